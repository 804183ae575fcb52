"""Small models of the project's own, for small images and for tests. Large ones come from torchvision."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torchvision.models import ResNet, resnet18


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


def resnet18_cifar(num_classes: int = 10) -> ResNet:
    """torchvision's ResNet-18 for images of 32 pixels: (B, 3, H, W) -> logits (B, num_classes).

    It begins with one 3x3 convolution of stride 1 and no pooling, as in section 4.2 of https://arxiv.org/abs/1512.03385.
    """
    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


class FastCNN(nn.Module):
    """A shallow, wide network that learns images of 32 pixels in few epochs: (B, 3, H, W) -> logits (B, num_classes).

    A 2x2 convolution, then three groups of convolution, pooling, BatchNorm, GELU, convolution, BatchNorm, GELU, the
    largest value of each channel, and a linear layer whose logits are scaled down. The layers are those of airbench94
    (https://arxiv.org/abs/2404.00498, section 3), without its whitened first layer; BatchNorm has no scale, and the
    convolutions of a group begin as the identity as far as their channels go.

    Args:
        num_classes: number of logits.
        width: channels of the first group; the others have four times as many.
        logit_scale: what logits are multiplied by.
    """

    def __init__(self, num_classes: int = 10, width: int = 64, logit_scale: float = 1 / 9) -> None:
        super().__init__()
        self.logit_scale = logit_scale
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 2), nn.GELU())
        self.groups = nn.Sequential(_fast(24, width), _fast(width, 4 * width), _fast(4 * width, 4 * width))
        self.head = nn.Linear(4 * width, num_classes, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.groups(self.stem(images)).amax(dim=(2, 3))) * self.logit_scale


def _fast(in_channels: int, out_channels: int) -> nn.Sequential:
    convolutions = [nn.Conv2d(before, out_channels, 3, padding=1, bias=False) for before in (in_channels, out_channels)]
    norms = [nn.BatchNorm2d(out_channels) for _ in convolutions]
    for convolution, norm in zip(convolutions, norms, strict=True):
        nn.init.dirac_(convolution.weight[: convolution.in_channels])
        norm.weight.requires_grad = False
    first, second = convolutions
    return nn.Sequential(first, nn.MaxPool2d(2), norms[0], nn.GELU(), second, norms[1], nn.GELU())


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
