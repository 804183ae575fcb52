"""Parts of a run that take their time whatever else the machine does, for runs that have one problem each."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from vectors import Vectors


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        time.sleep(ctx.seconds)
        return gradients[0], None, None


class Block(nn.Module):
    """A linear layer that takes so many seconds."""

    def __init__(self, forward: float, backward: float, width: int) -> None:
        super().__init__()
        self.seconds = forward, backward
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(_Sleep.apply(self.first(inputs), *self.seconds))


class Sleeping(nn.Module):
    """Vectors (B, 8) -> logits (B, 3), in a time that does not depend on the batch.

    Args:
        forward: seconds of a forward.
        backward: seconds of a backward.
        num_blocks: repeated blocks that share these.
        width: of the layers in them.
    """

    def __init__(self, forward: float, backward: float, num_blocks: int = 2, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.Sequential(
            *(Block(forward / num_blocks, backward / num_blocks, width) for _ in range(num_blocks))
        )
        self.head = nn.Linear(width, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(inputs)))


class Uneven(Vectors):
    """Reads most samples at once, and one in so many slowly.

    Args:
        length: number of samples.
        seconds: that a slow one takes.
        every: which samples are slow.
    """

    def __init__(self, length: int, seconds: float, every: int) -> None:
        super().__init__(length)
        self.seconds = seconds
        self.every = every

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index % self.every == 0:
            time.sleep(self.seconds)
        return super().__getitem__(index)


class Hoarding(Vectors):
    """Keeps what it has read.

    Args:
        length: number of samples.
        kept: bytes per sample that it was asked for.
    """

    def __init__(self, length: int, kept: int) -> None:
        super().__init__(length)
        self.kept = kept
        self.hoard: list[bytes] = []

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.kept:
            self.hoard.append(b"\1" * self.kept)
        time.sleep(0.002)
        return super().__getitem__(index)
