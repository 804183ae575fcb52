"""A small model with what sharding may get wrong: rows that do not split, tied and frozen parameters, BatchNorm."""

from __future__ import annotations

import torch
from torch import nn


class OddBlock(nn.Module):
    """Has a weight of one row and one of three, which two processes cannot halve, and a scale that does not train."""

    def __init__(self, width: int, normed: bool) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, width))
        self.shift_too = nn.Parameter(torch.zeros(1, width))
        self.before = nn.Linear(width, 3)
        self.norm = nn.BatchNorm1d(3) if normed else nn.Identity()
        self.after = nn.Linear(3, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = torch.nn.functional.gelu(self.norm(self.before(hidden + self.shift)))
        return hidden + self.scale * self.after(inner) - 0.5 * self.shift_too


class Odd(nn.Module):
    """Vectors of 8 -> logits (B, 3); the stem and the last layer before the head share a weight, as do two blocks.

    Args:
        normed: with BatchNorm in the blocks and after the stem.
        tied: with the shared weights.
    """

    offset: torch.Tensor

    def __init__(self, normed: bool = False, tied: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8) if normed else nn.Identity()
        self.blocks = nn.ModuleList(OddBlock(8, normed) for _ in range(4))
        self.last = nn.Linear(8, 8)
        if tied:
            self.last.weight = self.stem.weight
            self.blocks[3].after.weight = self.blocks[2].after.weight  # type: ignore[union-attr]
        self.head = nn.Linear(8, 3)
        self.register_buffer("offset", torch.linspace(-1, 1, 8))  # float32 in every precision

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.stem(vectors) + self.offset)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.last(hidden))
