"""What an evaluation shows beside its metrics: a few samples with their predictions, and tables of counts.

Collects both while batches pass, without waiting for the device, and writes them to `eval/step-00000480/` in the run
folder, of which the newest and the best stay. What a sample or a count means is the task's business; a task that fails
to say it costs a warning, never the run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from trainer.config_data import NormalizeConfig
from trainer.errors import one_line
from trainer.tasks.base import Task
from trainer.tasks.labels import name_of

logger = logging.getLogger("lockstep")

_LONGEST_SIDE = 256  # of a picture that is kept
_LONGEST_IN_ALL = 480  # of several beside each other
_FAILED = ""  # name of a table of a rank that collects no more, so that all hear of it

_failing_tasks: weakref.WeakSet[Task] = weakref.WeakSet()


@dataclass(frozen=True)
class Example:
    """One sample and what the model makes of it.

    Args:
        number: of the sample among those that are shown, from 0.
        image: uint8 (height, width, 3), where the input is a picture.
        target: what it is.
        prediction: what the model says.
        confidence: how sure it is, from 0 to 1, where it says that.
        num_views: pictures beside each other in `image`, such as one with the target and one with the prediction.
    """

    number: int
    image: NDArray[np.uint8] | None
    target: str
    prediction: str
    confidence: float | None
    num_views: int = 1

    @property
    def caption(self) -> str:
        """One line for a person."""
        sure = f" ({self.confidence:.0%})" if self.confidence is not None else ""
        return f"{self.prediction}{sure}, is {self.target}"


@dataclass(frozen=True)
class EvalMedia:
    """Examples and tables of one evaluation, in host memory.

    Args:
        examples: a few samples.
        tables: square counts by name, such as `confusion`: a row per target, a column per prediction.
        classes: names of rows and columns.
    """

    examples: Sequence[Example]
    tables: Mapping[str, NDArray[np.int64]]
    classes: Sequence[str]


class Collector:
    """Collects the media of one evaluation on one rank; all of it stays on the device until the end.

    Args:
        task: what a batch means.
        num_examples: how many samples to keep; 0 on all ranks but one.
    """

    def __init__(self, task: Task, num_examples: int) -> None:
        self._task = task
        self._num_missing = num_examples
        self._examples: list[dict[str, torch.Tensor]] = []
        self.tables: dict[str, torch.Tensor] = {}
        if task in _failing_tasks:
            self._give_up()

    def add(self, outputs: Any, data: Any) -> None:
        """Takes what it wants from a batch. Waits for nothing."""
        if _FAILED in self.tables:
            return
        try:
            self._add(outputs, data)
        except Exception as error:
            self._fail(error)

    def _add(self, outputs: Any, data: Any) -> None:
        self._task.eval_tables(self.tables, outputs, data)
        for name, table in self.tables.items():
            if table.dtype != torch.int64 or table.ndim != 2 or table.shape[0] != table.shape[1]:
                raise ValueError(f"table '{name}' must be int64 and square (got {table.dtype}, {list(table.shape)})")
        if self._num_missing > 0:
            taken = self._task.examples(outputs, data, self._num_missing)
            if not taken:
                self._num_missing = 0
                return
            self._examples.append({name: tensor.clone() for name, tensor in taken.items()})  # else all of it stays
            self._num_missing -= len(next(iter(taken.values())))

    def _fail(self, error: Exception) -> None:
        _failing_tasks.add(self._task)
        logger.warning("evaluations show no samples and no tables from here on: %s", one_line(error))
        self._give_up()

    def _give_up(self) -> None:
        self._examples = []
        self.tables = {_FAILED: torch.ones((), dtype=torch.int64)}

    def media(
        self, tables: Mapping[str, torch.Tensor], classes: Sequence[str] | None, normalize: NormalizeConfig | None
    ) -> EvalMedia | None:
        """Brings all to host memory; None where there is nothing to show.

        Args:
            tables: those of all ranks together.
            classes: names of labels, where the data set knows them.
            normalize: what was done to pictures.
        """
        if _FAILED in tables or not (tables or self._examples):
            return None
        try:
            return self._media(tables, classes, normalize)
        except Exception as error:
            self._fail(error)
            return None

    def _media(
        self, tables: Mapping[str, torch.Tensor], classes: Sequence[str] | None, normalize: NormalizeConfig | None
    ) -> EvalMedia:
        counts = {name: table.cpu().numpy().astype(np.int64) for name, table in tables.items()}
        num = max((len(table) for table in counts.values()), default=0)
        names = [*(classes or ()), *(str(label) for label in range(len(classes or ()), num))]
        examples: list[Example] = []
        for part in self._examples:
            num_views = (
                1 + part["masks"].shape[1] if "masks" in part else part["boxes"].shape[1] if "boxes" in part else 1
            )
            longest = min(_LONGEST_SIDE, _LONGEST_IN_ALL // num_views)
            pictures = _pictures(part["image"], normalize, longest) if "image" in part else None
            rest = {k: v.cpu() for k, v in part.items() if k != "image"}
            if pictures is not None and "masks" in rest:
                pictures = _with_masks(pictures, rest["masks"])
            if pictures is not None and "boxes" in rest:
                pictures = _with_boxes(pictures, rest["boxes"], rest["labels"], names)
            told = self._task.describe_examples(rest, names)
            for i, (target, prediction, confidence) in enumerate(told):
                image = pictures[i] if pictures is not None else None
                sure = float(confidence) if confidence is not None and math.isfinite(confidence) else None
                examples.append(Example(len(examples), image, str(target), str(prediction), sure, num_views))
        return EvalMedia(examples, counts, names)


def _pictures(inputs: torch.Tensor, normalize: NormalizeConfig | None, most: int) -> NDArray[np.uint8] | None:
    """Turns inputs of a model back into pictures (B, height, width, 3) of so many pixels a side at most.

    None where they are no pictures.
    """
    if inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
        return None
    images = inputs.detach()
    if images.dtype != torch.uint8:
        images = images.float()
        if normalize is not None and len(normalize.mean) in (1, images.shape[1]):
            mean = torch.tensor(normalize.mean, device=images.device).view(-1, 1, 1)
            std = torch.tensor(normalize.std, device=images.device).view(-1, 1, 1)
            images = images * std + mean
        else:  # of unknown range
            low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
            images = (images - low) / (high - low).clamp(min=1e-12)
        images = images.nan_to_num(0.0).clamp(0, 1) * 255
    longest = max(images.shape[2:])
    if longest > most:
        size = [max(side * most // longest, 1) for side in images.shape[2:]]
        images = functional.interpolate(images.float(), size, mode="area")
    found: NDArray[np.uint8] = images.round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    return found


def _with_masks(pictures: NDArray[np.uint8], masks: torch.Tensor) -> NDArray[np.uint8]:
    """Returns each picture, and beside it, once per mask, the picture under that mask, a colour per label.

    Args:
        pictures: (B, height, width, 3).
        masks: labels (B, num_masks, H, W); nothing is drawn where they are below 0.
    """
    from torchvision.utils import draw_segmentation_masks

    masks = functional.interpolate(masks.float(), size=pictures.shape[1:3], mode="nearest").long()
    classes = torch.arange(max(int(masks.max()) + 1, 1)).view(-1, 1, 1)
    drawn = []
    for picture, labels in zip(torch.from_numpy(pictures).permute(0, 3, 1, 2), masks, strict=True):
        sides = [picture, *(draw_segmentation_masks(picture, label == classes, alpha=0.5) for label in labels)]
        drawn.append(torch.cat(sides, dim=2).permute(1, 2, 0).contiguous().numpy())
    return np.stack(drawn)


def _with_boxes(
    pictures: NDArray[np.uint8], boxes: torch.Tensor, labels: torch.Tensor, names: Sequence[str]
) -> NDArray[np.uint8]:
    """Returns pictures with boxes, drawn on a copy of it for each kind of boxes, beside each other.

    Args:
        pictures: (B, height, width, 3).
        boxes: (B, kinds, boxes, 4), XYXY as shares of the picture's width and height.
        labels: (B, kinds, boxes); those below 0 are of no box.
        names: of labels.
    """
    from torchvision.utils import draw_bounding_boxes

    height, width = pictures.shape[1:3]
    boxes = boxes * torch.tensor([width, height, width, height])
    drawn = []
    for picture, kinds, their_labels in zip(torch.from_numpy(pictures), boxes, labels, strict=True):
        sides = []
        for of_kind, label in zip(kinds, their_labels, strict=True):
            is_box = (label >= 0) & (of_kind[:, 2:] >= of_kind[:, :2]).all(1)
            known = [name_of(i, names) for i in label[is_box].tolist()]
            copy = picture.permute(2, 0, 1).contiguous()
            sides.append(draw_bounding_boxes(copy, of_kind[is_box], known) if known else copy)
        drawn.append(torch.cat(sides, dim=2).permute(1, 2, 0).contiguous().numpy())
    return np.stack(drawn)


def write_media(run_dir: Path, step: int, media: EvalMedia, best_step: int | None) -> None:
    """Writes `eval/step-<step>/` and removes those of all steps but this and the best one.

    A disk that is full ends no run, nor does a picture that cannot be written: then there is a warning, and no folder.
    """
    folder = run_dir / "eval"
    target = folder / f"step-{step:08d}"
    staged = folder / f".{target.name}.new"
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        _write(staged, media)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(staged, target)
    except Exception as error:
        logger.warning("samples of the evaluation not written to '%s': %s", target, one_line(error))
        shutil.rmtree(staged, ignore_errors=True)
        return
    for entry in folder.iterdir():
        found = re.fullmatch(r"\.?step-(\d+)(\.new)?", entry.name)
        if found and (found[2] or int(found[1]) not in (step, best_step)):
            shutil.rmtree(entry, ignore_errors=True)


def _write(folder: Path, media: EvalMedia) -> None:
    from PIL import Image

    samples = []
    for example in media.examples:
        name = None
        if example.image is not None:
            name = f"{example.number}.png"
            Image.fromarray(example.image).save(folder / name, compress_level=1)
        confidence = example.confidence
        samples.append(
            {
                "image": name,
                "target": example.target,
                "prediction": example.prediction,
                "confidence": round(confidence, 4) if confidence is not None else None,
                "num_views": example.num_views,
            }
        )
    (folder / "samples.json").write_text(json.dumps(samples, indent=1), encoding="utf-8")
    for name, table in media.tables.items():
        content = {"classes": list(media.classes), "counts": table.tolist()}
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
