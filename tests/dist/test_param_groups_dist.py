"""Several groups of parameters, two optimizers, frozen parts and clipping by value on two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import WriteConfig, few
from resuming import TrainServer, assert_same_end
from run_results import close, losses, weights

FSDP = {"strategy": "fsdp"}
ODD = {"name": "sharded_models:Odd"}
LAYERS: dict[str, Any] = {
    "model": {**ODD, "freeze": ["blocks.0", "blocks.1.before"]},
    "optim": {
        "name": "adamw",
        "lr": 0.01,
        "weight_decay": 0.1,
        "no_weight_decay": ["vector"],
        "layer_decay": 0.8,
        "clip_value": 0.05,
        "ema": {"decay": 0.9},
    },
}
REST = {"name": "adamw", "lr": 0.01}
MUON: dict[str, Any] = {"model": ODD, "optim": {"name": "Muon", "lr": 0.02, "rest": REST}}
# Matrices of one row, which two processes cannot share.
NO_ROWS = {**REST, "match": ["not_matrix", "last_layer", "blocks.*.shift*"]}
LAMB: dict[str, Any] = {
    "model": ODD,
    "optim": {"name": "timm.optim:Lamb", "lr": 0.01, "weight_decay": 0.1, "no_weight_decay": ["bias"]},
}
CASES: dict[str, dict[str, Any]] = {
    "layers": LAYERS,
    "layers fsdp": {**LAYERS, "parallel": FSDP},
    "layers fsdp fp16": {**LAYERS, "parallel": FSDP, "precision": "fp16"},
    "muon": MUON,
    "muon fsdp": {**MUON, "parallel": FSDP, "optim": {**MUON["optim"], "rest": NO_ROWS}},
    "lamb": LAMB,
    "lamb fsdp": {**LAMB, "parallel": FSDP},
}
IN_CI = ("layers fsdp",)


@pytest.mark.parametrize("name", few(CASES, *IN_CI))
def test_as_on_one_process_and_bit_for_bit_over_a_stop(
    name: str, server: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    def run(folder: str, ranks: int, *changes: str) -> None:
        file = write_config(run__dir=str(tmp_path / folder), **CASES[name])
        done = server.train("--config", file, *changes, ranks=ranks)
        assert done.code == 0, done.out + done.err

    run("one", 1)
    run("whole", 2)
    run("stopped", 2, "train.epochs=1")
    run("stopped", 2)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
    run("stopped", 1, "train.epochs=3")  # on another number of processes, and under another strategy
    if "fp16" not in name:
        # Muon computes in bfloat16, and on shares in another order.
        rel = 2e-3 if name == "muon fsdp" else 1e-4
        assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "one"), rel=rel)
        assert rel > 1e-3 or close(weights(tmp_path / "whole", 10), weights(tmp_path / "one", 10))


def test_an_optimizer_that_shares_are_nothing_for(server: TrainServer, write_config: WriteConfig) -> None:
    done = server.train("--config", write_config(**MUON, parallel=FSDP), ranks=2)
    assert done.code == 2, done.out + done.err
    assert "parallel.strategy: the optimizer cannot work on shares of parameters, such as aten.add_" in done.err
    assert "Traceback" not in done.err
