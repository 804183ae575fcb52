"""The benchmark of further processes: what is made of times, what is read from a run folder, and one short run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, nightly
from launching import run

from benchmarks import ranks
from benchmarks.ranks import MODES, NAMES, default_setup, plot, read_reports, run_rounds, summarize, table
from benchmarks.rounds import Problem, Timing

SETUP = default_setup("cpu", tiny=False, num_ranks=2)  # batches of 64


def _result(**changes: float) -> dict[str, Any]:
    seconds = {"one": 0.10, "weak": 0.125, "strong": 0.08, **changes}
    taken = {("ddp", mode): [Timing(value, 1.0, 0.0)] for mode, value in seconds.items()}
    taken |= {("ours", mode): [Timing(value, 1.0, 0.9 if mode == "weak" else 0.0)] for mode, value in seconds.items()}
    taken["accelerate", "one"] = []
    problems = {("accelerate", "one"): Problem("it had 1 processes instead of 2", is_absence=False)}
    environment = {
        "cpu": "Chip",
        "cores": 2,
        "python": "3.11",
        "date": "2026-11-23T01:02:03",
        "commit": "a" * 40,
        "command": "python",
    }
    return {
        "environment": {**environment, "packages": {"torch": "2"}, "gpu": None, "cuda": None},
        "settings": {**ranks.asdict(SETUP), "rounds": 1, "keep_loaded": False},
        "entries": summarize(SETUP, taken, problems, keep_loaded=False),
    }


def test_efficiency_is_the_speed_of_all_over_that_of_as_many_alone() -> None:
    entries = {(entry["entry"], entry["mode"]): entry for entry in _result()["entries"]}
    assert entries["ddp", "one"]["efficiency"] is None
    assert entries["ddp", "one"]["samples_per_second"]["median"] == pytest.approx(320)
    weak, strong = entries["ddp", "weak"], entries["ddp", "strong"]
    assert (weak["num_ranks"], weak["batch_size"]) == (2, 32)
    assert weak["samples_per_second"]["median"] == pytest.approx(64 / 0.125)
    assert weak["efficiency"]["median"] == pytest.approx(0.8)
    assert (strong["num_ranks"], strong["batch_size"]) == (2, 16)
    assert strong["efficiency"]["median"] == pytest.approx(0.10 / 0.08 / 2)
    assert entries["ours", "weak"]["samples_per_second"] is None  # others used the machine
    assert entries["ours", "weak"]["efficiency"] is None
    rows = [line.split("|") for line in table(_result()).splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert "it had 1 processes instead of 2" in table(_result())


def test_a_job_that_fails_is_left_out_of_later_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def run_job(entry: str, mode: str, setup: ranks.Setup) -> Timing:
        started.append((entry, mode))
        if (entry, mode) == ("ddp", "weak"):
            raise Problem("no port", is_absence=False)
        return Timing(1.0, 1.0, 0.0)

    monkeypatch.setattr(ranks, "run_job", run_job)
    taken, problems = run_rounds(SETUP, ["ddp", "ours"], rounds=2, seed=0)
    assert list(problems) == [("ddp", "weak")]
    assert started.count(("ddp", "weak")) == 1
    assert {key: len(timings) for key, timings in taken.items()} == {
        (name, mode): 0 if (name, mode) == ("ddp", "weak") else 2 for name in ("ddp", "ours") for mode in MODES
    }


def test_our_seconds_are_those_between_two_reports(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    records = [
        {"train/loss": 2.0, "time": 100.0},
        {"eval/loss": 1.0, "time": 101.0},
        {"train/loss": 1.0, "time": 107.5},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"num_processes": 2}))
    assert read_reports(tmp_path) == (7.5, 2)


def test_the_plot_is_the_same_file_from_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the plot, and is not installed")
    for name in ("a.svg", "b.svg"):
        plot(_result(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    plot(_result(weak=0.2), tmp_path / "c.svg")
    assert (tmp_path / "a.svg").read_bytes() != (tmp_path / "c.svg").read_bytes()


@nightly
def test_a_run_measures_every_job_and_prints_the_same_table_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results" / "ranks.json"
    command = [sys.executable, "-m", "benchmarks.ranks", "--tiny", "--json", str(file)]
    ended = run(command, REPOSITORY, timeout=280)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(file.read_text())
    assert [(e["entry"], e["mode"]) for e in result["entries"]] == [(name, mode) for name in NAMES for mode in MODES]
    for entry in result["entries"]:
        assert entry["problem"] is None
        assert (entry["efficiency"] is None) == (entry["mode"] == "one")
    assert ranks.main(["--json", str(file), "--markdown"]) == 0
    assert capsys.readouterr().out == ended.stdout
