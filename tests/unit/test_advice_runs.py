"""Runs of one process that really have a problem: what they are told, and what following it gains.

`LOCKSTEP_NIGHTLY=1` runs and follows all of it, in longer runs; else there are three, of which only the first is
followed; what each rule says of given figures is `test_advice`. A promise is kept within the margin of
`advising.MARGIN`. What takes time here sleeps wherever it can, so that the load of the machine does not
decide.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from advising import Followed, Told, check
from conftest import NIGHTLY, Train, WriteConfig, nightly
from run_results import summary

from trainer.advice import adviser, stretches, survey
from trainer.checkpoint.storage import LocalStorage
from trainer.data.feed import DeviceFeed
from trainer.telemetry import observer
from trainer.tracking import Trackers

COMPUTING = 2.5  # the margin where nothing sleeps: other programs on the machine slow one run down, and not the other
TRIES = 3


@pytest.fixture(autouse=True)
def _short_stretches_count(monkeypatch: pytest.MonkeyPatch) -> None:
    if not NIGHTLY:
        monkeypatch.setattr(adviser, "LEAST_SECONDS", 0.5)
        monkeypatch.setattr(survey, "LEAST_SECONDS", 0.5)


def _steps(every: int, reports: int = 2) -> dict[str, Any]:
    """Returns a run of so many reports; of twice as many, nightly."""
    count = every * (2 * reports if NIGHTLY else reports)
    return {"train": {"steps": count, "batch_size": 12}, "log__every": every}


def _settings(key: str, least: Any, most: Any) -> Any:
    """Returns a judge of what is told: one setting within a range."""
    return lambda told: list(told.settings) == [key] and least <= told.settings[key] <= most


def _mends(rule: str, followed: Followed) -> bool:
    return followed.keeps_its_promise() and rule not in followed.remaining


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


@nightly
def test_more_workers_where_one_is_too_slow(
    train: Train, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []  # of trackers, which show the advice with the results of a run
    monkeypatch.setattr(Trackers, "summarise", lambda self, values, step: texts.append(values["advice"]))
    config = write_config(
        data__train=_steady(0.01),
        data__eval=None,
        checkpoint__every=1000,
        data__workers=1,
        model=_sleeping(0.02, 0.02),
        **_steps(10, reports=3),
    )

    def is_right(told: Told) -> bool:
        assert texts[-1].startswith("The device waited")
        return _settings("data.workers", 2, 8)(told) and told.log.count("advice: The device waited") == 2

    check(train, config, tmp_path, "data_wait", is_right, holds=partial(_mends, "data_wait"), follows=True)
    assert "workers" not in texts[-1]


@nightly
def test_workers_where_there_are_none(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(
        data__train=_steady(0.003),
        data__eval=None,
        checkpoint__every=1000,
        model=_sleeping(0.02, 0.02),
        **_steps(10),
    )

    def is_right(told: Told) -> bool:
        return _settings("data.workers", 1, 6)(told) and "in the thread of the step" in told.advice["text"]

    check(train, config, tmp_path, "data_wait", is_right)


@nightly
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

    def is_right(told: Told) -> bool:
        return told.settings == {"data.prefetch_factor": 8} and told.promised is None

    def holds(followed: Followed) -> bool:
        return followed.split["data_wait"] < 0.7 * followed.told.split["data_wait"]

    check(train, config, tmp_path, "data_wait", is_right, holds=holds)


@nightly
def test_copies_beside_the_step(train: Train, write_config: WriteConfig, tmp_path: Path, slow_bus: None) -> None:
    config = write_config(data__eval=None, checkpoint__every=1000, model=_sleeping(0.03, 0.03), **_steps(8))
    right = _settings("data.workers", 1, 3)
    check(train, config, tmp_path, "copies", right, holds=partial(_mends, "copies"))


@nightly
def test_larger_micro_batches_for_tiny_kernels(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(
        data__eval=None,
        checkpoint__every=1000,
        data__workers=1,
        model={"name": "mlp", "args": {"in_features": 8, "hidden": [8] * 30}},
        train={"steps": 48, "batch_size": 12, "micro_batch_size": 4},
        log__every=8,
    )
    right = _settings("train.micro_batch_size", 12, 12)
    holds = partial(Followed.keeps_its_promise, margin=COMPUTING)
    check(train, config, tmp_path, "host_bound", right, holds=holds)


@nightly
def test_keeping_activations_where_memory_is_idle(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(
        data__eval=None,
        checkpoint__every=1000,
        model=_sleeping(0.04, 0.04, num_blocks=4),
        memory__checkpointing="full",
        **_steps(8),
    )

    def is_right(told: Told) -> bool:
        return told.settings == {"memory.checkpointing": "none"}

    check(train, config, tmp_path, "recomputation", is_right, holds=partial(_mends, "recomputation"))


@nightly
def test_saving_behind_the_training(train: Train, write_config: WriteConfig, tmp_path: Path, slow_disk: None) -> None:
    config = write_config(
        data__eval=None,
        model=_sleeping(0.01, 0.01),
        checkpoint={"every": 20, "async_save": False},
        **_steps(20, reports=3),
    )

    def is_right(told: Told) -> bool:
        return told.settings == {"checkpoint.async_save": True} and "of host memory" in told.advice["text"]

    check(train, config, tmp_path, "checkpoints", is_right, holds=partial(_mends, "checkpoints"))


@nightly
def test_rarer_saves_where_a_disk_is_slow(
    train: Train, write_config: WriteConfig, tmp_path: Path, slow_disk: None
) -> None:
    config = write_config(data__eval=None, model=_sleeping(0.01, 0.01), checkpoint={"every": 2}, **_steps(12))
    check(train, config, tmp_path, "checkpoints", _settings("checkpoint.every", 6, 48))


@nightly
def test_rarer_evaluations(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(
        data__eval=_steady(0.005, length=24),
        model=_sleeping(0.01, 0.01),
        eval__every=5,
        checkpoint__every=200,
        **_steps(15),
    )
    right = _settings("eval.every", 20, 60)  # which may be the length of the run
    check(train, config, tmp_path, "evaluations", right, holds=partial(_mends, "evaluations"))


@nightly
def test_workers_that_keep_what_they_read(
    train: Train, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observer, "PERIOD_SECONDS", 0.1)
    monkeypatch.setattr(stretches, "WORKERS_SETTLE_SECONDS", 0.3)
    config = write_config(
        data__train={"name": "bottlenecks:Hoarding", "args": {"length": 1200, "kept": 2**18}},
        data__eval=None,
        checkpoint__every=1000,
        data__workers=1,
        train={"steps": 100, "batch_size": 12},
        log__every=10,  # so that each has a size of its own
    )

    def is_right(told: Told) -> bool:
        return told.settings == {} and told.advice["text"].startswith("Loader workers grew from ")

    def holds(followed: Followed) -> bool:
        return "loader_memory" not in followed.remaining

    check(train, config, tmp_path, "loader_memory", is_right, "data.train.args.kept=0", holds=holds)


def test_nothing_where_nothing_is_wrong(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(
        data__train={"name": "vectors:Vectors", "args": {"length": 600}},
        data__workers=1,
        eval__every=1000,
        model=_sleeping(0.04, 0.04),
        **_steps(8),
    )
    for number in range(TRIES):
        outcome = train("--config", config, f"run.dir={tmp_path / str(number)}")
        assert outcome.code == 0
        advice = summary(tmp_path / str(number))["advice"]
        if not advice and "advice" not in outcome.out + outcome.err:
            return
    raise AssertionError(advice)


def test_without_a_split_there_is_no_advice(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(
        data__train=_steady(0.01),
        data__eval=None,
        checkpoint__every=1000,
        train={"steps": 15, "batch_size": 12},
        log={"every": 5, "time_split": False},
    )
    assert train("--config", config).code == 0
    assert summary(tmp_path / "run")["advice"] == []
