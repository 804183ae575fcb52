"""A model for tests, named by import path."""

import torch
from torch import nn


class Linear(nn.Module):
    """Vectors (B, 8) -> logits (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.layer(vectors)
