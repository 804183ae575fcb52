"""Models by name, weights to start from, and heads that fit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.models.regnet import BlockParams

from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.model import build_model

CLASSIFIERS = models.list_models(module=models)


def build(name: str, num_classes: int | None = None, weights: Path | str | None = None, **args: Any) -> Any:
    return build_model(ModelConfig(name=name, args=args, weights=weights and str(weights)), num_classes)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_torchvision_classifier(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):  # RegNet computes its layer widths with tensors
            return from_init_params(*args, **kwargs)

    from_init_params = BlockParams.from_init_params
    monkeypatch.setattr(BlockParams, "from_init_params", on_the_cpu)
    with torch.device("meta"):
        model = build(name, num_classes=7)
        size = 299 if name == "inception_v3" else 224
        assert model.train()(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_there_are_many_classifiers() -> None:
    assert len(CLASSIFIERS) >= 80


@pytest.mark.parametrize(
    "name", ["fcn_resnet50", "fasterrcnn_resnet50_fpn", "r3d_18", "quantized_resnet18", "raft_small"]
)
def test_other_torchvision_models_build_by_name(name: str) -> None:
    args = {"weights_backbone": None} if name.startswith(("fcn", "fasterrcnn")) else {}
    assert isinstance(build(name, **args), nn.Module)


def test_number_of_classes_comes_from_the_data_unless_set() -> None:
    assert build("resnet18", num_classes=7).fc.out_features == 7
    with_args: Any = build_model(ModelConfig(name="resnet18", args={"num_classes": 9}), 7)
    assert with_args.fc.out_features == 9
    assert build("small_cnn", num_classes=7).head.out_features == 7


def test_import_path_is_called_with_args_and_nothing_else() -> None:
    assert isinstance(build("torch.nn:Linear", num_classes=7, in_features=2, out_features=3), nn.Linear)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_from_a_file(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = build("small_cnn", num_classes=10)
    file = tmp_path / f"weights{suffix}"
    save_file(source.state_dict(), file) if suffix == ".safetensors" else torch.save(source.state_dict(), file)
    same = build("small_cnn", num_classes=10, weights=file)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), source.state_dict().values(), strict=True))

    caplog.set_level(logging.INFO, "lockstep")
    other = build("small_cnn", num_classes=4, weights=file)
    assert other.head.out_features == 4
    assert torch.equal(other.features[0][0].weight, source.features[0][0].weight)
    assert "head.weight is new, [4, 64] instead of [10, 64]" in caplog.text
    assert "head.bias is new, [4] instead of [10]" in caplog.text


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_weights_inside_a_training_checkpoint(wrapper: str, tmp_path: Path) -> None:
    source = build("small_cnn", num_classes=10)
    torch.save({wrapper: source.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    same = build("small_cnn", num_classes=10, weights=tmp_path / "w.pth")
    assert torch.equal(same.head.weight, source.head.weight)


def test_torchvision_weights_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real download code, with a file already in torch's cache where a download would put it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    source = models.resnet18(num_classes=1000)
    torch.save(source.state_dict(), cache / Path(models.ResNet18_Weights.IMAGENET1K_V1.url).name)
    for name in ("IMAGENET1K_V1", "DEFAULT"):
        model = build("resnet18", num_classes=3, weights=name)
        assert torch.equal(model.conv1.weight, source.conv1.weight)
        assert model.fc.out_features == 3
    assert torch.equal(build("resnet18", weights="DEFAULT").fc.weight, source.fc.weight)
    with pytest.raises(UserError, match="has no weights 'IMAGENET1K_V2'; did you mean 'IMAGENET1K_V1'"):
        build("resnet18", weights="IMAGENET1K_V2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("head.bias"), "lacks head.bias"),
        (lambda s: s.update({"extra": torch.zeros(1)}), "has unknown extra"),
        (lambda s: s.update({"features.0.0.weight": torch.zeros(1)}), "features.0.0.weight is \\[1\\], the model has"),
        (lambda s: s.clear(), "is not a state dict"),
    ],
)
def test_weights_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    state = build("small_cnn", num_classes=10).state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=message) as info:
        build("small_cnn", num_classes=10, weights=tmp_path / "w.pt")
    assert info.value.problems[0].path == "model.weights"


def test_a_file_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"w": Trap()}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="cannot read"):
        build("small_cnn", num_classes=10, weights=tmp_path / "w.pt")
    assert not (tmp_path / "sprung").exists()
