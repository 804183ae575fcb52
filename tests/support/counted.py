"""A task whose loss is a mean over something other than samples, with all kinds of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from trainer.tasks.classification import Classification


class Counted(Classification):
    """Samples of class 0 count three times, and those of class 2 not at all: neither in the loss nor in its divisor."""

    best_metric = "loss"
    best_mode = "min"

    @staticmethod
    def weight(targets: torch.Tensor) -> torch.Tensor:
        """Returns how often each sample counts."""
        return torch.tensor([3.0, 1.0, 0.0], device=targets.device)[targets]

    def loss_sum(self, outputs: torch.Tensor, data: Any) -> torch.Tensor:
        targets = self.targets(data)
        return (functional.cross_entropy(outputs, targets, reduction="none") * self.weight(targets)).sum()

    def loss_count(self, outputs: torch.Tensor, data: Any) -> torch.Tensor:
        return self.weight(self.targets(data)).sum()

    def eval_sums(self, outputs: torch.Tensor, data: Any) -> dict[str, torch.Tensor]:
        targets = self.targets(data)
        confusion = torch.zeros(3, 3, dtype=torch.int64, device=outputs.device)
        confusion.view(-1).index_add_(0, targets * 3 + outputs.argmax(1), torch.ones_like(targets))
        return {
            "loss": self.loss_sum(outputs, data),
            "count": self.loss_count(outputs, data),
            "confusion": confusion,
        }

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        confusion = sums["confusion"]
        assert isinstance(sums["count"], float)
        assert confusion.dtype == torch.float64
        found = {f"cell_{row}{column}": float(confusion[row, column]) for row in range(3) for column in range(3)}
        return {"loss": sums["loss"] / sums["count"], **found}

    def eval_records(self, outputs: torch.Tensor, data: Any) -> list[tuple[int, int]]:
        return list(zip(self.targets(data).tolist(), outputs.argmax(1).tolist(), strict=True))

    def metrics_of_records(self, records: Sequence[tuple[int, int]]) -> dict[str, float]:
        """Returns what depends on every record and its place."""
        weighed = sum((i + 1) * (3 * target + found) for i, (target, found) in enumerate(records))
        return {"num_records": float(len(records)), "in_order": float(weighed)}
