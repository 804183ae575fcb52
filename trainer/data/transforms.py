"""The host half of what happens to a sample: whatever `data.transforms` lists, per sample.

torchvision's v2 transforms or the user's own. What of them runs elsewhere is decided in `trainer.data.geometry`;
the device half is `trainer.data.augment`. Transforms that change targets as well are `trainer.data.joint`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as image_functional

from trainer.components import build
from trainer.config import Component
from trainer.errors import UserError

Item = Any

_KINDS: dict[str, type] = {name: getattr(tv_tensors, name) for name in ("Image", "Mask", "BoundingBoxes", "Video")}


class HostTransform:
    """Applies transforms to the input of an item: the first of a pair, or `input_key` of a dict.

    PIL images that are left at the end become tensors (C, H, W): bytes where the device half follows, which makes
    them floats, and else float32 in [0, 1].
    """

    def __init__(self, transforms: Sequence[Callable[..., Any]], input_key: str, as_bytes: bool = True) -> None:
        self.transforms = tuple(transforms)
        self.input_key = input_key
        self.as_bytes = as_bytes

    def __call__(self, item: Item) -> Item:
        if isinstance(item, Mapping):
            if self.input_key not in item:
                return item
            return {**item, self.input_key: self._apply(item[self.input_key])}
        if isinstance(item, tuple) and hasattr(item, "_replace"):
            return type(item)(self._apply(item[0]), *item[1:])
        if isinstance(item, list | tuple) and len(item) > 0:
            return (self._apply(item[0]), *item[1:])
        return self._apply(item)

    def _apply(self, value: Any) -> Any:
        for transform in self.transforms:
            self._check(transform, value)
            value = transform(value)
        if not isinstance(value, Image.Image):
            return value
        return self._to_tensor(value)

    @staticmethod
    def _check(transform: Callable[..., Any], value: Any) -> None:
        if isinstance(value, np.ndarray) and type(transform).__module__.startswith("torchvision."):
            name = type(transform).__name__
            raise UserError(f"{name} passes over numpy arrays; let the data set return tensors or PIL images")

    def apply_to_pixels(self, pixels: NDArray[np.uint8]) -> Any:
        """Applies the transforms to decoded pixels (H, W, 1 or 3), which they get as a PIL image."""
        return self._apply(Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)))

    def _to_tensor(self, value: Image.Image) -> torch.Tensor:
        pixels = image_functional.pil_to_tensor(value)
        return pixels if self.as_bytes else image_functional.to_dtype(pixels, torch.float32, scale=True)


def build_transforms(components: Sequence[Component], path: str) -> list[Callable[[Any], Any]]:
    """Builds the transforms of a list.

    Types in `args` may be written by name: `dtype: float32`, and one value per kind of tensor, `fill: {Image: 0, Mask:
    255}`, for torchvision's transforms.

    Raises:
        UserError: an unknown transform, or arguments that do not fit.
    """
    transforms = []
    for i, component in enumerate(components):
        args = {k: _by_kind(v, _dtype if k == "dtype" else _same) for k, v in component.args.items()}
        resolved = Component(name=component.name, args=args)
        transforms.append(build("transform", resolved, f"{path}.{i}"))
    return transforms


def _by_kind(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Converts a value, or each of a dict by kind of tensor, whose keys become torchvision's classes."""
    if not isinstance(value, Mapping) or not set(value) <= {*_KINDS, "others"}:
        return convert(value)
    return {_KINDS.get(kind, kind): convert(of_kind) for kind, of_kind in value.items()}


def _same(value: Any) -> Any:
    return value


def _dtype(value: Any) -> Any:
    named = getattr(torch, value, None) if isinstance(value, str) else None
    return named if isinstance(named, torch.dtype) else value
