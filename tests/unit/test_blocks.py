"""Which modules of a model are its blocks."""

from __future__ import annotations

import collections

import pytest
import torch
from checkpointed_models import UsersModel
from torch import nn
from torchvision import models

from trainer.errors import UserError
from trainer.memory.blocks import repeated_blocks
from trainer.small_models import SmallCNN


@pytest.mark.usefixtures("regnets_on_meta")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", {"BasicBlock": 8}),
        ("resnet50", {"Bottleneck": 16}),
        ("convnext_tiny", {"CNBlock": 18}),
        ("vit_b_16", {"EncoderBlock": 12}),
        ("swin_t", {"SwinTransformerBlock": 12}),
        ("swin_v2_t", {"SwinTransformerBlockV2": 12}),
        ("efficientnet_b0", {"MBConv": 16}),
        ("efficientnet_v2_s", {"FusedMBConv": 10, "MBConv": 30}),
        ("mobilenet_v2", {"InvertedResidual": 17}),
        ("mobilenet_v3_small", {"InvertedResidual": 11}),
        ("mnasnet1_0", {"_InvertedResidual": 16}),
        ("shufflenet_v2_x1_0", {"InvertedResidual": 16}),
        ("regnet_y_400mf", {"ResBottleneckBlock": 16}),
        ("densenet121", {"_DenseLayer": 58}),
        ("squeezenet1_0", {"Fire": 8}),
        ("inception_v3", {"InceptionA": 3, "InceptionC": 4, "InceptionE": 2}),
        ("maxvit_t", {"MaxVitLayer": 11}),
        ("vgg11_bn", {}),
        ("alexnet", {}),
    ],
)
def test_torchvision(name: str, expected: dict[str, int]) -> None:
    with torch.device("meta"):
        model = models.get_model(name, **({"init_weights": False} if name == "inception_v3" else {}))
    blocks = repeated_blocks(model)
    assert dict(collections.Counter(type(block).__name__ for block in blocks.values())) == expected
    assert all(model.get_submodule(key) is block for key, block in blocks.items())
    order = {key: position for position, (key, _) in enumerate(model.named_modules())}
    assert list(blocks) == sorted(blocks, key=order.__getitem__)


class Feed(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(inputs))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.value(inputs)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head() for _ in range(2))
        self.out = nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([head(inputs) for head in self.heads], -1))


class Layer(nn.Module):
    """A transformer's layer: what it holds is repeated as well, but inside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed, self.norm = Heads(), Feed(), nn.LayerNorm(4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.feed(self.attention(self.norm(inputs)))


class MixtureLayer(nn.Module):
    """A layer with a list of its own: not a stage of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1)
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(Feed() for _ in range(3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.experts[0](inputs)


class Stage(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.downsample = nn.Linear(4, 4)
        self.blocks = nn.Sequential(*(Layer() for _ in range(depth)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.downsample(inputs))


class ConvNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(inputs))


class SequentialBlock(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(ConvNorm(), nn.ReLU(inplace=True), ConvNorm())


class Holder(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Linear(4, 4), Layer(), Layer(), nn.Linear(4, 4)), ["1", "2"]),
        (Holder(stem=Feed(), layers=nn.ModuleList([Layer(), Layer()])), ["layers.0", "layers.1"]),
        (Holder(stages=nn.ModuleList([Stage(1), Stage(2)])), ["0.blocks.0", "1.blocks.0", "1.blocks.1"]),
        (Holder(body=Holder(a=Layer(), b=Layer()), head=nn.Linear(4, 4)), ["body.a", "body.b"]),
        (nn.Sequential(MixtureLayer(), MixtureLayer()), ["0", "1"]),
        (nn.ModuleDict({"x": SequentialBlock(), "y": SequentialBlock(), "z": ConvNorm()}), ["x", "y"]),
        (nn.Sequential(ConvNorm(), ConvNorm(), nn.Conv2d(3, 3, 3)), ["0", "1"]),
        (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 3, enable_nested_tensor=False),
            ["layers.0", "layers.1", "layers.2"],
        ),
        (nn.Transformer(4, 2, 1, 2, 8, batch_first=True), ["decoder.layers.0", "decoder.layers.1"]),
        (UsersModel(), ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]),
        (SmallCNN(10), ["features.0", "features.1", "features.2", "features.3"]),
        (nn.Linear(4, 4), []),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), []),
    ],
)
def test_models_of_all_sorts(model: nn.Module, expected: list[str]) -> None:
    found = [name.removeprefix("stages.") if "blocks" in name else name for name in repeated_blocks(model)]
    assert found == expected


def test_a_shared_block_is_one() -> None:
    layer = Layer()
    assert repeated_blocks(Holder(layers=nn.ModuleList([layer, layer, Layer()]))).keys() == {"layers.0", "layers.2"}
    assert repeated_blocks(Holder(layers=nn.ModuleList([layer] * 4))) == {"layers.0": layer}
    assert repeated_blocks(Holder(layers=nn.ModuleList([layer] * 4)), ["layers.*"]) == {"layers.0": layer}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["layer3.*"], [f"layer3.{i}" for i in range(6)]),
        (["layer3", "layer4.1"], ["layer3", "layer4.1"]),
        (["layer4.1", "layer[12]"], ["layer1", "layer2", "layer4.1"]),
        (["Bottleneck"], [f"layer{i + 1}.{j}" for i, depth in enumerate((3, 4, 6, 3)) for j in range(depth)]),
        (["layer1.?.conv2"], ["layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2"]),
        (["layer4.0.*", "layer4.0"], ["layer4.0"]),
    ],
)
def test_patterns(patterns: list[str], expected: list[str]) -> None:
    with torch.device("meta"):
        model = models.resnet50()
    assert list(repeated_blocks(model, patterns)) == expected


def test_a_list_of_modules_is_no_block() -> None:
    model = Holder(layers=nn.ModuleList([Layer(), Layer()]))
    assert list(repeated_blocks(model, ["layers*"])) == ["layers.0", "layers.1"]
    with pytest.raises(UserError, match="'layers' matches no module of the model"):
        repeated_blocks(model, ["layers"])


def test_patterns_that_match_nothing() -> None:
    with torch.device("meta"):
        model = models.resnet50()
    with pytest.raises(UserError) as info:
        repeated_blocks(model, ["layer1.0", "Botleneck", "layer5"])
    assert [p.path for p in info.value.problems] == ["memory.blocks"] * 2
    assert [p.message.partition("; ")[2][:20] for p in info.value.problems] == [
        "did you mean 'Bottle",
        "did you mean 'layer4",
    ]
