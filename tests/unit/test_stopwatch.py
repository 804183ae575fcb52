"""The parts of a step add up to its time, and each gets what is spent on it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import Train, WriteConfig
from run_results import records, summary

from trainer.faults.judging import PLACES
from trainer.telemetry.clock import Clock
from trainer.telemetry.stopwatch import PART_OF_PLACE, PARTS, Stopwatch

CPU = torch.device("cpu")


def test_every_moment_belongs_to_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("trainer.telemetry.stopwatch.time.perf_counter", lambda: now)
    stopwatch = Stopwatch(CPU)
    now += 1
    stopwatch.enter("data_wait")
    now += 2
    stopwatch.enter("forward")
    now += 4
    with stopwatch.inside("communication"):
        now += 8
    now += 16
    stopwatch.enter("forward")  # still
    with stopwatch.inside("startup"):  # which is no part of a step
        now += 32
    spent = {"host": 1, "data_wait": 2, "forward": 4 + 16 + 32, "communication": 8}
    assert stopwatch.take() == {part: spent.get(part, 0) for part in PARTS}
    now += 64
    assert stopwatch.take()["forward"] == 64  # it goes on where it was
    now += 128
    stopwatch.restart()
    assert set(stopwatch.take().values()) == {0}


def test_phases_of_the_clock_are_parts() -> None:
    clock, stopwatch = Clock(), Stopwatch(CPU)
    clock.stopwatch = stopwatch
    with clock.phase("checkpoint"):
        assert stopwatch.part == "checkpoint"
    assert stopwatch.part == "host"


def test_every_place_of_the_loop_belongs_to_a_part() -> None:
    assert set(PART_OF_PLACE) == set(PLACES) - {"building"}  # which is before the first step
    assert set(PART_OF_PLACE.values()) <= set(PARTS)


def test_what_takes_long_is_named(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    changes = {
        "data__train": {"name": "slow:Steady", "args": {"length": 60, "seconds": 0.004}},
        "model": {"name": "slow_model:SlowModel", "args": {"forward": 0.03, "backward": 0.06}},
        "log__every": 5,
        "eval__every": 10,
    }
    assert train("--config", write_config(**changes)).code == 0
    reports = [record for record in records(tmp_path / "run") if "train/loss" in record]
    for report in reports:
        shares = {key.removeprefix("time/"): value for key, value in report.items() if key.startswith("time/")}
        assert set(shares) == set(PARTS)
        assert math.fsum(shares.values()) == pytest.approx(1)
        assert shares["communication"] == 0
    end = summary(tmp_path / "run")
    split, in_steps = end["time_split"], end["seconds"]["total"] - end["seconds"]["startup"]
    assert set(split) == set(PARTS)
    # 10 steps of 12 samples of 4 ms, 30 ms of forward and 60 ms of backward. A sleep takes no less, and the parts add
    # up, so that none can have taken from another.
    for part, seconds in {"data_wait": 0.48, "forward": 0.3, "backward": 0.6}.items():
        assert split[part] * in_steps >= 0.95 * seconds, part
    assert split["evaluation"] > 0  # also the last one, after the last report


def test_without_the_split(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    assert train("--config", write_config(log={"every": 5, "time_split": False})).code == 0
    assert not [key for record in records(tmp_path / "run") for key in record if key.startswith("time/")]
    assert summary(tmp_path / "run")["time_split"] is None


def test_a_copy_counts_as_far_as_the_step_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.telemetry.observer import Observer

    class Feed:
        copy_wait_seconds = 5.0

        def worker_pids(self) -> list[int]:
            return []

    class Runtime:
        device, rank, local_rank = CPU, 1, 1

    now = 100.0
    monkeypatch.setattr("trainer.telemetry.stopwatch.time.perf_counter", lambda: now)
    feed, stopwatch = Feed(), Stopwatch(CPU)
    observer = Observer(Runtime(), feed, stopwatch)  # type: ignore[arg-type]
    observer.restart()
    stopwatch.enter("data_wait")
    now += 3
    stopwatch.enter("forward")
    feed.copy_wait_seconds += 1
    seconds = observer.observe().seconds
    assert seconds is not None
    assert (seconds["h2d"], seconds["data_wait"]) == (1, 2)
    feed.copy_wait_seconds += 1
    assert (observer.observe().seconds or {})["h2d"] == 0  # nobody waited for data


def test_exchanges_of_an_evaluation_belong_to_it() -> None:
    stopwatch = Stopwatch(CPU)
    for part, expected in (("forward", "communication"), ("backward", "communication"), ("evaluation", "evaluation")):
        stopwatch.enter(part)
        with stopwatch.exchange():
            assert stopwatch.part == expected
        assert stopwatch.part == part
