"""Semantic segmentation: one label per pixel, cross-entropy over the pixels that count, mean IoU."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from trainer.errors import BadSample, UserError
from trainer.tasks.base import Task
from trainer.tasks.classification import CrossEntropy
from trainer.tasks.confusion import MOST_CLASSES, add_confusion, confusion_matrix
from trainer.tasks.labels import (
    check_class_weights,
    class_weights,
    explained_loss_errors,
    logits_of,
    name_of,
    settled_num_classes,
)
from trainer.tasks.misfit import described

IGNORED = 255  # the label of pixels that do not count, as in VOC's masks
_NAMED = 3  # classes that the caption of an example names


class Logits(NamedTuple):
    """What the model says of each pixel of the masks, (B, classes, H, W)."""

    out: torch.Tensor
    aux: torch.Tensor | None = None  # of an auxiliary head


class Segmentation(Task):
    """Samples are (image, mask) pairs or dicts; the model maps a batch of images to logits per class and pixel.

    Models are torchvision's, which return {"out": logits, "aux": logits}, those that return logits, and Hugging Face's,
    which return `.logits`. Logits (B, classes, h, w) of another size than the masks are resized to it, bilinearly.
    Masks are integers (B, H, W) or (B, 1, H, W).

    Args:
        loss: callable of (logits, int64 masks (B, H, W)) that returns a value per pixel, which must be 0 where pixels
            are ignored, one per sample, or a mean over the batch.
        num_classes: number of labels, background included; None learns it from the first outputs.
        aux_weight: weight of the auxiliary head's loss; by default 0.5, as in torchvision's references. Refused where
            a model in training has no such head.
        input_key: where the image is in samples that are dicts.
        target_key: where the mask is in samples that are dicts.
    """

    transforms_targets = True
    loss_args = {"ignore_index": IGNORED}
    metric_names = ("loss", "mean_iou", "pixel_accuracy")
    best_metric = "mean_iou"

    def __init__(
        self,
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
        num_classes: int | None = None,
        aux_weight: float | None = None,
        input_key: str = "input",
        target_key: str = "target",
    ) -> None:
        self.loss = loss or CrossEntropy(**self.loss_args)
        check_class_weights(self.loss, num_classes)
        keywords = self.loss.keywords if isinstance(self.loss, functools.partial) else {}
        self.ignore_index = int(keywords.get("ignore_index", getattr(self.loss, "ignore_index", IGNORED)))
        self.num_classes = num_classes
        self._check_ignored()
        self.aux_weight = 0.5 if aux_weight is None else aux_weight
        self._needs_aux = aux_weight is not None
        self.input_key = input_key
        self.target_key = target_key
        self._outputs_checked = False
        self._last_confusion: tuple[weakref.ref[torch.Tensor], torch.Tensor] | None = None
        self._counts_pixels: bool | None = True if loss is None else None  # else known from the loss's first value

    def _check_ignored(self) -> None:
        """Refuses to ignore a class because of a number that nobody chose; another number is the user's choice."""
        if self.ignore_index == IGNORED and self.num_classes is not None and self.num_classes > IGNORED:
            message = f"of {self.num_classes} classes {IGNORED} would be ignored; choose another number, such as -1"
            raise UserError(message, path="task.loss.args.ignore_index", agreed=True)

    # ---- batches ---------------------------------------------------------------------------------------------

    def check(self, data: Any, sample_ids: torch.Tensor) -> None:
        images, masks = self.inputs(data), super().targets(data)
        if not isinstance(masks, torch.Tensor) or masks.ndim < 3 or masks.is_floating_point():
            got = f"{masks.dtype} {list(masks.shape[1:])}" if isinstance(masks, torch.Tensor) else type(masks).__name__
            raise BadSample(f"has no mask, an integer per pixel, but {got}".replace("torch.", ""), int(sample_ids[0]))
        if masks.ndim > 4 or (masks.ndim == 4 and masks.shape[1] != 1):
            what = f"has a mask of shape {list(masks.shape[1:])}; it must have one channel, the labels"
            raise BadSample(what, int(sample_ids[0]))
        if isinstance(images, torch.Tensor) and images.shape[-2:] != masks.shape[-2:]:
            sizes = f"{list(images.shape[-2:])} and {list(masks.shape[-2:])}"
            raise BadSample(f"has an image and a mask of sizes {sizes} after data.transforms", int(sample_ids[0]))
        self._check_labels(masks, sample_ids)

    def _check_labels(self, masks: torch.Tensor, sample_ids: torch.Tensor | None) -> None:
        if self.num_classes is None:
            return
        if not masks.dtype.is_signed:  # in bytes, 300 would be taken for 44
            masks = masks.to(torch.int16 if masks.dtype == torch.uint8 else torch.int64)
        wrong = ((masks < 0) | (masks >= self.num_classes)) & (masks != self.ignore_index)
        if wrong.any():
            i = int(wrong.flatten(1).any(1).nonzero()[0])
            label = int(masks[i][wrong[i]][0])
            what = f"has label {label} in its mask; the model's are 0 to {self.num_classes - 1}, {self.ignore_index} is"
            raise BadSample(f"{what} ignored", int(sample_ids[i]) if sample_ids is not None else None)

    def targets(self, data: Any) -> torch.Tensor:
        """Returns the masks of a batch, int64 (B, H, W)."""
        masks: torch.Tensor = super().targets(data)
        return (masks.squeeze(1) if masks.ndim == 4 else masks).long()

    def forward(self, model: nn.Module, data: Any) -> Logits:
        logits = logits_of(super().forward(model, data))
        size = super().targets(data).shape[-2:]
        if isinstance(logits, Mapping) and "out" in logits:
            aux = logits.get("aux")
            if aux is not None:
                return Logits(_of_size(logits["out"], size), _of_size(aux, size))
            logits = logits["out"]
        if self._needs_aux and model.training:
            raise UserError("the model has no auxiliary head", path="task.args.aux_weight", agreed=True)
        return Logits(_of_size(logits, size))

    # ---- loss ------------------------------------------------------------------------------------------------

    def loss_sum(self, outputs: Logits, data: Any) -> torch.Tensor:
        masks = self.targets(data)
        if not self._outputs_checked:
            self._check_outputs(outputs.out, masks)
            self._outputs_checked = True
        total = self._summed(outputs.out, masks)
        if outputs.aux is not None:
            total = total + self.aux_weight * self._summed(outputs.aux, masks)
        return total

    def loss_count(self, outputs: Logits, data: Any) -> torch.Tensor | None:
        """Returns the number of pixels that count, or their weights, as torch's mean has it; None: samples count."""
        masks = self.targets(data)
        if self._counts_pixels is None:
            with torch.no_grad():
                self._summed(outputs.out, masks)
        if not self._counts_pixels:
            return None
        weight, is_counted = class_weights(self.loss), masks != self.ignore_index
        if weight is None:
            return is_counted.sum()
        return torch.where(is_counted, weight[masks.where(is_counted, 0)], 0.0).sum()

    def _summed(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        is_first = self._counts_pixels is None
        gets = f"the loss gets logits {list(logits.shape)} and labels {list(masks.shape)} of pixels"
        with explained_loss_errors(gets) if is_first else nullcontext():
            loss = self.loss(logits, masks)
        if loss.ndim not in (0, 1, 3) or (loss.ndim > 0 and loss.shape[0] != len(masks)):
            message = f"the loss returned shape {list(loss.shape)} for masks {list(masks.shape)}"
            raise UserError(f"{message}; expected a mean, or a value per sample or per pixel", path="task.loss")
        self._counts_pixels = loss.ndim == 3
        return loss * len(masks) if loss.ndim == 0 else loss.sum()

    def _check_outputs(self, logits: torch.Tensor, masks: torch.Tensor) -> None:
        """Compares the first outputs with the classes; where these were unknown, waits once for the device."""

        def check_labels(num_classes: int) -> None:
            self.num_classes = num_classes
            self._check_ignored()
            self._check_labels(masks, None)

        self.num_classes = settled_num_classes(self.num_classes, logits.shape[1], check_labels, " per pixel")

    # ---- evaluation ------------------------------------------------------------------------------------------

    def eval_sums(self, outputs: Logits, data: Any) -> dict[str, torch.Tensor]:
        masks, loss_sum = self.targets(data), self.loss_sum(outputs, data)
        count = self.loss_count(outputs, data)
        return {
            "loss": loss_sum,
            "count": torch.tensor(len(masks)) if count is None else count,
            "confusion": self._count_pixels(outputs.out, masks),
        }

    def _count_pixels(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        counts = confusion_matrix(self._counted(masks), logits.argmax(1), logits.shape[1])
        self._last_confusion = weakref.ref(logits), counts
        return counts

    def _counted(self, masks: torch.Tensor) -> torch.Tensor:
        """Returns masks with -1 where pixels are ignored, also where that is the number of a class."""
        return masks.masked_fill(masks == self.ignore_index, -1)

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Returns the loss, the share of pixels that are right, and the intersection over union of classes.

        The IoU of a class is its diagonal entry of the confusion matrix over the sum of its row and column less that
        entry, as torchvision's references have it. A class that is in no mask and in no prediction has none, and does
        not count in the mean.
        """
        confusion: torch.Tensor = sums["confusion"]
        right = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - right
        ious = {label: float(right[label] / union[label]) for label in range(len(union)) if union[label] > 0}
        total = float(confusion.sum())
        found = {
            "loss": sums["loss"] / sums["count"] if sums["count"] else math.nan,
            "mean_iou": math.fsum(ious.values()) / len(ious) if ious else math.nan,
            "pixel_accuracy": float(right.sum()) / total if total else math.nan,
        }
        return {**found, **{f"iou/{name_of(label, self.class_names)}": iou for label, iou in ious.items()}}

    def metric_inputs(self, outputs: Logits, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits (B, classes, H, W) and masks (B, H, W), in which 255 is to be ignored."""
        return outputs.out, self.targets(data)

    def eval_tables(self, tables: dict[str, torch.Tensor], outputs: Logits, data: Any) -> None:
        """Counts the confusion matrix of pixels, up to 1000 classes."""
        if outputs.out.shape[1] <= MOST_CLASSES:
            # Its sums have just counted this batch. Used once: the next may come in the same tensor (CUDA graphs).
            known, self._last_confusion = self._last_confusion, None
            is_known = known is not None and known[0]() is outputs.out
            counts = known[1] if known and is_known else self._count_pixels(outputs.out, self.targets(data))
            add_confusion(tables, counts)

    def examples(self, outputs: Logits, data: Any, num: int) -> dict[str, torch.Tensor]:
        """Returns images, and the masks that are drawn over them: what they are, and what the model says."""
        masks, logits = self.targets(data)[:num], outputs.out[:num]
        confidence, prediction = logits.float().softmax(1).max(1)
        found = {
            "masks": torch.stack([self._counted(masks), prediction], 1).to(torch.int16),
            "confidence": confidence.mean((1, 2)),
        }
        inputs = self.inputs(data)
        return {**found, "image": inputs[:num]} if isinstance(inputs, torch.Tensor) else found

    def describe_examples(
        self, examples: Mapping[str, torch.Tensor], classes: Sequence[str]
    ) -> list[tuple[str, str, float | None]]:
        """Names the largest classes of masks and predictions, with their share of the pixels."""
        shares = [[_largest(mask.numpy(), classes) for mask in pair] for pair in examples["masks"]]
        return [
            (target, found, sure) for (target, found), sure in zip(shares, examples["confidence"].tolist(), strict=True)
        ]


def _of_size(logits: Any, size: torch.Size) -> torch.Tensor:
    """Returns logits, resized where they are of another size, as torchvision's models do it themselves."""
    if not isinstance(logits, torch.Tensor) or logits.ndim != 4 or logits.shape[1] < 2:
        message = "masks need logits (batch, classes, height, width), or a dict with them as 'out'; the model returned"
        raise UserError(f"{message} {described(logits)}", path="model", agreed=True)
    if logits.shape[-2:] == size:
        return logits
    return functional.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def _largest(mask: np.ndarray, classes: Sequence[str]) -> str:
    labels, counts = np.unique(mask[mask >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_NAMED]
    named = [f"{name_of(int(labels[i]), classes)} {counts[i] / counts.sum():.0%}" for i in order]
    return ", ".join(named) or "nothing"
