"""Stopped and started again on other processes, under another strategy: the samples and losses of the quiet run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteConfig, few, nightly
from resuming import TrainServer
from run_results import checkpoint, close, losses, optimizer_state, summary, weights

BATCH, STEPS = 12, 30
DDP: dict[str, Any] = {"parallel__strategy": "ddp"}
FSDP: dict[str, Any] = {"parallel__strategy": "fsdp"}
HSDP: dict[str, Any] = {"parallel": {"strategy": "hsdp", "shard_size": 2}}

# Ranks and strategy of each leg.
JOURNEYS = {
    "2, 1, 3 ranks": [(2, DDP), (1, DDP), (3, DDP)],
    "ddp, fsdp, ddp": [(2, DDP), (2, FSDP), (2, DDP)],
    "fsdp on 3, ddp on 1, fsdp on 2": [(3, FSDP), (1, DDP), (2, FSDP)],
    "hsdp on 4, fsdp on 3, ddp on 1": [(4, HSDP), (3, FSDP), (1, DDP)],
}


def config(write_config: WriteConfig, run: Path, recorded: Path, stop: Path, **changes: Any) -> Path:
    recorded.mkdir()
    return write_config(
        **{
            "run__dir": str(run),
            "data__train": {"name": "stopping:Stopping", "args": {"length": 60, "file": str(stop)}},
            "data__eval": {"name": "vectors:Dicts", "args": {"length": 23}},
            "task": {
                "name": "recording:Recording",
                "args": {"folder": str(recorded), "input_key": "vector", "target_key": "kind"},
            },
            "model__args__dropout": 0.0,  # which depends on the ranks
            "optim": {"name": "adamw", "lr": 0.01, "ema": {"decay": 0.9}},
            "schedule": {"name": "cosine"},
            "train": {"steps": STEPS, "batch_size": BATCH},
            "checkpoint__allow_changes": ["task.args.folder"],
            **changes,
        }
    )


def samples(recorded: Path, ranks: int) -> list[list[int]]:
    """Returns the samples of each step, of all ranks together."""
    by_rank = [
        [json.loads(line) for line in (recorded / f"train-{rank}.jsonl").read_text().splitlines()]
        for rank in range(ranks)
    ]
    return [sorted(index for share in step for index in share) for step in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("every", [pytest.param(1, marks=nightly), 4])
@pytest.mark.parametrize("name", few(JOURNEYS, "hsdp on 4, fsdp on 3, ddp on 1"))
def test_other_processes_go_on(
    name: str, every: int, server: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    """With a report every fourth step, the sums of a report cross from one world into the next."""
    quiet, run, stop = tmp_path / "quiet", tmp_path / "run", tmp_path / "stop"
    changes = {"log__every": every}
    alone = server.train("--config", config(write_config, quiet, tmp_path / "0", stop, **changes))
    assert alone.code == 0, alone
    expected = samples(tmp_path / "0", 1)
    assert len(expected) == STEPS

    trained, before = 0, None
    for leg, (ranks, strategy) in enumerate(JOURNEYS[name], 1):
        stop.write_text(str(10 * BATCH // ranks - 1))  # in the tenth step
        if leg == len(JOURNEYS[name]):
            stop.unlink()
        recorded = tmp_path / str(leg)
        file = config(write_config, run, recorded, stop, **changes, **strategy)
        done = server.train("--config", file, ranks=ranks)
        assert done.code == (75 if stop.exists() else 0), done
        assert ("continuing from step" in done.out) == (leg > 1)
        assert (f"written by {before} processes, read by {ranks}" in done.out) == (before not in (None, ranks))
        before, found = ranks, samples(recorded, ranks)
        assert found == expected[trained : trained + len(found)]
        trained = summary(run)["step"]
        assert checkpoint(run, trained).manifest.num_ranks == ranks
        if stop.exists():
            assert 10 * leg <= trained <= 10 * leg + leg
    assert trained == STEPS
    assert list(losses(run)) == [*range(every, STEPS, every), STEPS]
    assert losses(run) == pytest.approx(losses(quiet), rel=1e-4)
    assert close(weights(run, STEPS), weights(quiet, STEPS))
    assert close(optimizer_state(run, STEPS), optimizer_state(quiet, STEPS))
    assert summary(run)["metrics"] == pytest.approx(summary(quiet)["metrics"], rel=1e-4)
