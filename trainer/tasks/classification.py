"""Classification: one label per sample, cross-entropy or a loss of the user's own, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from trainer.data.augment import class_probabilities
from trainer.errors import BadSample, UserError
from trainer.tasks.base import Task
from trainer.tasks.confusion import MOST_CLASSES, add_confusion, confusion_matrix
from trainer.tasks.labels import (
    check_class_weights,
    explained_loss_errors,
    logits_of,
    name_of,
    settled_num_classes,
)
from trainer.tasks.misfit import described


class CrossEntropy(nn.CrossEntropyLoss):
    """torch's cross-entropy, one value per sample. Class weights scale a sample's loss.

    Args:
        label_smoothing: share of the target spread over all classes.
        weight: one weight per class.
        ignore_index: a label whose samples have zero loss.
    """

    def __init__(
        self, label_smoothing: float = 0.0, weight: Sequence[float] | None = None, ignore_index: int = -100
    ) -> None:
        if not 0 <= label_smoothing <= 1:
            raise UserError(f"label_smoothing must be between 0 and 1 (got {label_smoothing})")
        super().__init__(
            weight=None if weight is None else torch.tensor(weight, dtype=torch.float32),
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        )

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns one loss per sample, for labels (B,) or class probabilities (B, classes).

        Probabilities that sum to less than 1, of a mixed sample whose other label is ignored, weigh that much less.
        """
        if not targets.is_floating_point() or targets.ndim != 2:
            return super().forward(outputs, targets)
        smoothed = smooth(targets, self.label_smoothing)
        if self.weight is not None:
            smoothed = smoothed * self.weight
        return -(smoothed * torch.log_softmax(outputs.float(), 1)).sum(1)


def smooth(probabilities: torch.Tensor, share: float) -> torch.Tensor:
    """Returns class probabilities (B, classes) with a share of each sample's spread evenly over all classes."""
    return probabilities * (1 - share) + probabilities.sum(1, keepdim=True) * (share / probabilities.shape[1])


class Classification(Task):
    """Samples are (input, target) pairs or dicts; the model maps a batch of inputs to logits (B, classes).

    Targets are int64 labels (B,), or class probabilities (B, classes).

    Args:
        loss: callable of (outputs, targets) that returns a mean, or one value per sample.
        num_classes: number of labels, to check targets before the device sees them; None learns it from the
            first outputs.
        input_key: where the input is in samples that are dicts.
        target_key: where the target is in samples that are dicts.
        label_smoothing: for losses of class probabilities, which then get these in place of labels, with this share
            spread over all classes. 0 spreads nothing; None leaves targets as they are. `cross_entropy` has its own.
    """

    metric_names: tuple[str, ...] = ("loss", "accuracy")
    best_metric = "accuracy"

    def __init__(
        self,
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
        num_classes: int | None = None,
        input_key: str = "input",
        target_key: str = "target",
        label_smoothing: float | None = None,
    ) -> None:
        self.loss = loss or CrossEntropy()
        path = "task.args.label_smoothing"
        if label_smoothing is not None and isinstance(self.loss, CrossEntropy):
            raise UserError("cross_entropy smooths by itself: task.loss.args.label_smoothing", path=path)
        if label_smoothing is not None and not 0 <= label_smoothing <= 1:
            raise UserError(f"must be between 0 and 1 (got {label_smoothing})", path=path)
        self.label_smoothing = label_smoothing
        self._has_labels = False
        check_class_weights(self.loss, num_classes)
        self._outputs_checked = False
        self.num_classes = num_classes
        self.input_key = input_key
        self.target_key = target_key

    def check(self, data: Any, sample_ids: torch.Tensor) -> None:
        targets = self.targets(data)
        if not isinstance(targets, torch.Tensor):
            raise UserError(f"targets must be numbers or tensors (got {type(targets).__name__})")
        self._check_labels(targets, sample_ids)

    def _check_labels(self, targets: torch.Tensor, sample_ids: torch.Tensor | None) -> None:
        if self.num_classes is None or targets.ndim != 1 or targets.is_floating_point():
            return
        if targets.numel():
            least, most = targets.aminmax()
            if least >= 0 and most < self.num_classes:  # as ever; what follows looks for the sample
                return
        wrong = (targets < 0) | (targets >= self.num_classes)
        wrong &= targets != getattr(self.loss, "ignore_index", -1 - self.num_classes)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            what = f"has label {int(targets[i])}; the model's are 0 to {self.num_classes - 1}"
            raise BadSample(what, int(sample_ids[i]) if sample_ids is not None else None)

    def targets(self, data: Any) -> Any:
        """Returns the targets of a batch; labels as int64."""
        targets = super().targets(data)
        is_label = isinstance(targets, torch.Tensor) and not targets.is_floating_point()
        self._has_labels |= is_label and targets.ndim == 1
        return targets.long() if is_label else targets

    def forward(self, model: nn.Module, data: Any) -> torch.Tensor:
        logits = logits_of(super().forward(model, data))
        if not isinstance(logits, torch.Tensor):
            message = f"the model returned {described(logits)}, not logits: it needs a task of its own"
            raise UserError(message, path="task.name")
        return logits

    def loss_sum(self, outputs: torch.Tensor, data: Any) -> torch.Tensor:
        targets = self.targets(data)
        if not self._outputs_checked:
            self._check_outputs(outputs, targets)
            self._check_loss(outputs)
            self._outputs_checked = True
        if self.label_smoothing is not None:
            if targets.ndim == 1:
                targets = class_probabilities(targets, outputs.shape[1])
            targets = smooth(targets, self.label_smoothing)
        are_probabilities = targets.is_floating_point() and targets.ndim == 2
        gets = "with mixed samples the loss gets class probabilities (batch, classes)"
        with explained_loss_errors(gets) if are_probabilities else nullcontext():
            loss = self.loss(outputs, targets)
        if loss.ndim == 0:  # a mean over the batch
            return loss * len(outputs)
        if loss.shape[0] != len(outputs):
            message = f"the loss returned shape {list(loss.shape)} for a batch of {len(outputs)}"
            raise UserError(f"{message}; expected a mean or one value per sample", path="task.loss")
        return loss.sum() if loss.ndim == 1 else loss.flatten(1).mean(1).sum()

    def _check_outputs(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Compares the first outputs with the classes; where these were unknown, waits once for the device."""
        if targets.ndim == 2 and targets.is_floating_point() and outputs.shape != targets.shape:
            message = f"the model returned {list(outputs.shape)} for class probabilities {list(targets.shape)}"
            raise UserError(f"{message}; set model.args.num_classes", path="model", agreed=True)
        if targets.ndim != 1 or targets.is_floating_point():
            return
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            message = f"labels need logits of shape (batch, classes); the model returned {list(outputs.shape)}"
            raise UserError(message, path="model", agreed=True)

        def check_labels(num_classes: int) -> None:
            self.num_classes = num_classes
            self._check_labels(targets, None)

        self.num_classes = settled_num_classes(self.num_classes, outputs.shape[1], check_labels)

    def _check_loss(self, outputs: torch.Tensor) -> None:
        """Refuses a loss that takes class probabilities alone, and would meet labels now or in an evaluation.

        Tried on more samples than classes: labels of as many as there are classes would pass for one of each.
        """
        if not self._has_labels or self.label_smoothing is not None or isinstance(self.loss, CrossEntropy):
            return
        scores = torch.zeros(outputs.shape[1] + 1, outputs.shape[1], device=outputs.device)
        labels = torch.zeros(len(scores), dtype=torch.int64, device=outputs.device)
        if not self._takes(scores, labels) and self._takes(scores, class_probabilities(labels, scores.shape[1])):
            message = "the loss takes class probabilities, not labels: task.args.label_smoothing: 0 makes them"
            raise UserError(message, path="task.loss", agreed=True)

    def _takes(self, scores: torch.Tensor, targets: torch.Tensor) -> bool:
        try:
            self.loss(scores, targets)
        except Exception:  # whatever a loss of the user's raises
            return False
        return True

    def eval_sums(self, outputs: torch.Tensor, data: Any) -> dict[str, torch.Tensor]:
        targets = self.targets(data)
        return {
            "loss": self.loss_sum(outputs, data),
            "correct": (outputs.argmax(1) == _labels(targets)).sum(),
            "count": torch.tensor(len(outputs)),  # on the host
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["count"], "accuracy": sums["correct"] / sums["count"]}

    def metric_inputs(self, outputs: torch.Tensor, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits (B, classes) and labels (B,)."""
        return outputs, _labels(self.targets(data))

    def eval_tables(self, tables: dict[str, torch.Tensor], outputs: torch.Tensor, data: Any) -> None:
        """Counts the confusion matrix, up to 1000 classes; samples whose label is no class are not in it."""
        labels = _labels_of_logits(outputs, self.targets(data))
        if labels is not None and outputs.shape[1] <= MOST_CLASSES:
            add_confusion(tables, confusion_matrix(labels, outputs.argmax(1), outputs.shape[1]))

    def examples(self, outputs: torch.Tensor, data: Any, num: int) -> dict[str, torch.Tensor]:
        labels = _labels_of_logits(outputs, self.targets(data))
        if labels is None:
            return {}
        confidence, prediction = outputs[:num].float().softmax(1).max(1)
        found = {"target": labels[:num], "prediction": prediction, "confidence": confidence}
        inputs = self.inputs(data)
        return {**found, "image": inputs[:num]} if isinstance(inputs, torch.Tensor) else found

    def describe_examples(
        self, examples: Mapping[str, torch.Tensor], classes: Sequence[str]
    ) -> list[tuple[str, str, float | None]]:
        columns = (examples[key].tolist() for key in ("target", "prediction", "confidence"))
        return [
            (name_of(target, classes), name_of(found, classes), sure)
            for target, found, sure in zip(*columns, strict=True)
        ]


def _labels(targets: torch.Tensor) -> torch.Tensor:
    return targets if targets.ndim == 1 else targets.argmax(1)


def _labels_of_logits(outputs: Any, targets: Any) -> torch.Tensor | None:
    """Returns int64 labels (B,), some of which may be no class; None where outputs or targets mean something else."""
    if not (isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor)):
        return None
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        return None
    if targets.is_floating_point():
        return targets.argmax(1) if targets.shape == outputs.shape else None
    return targets if targets.shape == outputs.shape[:1] else None
