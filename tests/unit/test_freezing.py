"""Frozen parts of a model: what stays as it is, in which mode, and that everything else goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train, WriteConfig, forget_accelerate
from resuming import assert_same_end, interrupted
from run_results import checkpoint, identical, losses, optimizer_state, tensors, weights
from safetensors.torch import load_file
from torch import nn

from trainer import results
from trainer.config import load_config
from trainer.config_model import ModelConfig
from trainer.loop import Trainer
from trainer.memory.simulation import simulate_step
from trainer.model import build_model

BLOCKS: dict[str, Any] = {"name": "vectors_model:Blocks", "args": {"depth": 3}}
FROZEN = {**BLOCKS, "freeze": ["stem", "blocks.[01]", "blocks.2.layer"]}
ARE_FROZEN = ("stem.", "blocks.0.", "blocks.1.", "blocks.2.layer.")
EMA = {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "ema": {"decay": 0.5}}


def built(freeze: list[str]) -> nn.Module:
    return build_model(ModelConfig.model_validate({**BLOCKS, "freeze": freeze}), None)


def test_patterns_are_of_parameters_and_of_modules() -> None:
    model = built(["stem", "blocks.0*", "*.norm.bias"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    whole = {f"{part}.{kind}" for part in ("stem", "blocks.0.layer", "blocks.0.norm") for kind in ("weight", "bias")}
    assert frozen == whole | {"blocks.1.norm.bias", "blocks.2.norm.bias"}


def test_what_is_wholly_frozen_is_in_eval_mode() -> None:
    model = built(["blocks.0", "blocks.1.norm", "blocks.2.norm.weight"])
    in_eval = {name for name, module in model.named_modules() if not module.training}
    assert in_eval == {"blocks.0", "blocks.0.layer", "blocks.0.norm", "blocks.0.dropout", "blocks.1.norm"}


def test_a_run_leaves_it_as_it_was(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    """With weight decay, dropout and averages; the checkpoint and an export hold everything."""
    run = tmp_path / "run"
    kept = {"checkpoint": {"every": 1, "keep": 99}, "train": {"steps": 4, "batch_size": 12}}
    done = train("--config", write_config(model=FROZEN, optim=EMA, **kept))
    assert done.code == 0, done.err
    assert "363 parameters, 43 of them trained" in done.out
    first, last = weights(run, 1), weights(run, 4)
    same = {name for name in first if torch.equal(first[name], last[name])}
    assert same == {name for name in first if name.startswith(ARE_FROZEN)}
    assert all(last[f"blocks.{i}.norm.num_batches_tracked"] == (4 if i == 2 else 0) for i in range(3))
    averaged = set(checkpoint(run, 4).names("ema."))
    assert averaged == {"blocks.2.norm.weight", "blocks.2.norm.bias", "head.weight", "head.bias"}
    assert {name.rpartition(".")[0] for name in optimizer_state(run, 4)} == averaged
    forget_accelerate()
    results.export(run, "safetensors", tmp_path / "w.safetensors", best=False)
    assert identical(load_file(tmp_path / "w.safetensors"), last | tensors(run, 4, "ema."))
    forget_accelerate()
    results.evaluate(run, best=False)


def test_bit_for_bit_over_an_interruption(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    interrupted(train, write_config, tmp_path, 61, model=FROZEN, optim=EMA)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_with_gradient_checkpointing(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    for name, setting in (("none", "none"), ("full", "full"), ("selective", "selective")):
        changes = {"run__dir": str(tmp_path / name), "memory": {"checkpointing": setting}, "train__epochs": 1}
        done = train("--config", write_config(f"{name}.yaml", model=FROZEN, **changes))
        assert done.code == 0, done.err
        assert losses(tmp_path / name) == losses(tmp_path / "none")
        assert identical(weights(tmp_path / name, 5), weights(tmp_path / "none", 5))


def test_modes_outlast_an_evaluation(write_config: WriteConfig) -> None:
    trainer = Trainer(load_config(str(write_config(model=FROZEN))))
    before = {name: module.training for name, module in trainer.bare_model.named_modules()}
    assert not before["blocks.1"]
    assert before["blocks.2.norm"]
    trainer.evaluate()
    assert {name: module.training for name, module in trainer.bare_model.named_modules()} == before
    trainer.close()


def test_a_plan_knows_what_is_frozen() -> None:
    """Frozen parameters have neither gradients nor state; their BatchNorm updates nothing."""

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).sum()

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], foreach=False)

    settings: dict[str, Any] = {"device_type": "cpu", "granularity": 1}
    frozen, whole = (
        simulate_step(built(names), loss, adam, torch.randn(4, 8), **settings) for names in (["stem", "blocks"], [])
    )
    assert frozen.persistent["gradients"] == 4 * (8 * 3 + 3)
    assert frozen.persistent["optimizer"] < whole.persistent["optimizer"] / 5
    assert frozen.peak_bytes < whole.peak_bytes


def test_changed_in_a_run(train: Train, write_config: WriteConfig) -> None:
    assert train("--config", write_config(model=FROZEN, train__epochs=1)).code == 0
    code, _, err = train("--config", write_config(model=BLOCKS, train__epochs=2))
    assert (code, err.count("\n")) == (2, 1)
    assert "model.freeze: " in err
    assert "this cannot change in a run" in err


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (["blocks", "stem", "head"], "model.freeze: nothing is left to train"),
        (["stm"], "model.freeze: 'stm' names no parameter and no module with parameters; did you mean 'stem'?"),
        (["blocks.0.dropout"], "model.freeze: 'blocks.0.dropout' names no parameter"),
        ("stem", "model.freeze: must be a list"),
    ],
)
def test_refused_in_one_line(freeze: Any, message: str, train: Train, write_config: WriteConfig) -> None:
    code, _, err = train("--config", write_config(model={**BLOCKS, "freeze": freeze}))
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
