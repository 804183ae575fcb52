"""A model that runs out of memory, named by import path."""

from __future__ import annotations

import os

import torch
from torch import nn

PEBIBYTE = 2**50  # more than a process can address


class Hungry(nn.Module):
    """Vectors (B, 8) -> logits (B, 3); a batch of more than `limit` samples needs 1 PiB.

    Args:
        limit: samples that fit.
        rank: only there; None on every rank.
        after: so many training batches fit whatever their size.
        in_eval: evaluation instead of training.
    """

    def __init__(self, limit: int, rank: int | None = None, after: int = 0, in_eval: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.limit = limit
        self.here = rank is None or os.environ.get("RANK", "0") == str(rank)
        self.after = after
        self.in_eval = in_eval

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        hidden = self.layers(vectors)
        self.after -= self.training
        if self.here and self.after < 0 and self.training != self.in_eval and len(vectors) > self.limit:
            self.devour(vectors.device)
        return hidden

    def devour(self, device: torch.device) -> None:
        """Asks for more than there is."""
        torch.empty(PEBIBYTE, dtype=torch.uint8, device=device)


class TooLarge(nn.Module):
    """Does not fit on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.table = nn.Parameter(torch.empty(PEBIBYTE, dtype=torch.uint8), requires_grad=False)
