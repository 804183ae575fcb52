"""The time of steps on a GPU, by its own events."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import Train, WriteConfig
from run_results import records, summary

from trainer.telemetry.efficiency import peak_flops
from trainer.telemetry.stopwatch import PARTS, Stopwatch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

_CYCLES = 50_000_000  # some tens of milliseconds


def test_parts_are_those_of_the_device_not_of_the_host() -> None:
    device = torch.device("cuda", 0)
    stopwatch = Stopwatch(device)
    torch.cuda._sleep(1000)
    stopwatch.restart()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stopwatch.enter("forward")
    start.record()
    torch.cuda._sleep(_CYCLES)
    stopwatch.enter("backward")  # the host is here at once
    torch.cuda._sleep(2 * _CYCLES)
    end.record()
    stopwatch.enter("optimizer")
    torch.cuda.synchronize()
    seconds = stopwatch.take()
    total = start.elapsed_time(end) / 1000
    assert seconds["backward"] / seconds["forward"] == pytest.approx(2, rel=0.1)
    assert seconds["forward"] + seconds["backward"] == pytest.approx(total, rel=0.1)
    assert all(math.isfinite(value) for value in seconds.values())


def test_many_parts_between_two_reports() -> None:
    stopwatch = Stopwatch(torch.device("cuda", 0))
    for _ in range(5000):
        stopwatch.enter("forward")
        stopwatch.enter("backward")
    torch.cuda.synchronize()
    assert len(stopwatch._pending) < 5000  # those that are over are added up
    assert stopwatch.take()["forward"] > 0


def test_a_slow_data_set_is_data_wait(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    data = {"name": "slow:Steady", "args": {"length": 60, "seconds": 0.004}}
    assert train("--config", write_config(data__train=data, log__every=5)).code == 0
    split = summary(tmp_path / "run")["time_split"]
    assert set(split) == set(PARTS)
    assert math.fsum(split.values()) == pytest.approx(1)
    assert split["data_wait"] > 0.5
    reports = [record for record in records(tmp_path / "run") if "train/loss" in record]
    for report in reports:
        assert report["memory/allocated_gib"] <= report["memory/reserved_gib"]


def test_the_peak_is_that_of_the_data_sheet_or_measured() -> None:
    device = torch.device("cuda", 0)
    assert peak_flops(device, torch.bfloat16, is_fp8=False, allow_tf32=False) > 1e12
