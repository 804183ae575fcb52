"""A model for tests, named by import path."""

from typing import Any

import torch
from torch import nn

from trainer.tasks.classification import Classification


class Linear(nn.Module):
    """Vectors (B, 8) -> logits (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.layer(vectors)


class Frozen(nn.Module):
    """Arrives in eval mode, as many pretrained models do, with a part that stays in it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))
        self.eval()

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        with open("modes", "a", encoding="utf-8") as file:
            file.write(f"{int(self.backbone.training)}{int(self.head.training)} ")
        return self.head(self.backbone(vectors))


class Unused(Linear):
    """Has a layer that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(8, 8)


class Normed(nn.Module):
    """Has what makes an exact resume hard: BatchNorm's statistics and dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3)
        )

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.layers(vectors)


class NormedByHand(Normed):
    """The same, but for one training forward that leaves BatchNorm's statistics as they were."""

    def __init__(self, dropout: float, step_left_out: int) -> None:
        super().__init__(dropout)
        self.step_left_out = step_left_out
        self.num_forwards = 0

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.num_forwards += 1
            self.layers[1].track_running_stats = self.num_forwards != self.step_left_out  # type: ignore[assignment]
        return super().forward(vectors)


class LeavingOut(torch.optim.AdamW):
    """Does nothing when it is to take one certain step."""

    def __init__(self, params: Any, lr: float, weight_decay: float, step_left_out: int, **options: Any) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, **options)
        self.step_left_out = step_left_out
        self.num_calls = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.num_calls += 1
        if self.num_calls != self.step_left_out:
            super().step(closure)


class Tokens(Classification):
    """Samples are of several tokens."""

    tokens_per_sample = 7


class Block(nn.Module):
    """A residual block with BatchNorm and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.dropout(self.norm(self.layer(hidden)).relu())


class Blocks(nn.Module):
    """Vectors of 8 -> logits (B, 3): a stem, repeated blocks and a head."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(vectors)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)
