"""Small models of the project's own, for small images and for tests. Large ones come from torchvision."""

from __future__ import annotations

import itertools

import torch
from torch import nn


class SmallCNN(nn.Module):
    """A convolutional network for images of 8 to 64 pixels: (B, in_channels, H, W) -> logits (B, num_classes).

    Four 3x3 convolutions with GroupNorm and GELU, halving the image once, then global average pooling. No
    BatchNorm, so a sample's output does not depend on which samples share its device.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        width: channels of the first layers; a multiple of 8.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, width: int = 32) -> None:
        super().__init__()
        if width < 8 or width % 8:
            raise ValueError(f"width must be a multiple of 8 (got {width})")
        self.features = nn.Sequential(
            _conv(in_channels, width),
            _conv(width, width),
            _conv(width, 2 * width, stride=2),
            _conv(2 * width, 2 * width),
        )
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images).mean(dim=(2, 3)))


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(out_channels // 8, out_channels),
        nn.GELU(),
    )


class MLP(nn.Module):
    """A multi-layer perceptron on flattened inputs: (B, ...) -> (B, num_classes).

    Args:
        num_classes: number of outputs.
        in_features: values per sample after flattening.
        hidden: widths of the hidden layers.
        dropout: dropout after every hidden layer.
    """

    def __init__(
        self, num_classes: int, in_features: int, hidden: tuple[int, ...] = (64,), dropout: float = 0.0
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], num_classes))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)
