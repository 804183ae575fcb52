"""The device half of image handling, for whole batches: flip, mix, normalise, erase, and the precision of the step.

Every random number is drawn on the host, as a pure function of (seed, epoch, sample): `DeviceAugmentation.plan`.
The device only does what the plan says, with no generator, no waiting and no control flow that depends on data, so
a sample comes out bit for bit the same in any batch, at any position, on any rank, provided that its pair, the
samples at positions 2k and 2k + 1 of a batch, stays together. Owns the mixing of targets too; crops and resizes
are `trainer.data.geometry` and `trainer.data.device_crop`.

CPU and CUDA agree bit for bit. Compiled, they do as well where the compiler neither fuses products and sums nor
approximates division; on CUDA, Triton does both by default, which changes last bits of float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torchvision.transforms.v2 import functional as image_functional

from trainer.config_data import AugmentConfig, NormalizeConfig
from trainer.data.draws import Keys, Stream, uniforms
from trainer.errors import UserError

_SHARE_STEPS = 2**16  # shares are multiples of 1/65536: mixing bytes with them is exact in float32
_ERASE_AREA = (0.02, 0.33)  # of the image; this and the two below as torchvision's RandomErasing
_ERASE_RATIO = (0.3, 3.3)
_ERASE_ATTEMPTS = 10
_NORMAL_BITS = 16  # noise takes 65536 values, the quantiles of the normal distribution, -4.2 to 4.2
_HASH_MASK = 2**32 - 1
_HASH_FACTOR = 0x45D9F3B  # below 2^31: times 32 bits, it stays within int64


class AugmentationPlan(NamedTuple):
    """What to do with each of B images, in small tensors; None is a part that this run does not have.

    Boxes are int32 (B, 4): top, left, bottom, right in pixels; empty ones change nothing.
    """

    flip_horizontally: torch.Tensor | None = None  # bool (B,)
    flip_vertically: torch.Tensor | None = None  # bool (B,)
    mix_share: torch.Tensor | None = None  # float32 (B,): weight of the own pixels, against the partner's
    mix_boxes: torch.Tensor | None = None  # where all is the partner's
    target_share: torch.Tensor | None = None  # float32 (B,): weight of the own target
    erase_boxes: torch.Tensor | None = None
    noise_keys: torch.Tensor | None = None  # int64 (B,), 32 bits each: what the noise in `erase_boxes` depends on

    def to(self, device: torch.device, non_blocking: bool = False) -> AugmentationPlan:
        """Returns the plan on a device; without waiting where it is pinned and `non_blocking`."""
        return AugmentationPlan(*(None if t is None else t.to(device, non_blocking=non_blocking) for t in self))

    def pin_memory(self) -> AugmentationPlan:
        """Returns the plan in page-locked host memory, as DataLoader and copies that do not wait want it."""
        return AugmentationPlan(*(None if t is None else t.pin_memory() for t in self))


class DeviceAugmentation(nn.Module):
    """Images (B, C, H, W), uint8 or float in [0, 1] -> floats in the precision of the step, channels_last.

    In this order: flip, mix in pairs, scale to [0, 1], (x - mean) / std, erase, all in float32, then `dtype`.
    Parts that are off cost nothing. Plans and batches go with the module's device: move it with `.to`.

    Args:
        normalize: mean and std per channel; None only scales to [0, 1].
        augment: mixing and erasing; None, as for evaluation, does neither.
        horizontal_flip: probability.
        vertical_flip: probability.
        dtype: of the result: float32, bfloat16 or float16.

    Raises:
        UserError: a probability outside [0, 1].
    """

    mean: torch.Tensor
    std: torch.Tensor
    normal_quantiles: torch.Tensor

    def __init__(
        self,
        normalize: NormalizeConfig | None,
        augment: AugmentConfig | None = None,
        horizontal_flip: float = 0.0,
        vertical_flip: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for name, probability in (("horizontal", horizontal_flip), ("vertical", vertical_flip)):
            if not 0 <= probability <= 1:
                raise UserError(f"the probability of a {name} flip must be between 0 and 1 (got {probability})")
        augment = augment or AugmentConfig()
        self.num_channels = len(normalize.mean) if normalize else None
        self.augment = augment
        self.horizontal_flip = horizontal_flip
        self.vertical_flip = vertical_flip
        self.dtype = dtype
        self.mixes = augment.mixes
        cutmix_share = augment.cutmix_share if augment.mixup > 0 else 1.0
        self.cutmix_share = cutmix_share if augment.cutmix > 0 else 0.0  # of the changed pairs
        self._mixup_quantiles = SymmetricBeta(augment.mixup) if augment.mixup > 0 else None
        self._cutmix_quantiles = SymmetricBeta(augment.cutmix) if augment.cutmix > 0 else None
        if normalize is not None:
            self.register_buffer("mean", torch.tensor(normalize.mean).view(-1, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(normalize.std).view(-1, 1, 1), persistent=False)
        if augment.erase > 0 and augment.erase_with == "noise":
            self.register_buffer("normal_quantiles", _normal_quantiles(), persistent=False)

    @property
    def is_random(self) -> bool:
        """Whether batches need a plan: without one they are only normalised."""
        return self.horizontal_flip > 0 or self.vertical_flip > 0 or self.mixes or self.augment.erase > 0

    def plan(self, keys: Keys, image_shape: tuple[int, ...]) -> AugmentationPlan:
        """Draws a batch's random numbers, on the host.

        Args:
            keys: one per sample, in the order of the batch.
            image_shape: (..., height, width) of the images.

        Returns:
            CPU tensors; a pair's are functions of its first sample's key, all others of their own sample's.
        """
        height, width = image_shape[-2:]
        plan = AugmentationPlan()
        if self.horizontal_flip > 0 or self.vertical_flip > 0:
            draws = uniforms(keys, Stream.FLIP, 2)
            if self.horizontal_flip > 0:
                plan = plan._replace(flip_horizontally=torch.from_numpy(draws[:, 0] < self.horizontal_flip))
            if self.vertical_flip > 0:
                plan = plan._replace(flip_vertically=torch.from_numpy(draws[:, 1] < self.vertical_flip))
        if self.mixes:
            plan = self._plan_mixing(plan, keys, height, width)
        if self.augment.erase > 0:
            plan = self._plan_erasing(plan, keys, height, width)
        return plan

    def _plan_mixing(self, plan: AugmentationPlan, keys: Keys, height: int, width: int) -> AugmentationPlan:
        batch_size = len(keys)
        draws = uniforms(keys[: batch_size // 2 * 2 : 2], Stream.MIX, 5)
        is_changed = draws[:, 0] < self.augment.mix_probability
        is_cut = is_changed & (draws[:, 1] < self.cutmix_share)
        pixel_share = np.ones(len(draws))
        target_share = np.ones(len(draws))
        boxes = np.zeros((len(draws), 4), dtype=np.int64)
        if self._mixup_quantiles is not None:
            share = np.rint(self._mixup_quantiles(draws[:, 2]) * _SHARE_STEPS) / _SHARE_STEPS
            pixel_share = np.where(is_changed & ~is_cut, share, 1.0)
            target_share = pixel_share.copy()
        if self._cutmix_quantiles is not None:
            half_side = 0.5 * np.sqrt(1.0 - self._cutmix_quantiles(draws[:, 2]))  # as torchvision's CutMix
            for axis, size in enumerate((height, width)):
                centre, half = np.floor(draws[:, 3 + axis] * size), np.floor(half_side * size)
                boxes[:, axis] = np.where(is_cut, (centre - half).clip(0, size), 0)
                boxes[:, 2 + axis] = np.where(is_cut, (centre + half).clip(0, size), 0)
            areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            target_share = np.where(is_cut, 1.0 - areas / (height * width), target_share)
        return plan._replace(
            mix_share=_both_of_pairs(pixel_share, 1.0, batch_size).float(),
            mix_boxes=_both_of_pairs(boxes, 0, batch_size).int(),
            target_share=_both_of_pairs(target_share, 1.0, batch_size).float(),
        )

    def _plan_erasing(self, plan: AugmentationPlan, keys: Keys, height: int, width: int) -> AugmentationPlan:
        draws = uniforms(keys, Stream.ERASE, 3 + 2 * _ERASE_ATTEMPTS)
        attempts = draws[:, 3:].reshape(-1, _ERASE_ATTEMPTS, 2)
        area = height * width * (_ERASE_AREA[0] + (_ERASE_AREA[1] - _ERASE_AREA[0]) * attempts[..., 0])
        low, high = math.log(_ERASE_RATIO[0]), math.log(_ERASE_RATIO[1])
        ratio = np.exp(low + (high - low) * attempts[..., 1])
        heights, widths = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (heights < height) & (widths < width)
        chosen = fits.argmax(1)[:, None]  # the first that fits
        h, w = np.take_along_axis(heights, chosen, 1)[:, 0], np.take_along_axis(widths, chosen, 1)[:, 0]
        top, left = np.floor(draws[:, 1] * (height - h + 1)), np.floor(draws[:, 2] * (width - w + 1))
        is_erased = fits.any(1) & (draws[:, 0] < self.augment.erase)
        boxes = np.stack([top, left, top + h, left + w], axis=1) * is_erased[:, None]
        plan = plan._replace(erase_boxes=torch.from_numpy(boxes.astype(np.int32)))
        if self.augment.erase_with == "noise":
            noise_keys = uniforms(keys, Stream.ERASE_NOISE, 1)[:, 0] * 2.0**32
            plan = plan._replace(noise_keys=torch.from_numpy(noise_keys.astype(np.int64)))
        return plan

    def forward(self, images: torch.Tensor, plan: AugmentationPlan | None = None) -> torch.Tensor:
        """Returns (B, C, H, W) in `dtype` and channels_last memory; `images` are left as they are.

        Args:
            images: (B, C, H, W), uint8, or float in [0, 1]; fastest in channels_last memory.
            plan: of this batch, on the same device; only `is_random` modules need one.

        Raises:
            UserError: these are no images, or their channels are not those of `mean`.
        """
        if images.ndim != 4 or (self.num_channels is not None and images.shape[1] != self.num_channels):
            wanted = f"(batch, {self.num_channels or 'channels'}, height, width)"
            raise UserError(f"it takes images of shape {wanted}, not {list(images.shape)}", path="data.normalize")
        assert plan is not None or not self.is_random
        plan = AugmentationPlan() if plan is None else plan
        are_bytes = images.dtype == torch.uint8
        if not are_bytes:
            images = image_functional.to_dtype(images, torch.float32, scale=True)
        images = images.contiguous(memory_format=torch.channels_last)
        images = self._mix(self._flip(images, plan), plan)
        images = self._erase(self._normalize(images, are_bytes), plan)
        return images.to(self.dtype, memory_format=torch.channels_last)

    def _flip(self, images: torch.Tensor, plan: AugmentationPlan) -> torch.Tensor:
        if plan.flip_horizontally is not None:
            images = torch.where(_per_image(plan.flip_horizontally), images.flip(-1), images)
        if plan.flip_vertically is not None:
            images = torch.where(_per_image(plan.flip_vertically), images.flip(-2), images)
        return images

    def _mix(self, images: torch.Tensor, plan: AugmentationPlan) -> torch.Tensor:
        """Returns uint8 as it came, or float32 in the range of the images."""
        if not self.mixes:
            return images
        assert plan.mix_share is not None
        assert plan.mix_boxes is not None
        partners = _partners(images)
        if self.cutmix_share == 1:
            return torch.where(_inside(plan.mix_boxes, images), partners, images)
        share = _per_image(plan.mix_share)
        if self.cutmix_share > 0:
            share = torch.where(_inside(plan.mix_boxes, images), 0.0, share)
        return (images * share).add_(partners * (1.0 - share))

    def _normalize(self, images: torch.Tensor, are_bytes: bool) -> torch.Tensor:
        """Scales bytes, mixed or not, and normalises, in the operations of torchvision's v2 transforms."""
        pixels = images.to(torch.float32)
        if are_bytes:
            pixels.mul_(1.0 / 255)  # never the caller's: the conversion or the mixing made a new tensor
        if self.num_channels is None:
            return pixels
        return pixels.sub(self.mean).div_(self.std)

    def _erase(self, images: torch.Tensor, plan: AugmentationPlan) -> torch.Tensor:
        if plan.erase_boxes is None:
            return images
        is_erased = _inside(plan.erase_boxes, images)
        if plan.noise_keys is None:
            return images.masked_fill(is_erased, 0.0)
        return torch.where(is_erased, self._noise(plan.noise_keys, images), images)

    def _noise(self, keys: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Returns normal noise like `images`: a table's entry for the hash of each (key, pixel, channel)."""
        _, channels, height, width = images.shape
        places = torch.arange(height * width * channels, device=images.device).view(1, height, width, channels)
        bits = _hash(_hash(places.permute(0, 3, 1, 2)) ^ _per_image(keys))
        return self.normal_quantiles[bits >> (32 - _NORMAL_BITS)]


def mix_targets(targets: torch.Tensor, plan: AugmentationPlan, num_classes: int) -> torch.Tensor:
    """Mixes a batch's targets as its images were mixed.

    Args:
        targets: integer labels (B,), or class probabilities (B, num_classes); a label that is none of the classes,
            such as an ignored one, has no probability at all.
        plan: of this batch, on the same device, by an augmentation that mixes.
        num_classes: number of labels.

    Returns:
        Class probabilities, float32 (B, num_classes).

    Raises:
        UserError: targets of another shape.
    """
    assert plan.target_share is not None
    if targets.ndim == 1 and not targets.is_floating_point():
        probabilities = class_probabilities(targets, num_classes)
    elif targets.ndim == 2 and targets.shape[1] == num_classes:
        probabilities = targets.float()
    else:
        shape = f"{targets.dtype} {list(targets.shape)}".removeprefix("torch.")
        message = f"mixing needs labels (batch,) or probabilities (batch, {num_classes}), not {shape}"
        raise UserError(message, path="data.augment")
    share = plan.target_share[:, None]
    return (probabilities * share).add_(_partners(probabilities) * (1.0 - share))


def class_probabilities(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Returns float32 (B, num_classes) for integer labels (B,): 1 for the label, and nothing where it is no class."""
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()


class SymmetricBeta:
    """Quantiles of Beta(concentration, concentration), to better than 1e-6, for any concentration above 0.

    Tabulated over the logarithm of the odds z = log(x / (1 - x)), whose density (x (1 - x))^concentration has no
    edges and falls exponentially on both sides, also where that of x is infinite at 0 and 1.
    """

    def __init__(self, concentration: float, size: int = 2**16) -> None:
        assert concentration > 0
        reach = 36.0 / concentration + 12.0 * math.sqrt(2.0 / concentration)  # what lies beyond has less than 2^-51
        log_odds = np.linspace(-reach, reach, size + 1)
        density = np.exp(-concentration * (np.abs(log_odds) + 2.0 * np.log1p(np.exp(-np.abs(log_odds)))))
        density /= density.sum()
        cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
        self._log_odds = log_odds
        self._cumulative = cumulative / cumulative[-1]

    def __call__(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the quantiles of probabilities in [0, 1]: beta-distributed where these are uniform."""
        log_odds = np.interp(probabilities, self._cumulative, self._log_odds)
        odds = np.exp(-np.abs(log_odds))  # of the less likely side
        return np.where(log_odds < 0, odds, 1.0) / (1.0 + odds)


def _normal_quantiles() -> torch.Tensor:
    middles = (torch.arange(2**_NORMAL_BITS, dtype=torch.float64) + 0.5) / 2**_NORMAL_BITS
    return torch.special.ndtri(middles).float()


def _hash(values: torch.Tensor) -> torch.Tensor:
    """Permutes int64 values below 2^32 so that every bit depends on every bit, without overflow."""
    for _ in range(2):
        values = ((values ^ (values >> 16)) * _HASH_FACTOR) & _HASH_MASK
    return values ^ (values >> 16)


def _both_of_pairs(of_pairs: NDArray[np.generic], of_single: float, batch_size: int) -> torch.Tensor:
    """Returns (B, ...): each pair's values for both, and `of_single` for the last of an odd batch."""
    values = np.full((batch_size, *of_pairs.shape[1:]), of_single, dtype=of_pairs.dtype)
    values[: 2 * len(of_pairs)] = np.repeat(of_pairs, 2, axis=0)
    return torch.from_numpy(values)


def _partners(batch: torch.Tensor) -> torch.Tensor:
    """Returns the batch with the two of each pair swapped; the last of an odd batch stays."""
    positions = torch.arange(len(batch), device=batch.device) ^ 1
    return batch[positions.clamp(max=len(batch) - 1)]


def _per_image(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def _inside(boxes: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Returns bool (B, 1, H, W): which pixels are in the boxes (top, left, bottom, right)."""
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    in_rows = (rows >= top) & (rows < bottom)
    in_columns = (columns >= left) & (columns < right)
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]
