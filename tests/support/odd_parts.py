"""Models and optimizers whose state is out of the ordinary, named by import path in tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Counting(nn.Module):
    """Vectors (B, 8) -> logits (B, 3). Has extra state, and uses the global generator in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.num_calls = 0

    def get_extra_state(self) -> dict[str, Any]:
        return {"num_calls": self.num_calls}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.num_calls = state["num_calls"]

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        self.num_calls += self.training
        return self.layer(vectors) + 0.01 * torch.randn(3)


class Meddling(nn.Module):
    """Vectors (B, 8) -> logits (B, 3). Changes a trainable weight in its forward, which only an optimizer should."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.layer.bias.mul_(0.99)
        return self.layer(vectors)


class Remembering(torch.optim.SGD):
    """Keeps plain values per parameter and per group, as schedule-free optimizers do."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            group["num_steps"] = group.get("num_steps", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["seen"] = [*state.get("seen", []), group["num_steps"]][-3:]
                parameter.data.add_(1e-3 * group["num_steps"])


class Unsaveable(torch.optim.SGD):
    """Keeps an object that no checkpoint can hold."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["helper"] = object()
