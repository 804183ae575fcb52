"""Models and tasks for exports, most of which are not one tensor to one tensor; named by import path."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.tasks.classification import Classification


class Normed(nn.Sequential):
    """Images (B, 3, H, W) -> logits (B, 3), with statistics of batches on the way."""

    def __init__(self) -> None:
        pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *pooled, nn.Linear(8, 3))


class Named(nn.Module):
    """Vectors (B, 8) -> logits (B, 3), under a name."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, vectors: torch.Tensor) -> Any:
        return {"scores": self.head(vectors)}


class Branching(Named):
    """Does one thing or another, depending on numbers."""

    def forward(self, vectors: torch.Tensor) -> Any:
        scores = self.head(vectors)
        return scores if scores.sum() > 0 else -scores


class OfNamed(Classification):
    """Classification with either."""

    def forward(self, model: nn.Module, data: Any) -> torch.Tensor:
        outputs = model(self.inputs(data))
        return outputs["scores"] if isinstance(outputs, dict) else outputs


class Twice(Classification):
    """Averages the outputs of two views of each sample."""

    def forward(self, model: nn.Module, data: Any) -> torch.Tensor:
        inputs = self.inputs(data)
        return (model(inputs) + model(-inputs)) / 2
