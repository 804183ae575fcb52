"""Crops and resizes as boxes: which part of a picture becomes which output, before a pixel is decoded.

torchvision's RandomResizedCrop, Resize and CenterCrop at the start of a transforms list need no picture to decide
what they keep, only its size. Owns their arithmetic, for whole batches; reading the pixels of a box is
`trainer.data.decode` on the host and `trainer.data.device_crop` on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torchvision.transforms import InterpolationMode, v2

from trainer.data.draws import Keys, Stream, uniforms
from trainer.errors import UserError

Sizes = NDArray[np.int64]  # (B, 2): height and width

_ATTEMPTS = 10  # as torchvision's RandomResizedCrop; then the largest central box


class Crops(NamedTuple):
    """What to keep of each picture of a batch, and the size that it gets."""

    boxes: NDArray[np.float64]  # (B, 4): top, left, height, width in source pixels; may reach outside (zeros)
    sizes: Sizes  # (B, 2): height and width of the output


@dataclass(frozen=True)
class RandomResizedCrop:
    """torchvision's: a box of random area and ratio, resized."""

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]

    def __call__(self, sizes: Sizes, keys: Keys) -> Crops:
        height, width = sizes[:, :1], sizes[:, 1:]
        draws = uniforms(keys, Stream.CROP, 4 * _ATTEMPTS).reshape(-1, _ATTEMPTS, 4)
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * draws[..., 0])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = np.exp(low + (high - low) * draws[..., 1])
        w = np.rint(np.sqrt(area * ratio))
        h = np.rint(np.sqrt(area / ratio))
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        chosen = fits.argmax(1)[:, None]  # the first that fits
        w, h = np.take_along_axis(w, chosen, 1), np.take_along_axis(h, chosen, 1)
        top = np.floor(np.take_along_axis(draws[..., 2], chosen, 1) * (height - h + 1))
        left = np.floor(np.take_along_axis(draws[..., 3], chosen, 1) * (width - w + 1))
        boxes = np.concatenate([top, left, h, w], axis=1)
        none = ~fits.any(1)
        if none.any():
            boxes[none] = self._central(sizes[none])
        return Crops(boxes, np.broadcast_to(np.array(self.size), sizes.shape))

    def _central(self, sizes: Sizes) -> NDArray[np.float64]:
        height, width = sizes[:, 0].astype(float), sizes[:, 1].astype(float)
        w = np.where(width / height > self.ratio[1], np.rint(height * self.ratio[1]), width)
        h = np.where(width / height < self.ratio[0], np.rint(width / self.ratio[0]), height)
        return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's, with zeros around: a box of fixed size at a random place."""

    size: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, right, top, bottom

    def __call__(self, sizes: Sizes, keys: Keys) -> Crops:
        left, right, top, bottom = self.padding
        room = sizes + np.array([top + bottom, left + right]) - np.array(self.size)
        if (room < 0).any():
            small = sizes[(room < 0).any(1)][0]
            raise UserError(f"a crop of {list(self.size)} is larger than a picture of {small.tolist()} and its padding")
        corner = np.floor(uniforms(keys, Stream.CROP, 2) * (room + 1)) - np.array([top, left])
        size = np.broadcast_to(np.array(self.size), sizes.shape)
        return Crops(np.concatenate([corner, size], axis=1).astype(float), size)


@dataclass(frozen=True)
class ResizeAndCenterCrop:
    """torchvision's Resize, CenterCrop, or the one after the other, in one resampling.

    `resize` is (height, width), or one number for the shorter side.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None

    def __call__(self, sizes: Sizes, keys: Keys) -> Crops:
        resized = self._resized(sizes)
        if self.crop is None:
            return Crops(np.concatenate([np.zeros_like(sizes), sizes], axis=1).astype(float), resized)
        size = np.broadcast_to(np.array(self.crop), sizes.shape)
        room = resized - size
        corner = np.where(
            room < 0, -(-room // 2), np.rint(room / 2.0)
        )  # torchvision rounds padding down, crops to even
        pixels = sizes / resized  # source pixels per resized pixel
        return Crops(np.concatenate([corner * pixels, size * pixels], axis=1), size)

    def _resized(self, sizes: Sizes) -> Sizes:
        if self.resize is None:
            return sizes
        if not isinstance(self.resize, int):
            return np.broadcast_to(np.array(self.resize), sizes.shape)
        short, long = sizes.min(1), sizes.max(1)
        long = (self.resize * long / short).astype(np.int64)
        is_tall = (sizes[:, 0] >= sizes[:, 1])[:, None]
        both = np.stack([np.full_like(long, self.resize), long], axis=1)
        return np.where(is_tall, both[:, ::-1], both)


Geometry = Callable[[Sizes, Keys], Crops]


def whole_pictures(sizes: Sizes, keys: Keys) -> Crops:
    """The geometry of no transform at all."""
    return Crops(np.concatenate([np.zeros_like(sizes), sizes], axis=1).astype(float), sizes)


@dataclass(frozen=True)
class SplitTransforms:
    """A list of transforms, taken apart by where each runs cheapest."""

    geometry: Geometry | None  # from the start of the list: decides what is decoded
    geometric: tuple[Callable[[Any], Any], ...]  # the transforms that it stands for
    rest: tuple[Callable[[Any], Any], ...]  # run on the host on what the geometry left
    horizontal_flip: float  # probabilities of flips from the end of the list: run on the device
    vertical_flip: float


def split_transforms(transforms: Sequence[Callable[[Any], Any]], *, pads: bool = False) -> SplitTransforms:
    """Takes torchvision transforms apart into geometry, host transforms and flips.

    Args:
        transforms: in the order of the config.
        pads: whether crops may reach outside of the picture, where zeros are: for pictures that are pixels already.
    """
    rest = list(transforms)
    flips = {"horizontal": 0.0, "vertical": 0.0}
    while rest and type(rest[-1]) in (v2.RandomHorizontalFlip, v2.RandomVerticalFlip):
        name = "horizontal" if isinstance(rest[-1], v2.RandomHorizontalFlip) else "vertical"
        if flips[name]:
            break  # two of a kind: left to torchvision
        flips[name] = float(rest.pop().p)  # type: ignore[attr-defined]
    geometry: Geometry | None = None
    start = tuple(rest)
    if rest and type(rest[0]) is v2.RandomResizedCrop and _is_bilinear(rest[0]):
        t: Any = rest.pop(0)
        geometry = RandomResizedCrop(_pair(t.size), tuple(t.scale), tuple(t.ratio))
    elif rest and type(rest[0]) is v2.RandomCrop and pads and _pads_with_zeros(rest[0]):
        t = rest.pop(0)
        geometry = RandomCrop((t.size[0], t.size[1]), tuple(t.padding or (0, 0, 0, 0)))
    else:
        geometry = _resize_and_center_crop(rest, pads)
    geometric = start[: len(start) - len(rest)]
    return SplitTransforms(geometry, geometric, tuple(rest), flips["horizontal"], flips["vertical"])


def _resize_and_center_crop(rest: list[Any], pads: bool) -> Geometry | None:
    """Takes Resize, then CenterCrop, off the start of `rest`."""
    resize: int | tuple[int, int] | None = None
    if rest and type(rest[0]) is v2.Resize and _is_bilinear(rest[0]) and rest[0].max_size is None and rest[0].size:
        size = rest.pop(0).size
        resize = int(size[0]) if len(size) == 1 else (int(size[0]), int(size[1]))
    crop: tuple[int, int] | None = None
    may_pad = pads and resize is None
    if rest and type(rest[0]) is v2.CenterCrop and (may_pad or _inside(_pair(rest[0].size), resize)):
        crop = _pair(rest.pop(0).size)
    return ResizeAndCenterCrop(resize, crop) if resize or crop else None


def _inside(crop: tuple[int, int], resize: int | tuple[int, int] | None) -> bool:
    """Tells whether a crop after a resize always lies inside of the picture."""
    if resize is None:
        return False
    height, width = (resize, resize) if isinstance(resize, int) else resize
    return crop[0] <= height and crop[1] <= width


def _is_bilinear(transform: Any) -> bool:
    name = getattr(transform.interpolation, "value", transform.interpolation)  # torchvision keeps the name or the enum
    return name == InterpolationMode.BILINEAR.value and transform.antialias is not False


def _pads_with_zeros(transform: Any) -> bool:
    return not transform.pad_if_needed and transform.padding_mode == "constant" and not _nonzero(transform.fill)


def _nonzero(fill: Any) -> bool:
    values = fill.values() if isinstance(fill, dict) else [fill]
    return any(np.any(np.asarray(v if v is not None else 0) != 0) for v in values)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[-1]))
