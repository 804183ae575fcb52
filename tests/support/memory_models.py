"""The models whose memory on several processes is predicted and measured, with the step that both take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torchvision import models

MODELS: dict[str, Callable[[], nn.Module]] = {
    name: functools.partial(getattr(models, name), num_classes=10)
    for name in ("resnet50", "convnext_tiny", "swin_t", "efficientnet_b0")
} | {"vit_b_16": functools.partial(models.vit_b_16, num_classes=10, image_size=64)}


# Per process and micro-batch. A kernel's workspace of 37 MiB, which nobody predicts, must not be most of convnext.
NUM_SAMPLES = dict.fromkeys(MODELS, 8) | {"convnext_tiny": 24}
# With the number of micro-batches.
CASES = [*((name, 1) for name in MODELS), ("efficientnet_b0", 2)]


def batch_of(name: str) -> dict[str, torch.Tensor]:
    num_samples = NUM_SAMPLES[name]
    return {"image": torch.zeros(num_samples, 3, 64, 64), "label": torch.zeros(num_samples, dtype=torch.long)}


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch["image"]), batch["label"])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, foreach=True)
