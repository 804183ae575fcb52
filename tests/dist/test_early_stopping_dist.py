"""Early stopping on two ranks: both end with the same step, also after a stop, and a finished run stays finished."""

from __future__ import annotations

from pathlib import Path

from conftest import WriteConfig
from resuming import TrainServer, assert_same_end
from run_results import summary

from trainer.faults.plan import VARIABLE, Event, write_plan


def test_both_ranks_end_early(server: TrainServer, write_config: WriteConfig, tmp_path: Path) -> None:
    rule = {"metric": "loss", "mode": "max", "patience": 2}  # the loss falls, so that none after the first is better
    changes = {"train": {"epochs": 6, "batch_size": 12, "early_stopping": rule}}
    whole = write_config("whole.yaml", run__dir=str(tmp_path / "whole"), **changes)
    done = server.train("--config", whole, ranks=2)
    assert done.code == 0, done.err
    assert summary(tmp_path / "whole")["stopped_early"]["step"] == 15

    config = write_config(**changes)
    write_plan(tmp_path / "plan.json", tmp_path / "run", [Event("stop-at", step=12)])
    variables = {VARIABLE: str(tmp_path / "plan.json")}
    assert server.train("--config", config, ranks=2, variables=variables).code == 75
    assert server.train("--config", config, ranks=2).code == 0
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    again = server.train("--config", config, ranks=2)
    assert again.code == 0
    assert "already finished at step 15 of 30, early" in again.out
