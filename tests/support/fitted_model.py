"""A stack of blocks whose activations outweigh its weights, and models whose memory cannot be foreseen."""

from __future__ import annotations

import os

import torch
from hungry import Hungry
from torch import nn
from torch._subclasses import FakeTensor


class Block(nn.Module):
    """Linear, GELU, Linear, dropout, around a shortcut; with BatchNorm where asked."""

    def __init__(self, width: int, dropout: float, normed: bool) -> None:
        super().__init__()
        self.before = nn.Linear(width, 4 * width)
        self.norm = nn.BatchNorm1d(4 * width) if normed else nn.Identity()
        self.act = nn.GELU()
        self.after = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.dropout(self.after(self.act(self.norm(self.before(hidden)))))


class Stack(nn.Module):
    """Vectors (B, features), or images of as many pixels, -> logits (B, classes)."""

    def __init__(
        self,
        features: int = 8,
        width: int = 32,
        depth: int = 6,
        num_classes: int = 3,
        dropout: float = 0.0,
        normed: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(features, width)
        self.blocks = nn.Sequential(*(Block(width, dropout, normed) for _ in range(depth)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(inputs.flatten(1))))


class OverwritingBlock(Block):
    """Overwrites what a product gave, which selective checkpointing would keep."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.after(torch.relu_(self.before(hidden)))


class Overwriting(Stack):
    """The stack of such blocks."""

    def __init__(self, width: int = 32, depth: int = 6) -> None:
        super().__init__(width=width, depth=depth)
        self.blocks = nn.Sequential(*(OverwritingBlock(width, 0.0, False) for _ in range(depth)))


class Surprising(Hungry):
    """Runs out of memory where the planner, which runs it on fake tensors, sees nothing of it."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        if isinstance(vectors, FakeTensor):
            return self.layers(vectors)
        return super().forward(vectors)


class HungryRank(Stack):
    """Takes `extra` bytes more per sample on one rank than on the others, and than the planner sees."""

    def __init__(self, rank: int, extra: int, features: int = 8) -> None:
        super().__init__(features)
        self.extra = extra if os.environ.get("RANK", "0") == str(rank) else 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = super().forward(inputs)
        if self.extra and self.training and not isinstance(inputs, FakeTensor):
            hidden = hidden + 0.0 * torch.zeros(len(inputs), self.extra // 4, device=inputs.device).sum()
        return hidden
