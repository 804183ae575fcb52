"""Models with everything that a recomputed forward may get wrong, small enough for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.ops import StochasticDepth

from trainer.memory.checkpointing import Policy

POLICIES: tuple[Policy, ...] = ("none", "selective", "full")


class UsersBlock(nn.Module):
    """Dropout, BatchNorm, spectral norm of the old style, and a buffer that is read and written in forward."""

    scale: torch.Tensor
    last: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = nn.utils.spectral_norm(nn.Linear(width, 2 * width))
        self.norm = nn.BatchNorm1d(2 * width)
        self.act = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.3)
        self.after = nn.utils.parametrizations.spectral_norm(nn.Linear(2 * width, width))
        self.average = nn.BatchNorm1d(width, momentum=None)
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("last", torch.zeros(width))

    def forward(self, inputs: torch.Tensor, *, gain: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.after(self.dropout(self.act(self.norm(self.before(inputs)))))
        if self.training:
            with torch.no_grad():
                self.scale.mul_(0.9).add_(hidden.abs().mean(0), alpha=0.1)
            self.last = 0.5 * self.last + hidden.detach().mean(0)  # replaced, not changed
        hidden = self.average(hidden) * self.scale.clone() + self.last
        return inputs + (hidden if gain is None else hidden * gain)


class UsersModel(nn.Module):
    """Blocks one deeper in stages; one of them is used twice."""

    def __init__(self, width: int = 8, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Linear(3, width)
        self.stages = nn.ModuleList(nn.ModuleList([UsersBlock(width), UsersBlock(width)]) for _ in range(2))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(images.mean(dim=(2, 3)))
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                hidden = block(hidden)
        hidden = self.stages[0][0](hidden, gain=hidden.sigmoid())  # type: ignore[index]
        return self.head(hidden)


def _with(constructor: Callable[..., nn.Module], **settings: Any) -> Callable[..., nn.Module]:
    """Turns on what is random, also inside torchvision's models that take no argument for it."""

    def build(**args: Any) -> nn.Module:
        model = constructor(**settings, **args)
        for module in model.modules():
            if isinstance(module, StochasticDepth):
                module.p = 0.4
            elif isinstance(module, ShiftedWindowAttention):
                module.attention_dropout = module.dropout = 0.1
            if isinstance(module, nn.Linear) and not module.weight.any():  # ViT's head: no gradients below zeros
                nn.init.normal_(module.weight, std=0.1)
        return model

    return build


# Each with the side of its images.
MODELS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "resnet50": (models.resnet50, 48),
    "convnext_tiny": (_with(models.convnext_tiny), 32),
    "vit_b_16": (_with(models.vit_b_16, image_size=32, dropout=0.1, attention_dropout=0.1), 32),
    "swin_t": (_with(models.swin_t), 32),
    "efficientnet_b0": (_with(models.efficientnet_b0), 64),
    "users": (UsersModel, 8),
}


def build(name: str, short: bool = False) -> nn.Module:
    """Returns the model in training mode, always with the same values; `short` leaves out most of ViT's layers."""
    torch.manual_seed(0)
    constructor = MODELS[name][0]
    if short and name == "vit_b_16":
        sizes = {"patch_size": 16, "num_layers": 4, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072}
        constructor = _with(models.VisionTransformer, image_size=32, dropout=0.1, attention_dropout=0.1, **sizes)
    return constructor(num_classes=10).train()


def images(name: str, num: int, seed: int) -> torch.Tensor:
    size = MODELS[name][1]
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(seed))


def mixed(names: list[str]) -> dict[str, Policy]:
    """A policy for each block, as a solver would give them: all sorts, in no regular order."""
    return {name: POLICIES[(position * 7 // 3) % 3] for position, name in enumerate(names)}
