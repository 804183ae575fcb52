"""A model that takes its time, whatever the load of the machine, named by import path."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        time.sleep(ctx.seconds)
        return gradients[0], None


class SlowModel(nn.Module):
    """Sleeps in forward and in backward, around a linear layer.

    Args:
        forward: seconds.
        backward: seconds.
    """

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.seconds = forward, backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        forward, backward = self.seconds
        if x.device.type != "meta":  # where FLOPs are counted
            time.sleep(forward)
        return _Slow.apply(self.linear(x), backward if x.device.type != "meta" else 0.0)


class LateOnRank1(SlowModel):
    """Sleeps in forward on rank 1 only, and in evaluations on all; exchanges a number in its forward, as some do.

    Args:
        seconds: of a forward.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(0.0, 0.0)
        self.late = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and dist.is_initialized():
            dist.all_reduce(torch.ones(()))
        if x.device.type != "meta" and (not self.training or os.environ.get("RANK") == "1"):
            time.sleep(self.late)
        return super().forward(x)
