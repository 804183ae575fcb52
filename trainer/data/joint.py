"""Transforms that change an input together with its target, as segmentation and detection need them.

torchvision's v2 transforms know what to do with each part of a sample by its type, one of `torchvision.tv_tensors`.
Owns giving parts these types before the transforms, and making plain tensors of them after. Which tasks want this,
their `transforms_targets` says; the transforms of inputs alone are `trainer.data.transforms`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision import datasets, tv_tensors
from torchvision.transforms.v2 import functional as image_functional

from trainer.data.coco import keys_of_all
from trainer.data.datasets import SizedDataset, is_image_data
from trainer.data.held_out import Part
from trainer.data.nested import part, with_part
from trainer.data.transforms import HostTransform
from trainer.errors import BadSample, UserError, one_line_text

# Those whose targets are dicts, of which `wrap_dataset_for_transforms_v2` keeps the keys that it is told.
_WITH_KEYS = (datasets.CocoDetection, datasets.VOCDetection)


class TypedSamples:
    """One of torchvision's data sets, its samples as torchvision's v2 transforms want them.

    Boxes are XYXY. A picture without any object has boxes (0, 4), masks (0, H, W) and empty values of all other keys.

    Args:
        dataset: the data set.
        target_keys: what to keep of targets that are dicts; None: boxes and labels, and the `image_id` of COCO. Those
            that some annotations of a COCO file lack and nothing needs, `iscrowd` and `area`, are left out.
    """

    def __init__(self, dataset: datasets.VisionDataset, target_keys: Sequence[str] | None) -> None:
        self.is_image_data = is_image_data(dataset)
        self._keys = tuple(target_keys or ("boxes", "labels")) if isinstance(dataset, _WITH_KEYS) else ()
        if isinstance(dataset, datasets.CocoDetection):
            self._keys = keys_of_all(dataset, self._keys)
        keys = self._keys if target_keys else None
        try:
            self._dataset: Any = datasets.wrap_dataset_for_transforms_v2(dataset, keys)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{type(dataset).__name__}: {one_line_text(error)}") from None

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self._dataset[index]
        if self._keys and set(sample[1]) <= {"image_id"}:  # all that torchvision says of a COCO picture without objects
            return sample[0], {**_no_objects(self._keys, image_functional.get_size(sample[0])), **sample[1]}
        return sample

    def source_name(self, index: int) -> str | None:
        """Returns where a sample comes from."""
        if isinstance(self._dataset, datasets.CocoDetection):
            found = self._dataset.coco.loadImgs(self._dataset.ids[index])[0]["file_name"]
            return str(found)
        images = getattr(self._dataset, "images", None)
        return str(images[index]) if isinstance(images, list) else None


def _no_objects(keys: Sequence[str], size: Sequence[int]) -> dict[str, torch.Tensor]:
    shaped = {"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, *size, dtype=torch.uint8)}
    return {key: shaped.get(key, torch.zeros(0, dtype=torch.int64)) for key in keys}


def with_typed_samples(dataset: SizedDataset, target_keys: Sequence[str] | None) -> SizedDataset:
    """Returns a data set that v2 transforms can change as a whole; one of the user's own is left as it is.

    Raises:
        UserError: torchvision has no such samples of this data set, or with these settings of it.
    """
    if type(dataset) is Part:
        return Part(with_typed_samples(dataset.dataset, target_keys), dataset.indices)
    # Where a subclass gives samples of its own, only it knows what they are.
    gives_items_of_torchvision = inspect.getmodule(type(dataset).__getitem__)
    is_torchvision = getattr(gives_items_of_torchvision, "__name__", "").startswith("torchvision.datasets.")
    if isinstance(dataset, datasets.VisionDataset) and is_torchvision:
        return TypedSamples(dataset, target_keys)
    return dataset


class JointTransform(HostTransform):
    """Applies transforms to (input, target) of an item, which is a pair or a dict with these keys.

    Transforms get both and return both: torchvision's v2 transforms, and the user's own. Before the first, images are
    PIL images or `tv_tensors.Image`, masks `Mask` and `boxes` `BoundingBoxes`, in XYXY unless they say otherwise. After
    the last all are plain tensors: PIL images (C, H, W) as `HostTransform` makes them, and the numbers of a target's
    dict.

    Args:
        transforms: in order.
        input_key: where the input is in samples that are dicts.
        target_key: where the target is in samples that are dicts.
        as_bytes: whether images are left as bytes, because the device half follows.
    """

    def __init__(
        self, transforms: Sequence[Callable[..., Any]], input_key: str, target_key: str, as_bytes: bool = True
    ) -> None:
        super().__init__(transforms, input_key, as_bytes)
        self.target_key = target_key

    def __call__(self, item: Any) -> Any:
        """Returns an item of the same structure; a pair as a list.

        Raises:
            BadSample: its target does not go with its input.
            UserError: the item has no target, or a transform does not return a pair.
        """
        try:
            given = part(item, self.input_key, 0), part(item, self.target_key, 1)
        except LookupError:
            message = f"samples must be (input, target) pairs, or have '{self.input_key}' and '{self.target_key}'"
            raise UserError(message) from None
        pair = _typed(*given)
        for transform in self.transforms:
            pair = self._call(transform, *pair)
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                name = getattr(transform, "__name__", type(transform).__name__)
                raise UserError(f"{name} must return (input, target), as it gets them", path="data.transforms")
        item = with_part(item, self.input_key, 0, self._to_plain(pair[0]))
        return with_part(item, self.target_key, 1, _plain_target(pair[1]))

    def _to_plain(self, value: Any) -> Any:
        if isinstance(value, Image.Image):
            return self._to_tensor(value)
        return _plain(value)


def check_joint_transforms(transforms: Sequence[Callable[..., Any]], path: str) -> None:
    """Raises UserError where one of them cannot be called with (input, target)."""
    for i, transform in enumerate(transforms):
        function = transform.forward if isinstance(transform, nn.Module) else transform
        try:
            inspect.signature(function).bind(None, None)
        except TypeError:
            name = getattr(transform, "__name__", type(transform).__name__)
            message = f"'{name}' must take (input, target) and return both: this task's targets change with the inputs"
            raise UserError(message, path=f"{path}.{i}") from None
        except ValueError:  # no signature is known; the call will tell
            continue


def _typed(image: Any, target: Any) -> tuple[Any, Any]:
    if type(image) is torch.Tensor and image.ndim == 3:
        image = tv_tensors.Image(image)
    is_image = isinstance(image, Image.Image | tv_tensors.Image)
    size = tuple(image_functional.get_size(image)) if is_image else None
    if isinstance(target, Mapping):
        return image, {key: _typed_value(key, value, size) for key, value in target.items()}
    mask = _as_mask(target)
    if mask is not None and size is not None and tuple(mask.shape[-2:]) != size:
        height, width = mask.shape[-2:]
        raise BadSample(f"has a mask of {width}x{height} pixels for an image of {size[1]}x{size[0]}")
    return image, target if mask is None else mask


def _typed_value(key: str, value: Any, size: tuple[int, ...] | None) -> Any:
    if isinstance(value, tv_tensors.TVTensor):
        return value
    if key == "boxes" and size is not None:
        boxes = torch.as_tensor(value, dtype=torch.float32).reshape(-1, 4)
        return tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
    if key == "masks":
        return tv_tensors.Mask(torch.as_tensor(value))
    return value


def _as_mask(target: Any) -> torch.Tensor | None:
    if isinstance(target, Image.Image):
        return tv_tensors.Mask(target)
    if isinstance(target, np.ndarray) and target.ndim >= 2 and target.dtype.kind in "iub":
        target = torch.from_numpy(target)
    if isinstance(target, tv_tensors.Mask) or type(target) is not torch.Tensor:
        return target if isinstance(target, tv_tensors.Mask) else None
    is_mask = target.ndim >= 2 and not target.is_floating_point()
    return tv_tensors.Mask(target) if is_mask else None


def _plain_target(target: Any) -> Any:
    if isinstance(target, Mapping):
        return {key: _plain_number(value) for key, value in target.items()}
    if isinstance(target, Image.Image):
        return image_functional.pil_to_tensor(target)
    return _plain(target)


def _plain_number(value: Any) -> Any:
    """Returns a tensor in place of a number or a list of such."""
    if isinstance(value, list | tuple) and all(isinstance(number, bool | int | float) for number in value):
        return torch.tensor(value, dtype=None if value else torch.int64)
    if isinstance(value, bool | int | float | np.generic | np.ndarray) and not isinstance(value, str):
        return torch.as_tensor(value)
    return _plain(value)


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, torch.Tensor) else value
