"""Classification: one label per sample, cross-entropy or a loss of the user's own, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trainer.errors import UserError, place_at
from trainer.tasks.base import Task


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


class Classification(Task):
    """Samples are (input, target) pairs or dicts; the model maps a batch of inputs to logits (B, classes).

    Targets are int64 labels (B,), or class probabilities (B, classes).

    Args:
        loss: callable of (outputs, targets) that returns a mean, or one value per sample.
        num_classes: number of labels, to check targets before the device sees them; None learns it from the
            first outputs.
        input_key: where the input is in samples that are dicts.
        target_key: where the target is in samples that are dicts.
    """

    best_metric = "accuracy"

    def __init__(
        self,
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
        num_classes: int | None = None,
        input_key: str = "input",
        target_key: str = "target",
    ) -> None:
        self.loss = loss or CrossEntropy()
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
        wrong = (targets < 0) | (targets >= self.num_classes)
        wrong &= targets != getattr(self.loss, "ignore_index", -1 - self.num_classes)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            sample = f"sample {int(sample_ids[i])}" if sample_ids is not None else "a sample"
            raise UserError(f"{sample} has label {int(targets[i])}; the model's are 0 to {self.num_classes - 1}")

    def targets(self, data: Any) -> Any:
        """Returns the targets of a batch: the second of a pair, or `target_key` of a dict."""
        return self.part(data, self.target_key, 1)

    def forward(self, model: nn.Module, data: Any) -> torch.Tensor:
        outputs = super().forward(model, data)
        logits = getattr(outputs, "logits", outputs)  # as Hugging Face's models and torchvision's Inception return them
        if not isinstance(logits, torch.Tensor):
            message = f"the model returned a {type(outputs).__name__}, not logits: it needs a task of its own"
            raise UserError(message, path="task.name")
        return logits

    def loss_sum(self, outputs: torch.Tensor, data: Any) -> torch.Tensor:
        targets = self.targets(data)
        if self.num_classes is None:
            self._learn_num_classes(outputs, targets)
        loss = self.loss(outputs, targets)
        if loss.ndim == 0:  # a mean over the batch
            return loss * len(outputs)
        if loss.shape[0] != len(outputs):
            message = f"the loss returned shape {list(loss.shape)} for a batch of {len(outputs)}"
            raise UserError(f"{message}; expected a mean or one value per sample", path="task.loss")
        return loss.sum() if loss.ndim == 1 else loss.flatten(1).mean(1).sum()

    def _learn_num_classes(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Learns the number of classes from the first outputs; checks that batch late, and waits for the device."""
        if outputs.ndim == 2:
            self.num_classes = outputs.shape[1]
            try:
                self._check_labels(targets, None)
            except UserError as error:
                raise place_at("data.train", error) from None

    def eval_sums(self, outputs: torch.Tensor, data: Any) -> dict[str, torch.Tensor]:
        targets = self.targets(data)
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        return {
            "loss": self.loss_sum(outputs, data),
            "correct": (outputs.argmax(1) == labels).sum(),
            "count": torch.tensor(len(outputs)),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["count"], "accuracy": sums["correct"] / sums["count"]}
