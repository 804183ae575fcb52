"""A task of a user's own, named by import path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainer.tasks.base import Task


class Regression(Task):
    """Predicts the label as a number."""

    best_metric = "rmse"
    best_mode = "min"

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def loss_sum(self, outputs: torch.Tensor, data: Any) -> torch.Tensor:
        return (self.scale * (outputs[:, 0] - data[1]) ** 2).sum()

    def eval_sums(self, outputs: torch.Tensor, data: Any) -> dict[str, torch.Tensor]:
        return {"squares": ((outputs[:, 0] - data[1]) ** 2).sum(), "count": torch.tensor(len(outputs))}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"rmse": (sums["squares"] / sums["count"]) ** 0.5}
