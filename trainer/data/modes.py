"""`data.feed`: chooses where a data set's pictures are decoded and kept.

Owns the choice and its reasons; `trainer.data.feed` goes the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from trainer.config_data import DataConfig
from trainer.data.arrays import ArrayPictures, as_array_pictures
from trainer.data.datasets import SizedDataset, gives_encoded, is_image_data
from trainer.data.decode import codec, decodes_on_gpu
from trainer.data.geometry import Geometry, split_transforms, whole_pictures
from trainer.data.resident import estimate_bytes
from trainer.errors import UserError

_AUTO_SHARE = 0.2  # of the device's memory that `auto` gives to a resident data set; the model needs the rest
_MOST_SHARE = 0.8  # of it that a data set may take where the user asks for it


class SampleMeaning(Protocol):
    """What the way of a data set depends on; a task knows it."""

    transforms_targets: bool
    stacks: bool


@dataclass(frozen=True)
class Route:
    """The way of a data set's samples to the device."""

    mode: Literal["host", "device_decode", "resident", "made_on_device"]
    reason: str
    dataset: Any
    is_image_data: bool = True  # so the device half applies
    geometry: Geometry | None = None  # of undecoded pictures; None where the data set gives samples ready
    on_host: tuple[Callable[[Any], Any], ...] = ()  # transforms per sample, after the geometry
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    is_sharded: bool = False  # resident: each rank keeps a share


def choose_route(
    dataset: SizedDataset,
    config: DataConfig,
    split: Literal["train", "eval"],
    transforms: Sequence[Callable[[Any], Any]],
    device: torch.device,
    num_ranks: int,
    memory: int,
    host_only: str = "",
) -> Route:
    """Chooses how a data set's samples reach the device; the same on every rank that is given the same `memory`.

    Args:
        dataset: the samples.
        config: the `data` section.
        split: which of the two data sets it is.
        transforms: of this split, in order.
        device: where the samples go.
        num_ranks: how many processes may share them.
        memory: bytes of the device.
        host_only: why its task needs samples that are whole and transformed on the host; see `why_host_only`.

    Raises:
        UserError: the config asks for a way that this data set or this machine does not have.
    """
    asked = config.feed
    if hasattr(dataset, "device_batch"):
        if transforms:
            raise UserError("data that is made on the device has no host transforms", path=f"data.transforms.{split}")
        if asked not in ("auto", "host"):
            raise UserError("this data is made on the device already", path="data.feed")
        return Route("made_on_device", "it is made there", dataset, config.normalize is not None)
    if config.normalize is None and not is_image_data(dataset):
        if asked in ("resident", "device_decode"):
            raise UserError(f"{asked} is for pictures, which data.{split} does not have", path="data.feed")
        return Route("host", "its samples are no pictures", dataset, False, None, tuple(transforms))
    if host_only:
        if asked in ("resident", "device_decode"):
            raise UserError(f"{asked} is not for this task: {host_only}", path="data.feed")
        return Route("host", host_only, dataset, True, None, tuple(transforms))
    arrays = as_array_pictures(dataset)
    pictures: Any = arrays or (dataset if gives_encoded(dataset) else None)
    parts = split_transforms(transforms, pads=arrays is not None)
    if pictures is None or (arrays is not None and arrays.as_tensors and parts.rest):
        geometry, on_host, pictures = None, (*parts.geometric, *parts.rest), dataset
    else:
        geometry, on_host = parts.geometry, parts.rest
        if geometry is None and arrays is not None and not on_host:
            geometry = whole_pictures
    if geometry is None:
        pictures = dataset
    mode, reason, is_sharded = _choose_mode(config, split, pictures, geometry, on_host, device, num_ranks, memory)
    return Route(
        mode, reason, pictures, True, geometry, on_host, parts.horizontal_flip, parts.vertical_flip, is_sharded
    )


def why_host_only(task: SampleMeaning) -> str:
    """Returns why a task's samples are handled whole and on the host; nothing where pictures may take another way."""
    if task.transforms_targets:
        return "its targets are transformed together with their inputs, on the host"
    return "" if task.stacks else "its samples are not stacked to batches"


def _choose_mode(
    config: DataConfig,
    split: str,
    pictures: Any,
    geometry: Geometry | None,
    on_host: Sequence[Any],
    device: torch.device,
    num_ranks: int,
    memory: int,
) -> tuple[Literal["host", "device_decode", "resident"], str, bool]:
    asked = config.feed
    obstacle = _obstacle(split, pictures, geometry, on_host)
    if asked == "host":
        return "host", "data.feed asks for it", False
    if asked == "device_decode":
        problem = obstacle or _no_decoder(pictures, device)
        if problem:
            raise UserError(f"cannot decode on {device.type}: {problem}", path="data.feed")
        return "device_decode", "data.feed asks for it", False
    if obstacle:
        if asked == "resident":
            raise UserError(f"data.{split} cannot live on the device: {obstacle}", path="data.feed")
        return "host", obstacle, False
    if asked == "auto" and device.type != "cuda":
        return "host", "there is no GPU to keep it on", False
    if asked == "auto" and config.on_error == "skip" and not isinstance(pictures, ArrayPictures):
        return "host", "data.on_error: skip needs pictures that are read one by one", False
    size = estimate_bytes(pictures)
    limit = int(memory * (_AUTO_SHARE if asked == "auto" else _MOST_SHARE))
    placement = config.resident_placement
    size_text = f"its pixels take {_gib(size)} of {_gib(memory)} on the device"
    if placement != "sharded" and size <= limit:
        return "resident", size_text, False
    if placement != "replicated" and 1 < num_ranks <= len(pictures) and size / num_ranks <= limit:
        return "resident", f"{size_text}, shared by {num_ranks} ranks", True
    if placement == "sharded" and size <= limit:  # nobody to share with, or not a sample for each
        return "resident", size_text, False
    if asked == "resident":
        raise UserError(f"data.{split} does not fit: {size_text}, where {_gib(limit)} may be used", path="data.feed")
    return "host", size_text, False


def _obstacle(split: str, pictures: Any, geometry: Geometry | None, on_host: Sequence[Any]) -> str:
    """Returns why the pixels of a data set cannot be handled on the device; nothing where they can."""
    if on_host:
        return f"{type(on_host[0]).__name__} of data.transforms.{split} runs on the host only"
    if not gives_encoded(pictures):
        return "the data set does not give its pictures undecoded"
    if geometry is None:
        return f"data.transforms.{split} does not make its pictures equal in size"
    return ""


def _no_decoder(pictures: Any, device: torch.device) -> str:
    if isinstance(pictures, ArrayPictures):
        return "the pictures are pixels already"
    if codec() is None:
        return "nvidia-nvimgcodec-cu13 is not installed"
    if device.type == "cuda" and not decodes_on_gpu():
        return "nvJPEG is missing: install nvidia-nvjpeg"
    return ""


def without_effect(config: DataConfig, route: Route) -> list[str]:
    """Returns which keys of the section somebody set that do nothing on this way."""
    idle = [] if route.mode == "resident" else ["resident_placement"]
    if route.mode in ("resident", "made_on_device"):
        idle += ["workers", "prefetch", "prefetch_factor", "on_error", "max_skipped"]
    elif config.workers == 0:
        idle += ["prefetch", "prefetch_factor"]
    if config.on_error == "raise":
        idle.append("max_skipped")
    return [key for key in dict.fromkeys(idle) if key in config.model_fields_set]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
