"""Where the time of several ranks goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import WriteConfig, few
from resuming import TrainServer
from run_results import records, summary

pytestmark = pytest.mark.alone


@pytest.mark.parametrize("strategy", few(["ddp", "fsdp"], "fsdp"))
def test_a_late_rank_and_an_evaluation(
    strategy: str, server: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = write_config(
        model={"name": "slow_model:LateOnRank1", "args": {"seconds": 0.1}},
        parallel={"strategy": strategy},
        train={"steps": 20, "batch_size": 12},
        log={"every": 10},
        eval={"every": 10, "batch_size": 4},
    )
    done = server.train("--config", config, ranks=2)
    assert done.code == 0, done.err
    lines = (tmp_path / "run" / "ranks.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines][-1]
    assert last["step"] == 20
    if strategy == "ddp":  # rank 0 waits for the other one's gradients; FSDP's forward is an exchange itself
        assert last["communication"][0] > last["communication"][1] + 0.1
        assert last["seconds_to_exchange"][1] > 0.1
    split = summary(tmp_path / "run")["time_split"]
    # 20 steps of 0.1 s; 2 evaluations of 3 batches of 0.1 s each on either rank, exchanges of the model included.
    assert split["evaluation"] > 0.15
    assert split["communication"] + split["forward"] > split["evaluation"]
    reports = [record for record in records(tmp_path / "run") if "train/loss" in record]
    assert all(record["train/mfu"] > 0 for record in reports)  # counted in spite of the exchange in forward
