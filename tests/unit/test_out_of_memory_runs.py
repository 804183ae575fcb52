"""Runs that run out of memory: what they say, and that they go on with half a micro-batch as if it had been chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Train, WriteConfig
from run_results import close, identical, losses, summary, weights

from trainer.memory.shrink import read_shrink


def hungry(write_config: WriteConfig, args: dict[str, Any], **changes: Any) -> Path:
    return write_config(model={"name": "hungry:Hungry", "args": args}, **changes)


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out-of-memory" / "rank-0.json").read_text())


def test_a_run_that_runs_out(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    done = train("--config", hungry(write_config, {"limit": 6, "after": 2}))
    assert done.code == 1
    assert "error: rank 0 ran out of memory in step 3, micro-batch 1 of 1 (forward)\n" in done.err
    assert "the model (Hungry), " in done.err
    assert "hungry.py:40 in devour: torch.empty(PEBIBYTE, dtype=torch.uint8, device=device)" in done.err
    assert "try      train.micro_batch_size=6 " in done.err
    assert "Traceback" not in done.err
    found = summary(tmp_path / "run")
    assert found["status"] == "failed"
    assert "can't allocate memory" in found["error"]
    assert facts(tmp_path / "run")["phase"] == "forward"
    assert not (tmp_path / "run" / "out-of-memory" / "shrink.json").exists()
    again = train("--config", hungry(write_config, {"limit": 6, "after": 2}))  # nothing shrinks
    assert again.code == 1


def test_in_evaluation(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    args = {"limit": 6, "in_eval": True}
    changes = {"memory": {"on_oom": "shrink"}, "eval": {"batch_size": 8}}
    done = train("--config", hungry(write_config, args, **changes))
    assert done.code == 1
    assert "error: rank 0 ran out of memory during evaluation after step 5\n" in done.err
    assert "try      eval.batch_size=4 " in done.err
    assert "next     " not in done.err  # a smaller micro-batch would not help
    done = train(
        "--config", hungry(write_config, args, **changes), "eval.batch_size=4", "run.dir=" + str(tmp_path / "b")
    )
    assert done.code == 0, done.err
    done = train("--config", hungry(write_config, args, memory={"on_oom": "shrink"}), "run.dir=" + str(tmp_path / "c"))
    assert done.code == 1
    assert "next     the next start takes 6 " in done.err  # evaluation has the micro-batch of training


def test_a_model_that_does_not_fit(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    done = train("--config", write_config(model={"name": "hungry:TooLarge"}, memory={"on_oom": "shrink"}))
    assert done.code == 1
    assert "error: rank 0 ran out of memory during startup\n" in done.err
    assert "in __init__: self.table = nn.Parameter(" in done.err
    assert "try      a device with more memory: the model and its optimizer state alone do not fit\n" in done.err
    assert "Traceback" not in done.err
    assert facts(tmp_path / "run")["step"] is None
    assert not (tmp_path / "run" / "out-of-memory" / "shrink.json").exists()


def test_the_next_start_takes_half(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = hungry(write_config, {"limit": 6}, memory={"on_oom": "shrink"})
    first = train("--config", config)
    assert first.code == 1
    assert "next     the next start takes 6 (memory.on_oom: shrink)" in first.err
    second = train("--config", config)
    assert second.code == 0, second.err
    assert "train.micro_batch_size: 6 instead of 12, which ran out of memory at step 1\n" in second.out
    assert "changed " not in second.out
    assert "micro_batch_size: null" in (tmp_path / "run" / "config.yaml").read_text()

    asked = train("--config", config, "train.micro_batch_size=6", "run.dir=" + str(tmp_path / "asked"))
    assert asked.code == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "asked")
    assert identical(weights(tmp_path / "run", 10), weights(tmp_path / "asked", 10))


def test_shrunk_within_a_run_equals_one_that_fits(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = hungry(write_config, {"limit": 3, "after": 7}, memory={"on_oom": "shrink"})
    assert train("--config", config).code == 1
    assert train("--config", config).code == 1
    last = train("--config", config)
    assert last.code == 0, last.err
    found = read_shrink(tmp_path / "run")
    assert found is not None
    assert (found.micro_batch_size, found.was, found.configured, found.attempt) == (3, 6, None, 2)
    assert "train.micro_batch_size: 3 instead of 6, which ran out of memory at step 9\n" in last.out
    assert "continuing from step 5 " in last.out

    whole = train("--config", hungry(write_config, {"limit": 99}), "run.dir=" + str(tmp_path / "whole"))
    assert whole.code == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert close(weights(tmp_path / "run", 10), weights(tmp_path / "whole", 10))


def test_a_size_that_the_user_chooses_wins_over_the_record(train: Train, write_config: WriteConfig) -> None:
    config = hungry(write_config, {"limit": 3}, memory={"on_oom": "shrink"})
    assert train("--config", config).code == 1  # 6 is recorded
    done = train("--config", config, "train.micro_batch_size=3")
    assert done.code == 0, done.err
    assert "instead of" not in done.out


def test_the_record_is_ignored_with_stop(train: Train, write_config: WriteConfig) -> None:
    config = hungry(write_config, {"limit": 6}, memory={"on_oom": "shrink"})
    assert train("--config", config).code == 1
    done = train("--config", config, "memory.on_oom=stop")
    assert done.code == 1
    assert "instead of 12, which" not in done.out
