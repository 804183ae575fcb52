"""The two halves of what happens to an image: on the host per sample, on the device per batch.

The host half is whatever `data.transforms` lists, torchvision's v2 transforms or the user's own. The device
half turns shipped bytes into normalised floats. A data set by import path that asks for neither reaches the
model untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as image_functional

from trainer.components import build
from trainer.config import Component, NormalizeConfig
from trainer.errors import UserError

Item = Any


class HostTransform:
    """Applies transforms to the input of an item: the first of a pair, or `input_key` of a dict.

    PIL images that are left at the end become tensors (C, H, W): bytes where the device half follows, which makes
    them floats, and else float32 in [0, 1].
    """

    def __init__(self, transforms: Sequence[Callable[[Any], Any]], input_key: str, as_bytes: bool = True) -> None:
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
            if isinstance(value, np.ndarray) and type(transform).__module__.startswith("torchvision."):
                name = type(transform).__name__
                raise UserError(f"{name} passes over numpy arrays; let the data set return tensors or PIL images")
            value = transform(value)
        if not isinstance(value, Image.Image):
            return value
        pixels = image_functional.pil_to_tensor(value)
        return pixels if self.as_bytes else image_functional.to_dtype(pixels, torch.float32, scale=True)


def build_host_transform(components: Sequence[Component], path: str, input_key: str, as_bytes: bool) -> HostTransform:
    """Builds the host half; `dtype: float32` and the like in `args` may be written by name.

    Raises:
        UserError: an unknown transform, or arguments that do not fit.
    """
    transforms = []
    for i, component in enumerate(components):
        args = {k: _dtype(v) if k == "dtype" else v for k, v in component.args.items()}
        resolved = Component(name=component.name, args=args)
        transforms.append(build("transform", resolved, f"{path}.{i}"))
    return HostTransform(transforms, input_key, as_bytes)


def _dtype(value: Any) -> Any:
    named = getattr(torch, value, None) if isinstance(value, str) else None
    return named if isinstance(named, torch.dtype) else value


class Normalize(nn.Module):
    """The device half: images (B, C, H, W) as uint8 or float in [0, 1] -> float32 (x - mean) / std."""

    def __init__(self, config: NormalizeConfig | None) -> None:
        super().__init__()
        self.num_channels = len(config.mean) if config else None
        self.normalize = v2.Normalize(list(config.mean), list(config.std)) if config else nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Raises UserError where these are no images, or their channels are not those of `mean`."""
        if images.ndim != 4 or (self.num_channels is not None and images.shape[1] != self.num_channels):
            wanted = f"(batch, {self.num_channels or 'channels'}, height, width)"
            raise UserError(f"it takes images of shape {wanted}, not {list(images.shape)}", path="data.normalize")
        return self.normalize(image_functional.to_dtype(images, torch.float32, scale=True))
