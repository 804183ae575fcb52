"""The benchmark of steps: loops that take turns, what is made of their times, and one short run of all of it."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, nightly
from launching import run

from benchmarks import step_overhead
from benchmarks.loops import AfterStep
from benchmarks.rounds import MOST_FOREIGN_CORES, Problem, Timing, median_interval
from benchmarks.step_overhead import NAMES, Measured, plot, summarize, table, workloads
from benchmarks.turns import Entrant, Turn, Turns


def _write_down(steps: int, after_step: AfterStep, folder: Path) -> None:
    """A loop that leaves its number of steps in a file, and fails after `steps`."""
    for step in itertools.count(1):
        (folder / "steps.txt").write_text(str(step))
        time.sleep(0.01)
        if step > steps:
            raise ValueError("the last step\nis over")
        after_step(1)


def test_a_loop_hands_over_after_the_steps_of_its_turn() -> None:
    ours, theirs = multiprocessing.Pipe()
    for steps in (3, 1):
        ours.send(Turn(lead=1, steps=steps))
    turns = Turns(theirs, torch.device("cpu"), Turn(lead=2, steps=1))
    handed_over = []
    for step in range(1, 8):
        time.sleep(0.01)
        turns.after_step(1)
        if ours.poll():
            handed_over.append(step)
            assert ours.recv().timing.seconds >= 0.01
    assert handed_over == [3, 7]


@nightly
def test_a_process_makes_the_steps_of_its_turn_and_waits(tmp_path: Path) -> None:
    entrant = Entrant(partial(_write_down, 12), torch.device("cpu"), 1, Turn(lead=1, steps=2), tmp_path / "loop")
    try:
        steps = tmp_path / "loop" / "steps.txt"
        assert steps.read_text() == "3"
        taken = entrant.take(Turn(lead=1, steps=4))
        assert steps.read_text() == "8"
        assert taken.num_threads == 1
        assert taken.timing.seconds >= 0.01
        with pytest.raises(Problem, match="ValueError: the last step is over"):
            entrant.take(Turn(lead=3, steps=4))
    finally:
        entrant.close()


def _measured(*seconds: float, foreign: float = 0.0) -> Measured:
    return Measured([Timing(value, 1.0, foreign) for value in seconds], num_threads=2)


def _result(**changes: Any) -> dict[str, Any]:
    workload = workloads("cpu", tiny=False)[0]
    measured = {
        "raw": _measured(0.100, 0.200),
        "lightning": _measured(0.121, 0.220),
        "composer": Measured(problem=Problem("not for this torch", is_absence=True)),
        "ours": _measured(0.110, 0.200),
        **changes,
    }
    environment = {
        "cpu": "Chip",
        "cores": 2,
        "python": "3.11",
        "date": "2026-11-23T01:02:03",
        "commit": "a" * 40,
        "command": "python",
    }
    result = {
        "environment": {**environment, "packages": {"torch": "2"}, "gpu": None, "cuda": None},
        "settings": {"workloads": [step_overhead.asdict(workload)], "keep_loaded": False},
        "peak_flops": 1e9,
        "entries": summarize(workload, measured, flops=1e6, peak=1e9, keep_loaded=False),
    }
    return json.loads(json.dumps(result))


def test_loops_are_compared_with_ours_within_rounds() -> None:
    result = _result()
    raw, lightning, composer, ours = result["entries"]
    assert ours["time_ratio"] == {"median": 1, "min": 1, "max": 1}
    assert lightning["time_ratio"]["min"] == pytest.approx(1.1)
    assert lightning["time_ratio"]["max"] == pytest.approx(1.1)
    assert raw["time_ratio"]["max"] == 1
    assert raw["overhead_microseconds"]["median"] == 0
    assert ours["overhead_microseconds"]["median"] == pytest.approx(5000)
    assert raw["samples_per_second"] == pytest.approx(64 / 0.15)
    assert raw["mfu"] == pytest.approx(64 / 0.15 * 1e6 / 1e9)
    assert composer["is_left_out"]
    rows = [line.split("|") for line in table(result).splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert [cell.strip() for cell in rows[3][4:7]] == ["170", "121 to 220", "1.10"]
    assert "not for this torch" in table(result)


def test_what_a_step_costs_beside_the_model_is_compared_with_the_loop_that_has_the_same_memory() -> None:
    paged = {"huge_pages": _measured(0.105, 0.198)}
    ours = next(entry for entry in _result(**paged)["entries"] if entry["loop"] == "ours")
    assert ours["overhead_microseconds"] == pytest.approx({"median": 3500, "min": 2000, "max": 5000})
    assert "above `huge_pages`, µs" in table(_result(**paged))
    assert "`backends.huge_pages`" in table(_result(**paged))
    assert "huge pages" not in table(_result())


def test_the_bars_are_of_our_speed_and_say_what_the_rounds_can_tell() -> None:
    ours = [0.1, 0.102, 0.11, 0.1, 0.101, 0.1]
    measured = {
        "raw": _measured(*(0.97 * second for second in ours)),
        "accelerate": _measured(*(factor * s for factor, s in zip((0.9, 1, 1.1, 1.02, 1.05, 1.1), ours, strict=True))),
        "lightning": Measured(problem=Problem("failed", is_absence=False)),
        "ours": _measured(*ours),
    }
    goals = [line for line in table(_result(**measured)).splitlines() if line.startswith("- ")]
    assert goals == [
        "- resnet18, our speed to that of `raw` (95% interval 0.970 to 0.970): 0.970, at least 0.99: NOT MET",
        "- resnet18, our speed to that of `lightning`: not measured",
        "- resnet18, our speed to that of `accelerate` (95% interval 0.900 to 1.100, the bar is within it): 1.035, "
        "at least 1: met",
    ]


def test_the_interval_of_a_median_is_that_of_the_tables() -> None:
    values = list(range(26, 0, -1))
    assert median_interval(values) == (8, 19)  # the 8th of 26, as in tables of the sign test
    assert median_interval(values[:9]) == (19, 25)  # the 2nd of 9
    assert median_interval(values[:6]) == (21, 26)
    assert median_interval(values[:5]) is None


def test_the_peak_is_that_of_each_models_precision() -> None:
    result = _result()
    assert "MFU: of 0.001 TFLOP/s;" in table(result)
    result["peak_flops"] = {"resnet50": 9.9e14, "mlp": 6.7e13}
    assert "MFU: of 990 TFLOP/s (resnet50), 67 TFLOP/s (mlp);" in table(result)


def test_a_round_in_which_others_used_the_machine_is_compared_with_nothing() -> None:
    loaded = _measured(0.5, 0.5, foreign=MOST_FOREIGN_CORES + 0.01)
    raw, *_, ours = _result(raw=loaded)["entries"]
    assert raw["seconds"] is None
    assert raw["dropped_rounds"] == 2
    assert ours["overhead_microseconds"] is None


def test_the_plot_is_the_same_file_from_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the plot, and is not installed")
    for name in ("a.svg", "b.svg"):
        plot(_result(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    plot(_result(ours=_measured(0.110, 0.210)), tmp_path / "c.svg")
    assert (tmp_path / "a.svg").read_bytes() != (tmp_path / "c.svg").read_bytes()


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_turn_lasts_from_report_to_report_or_a_multiple_of_that(device_type: str) -> None:
    for workload in workloads(device_type, tiny=False):
        assert (workload.lead + workload.steps) % workload.work.report_every == 0


@nightly
def test_a_run_measures_every_loop_and_prints_the_same_table_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("lightning", "timm"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    file = tmp_path / "results" / "steps.json"
    command = [sys.executable, "-m", "benchmarks.step_overhead", "--tiny", "--json", str(file)]
    ended = run(command, REPOSITORY, timeout=280)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(file.read_text())
    assert [entry["loop"] for entry in result["entries"]] == [*NAMES, *NAMES]
    for entry in result["entries"]:
        assert (entry["seconds"] is None) == entry["is_left_out"] == (entry["loop"] == "composer")
        assert entry["num_threads"] in (1, None)
        if not entry["is_left_out"]:
            assert entry["mfu"] > 0
    assert step_overhead.main(["--json", str(file), "--markdown"]) == 0
    assert capsys.readouterr().out == ended.stdout
