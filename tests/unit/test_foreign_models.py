"""Models of timm and of transformers, small ones built without their weights."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train, WriteConfig, nightly
from torch import nn

from launch import plan
from trainer.assembly import class_count
from trainer.config import load_config
from trainer.config_model import ModelConfig
from trainer.errors import UserError
from trainer.memory.blocks import repeated_blocks
from trainer.model import build_model

pytest.importorskip("timm")

VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}


def build(name: str, num_classes: int | None = None, is_fresh: bool = False, **args: Any) -> Any:
    return build_model(ModelConfig(name=name, args=args), num_classes, is_fresh)


def message(name: str, **args: Any) -> tuple[str, str]:
    with pytest.raises(UserError) as info:
        build(name, **args)
    (problem,) = info.value.problems
    return problem.path, problem.message


# ---- timm ----------------------------------------------------------------------------------------------------------


def test_timm_takes_its_classes_from_the_data_unless_set() -> None:
    assert build("timm:test_resnet", num_classes=7).num_classes == 7
    assert build("timm:test_resnet.r160_in1k", num_classes=7, in_chans=1)(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    with_args: Any = build_model(ModelConfig(name="timm:test_resnet", args={"num_classes": 9}), 7)
    assert with_args.num_classes == 9


def test_timm_names_that_are_none() -> None:
    assert message("timm:resnet5O") == ("model.name", "timm has no model 'resnet5O'; did you mean 'resnet50'?")
    assert "Invalid pretrained tag" in message("timm:test_resnet.nope")[1]
    assert "unexpected keyword argument 'drp'" in message("timm:test_vit", drp=0.1)[1]


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path, text = message("timm:test_resnet", pretrained=True)
    assert path == "model"
    assert text.startswith("its weights are not on this machine and cannot be downloaded: ")
    assert "\n" not in text
    assert message("timm:hf-hub:nobody/nothing")[1].startswith("its weights are not on this machine and cannot")
    assert isinstance(build("timm:test_resnet", is_fresh=True, pretrained=True), nn.Module)


@pytest.mark.parametrize(("package", "name"), [("timm", "timm:resnet50"), ("transformers", "transformers:ViTModel")])
def test_a_package_that_is_missing(package: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    extra = {"timm": "timm", "transformers": "huggingface"}[package]
    assert message(name) == ("model.name", f"no module '{package}': pip install 'lockstep-trainer[{extra}]'")


# ---- transformers --------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers")


@nightly
def test_transformers_take_their_classes_from_the_data_unless_set(transformers: Any) -> None:
    name = "transformers:ViTForImageClassification"
    assert build(name, num_classes=7, **VIT).config.num_labels == 7
    assert build(name, num_classes=7, num_labels=9, **VIT).config.num_labels == 9
    assert build("transformers:GPT2LMHeadModel", num_classes=320, **GPT2).config.vocab_size == 320


SCORER = "transformers:GPT2ForSequenceClassification"
GPT2_MODEL = "transformers:GPT2LMHeadModel"
SIZES = {"vocab_size": 8000}


@pytest.mark.parametrize(
    ("task", "name", "args", "expected"),
    [
        ("classification", SCORER, SIZES, 3),  # those of the data
        ("classification", SCORER, {**SIZES, "num_labels": 5}, 5),
        ("own:Task", SCORER, SIZES, 3),
        ("classification", "own:model", SIZES, 3),
        ("own:Task", GPT2_MODEL, SIZES, 8000),
        ("language_model", GPT2_MODEL, SIZES, 8000),
        ("language_model", "own:model", SIZES, 8000),
    ],
)
def test_tokens_are_classes_to_language_models_only(
    transformers: Any, task: str, name: str, args: dict[str, int], expected: int, write_config: WriteConfig
) -> None:
    class Data:
        classes = ("bad", "good", "so so")

    file = write_config(task__name=task, model={"name": name, "args": args})
    assert class_count(load_config(str(file)), Data()) == expected  # type: ignore[arg-type]


def test_a_text_whose_tokens_are_no_classes(write_config: WriteConfig) -> None:
    class Text:
        vocab_size = 8000

    for task, expected in (("classification", None), ("language_model", 8000)):
        file = write_config(task__name=task, model={"name": "small_cnn"})
        assert class_count(load_config(str(file)), Text()) == expected  # type: ignore[arg-type]


def test_a_language_model_of_transformers(transformers: Any) -> None:
    model = build("transformers:GPT2LMHeadModel", vocab_size=30, **GPT2)
    assert model(torch.zeros(3, 16, dtype=torch.int64)).logits.shape == (3, 16, 30)
    assert model.config.use_cache is False
    assert list(repeated_blocks(model)) == ["transformer.h.0", "transformer.h.1"]
    text = "GPT2Config has no 'n_layers'; did you mean 'n_layer'?"
    assert message("transformers:GPT2LMHeadModel", n_layers=3) == ("model.args.n_layers", text)


def test_auto_classes_are_asked_for_weights_by_name(transformers: Any) -> None:
    name = "transformers:AutoModelForImageClassification"
    assert message(name, num_labels=3) == ("model.name", f"write '{name}.from_pretrained'")
    path, text = message(f"{name}.from_pretrained", num_labels=3)
    assert path == "model.args"
    assert text == "name a folder or a model of the Hub as pretrained_model_name_or_path"


@nightly
def test_from_pretrained_is_called_as_it_is(transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = build("transformers:ViTForImageClassification", num_labels=5, **VIT)
    saved.bfloat16().save_pretrained(tmp_path)
    name = "transformers:AutoModelForImageClassification.from_pretrained"
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(tmp_path)}
    model = build(name, **where)
    assert model.classifier.weight.dtype == torch.float32
    assert torch.equal(model.classifier.weight, saved.classifier.weight.float())
    fresh = build(name, is_fresh=True, **where)
    assert fresh.classifier.weight.shape == model.classifier.weight.shape
    assert not torch.equal(fresh.classifier.weight, model.classifier.weight)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = message(name, pretrained_model_name_or_path="nobody/nothing")[1]
    assert text.startswith("its weights are not on this machine")


# ---- whole runs ----------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "timm:test_vit": {"args": {"in_chans": 1, "img_size": 8, "patch_size": 4}},
    "timm:test_resnet": {"args": {"in_chans": 1}},
    "transformers:ViTForImageClassification": {"args": VIT},
}


DIGITS = {
    "train": {"name": "digits", "args": {"split": "eval"}},
    "eval": {"name": "digits", "args": {"split": "eval"}},
    "workers": 0,
}


@nightly
@pytest.mark.parametrize("name", MODELS)
def test_they_are_planned(name: str, write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    memory = {"checkpointing": "full"}
    file = write_config(data=DIGITS, model={"name": name, **MODELS[name]}, memory=memory)
    assert plan.run(load_config(str(file)), "h100-80g", 2) == plan.FITS
    assert re.search(r"[1-9]\d* repeated blocks", capsys.readouterr().out)


@nightly
@pytest.mark.parametrize("name", MODELS)
def test_they_train_resume_and_are_exported(name: str, train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    from trainer.results import evaluate, export

    file = write_config(
        data=DIGITS,
        model={"name": name, **MODELS[name]},
        memory={"checkpointing": "full"},
        train={"steps": 4, "batch_size": 8},
        eval={"every": 4, "batch_size": 64},
        checkpoint={"every": 2},
    )
    assert train("--config", file, "train.steps=2").code == 0
    assert train("--config", file, "checkpoint.allow_changes=[train.steps]").code == 0
    run = tmp_path / "run"
    assert evaluate(run, best=False)["step"] == 4
    export(run, "torch_export", tmp_path / "model.pt2", best=False)
    exported = torch.export.load(tmp_path / "model.pt2").module()
    assert exported(torch.zeros(5, 1, 8, 8)).shape == (5, 10)
