"""What DistributedDataParallel was told, and what its exchange did: written down by an optimizer and a task."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.tasks.classification import Classification


class Watching(Classification):
    """Appends the settings of the wrapped model to `settings.jsonl`."""

    def forward(self, model: nn.Module, data: Any) -> torch.Tensor:
        if isinstance(model, DistributedDataParallel):
            names = ("gradient_as_bucket_view", "static_graph", "find_unused_parameters", "bucket_bytes_cap")
            with open("settings.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({name: getattr(model, name) for name in names}) + "\n")
        return super().forward(model, data)


class Recorded(torch.optim.SGD):
    """Saves the gradients of every step as `gradients-<rank>-<step>.pt`."""

    def step(self, closure: Any = None) -> Any:
        count = sum(1 for name in os.listdir() if name.startswith(f"gradients-{os.environ.get('RANK', '0')}-"))
        gradients = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch.save(gradients, f"gradients-{os.environ.get('RANK', '0')}-{count}.pt")
        return super().step(closure)
