"""Models by name, weights to start from, and heads that fit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train, WriteConfig, few
from run_results import identical, tensors
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision import models

from trainer.config_model import ModelConfig
from trainer.errors import UserError
from trainer.model import build_model, may_download
from trainer.weights import load_weights

CLASSIFIERS = models.list_models(module=models)
FAMILIES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d"),
    *("shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vit_b_16", "wide_resnet50_2"),
)


def build(name: str, num_classes: int | None = None, weights: Path | str | None = None, **args: Any) -> Any:
    return build_model(ModelConfig(name=name, args=args, weights=weights and str(weights)), num_classes)


@pytest.mark.usefixtures("regnets_on_meta")
@pytest.mark.parametrize("name", few(CLASSIFIERS, *FAMILIES))
def test_every_torchvision_classifier(name: str) -> None:
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


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet18", {"weights": "DEFAULT"}),
        ("lraspp_mobilenet_v3_large", {}),
        ("lraspp_mobilenet_v3_large", {"weights": "DEFAULT"}),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", {}),
    ],
)
def test_torchvision_models_are_built_without_their_weights(
    name: str, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> Any:
        raise OSError("asked the network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    config = ModelConfig(name=name, args=args)
    assert may_download(config)
    with pytest.raises(UserError, match=r"cannot be downloaded: .*asked the network"):
        build_model(config, None)
    with torch.device("meta"):
        fresh = build_model(config, None, is_fresh=True)
        if name.startswith("fasterrcnn"):  # with weights it has what has no statistics to count
            assert not any("num_batches_tracked" in key for key in fresh.state_dict())
    copy = nn.Linear(1, 1)
    copy.load_state_dict({"weight": torch.ones(1, 1), "bias": torch.ones(1)})
    assert copy.weight.item() == 1  # as ever


def test_what_reads_no_weights() -> None:
    for name, args in (("resnet18", {}), ("fcn_resnet50", {"weights_backbone": None}), ("small_cnn", {})):
        assert not may_download(ModelConfig(name=name, args=args))


def test_number_of_classes_comes_from_the_data_unless_set() -> None:
    assert build("resnet18", num_classes=7).fc.out_features == 7
    with_args: Any = build_model(ModelConfig(name="resnet18", args={"num_classes": 9}), 7)
    assert with_args.fc.out_features == 9
    assert build("small_cnn", num_classes=7).head.out_features == 7


def test_models_for_32_pixels() -> None:
    images = torch.randn(2, 3, 32, 32)
    resnet = build("resnet18_cifar", num_classes=7)
    assert resnet(images).shape == (2, 7)
    assert resnet.maxpool(resnet.conv1(images)).shape == (2, 64, 32, 32)  # torchvision's own has 8x8 left here
    fast = build("fast_cnn", num_classes=7, width=24)
    assert fast(images).shape == (2, 7)
    first = fast.groups[0][0]
    assert first.weight.shape == (24, 24, 3, 3)
    values = torch.randn(2, 24, 8, 8)
    assert torch.equal(first(values), values)  # it begins as the identity
    frozen = {name for name, p in fast.named_parameters() if not p.requires_grad}
    assert frozen == {f"groups.{group}.{norm}.weight" for group in range(3) for norm in (2, 5)}


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


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_ema", "state_dict_ema"])
def test_weights_inside_a_training_checkpoint(wrapper: str, tmp_path: Path) -> None:
    source = build("small_cnn", num_classes=10)
    torch.save({wrapper: source.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    same = build("small_cnn", num_classes=10, weights=tmp_path / "w.pth")
    assert torch.equal(same.head.weight, source.head.weight)


@pytest.mark.parametrize("wrapper", [None, "model_ema"])
def test_averages_that_torch_made(wrapper: str | None, tmp_path: Path) -> None:
    """AveragedModel counts beside the model, which torchvision's reference saves as it is."""
    source = build("small_cnn", num_classes=10)
    state = AveragedModel(source).state_dict()  # copies of the source's weights
    torch.save({wrapper: state} if wrapper else state, tmp_path / "w.pth")
    same = build("small_cnn", num_classes=10, weights=tmp_path / "w.pth")
    assert torch.equal(same.head.weight, source.head.weight)


def test_a_files_weights_go_before_its_averages(tmp_path: Path) -> None:
    raw, averaged = build("small_cnn", num_classes=10), build("small_cnn", num_classes=10)
    torch.save({"model_ema": averaged.state_dict(), "model": raw.state_dict()}, tmp_path / "w.pth")
    assert torch.equal(build("small_cnn", num_classes=10, weights=tmp_path / "w.pth").head.weight, raw.head.weight)


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
        (lambda s: s.update({0: torch.zeros(1)}), "is not a state dict"),
        (lambda s: [s.pop("head.bias"), s.update({"extra": torch.zeros(1)})], "lacks head.bias\n.*has unknown extra"),
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


def states(file: Path, change: Any) -> dict[str, Any]:
    """Writes small_cnn's weights after a change, and returns them as they were."""
    state = build("small_cnn", num_classes=10).state_dict()
    before = dict(state)
    torch.save(change(state) or state, file)
    return before


def lenient(file: Path, **args: Any) -> Any:
    config = ModelConfig(name="small_cnn", args=args, weights=str(file), weights_strict=False)
    return build_model(config, 10)


def test_the_report_counts_and_lists_each_kind(tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        for i in range(12):
            state[f"old.{i}"] = torch.zeros(1)
        for name in ("features.0.0.weight", "features.1.0.weight", "head.weight"):
            state[name] = torch.zeros(1, 2)
        for name in [name for name in state if name.startswith(("features.2", "features.3", "features.0.1"))]:
            del state[name]

    states(tmp_path / "w.pt", change)
    with pytest.raises(UserError) as info:
        build("small_cnn", num_classes=10, weights=tmp_path / "w.pt")
    missing, unexpected, shapes = (problem.message for problem in info.value.problems)
    assert "lacks 8 tensors: features.0.1.weight, features.0.1.bias, features.2.0.weight, " in missing
    assert "has unknown 12 tensors: old.0, old.1, " in unexpected
    assert "old.9 and 2 more" in unexpected
    assert "old.10" not in unexpected
    assert "2 tensors: features.0.0.weight is [1, 2], the model has [32, 1, 3, 3], features.1.0.weight" in shapes
    assert "head.weight" not in shapes  # a last layer of another size is no mistake
    assert shapes.endswith("weights_strict: false loads what fits")


def test_not_strict_loads_what_fits_and_says_what_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(state: dict[str, Any]) -> None:
        state["extra"] = state.pop("features.1.0.weight")
        state["features.2.0.weight"] = torch.zeros(1)

    before = states(tmp_path / "w.pt", change)
    caplog.set_level(logging.INFO, "lockstep")
    model = lenient(tmp_path / "w.pt")
    assert "12 of 14 tensors loaded" in caplog.text
    assert "lacks features.1.0.weight" in caplog.text
    assert "has unknown extra" in caplog.text
    assert "features.2.0.weight is [1], the model has [64, 32, 3, 3]" in caplog.text
    for name, tensor in model.state_dict().items():
        is_new = name in ("features.1.0.weight", "features.2.0.weight")
        assert torch.equal(tensor, before[name]) != is_new, name


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_that_fits_is_always_an_error(strict: bool, tmp_path: Path) -> None:
    torch.save({"other.weight": torch.zeros(3)}, tmp_path / "w.pt")
    config = ModelConfig(name="small_cnn", weights=str(tmp_path / "w.pt"), weights_strict=strict)
    with pytest.raises(UserError, match="has nothing that fits the model"):
        build_model(config, 10)


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "module._orig_mod."])
def test_what_a_wrapper_put_before_all_names_is_taken_off(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = states(tmp_path / "w.pt", lambda state: {prefix + name: value for name, value in state.items()})
    caplog.set_level(logging.INFO, "lockstep")
    model = build("small_cnn", num_classes=10, weights=tmp_path / "w.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert f"'{prefix}' before all names taken off" in caplog.text


def test_a_models_own_prefix_stays(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)

    first, second = Wrapped(), Wrapped()
    load_weights(second, first.state_dict(), "first")
    assert torch.equal(first.model.weight, second.model.weight)
    load_weights(second, {f"module.{k}": v + 1 for k, v in first.state_dict().items()}, "first")
    assert torch.equal(first.model.weight + 1, second.model.weight)


@pytest.mark.parametrize("ema", [None, {"decay": 0.9}])
def test_weights_of_a_run(
    ema: dict[str, Any] | None,
    train: Train,
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert train("--config", write_config(optim={"name": "adamw", "lr": 0.01, "ema": ema})).code == 0
    monkeypatch.chdir(tmp_path)

    def build_from(weights: str) -> dict[str, torch.Tensor]:
        model = build("mlp", 3, weights, in_features=8, hidden=[16], dropout=0.2)
        return dict(model.state_dict())

    prefix = "ema." if ema else "model."
    newest, older = (tensors(tmp_path / "run", step, prefix) for step in (10, 5))
    assert identical(build_from("run"), newest)
    assert identical(build_from(str(tmp_path / "run" / "checkpoints" / "step-00000010")), newest)
    assert identical(build_from("run/checkpoints/step-00000005"), older)
    assert identical(build_from("run/checkpoints"), newest)
    assert identical(build_from(f"file://{tmp_path}/run/checkpoints/step-00000005"), older)

    file = tmp_path / "run" / "checkpoints" / "step-00000010" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    caplog.set_level(logging.INFO, "lockstep")
    logging.getLogger("lockstep").propagate = True
    assert identical(build_from("run"), older)
    assert f"weights run: {'averages (EMA)' if ema else 'weights'} of step 5" in caplog.text
    for weights, message in (
        ("run/checkpoints/step-00000010", "rank-00000.safetensors has .* bytes instead of"),
        ("run/checkpoints/best/none", "no such file"),
        (".", "is neither a run folder nor a checkpoint"),
    ):
        with pytest.raises(UserError, match=message) as info:
            build_from(weights)
        assert info.value.problems[0].path == "model.weights"
    (tmp_path / "run" / "config.yaml").write_text("[")
    with pytest.raises(UserError, match="cannot read 'run'"):
        build_from("run")


def test_a_run_starts_from_another(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    assert train("--config", write_config()).code == 0
    optim = {"name": "sgd", "lr": 1e-30}
    second = write_config("b.yaml", run__dir=str(tmp_path / "b"), model__weights=str(tmp_path / "run"), optim=optim)
    code, out, _ = train("--config", second)
    assert code == 0
    assert "checkpoints/step-00000010: weights of step 10" in out  # and not what may be the newest on another rank
    assert identical(tensors(tmp_path / "b", 10, "model."), tensors(tmp_path / "run", 10, "model."))
    assert f"weights: {tmp_path / 'run'}\n" in (tmp_path / "b" / "config.yaml").read_text()
