"""The host half of what happens to a sample: whatever `data.transforms` lists, per sample.

torchvision's v2 transforms or the user's own. What of them runs elsewhere is decided in `trainer.data.geometry`;
the device half is `trainer.data.augment`. Transforms that change targets as well are `trainer.data.joint`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode
from torchvision.transforms.v2 import functional as image_functional

from trainer.components import call, resolve
from trainer.config import read_section
from trainer.config_values import Component
from trainer.errors import BadSample, UserError, nearest, one_line_text

Item = Any

_KINDS: dict[str, type] = {name: getattr(tv_tensors, name) for name in ("Image", "Mask", "BoundingBoxes", "Video")}
_NAMED: dict[str, type[Enum]] = {"interpolation": InterpolationMode, "policy": AutoAugmentPolicy}


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
        if not self.transforms and type(item) is tuple and item and type(item[0]) is torch.Tensor:
            return item
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
            value = self._call(transform, value)
        if not isinstance(value, Image.Image):
            return value
        return self._to_tensor(value)

    @staticmethod
    def _call(transform: Callable[..., Any], *values: Any) -> Any:
        if not type(transform).__module__.startswith("torchvision."):
            return transform(*values)
        name = type(transform).__name__
        if isinstance(values[0], np.ndarray):
            raise UserError(f"{name} passes over numpy arrays; let the data set return tensors or PIL images")
        try:
            return transform(*values)
        except TypeError as error:
            hint = "; use data.normalize" if name == "Normalize" else ""
            raise UserError(f"{name} does not take what it is given: {one_line_text(error)}{hint}") from error
        except ValueError as error:  # such as a crop that is larger than this image
            raise BadSample(f"does not go through {name}: {one_line_text(error)}") from error

    def apply_to_pixels(self, pixels: NDArray[np.uint8]) -> Any:
        """Applies the transforms to decoded pixels (H, W, 1 or 3), which they get as a PIL image."""
        return self._apply(Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)))

    def _to_tensor(self, value: Image.Image) -> torch.Tensor:
        pixels = image_functional.pil_to_tensor(value)
        return pixels if self.as_bytes else image_functional.to_dtype(pixels, torch.float32, scale=True)


def build_transforms(components: Sequence[Component], path: str) -> list[Callable[[Any], Any]]:
    """Builds the transforms of a list.

    What YAML has not is written by name. For all: `dtype: float32`, and one value per kind of tensor, `fill: {Image: 0,
    Mask: 255}`. For torchvision's own: `interpolation: bicubic`, `policy: cifar10`, and `transforms`, a list like this
    one, of `RandomApply`, `RandomChoice`, `RandomOrder` and `Compose`.

    Raises:
        UserError: an unknown transform, or arguments that do not fit.
    """
    return [_build_transform(component, f"{path}.{i}") for i, component in enumerate(components)]


def check_pictures(transforms: Sequence[Callable[..., Any]], path: str) -> None:
    """Raises UserError where pictures would be normalised here, while they are bytes."""
    for i, transform in enumerate(transforms):
        name = type(transform).__name__
        if not type(transform).__module__.startswith("torchvision."):
            return  # it may make floats of them, as may those below
        if name in ("ToImage", "ToTensor", "PILToTensor", "ToDtype", "ConvertImageDtype", "Compose"):
            return
        if name == "Normalize":
            message = "pictures are normalised on the device: use data.normalize, with this mean and std"
            raise UserError(message, path=f"{path}.{i}")


def _build_transform(component: Component, path: str) -> Callable[[Any], Any]:
    args = {key: _by_kind(value, _dtype if key == "dtype" else _same) for key, value in component.args.items()}
    target = resolve("transform", component.name, path)
    if str(target.__module__).startswith("torchvision."):
        for key, kind in _NAMED.items():
            if key in args:
                args[key] = _named(kind, args[key], f"{path}.args.{key}")
        if "transforms" in args:
            args["transforms"] = _nested(args["transforms"], f"{path}.args.transforms")
    transform: Callable[[Any], Any] = call(target, args, component.name, path)
    return transform


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


def _named(kind: type[Enum], value: Any, path: str) -> Any:
    """Returns the member of an enum that has this value; any value that is no text as it is.

    Raises:
        UserError: there is none of that name.
    """
    if not isinstance(value, str):
        return value
    names = [member.value for member in kind]
    if value not in names:
        hint = nearest(value, names) or f"; there are: {', '.join(names)}"
        raise UserError(f"there is no '{value}'{hint}", path=path)
    return kind(value)


def _nested(entries: Any, path: str) -> list[Callable[[Any], Any]]:
    """Builds the transforms that are an argument of another.

    Raises:
        UserError: it is no list of them.
    """
    if not isinstance(entries, list | tuple) or not entries:
        raise UserError("must be a list of transforms, each with a name and args", path=path)
    components = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise UserError(f"must be a transform, with a name and args (got {entry!r})", path=f"{path}.{i}")
        try:
            components.append(read_section(Component, **entry))
        except UserError as error:
            problems = (replace(p, path=f"{path}.{i}.{p.path}") for p in error.problems)
            raise UserError(*problems) from None
    return build_transforms(components, path)
