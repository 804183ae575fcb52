"""`python -m benchmarks.scaling`: its parts, its tables and its plot."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import nightly

from benchmarks import scaling
from benchmarks.scaling import __main__ as command
from benchmarks.scaling import check as measured_check
from benchmarks.scaling import constants, jobs
from benchmarks.scaling.check import Setup, predict

SPREAD = {"median": 1.0, "min": 0.9, "max": 1.2, "rounds": [1.0, 0.9, 1.2]}
MEASURED = {
    "ranks": 2,
    "all_reduce_line": [1e-3, 1e9],
    "all_reduce_cpu_line": [0.0, 2e9],
    "forward": 0.3,
    "backward": 0.6,
    "alone": SPREAD,
    "alone_deviation": 0.1,
    "ddp": SPREAD,
}


def _check(setup: Setup, max_ranks: int, mbits: list[float]) -> Iterator[dict[str, Any]]:
    yield {"name": "2 on this machine", **MEASURED, "predicted": predict(setup, MEASURED, 2), "error": 0.05}
    yield {"name": "2 hosts", "problem": "only root", "is_left_out": True}


def _simulate(numbers_by_part: dict[str, tuple[int, ...]]) -> Iterator[dict[str, list[dict[str, Any]]]]:
    entry = {"elements": 897, "step_seconds": 0.001, "peak_bytes": 2**30}
    yield {"sampler": [{"ranks": 8, **entry}, {"ranks": 16384, **entry}]}


def test_all_parts_become_tables_and_a_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "check", _check)
    monkeypatch.setattr(command, "simulate", _simulate)
    file, drawn = tmp_path / "scaling.json", tmp_path / "scaling.svg"
    assert command.main(["--tiny", "--json", str(file), "--plot", str(drawn)]) == 0
    result = json.loads(file.read_text())
    first = scaling.table(result)
    for line in (
        "| ViT-H/14, HSDP, 64 images a GPU | 16,384 | 1,048,576 |",
        "| sampler: elements computed for that | 897 | 897 |",
        "| 2 on this machine | 1000 | 3 | cores |",
        "2 hosts: not measured, only root",
        "| GPUs twice as fast |",
    ):
        assert line in first
    monkeypatch.setattr(command, "describe", lambda *_: {**result["parts"]["check"]["environment"], "cpu": "another"})
    assert command.main(["--json", str(file), "--parts", "estimate"]) == 0
    again = json.loads(file.read_text())
    assert again["quick"], "the check is still that of a tiny run"
    assert again["parts"]["check"] == result["parts"]["check"]
    assert again["parts"]["estimate"]["environment"]["cpu"] == "another"
    before = drawn.read_bytes()
    scaling.plot(result, drawn)
    assert drawn.read_bytes() == before


def test_an_exchange_on_a_cpu_takes_at_least_the_time_of_its_cores() -> None:
    setup = Setup("shufflenet_v2_x0_5", 2, 32)
    free = predict(setup, {**MEASURED, "alone_deviation": 0.0, "all_reduce_cpu_line": [0.0, 1e10]}, num_cores=2)
    busy = predict(setup, {**MEASURED, "alone_deviation": 0.0, "all_reduce_cpu_line": [0.0, 1e7]}, num_cores=2)
    crowded = predict(setup, {**MEASURED, "all_reduce_cpu_line": [0.0, 1e7], "ranks": 4}, num_cores=2)
    num_bytes = 4 * 1_366_792  # gradients of all parameters
    assert free["exposed"] < 0.01 < busy["exposed"] == pytest.approx(num_bytes / 1e7)
    assert crowded["exposed"] == pytest.approx(2 * num_bytes / 1e7)
    assert free["step"] == pytest.approx(1.0 + free["exposed"])
    alone = predict(setup, {**MEASURED, "ranks": 1}, num_cores=2)
    assert alone == {"step": pytest.approx(1.0), "exposed": 0.0, "slowest": 0.0, "bound": None}
    assert [found["bound"] for found in (free, busy, crowded)] == ["clock", "cores", "cores"]


def test_hosts_that_cannot_be_made_are_an_entry_and_ranks_that_fail_are_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*_: Any) -> dict[str, Any]:
        raise RuntimeError("ranks ended with [1]")

    monkeypatch.setattr(measured_check, "run", run)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert list(measured_check.check(Setup(), 1, [1000.0])) == [
        {"name": "1 on this machine", "problem": "ranks ended with [1]", "is_left_out": False},
        {
            "name": "2 hosts, 1000 Mbit/s",
            "problem": "only root can make two hosts of this machine",
            "is_left_out": True,
        },
    ]


def test_recipes_with_too_few_samples_a_gpu_are_left_out() -> None:
    rows = command.estimates(constants.read())["recipes"]
    shares = {row["batch_size"] // row["num_ranks"] for row in rows}
    assert min(shares) >= jobs.LEAST_MICRO_BATCH
    assert {row["num_ranks"] for row in rows} == {8, 64}


@nightly
def test_all_parts_run(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    assert command.main(["--tiny", "--json", str(file), "--ranks", "2", "--mbits"]) == 0
    result = json.loads(file.read_text())
    assert [entry["ranks"] for entry in result["parts"]["check"]["entries"]] == [1, 2]
    assert set(result["parts"]["simulate"]["found"]) == set(command.SIMULATED)
