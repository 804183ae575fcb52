"""Averages of the weights: their numbers, the swap, and that a run keeps and evaluates them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from conftest import Train, WriteConfig, forget_accelerate, tiny_config
from resuming import interrupted
from run_results import checkpoint, identical, losses, records, tensors, weights
from safetensors.torch import load_file
from torch import nn

from trainer import results
from trainer.config_model import EmaConfig
from trainer.ema import Ema

EMA = {"name": "adamw", "lr": 0.01, "ema": {"decay": 0.9}}


def moved(model: nn.Module, step: int) -> None:
    """Stands for an optimizer's step."""
    torch.manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("warmup", [True, False, "timm"])
def test_against_a_loop_by_hand(warmup: bool | Literal["timm"], every: int) -> None:
    model = nn.Linear(4, 3).double()
    ema = Ema(model, EmaConfig(decay=0.6, warmup=warmup, every=every))
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    num_updates = 0
    for step in range(1, 31):
        moved(model, step)
        ema.update(step)
        if step % every == 0:
            num_updates += 1
            most = {True: (1 + num_updates) / (10 + num_updates), "timm": 1 - num_updates ** (-2 / 3)}
            kept = min(0.6, most.get(warmup, float(num_updates > 1)))
            for name, parameter in model.named_parameters():
                expected[name] = kept * expected[name] + (1 - kept) * parameter.detach()
        for name, average in ema.averages.items():
            assert torch.allclose(average, expected[name], rtol=1e-12, atol=1e-12), (step, name)
    assert num_updates == 30 // every


@pytest.mark.parametrize(("step", "decay"), [(1, 2 / 11), (9, 10 / 19), (10**6, 0.999)])
def test_warmup_is_a_function_of_the_step(step: int, decay: float) -> None:
    assert Ema(nn.Linear(1, 1), EmaConfig(decay=0.999)).decay(step) == pytest.approx(decay)
    assert Ema(nn.Linear(1, 1), EmaConfig(decay=0.999, warmup=False)).decay(step) == (0.999 if step > 1 else 0.0)


def test_swapped_in_and_back_bit_for_bit() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    ema = Ema(model, EmaConfig(decay=0.9))
    model(torch.randn(8, 4))
    moved(model, 1)
    ema.update(1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    averages = {name: average.clone() for name, average in ema.averages.items()}
    objects = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with ema.swapped_in():
        inside = dict(model.state_dict())
        assert identical({name: inside[name] for name in averages}, averages)
        assert all(torch.equal(inside[name], state[name]) for name in state.keys() - averages.keys())
    with pytest.raises(ZeroDivisionError), ema.swapped_in():  # whatever happens in an evaluation
        raise ZeroDivisionError
    assert identical(dict(model.state_dict()), state)
    assert identical(ema.averages, averages)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == objects


def test_averages_of_bfloat16_weights_have_more_bits() -> None:
    """In bfloat16 the average of a weight that moved from 1 to 2 would stay at 1 for good."""
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4))
    ema = Ema(model, EmaConfig(decay=0.9998, warmup=False))
    assert {average.dtype for average in ema.averages.values()} == {torch.float32}
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    for step in range(2, 302):  # the first update would take the weights as they are
        if step == 2:
            moved(model, step)
        ema.update(step)
        for name, parameter in model.named_parameters():
            expected[name] += 0.0002 * (parameter.detach().double() - expected[name])
    for name, average in ema.averages.items():
        assert torch.allclose(average.double(), expected[name], rtol=1e-4, atol=1e-5), name

    state = {name: value.clone() for name, value in model.state_dict().items()}
    averages = {name: average.clone() for name, average in ema.averages.items()}
    with ema.swapped_in():
        inside = {name: value.clone() for name, value in model.state_dict().items()}
    assert identical(inside, {name: average.to(state[name].dtype) for name, average in averages.items()})
    assert identical(dict(model.state_dict()), state)
    assert identical(ema.averages, averages)  # not what went through bfloat16


def test_a_bfloat16_run_with_averages(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    interrupted(train, write_config, tmp_path, 61, optim=EMA, model__dtype="bfloat16", precision="bf16")
    averages = tensors(tmp_path / "run", 10, "ema.")
    assert {average.dtype for average in averages.values()} == {torch.float32}
    assert identical(averages, tensors(tmp_path / "whole", 10, "ema."))
    evaluated = [r["eval/loss"] for r in records(tmp_path / "run") if "eval/loss" in r]
    forget_accelerate()
    assert results.evaluate(tmp_path / "run", best=False)["loss"] == evaluated[-1]
    forget_accelerate()
    results.export(tmp_path / "run", "safetensors", tmp_path / "w.safetensors", best=False)
    assert identical(load_file(tmp_path / "w.safetensors"), averages)


def test_tied_and_frozen_weights() -> None:
    a, b, frozen = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
    b.weight = a.weight
    model = nn.ModuleDict({"a": a, "b": b, "frozen": frozen})
    ema = Ema(model, EmaConfig(decay=0.5, warmup=False))
    assert ema.averages.keys() == {"a.weight", "a.bias", "b.weight", "b.bias"}
    before = a.weight.detach().clone()
    moved(model, 2)
    ema.update(2)
    expected = (before + a.weight.detach()) / 2  # updated once, although it has two names
    assert torch.allclose(ema.averages["a.weight"], expected)
    assert torch.equal(ema.averages["b.weight"], ema.averages["a.weight"])


def test_a_run_evaluates_its_averages_and_trains_as_without(
    train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    plain = write_config("plain.yaml", run__dir=str(tmp_path / "plain"))
    assert train("--config", plain).code == 0
    assert train("--config", write_config(optim=EMA)).code == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert identical(weights(tmp_path / "run", 10), weights(tmp_path / "plain", 10))
    evaluations = [[r["eval/loss"] for r in records(tmp_path / n) if "eval/loss" in r] for n in ("run", "plain")]
    assert evaluations[0] != evaluations[1]
    for kind, expected in (("ema", evaluations[0][-1]), ("raw", evaluations[1][-1])):
        forget_accelerate()
        found = results.evaluate(tmp_path / "run", best=False, kind=kind)  # type: ignore[arg-type]
        assert found["loss"] == expected


def test_a_runs_averages_are_those_of_its_weights(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    """From the checkpoints of all steps. Nothing is known of step 0, so from the average of step 1."""
    optim = {**EMA, "ema": {"decay": 0.5, "warmup": False}}
    assert train("--config", write_config(optim=optim, checkpoint={"every": 1, "keep": 99})).code == 0
    average = tensors(tmp_path / "run", 1, "ema.")
    for step in range(2, 11):
        for name, weight in weights(tmp_path / "run", step).items():
            average[name] = (average[name] + weight) / 2
        found = tensors(tmp_path / "run", step, "ema.")
        assert all(torch.allclose(found[name], average[name], rtol=1e-5, atol=1e-7) for name in average)


@pytest.mark.parametrize("ema", [{"decay": 0.9}, {"decay": 0.9, "every": 4, "warmup": False}], ids=["1", "4"])
def test_bit_for_bit_over_an_interruption(
    ema: dict[str, Any], train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    interrupted(train, write_config, tmp_path, 61, optim={**EMA, "ema": ema})
    for prefix in ("ema.", "model."):
        assert identical(tensors(tmp_path / "run", 10, prefix), tensors(tmp_path / "whole", 10, prefix))
    assert tensors(tmp_path / "run", 10, "ema.")


def test_batchnorm_statistics_are_the_models(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", optim=EMA)
    data = {"name": "synthetic", "args": {"num_samples": 12, "shape": [3, 32, 32], "num_classes": 3}}
    config["data"] |= {"train": data, "eval": data}
    config["model"] = {"name": "odd_outputs:Normed"}
    config["train"] = {"steps": 2, "batch_size": 6}
    file = write_config()
    file.write_text(yaml.safe_dump(config))
    assert train("--config", file).code == 0
    names = set(checkpoint(tmp_path / "run", 2).names("ema."))
    assert "1.weight" in names
    assert not any("running" in name for name in names)
    forget_accelerate()
    results.export(tmp_path / "run", "state_dict", tmp_path / "w.pt", best=False)
    exported = torch.load(tmp_path / "w.pt", weights_only=True)
    expected = weights(tmp_path / "run", 2) | tensors(tmp_path / "run", 2, "ema.")
    assert identical(exported, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": 1.0}, "optim.ema.decay: must be less than 1"),
        ({"decay": 0.0}, "optim.ema.decay: must be greater than 0"),
        ({"decay": "0.9"}, "optim.ema.decay: must be"),
        ({}, "optim.ema.decay: required, but not set"),
        ({"decay": 0.9, "every": 0}, "optim.ema.every: must be greater than or equal to 1"),
        ({"decay": 0.9, "warmup": 5}, "optim.ema.warmup: must be"),
        ({"decay": 0.9, "evry": 2}, "optim.ema.evry: unknown key; did you mean 'every'?"),
    ],
)
def test_refused_values(change: dict[str, Any], message: str, train: Train, write_config: WriteConfig) -> None:
    code, _, err = train("--config", write_config(optim={"name": "sgd", "lr": 0.1, "ema": change}))
    assert code == 2
    assert message in err


def test_begun_and_ended_in_a_run(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    """Once it is allowed: the averages start from the weights of then, and may be dropped again."""
    run = tmp_path / "run"
    kept = {"checkpoint": {"every": 1, "keep": 99, "allow_changes": ["optim.ema"]}}
    assert train("--config", write_config(**kept)).code == 0
    assert train("--config", write_config(train__epochs=3, optim__ema={"decay": 0.9}, **kept)).code == 0
    expected = weights(run, 10)
    for step in range(11, 16):
        share = 1 - min(0.9, (1 + step) / (10 + step))
        expected = {name: value.lerp(weights(run, step)[name], share) for name, value in expected.items()}
    assert identical(tensors(run, 15, "ema."), expected)
    assert train("--config", write_config(train__epochs=4, **kept)).code == 0
    assert not tensors(run, 20, "ema.")
