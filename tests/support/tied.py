"""A model with tied weights, named by import path."""

import torch
from torch import nn


class Tied(nn.Module):
    """Vectors (B, 8) -> logits (B, 3), through one square matrix twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.head = nn.Linear(8, 3)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(vectors)))
