"""A data set and a model for segmentation, named by import path as a user's own would be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Segments:
    """Item i: a picture (3, 12, 10) and its mask (12, 10), both bytes, of which i % 5 fifths are ignored.

    So batches, and what ranks have of them, differ in how many pixels count; some have none.
    """

    classes = ["ground", "box", "disc"]

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 12, 10), dtype=torch.uint8, generator=generator)
        mask = torch.randint(0, 3, (12, 10), dtype=torch.uint8, generator=generator)
        mask[:, : 2 * (index % 6)] = 255
        return image, mask


class SmallSegmenter(nn.Module):
    """Convolutions with GroupNorm, so that samples of a batch do not meet: (B, 3, H, W) -> {"out": logits, "aux": ...}.

    Args:
        num_classes: number of logits per pixel.
        aux: whether there is an auxiliary head.
    """

    def __init__(self, num_classes: int = 3, aux: bool = False) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(16, 16, 5, padding=2), nn.GroupNorm(4, 16), nn.ReLU())
        self.head = nn.Conv2d(16, num_classes, 1)
        self.aux_head = nn.Conv2d(16, num_classes, 1) if aux else None

    def forward(self, images: torch.Tensor) -> dict[str, Any]:
        features = self.body(images)
        found = {"out": self.head(features)}
        return found if self.aux_head is None else {**found, "aux": self.aux_head(features)}


class OnlyTheInput:
    """A transform that does not take targets."""

    def __call__(self, image: Any) -> Any:
        return image


class ForgetsTheTarget:
    """A transform that takes both and returns one."""

    def __call__(self, image: Any, target: Any) -> Any:
        return image


class Turned:
    """A transform of a user's own, that changes both."""

    def __call__(self, image: Any, target: Any) -> Any:
        return image.flip(-1), target.flip(-1)
