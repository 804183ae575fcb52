"""Runs of one process that really have a problem: what they are told, and what following it gains.

A promise is kept within the margin of `advising.Followed`. What takes time here sleeps wherever it can, so that the
load of the machine does not decide.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from advising import follow
from conftest import Train, WriteConfig
from run_results import summary

from trainer.checkpoint.storage import LocalStorage
from trainer.data.feed import DeviceFeed
from trainer.telemetry import observer
from trainer.tracking import Trackers

COMPUTING = 2.5  # the margin where nothing sleeps: other programs on the machine slow one run down, and not the other


def _sleeping(forward: float, backward: float, **arguments: Any) -> dict[str, Any]:
    return {"name": "bottlenecks:Sleeping", "args": {"forward": forward, "backward": backward, **arguments}}


def _steady(seconds: float, length: int = 120) -> dict[str, Any]:
    return {"name": "slow:Steady", "args": {"length": length, "seconds": seconds}}


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint takes 0.15 s to write."""
    write = LocalStorage.write

    def slowly(storage: LocalStorage, folder: str, file: str, parts: Iterable[memoryview]) -> None:
        time.sleep(0.15)
        write(storage, folder, file, parts)

    monkeypatch.setattr(LocalStorage, "write", slowly)


@pytest.fixture
def slow_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy of a batch to the device takes 60 ms, on whichever thread."""
    move, moved = DeviceFeed._move, DeviceFeed._moved

    def slowly(feed: DeviceFeed, batch: Any) -> Any:
        time.sleep(0.06)
        return move(feed, batch)

    def slowly_each(feed: DeviceFeed, tensor: Any) -> Any:
        time.sleep(0.03)  # there are two: inputs and labels
        return moved(feed, tensor)

    monkeypatch.setattr(DeviceFeed, "_move", slowly)
    monkeypatch.setattr(DeviceFeed, "_moved", slowly_each)


def test_more_workers_where_one_is_too_slow(
    train: Train, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []  # trackers, which show the text with the results of a run
    monkeypatch.setattr(Trackers, "summarise", lambda self, values, step: told.append(values["advice"]))
    config = write_config(
        data__train=_steady(0.01),
        data__eval=None,
        checkpoint__every=1000,
        data__workers=1,
        model=_sleeping(0.02, 0.02),
        train={"steps": 40, "batch_size": 12},
        log__every=10,
    )
    followed = follow(train, config, tmp_path, "data_wait")
    assert followed.advice["settings"] == {"data.workers": pytest.approx(4, abs=2)}
    assert followed.keeps_its_promise(), followed
    assert followed.log.count("advice: The device waited") == 2, followed.log
    assert "data_wait" not in followed.remaining
    assert [text[:17] for text in told[:2]] == ["The device waited"] * 2
    assert "workers" not in told[-1]


def test_workers_where_there_are_none(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(
        data__train=_steady(0.003),
        data__eval=None,
        checkpoint__every=1000,
        model=_sleeping(0.02, 0.02),
        train={"steps": 48, "batch_size": 12},
        log__every=12,
    )
    followed = follow(train, config, tmp_path, "data_wait")
    assert "in the thread of the step" in followed.advice["text"]
    assert followed.keeps_its_promise(), followed


def test_a_deeper_queue_for_uneven_samples(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(
        data__train={"name": "bottlenecks:Uneven", "args": {"length": 1200, "seconds": 1.2, "every": 240}},
        data__eval=None,
        checkpoint__every=1000,
        data__workers=4,
        model=_sleeping(0.03, 0.03),
        train={"steps": 50, "batch_size": 12},
        log__every=10,
    )
    followed = follow(train, config, tmp_path, "data_wait")
    assert followed.advice["settings"] == {"data.prefetch_factor": 8}
    assert followed.advice["gain"] is None
    assert followed.split_after["data_wait"] < 0.7 * followed.split["data_wait"], followed


def test_copies_beside_the_step(train: Train, write_config: WriteConfig, tmp_path: Path, slow_bus: None) -> None:
    config = write_config(
        data__eval=None,
        checkpoint__every=1000,
        model=_sleeping(0.03, 0.03),
        train={"steps": 40, "batch_size": 12},
        log__every=10,
    )
    followed = follow(train, config, tmp_path, "copies")
    assert followed.advice["settings"] == {"data.workers": 1}
    assert followed.keeps_its_promise(), followed
    assert "copies" not in followed.remaining


def test_larger_micro_batches_for_tiny_kernels(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(
        data__eval=None,
        checkpoint__every=1000,
        data__workers=1,
        model={"name": "mlp", "args": {"in_features": 8, "hidden": [8] * 30}},
        train={"steps": 48, "batch_size": 12, "micro_batch_size": 4},
        log__every=8,
    )
    followed = follow(train, config, tmp_path, "host_bound", margin=COMPUTING)
    assert followed.advice["settings"] == {"train.micro_batch_size": 12}
    assert followed.keeps_its_promise(COMPUTING), followed


def test_keeping_activations_where_memory_is_idle(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(
        data__eval=None,
        checkpoint__every=1000,
        model=_sleeping(0.04, 0.04, num_blocks=4),
        memory__checkpointing="full",
        train={"steps": 32, "batch_size": 12},
        log__every=8,
    )
    followed = follow(train, config, tmp_path, "recomputation")
    assert followed.advice["settings"] == {"memory.checkpointing": "none"}
    assert followed.keeps_its_promise(), followed
    assert "recomputation" not in followed.remaining


def test_saving_behind_the_training(train: Train, write_config: WriteConfig, tmp_path: Path, slow_disk: None) -> None:
    config = write_config(
        data__eval=None,
        model=_sleeping(0.01, 0.01),
        checkpoint={"every": 20, "async_save": False},
        train={"steps": 100, "batch_size": 12},
        log__every=20,
    )
    followed = follow(train, config, tmp_path, "checkpoints")
    assert followed.advice["settings"] == {"checkpoint.async_save": True}
    assert followed.keeps_its_promise(), followed
    assert "checkpoints" not in followed.remaining


def test_rarer_saves_where_a_disk_is_slow(
    train: Train, write_config: WriteConfig, tmp_path: Path, slow_disk: None
) -> None:
    config = write_config(
        data__eval=None,
        model=_sleeping(0.01, 0.01),
        checkpoint={"every": 2},
        train={"steps": 60, "batch_size": 12},
        log__every=10,
    )
    followed = follow(train, config, tmp_path, "checkpoints")
    assert followed.advice["settings"] == {"checkpoint.every": pytest.approx(10, abs=4)}
    assert followed.keeps_its_promise(), followed


def test_rarer_evaluations(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(
        data__eval=_steady(0.005, length=24),
        model=_sleeping(0.01, 0.01),
        eval__every=5,
        checkpoint__every=200,
        train={"steps": 90, "batch_size": 12},
        log__every=15,
    )
    followed = follow(train, config, tmp_path, "evaluations")
    assert followed.keeps_its_promise(), followed
    assert "evaluations" not in followed.remaining


def test_workers_that_keep_what_they_read(
    train: Train, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observer, "PERIOD_SECONDS", 0.1)
    config = write_config(
        data__train={"name": "bottlenecks:Hoarding", "args": {"length": 1200, "kept": 2**18}},
        data__eval=None,
        checkpoint__every=1000,
        data__workers=1,
        train={"steps": 100, "batch_size": 12},
        log__every=10,
    )
    followed = follow(train, config, tmp_path, "loader_memory", "data.train.args.kept=0")
    assert followed.advice["text"].startswith("Loader workers grew from 0.")
    assert followed.advice["settings"] == {}
    assert "loader_memory" not in followed.remaining


def test_nothing_where_nothing_is_wrong(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(
        data__train={"name": "vectors:Vectors", "args": {"length": 600}},
        data__workers=1,
        model=_sleeping(0.04, 0.04),
        train={"epochs": 1, "batch_size": 12},
        log__every=10,
    )
    outcome = train("--config", config)
    assert outcome.code == 0
    assert summary(tmp_path / "run")["advice"] == []
    assert "advice" not in outcome.out + outcome.err


def test_without_a_split_there_is_no_advice(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(data__train=_steady(0.02), data__eval=None, log={"every": 5, "time_split": False})
    assert train("--config", config).code == 0
    assert summary(tmp_path / "run")["advice"] == []
