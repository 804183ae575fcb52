"""NaN on one rank: all ranks do the same about it, under every policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, WriteConfig
from resuming import TrainServer
from run_results import identical, optimizer_state, summary, weights

from trainer.faults.plan import VARIABLE, Event, write_plan

NORMED = {"name": "vectors_model:Normed", "args": {"dropout": 0.2}}
PLAIN = {"model": NORMED, "log": {"every": 1}, "checkpoint": {"every": 4}}
BY_HAND = {
    "model": {"name": "vectors_model:NormedByHand", "args": {"dropout": 0.2, "step_left_out": 6}},
    "optim": {"name": "vectors_model:LeavingOut", "lr": 0.01, "args": {"step_left_out": 6}},
}
FSDP = {"parallel": {"strategy": "fsdp"}, "memory": {"blocks": ["layers.0", "layers.4"]}}


def with_nan(server: TrainServer, config: Path, run: Path, **event: Any) -> Outcome:
    """Trains on two ranks, with NaN in a sample of rank 1's."""
    plan = run.with_name("plan.json")
    write_plan(plan, run, [Event("nan", rank=1, **event)])
    return server.train("--config", config, ranks=2, variables={VARIABLE: str(plan)})


@pytest.mark.parametrize("strategy", [{}, FSDP], ids=["ddp", "fsdp"])
def test_skip_equals_a_step_skipped_by_hand(
    strategy: dict[str, Any], server: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Weights, BatchNorm's statistics and the optimizer's state, bit for bit."""
    done = with_nan(server, write_config(**PLAIN, **strategy, faults={"non_finite": "skip"}), tmp_path / "run", step=6)
    assert done.code == 0, done.err
    by_hand = write_config("hand.yaml", run__dir=str(tmp_path / "hand"), **{**PLAIN, **BY_HAND, **strategy})
    done = server.train("--config", by_hand, ranks=2)
    assert done.code == 0, done.err
    assert identical(weights(tmp_path / "run", 10), weights(tmp_path / "hand", 10))
    assert identical(optimizer_state(tmp_path / "run", 10), optimizer_state(tmp_path / "hand", 10))
    (line,) = (tmp_path / "run" / "faults" / "bad-steps.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["step"], record["what"], record["ranks"], len(record["samples"])) == (6, "loss", [1], 6)
    assert summary(tmp_path / "run")["bad_steps"] == 1


def test_rollback_is_that_of_all_ranks(server: TrainServer, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(**PLAIN, faults={"non_finite": "rollback"})
    done = with_nan(server, config, tmp_path / "run", step=7, repeats=True)
    assert done.code == 0, done.err
    assert "going back to step 5, and leaving out the batch of step 7" in done.out
    found = summary(tmp_path / "run")
    assert (found["num_rollbacks"], found["avoided_steps"], found["step"]) == (1, [7], 10)


def test_stop_ends_all_ranks_before_such_weights_are_saved(
    server: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    done = with_nan(server, write_config(**PLAIN), tmp_path / "run", step=8)  # after which a checkpoint is due
    assert done.code == 1
    assert "step 8: the loss of rank 1 is nan" in done.err
    assert "the checkpoint of step 5 stands" in done.err
    assert not (tmp_path / "run" / "checkpoints" / "step-00000008").exists()
    assert "Traceback" not in done.err
