"""Crop and antialiased bilinear resize of batches of images, on their device, with the same bits everywhere.

Two batched matrix products, columns and then rows, as PIL's `resize(size, BILINEAR, box=box)` does it: the triangle
filter widens with the reduction, and bytes are rounded (half up) between the passes. The weights of an output pixel
are multiples of 1/2048 that sum to exactly 1, and pixels are integers up to 255. So every product and every partial
sum is a multiple of 1/2048 below 256, which float32 holds exactly: the result depends on nothing but the image and
its box, not on the batch, the order of summation, the kernel or the device, and not on TF32, which keeps the 11
significant bits that weights and pixels have at most.

On the photos of scikit-learn, the mean difference from PIL is below 0.05 of 255 and the largest is 2. On a CPU this
is slower than PIL: the products are dense, which is what GPUs are fast with.

Do not compile this: fused products and sums in the weights' float64 arithmetic would change bits. Which boxes to
crop is `trainer.data.geometry`; flips are `trainer.data.augment`; decoding on the host is `trainer.data.decode`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

Boxes = NDArray[np.float64]  # (B, 4): top, left, height, width in source pixels, in host memory

_WEIGHT_STEPS = 2048.0  # 11 bits: what float16 and TF32 hold
_FILTER_STEPS = 2.0**20  # resolution of the filter before its weights are made to sum to 1
_ALIGNMENT = 8  # matrix sizes that tensor cores are fast with
_ROUNDING = 1e-6  # boxes that stick out of the image by less were meant to touch its edge


@dataclass(frozen=True)
class _Axis:
    """Rows or columns of a batch: what is kept of them, and which pixels the filter can reach; all on the host."""

    start: NDArray[np.float64]  # (B,): of the box
    extent: NDArray[np.float64]  # (B,): of the box
    low: NDArray[np.float64]  # (B,): first and, exclusively, last pixel that the filter may use: the image's, or
    high: NDArray[np.float64]  # the box's where that reaches outside
    first: NDArray[np.int64]  # (B,): first and, exclusively, last pixel that the box can need
    last: NDArray[np.int64]
    num_outputs: int

    @classmethod
    def of(cls, start: NDArray[np.float64], extent: NDArray[np.float64], sizes: NDArray[np.int64], out: int) -> _Axis:
        end = start + extent
        low = np.minimum(np.floor(start + _ROUNDING), 0)
        high = np.maximum(np.ceil(end - _ROUNDING), sizes)
        reach = np.maximum(extent / out, 1.0) + 1
        first, last = np.maximum(np.floor(start - reach), low), np.minimum(np.ceil(end + reach), high)
        return cls(start, extent, low, high, first.astype(np.int64), last.astype(np.int64), out)

    def select(self, which: NDArray[np.int64]) -> _Axis:
        """Returns the axis of some images, in this order."""
        names = ("start", "extent", "low", "high", "first", "last")
        return replace(self, **{name: getattr(self, name)[which] for name in names})

    def with_common_window(self) -> _Axis:
        """Returns the axis with the same window for all, with what any of them needs."""
        first, last = self.first.min(), self.last.max()
        return replace(self, first=np.full_like(self.first, first), last=np.full_like(self.last, last))

    @property
    def width(self) -> int:
        """Pixels in memory for each image's window."""
        return -(-int((self.last - self.first).max()) // _ALIGNMENT) * _ALIGNMENT

    @property
    def max_taps(self) -> int:
        """The most pixels of the window that an output pixel is made of."""
        scale = max(float(self.extent.max()) / self.num_outputs, 1.0)
        return min(math.ceil(2.0 * scale) + 1, self.width)

    def weights(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Returns (B, num_outputs, width): how much of each pixel of the window is in each output pixel.

        Sums that decide about bits are sums of integers, exact in any order; all else is one operation at a time.
        """
        width = self.width
        scales = self.extent / self.num_outputs
        filter_scales = np.maximum(scales, 1.0)
        num_taps = self.max_taps
        host = np.stack([self.start, scales, filter_scales, self.low, self.high, self.first.astype(np.float64)])
        start, scale, filter_scale, low, high, origin = _upload(torch.from_numpy(host), device)[:, :, None].unbind()

        centers = (torch.arange(self.num_outputs, dtype=torch.float64, device=device) + 0.5) * scale + start
        first = torch.maximum((centers - filter_scale + 0.5).floor(), low)
        last = torch.minimum((centers + filter_scale + 0.5).floor(), high)
        # In the window: further to the left where the taps would not fit, which have no weight left of `first`.
        columns = (first - origin).clamp(max=width - num_taps)[:, :, None] + torch.arange(num_taps, device=device)
        pixels = columns + origin[:, :, None]
        heights = 1.0 - ((pixels - centers[:, :, None] + 0.5) / filter_scale[:, :, None]).abs()
        is_used = (pixels >= first[:, :, None]) & (pixels < last[:, :, None])
        heights = torch.where(is_used, (heights.clamp(min=0.0) * _FILTER_STEPS).floor(), 0.0)
        cumulative = heights.cumsum(-1)
        # Rounding the running sum rather than each weight keeps every weight within 1/2048 and their sum at 1.
        steps = (cumulative * _WEIGHT_STEPS / cumulative[:, :, -1:] + 0.5).floor()
        weights = steps.diff(dim=-1, prepend=torch.zeros_like(steps[:, :, :1])) / _WEIGHT_STEPS
        matrix = torch.zeros(*first.shape, width, dtype=dtype, device=device)
        return matrix.scatter_(2, columns.long(), weights.to(dtype))


@torch.no_grad()
def crop_resize(
    images: torch.Tensor | Sequence[torch.Tensor],
    boxes: Boxes,
    size: tuple[int, int],
    workspace_bytes: int = 2**28,
) -> torch.Tensor:
    """Crops a box of each image and resizes it. Never waits for the device.

    A box may have fractions, and may reach outside the image, which has zeros there. Where every box has the size
    of the output and whole corners, pixels are only copied.

    Args:
        images: uint8 (B, H, W, C), or B of (H, W, C) in different sizes, on one device. A view of (B, C, H, W) does
            as well. A list costs one launch per image more than a tensor.
        boxes: of the images, with positive height and width.
        size: (height, width) of the output.
        workspace_bytes: how much memory to use besides the output; an image that needs more still gets it. Images
            are taken together in the order of their size, as many as fit. A 375 x 500 photo resized to 224 x 224
            needs about 4 MB on CUDA.

    Returns:
        uint8 (B, C, height, width) in channels_last memory.
    """
    assert len(images) == len(boxes)
    assert (boxes[:, 2:] > 0).all()
    corners = np.floor(boxes[:, :2])
    if (boxes[:, 2:] == size).all() and (boxes[:, :2] == corners).all():
        return _copy_boxes(images, corners.astype(np.int64), size).permute(0, 3, 1, 2)
    device, channels = images[0].device, images[0].shape[-1]
    some = images[:1] if isinstance(images, torch.Tensor) else images  # of a tensor, all have the size of the first
    heights, widths = np.array([image.shape[:2] for image in some]).T
    rows = _Axis.of(boxes[:, 0], boxes[:, 2], heights, size[0])
    columns = _Axis.of(boxes[:, 1], boxes[:, 3], widths, size[1])
    order = np.arange(len(boxes))
    if isinstance(images, torch.Tensor):
        rows, columns = rows.with_common_window(), columns.with_common_window()
    else:
        order = np.argsort(-(rows.last - rows.first) * (columns.last - columns.first), kind="stable")
    # CUDA sums float16 products in float32; elsewhere float64, which no setting makes less precise.
    dtype = torch.float16 if device.type == "cuda" else torch.float64
    output = torch.empty(len(boxes), *size, channels, dtype=torch.uint8, device=device)
    done = 0
    while done < len(order):
        count = _num_images(rows.select(order[done:]), columns.select(order[done:]), channels, dtype, workspace_bytes)
        which = order[done : done + count]
        _resample(images, which, rows.select(which), columns.select(which), dtype, output[done : done + count])
        done += count
    if not isinstance(images, torch.Tensor):
        output = output[_upload(torch.from_numpy(np.argsort(order)), device)]
    return output.permute(0, 3, 1, 2)


def _num_images(rows: _Axis, columns: _Axis, channels: int, dtype: torch.dtype, workspace_bytes: int) -> int:
    """Returns how many of these images to take at once, if all were as large as the largest."""
    height, width, size = rows.width, columns.width, dtype.itemsize
    sums = 4 if dtype == torch.float16 else size
    pixels = height * width * channels * size + height * columns.num_outputs * channels * (sums + 1 + size)
    pixels += rows.num_outputs * columns.num_outputs * channels * (sums + 1)
    weights = sum(axis.num_outputs * (axis.width * size + axis.max_taps * 64) for axis in (rows, columns))
    return max(1, min(len(rows.start), workspace_bytes // (pixels + weights)))


def _resample(
    images: torch.Tensor | Sequence[torch.Tensor],
    which: NDArray[np.int64],
    rows: _Axis,
    columns: _Axis,
    dtype: torch.dtype,
    output: torch.Tensor,
) -> None:
    """Writes the boxes of some images (their rows and columns are given) to `output`, uint8 (B, oh, ow, C)."""
    count, out_height, out_width, channels = output.shape
    pixels = torch.zeros(count, rows.width, channels, columns.width, dtype=dtype, device=output.device)
    if isinstance(images, torch.Tensor):
        some = images[int(which[0]) : int(which[-1]) + 1]
        source, target = _overlap(rows, columns, 0, images.shape[1], images.shape[2])
        pixels[:, target[0], :, target[1]].copy_(some[:, source[0], source[1]].permute(0, 1, 3, 2))
    else:
        for i, image in enumerate(images[k] for k in which):
            source, target = _overlap(rows, columns, i, image.shape[0], image.shape[1])
            pixels[i, target[0], :, target[1]].copy_(image[source].permute(0, 2, 1))
    with torch.autocast(output.device.type, enabled=False):
        column_weights = columns.weights(output.device, dtype)
        sums = _product(pixels.view(count, -1, columns.width), column_weights.transpose(1, 2))
        del pixels
        narrowed = sums.add_(0.5).to(torch.uint8).to(dtype)  # the conversion cuts off the fraction
        sums = _product(rows.weights(output.device, dtype), narrowed.view(count, rows.width, channels * out_width))
    output.copy_(sums.add_(0.5).view(count, out_height, channels, out_width).permute(0, 1, 3, 2))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.bmm(a, b, out_dtype=torch.float32) if a.dtype == torch.float16 else torch.bmm(a, b)


def _overlap(
    rows: _Axis, columns: _Axis, i: int, height: int, width: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Returns where image `i` meets its window: (rows, columns) of the image, and those of the window."""
    source, target = [], []
    for axis, size in ((rows, height), (columns, width)):
        first, start, stop = int(axis.first[i]), max(int(axis.first[i]), 0), min(int(axis.last[i]), size)
        stop = max(start, stop)  # a box beside the image
        source.append(slice(start, stop))
        target.append(slice(start - first, stop - first))
    return (source[0], source[1]), (target[0], target[1])


def _copy_boxes(
    images: torch.Tensor | Sequence[torch.Tensor], corners: NDArray[np.int64], size: tuple[int, int]
) -> torch.Tensor:
    """Returns (B, height, width, C): boxes of the output's size, with zeros outside the images."""
    if isinstance(images, torch.Tensor):
        batch, height, width, _ = images.shape
        top, left = _upload(torch.from_numpy(corners), images.device)[:, :, None].unbind(1)
        rows = top + torch.arange(size[0], device=images.device)
        columns = left + torch.arange(size[1], device=images.device)
        samples = torch.arange(batch, device=images.device)[:, None, None]
        pixels = images[samples, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
        is_row, is_column = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
        return pixels * (is_row[:, :, None, None] & is_column[:, None, :, None])
    output = torch.zeros(len(images), *size, images[0].shape[-1], dtype=torch.uint8, device=images[0].device)
    for image, (top, left), target in zip(images, corners.tolist(), output, strict=True):
        height, width = image.shape[:2]
        window = image[max(top, 0) : max(top + size[0], 0), max(left, 0) : max(left + size[1], 0)]
        target = target[max(-top, 0) :, max(-left, 0) :]
        target[: window.shape[0], : window.shape[1]].copy_(window)
    return output


def _upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies small host values without waiting: from pinned memory, which lives until the copy is done."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
