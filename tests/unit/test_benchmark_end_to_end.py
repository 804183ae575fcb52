"""The benchmark from JPEGs to a trained model: what is made of its times, and one short run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, nightly
from launching import run

from benchmarks import end_to_end
from benchmarks.end_to_end import NAMES, ONLY_ON_GPU, plot, repeated, summarize, table
from benchmarks.rounds import Problem, Timing
from benchmarks.turns import Measured


def _result(**changes: Measured) -> dict[str, Any]:
    measured = {
        "torchvision": Measured([Timing(1.2, 1.5, 0.0), Timing(1.8, 1.5, 0.9)]),
        "timm": Measured(problem=Problem("No module named 'timm'", is_absence=True)),
        "ours": Measured([Timing(0.8, 2.0, 0.0), Timing(1.0, 2.0, 0.0)]),
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
    work = {"model": "resnet18", "shape": [3, 96, 96], "batch_size": 32, "precision": "no"}
    work |= {"num_samples": 3200, "compile": False}
    settings = {"work": work, "num_workers": 1, "num_threads": 2, "rounds": 2, "steps": 12, "keep_loaded": False}
    return {
        "environment": {**environment, "packages": {"torch": "2"}, "gpu": None, "cuda": None},
        "settings": settings,
        "pictures": {"pictures": 64, "pixels": ["500x375"], "mean_bytes": 100_000},
        "entries": summarize(measured, batch_size=32, keep_loaded=False),
    }


def test_rates_and_cpu_time_are_of_the_quiet_rounds() -> None:
    torchvision, timm, ours = _result()["entries"]
    assert torchvision["dropped_rounds"] == 1
    assert torchvision["images_per_second"]["max"] == pytest.approx(32 / 1.2)
    assert torchvision["cpu_seconds_per_image"]["median"] == pytest.approx(1.5 * 1.2 / 32)
    assert torchvision["time_ratio"]["median"] == pytest.approx(1.5)
    assert ours["images_per_second"]["median"] == pytest.approx((32 / 0.8 + 32) / 2)
    assert timm["is_left_out"]
    rows = [line.split("|") for line in table(_result()).splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert [cell.strip() for cell in rows[2][3:8]] == ["27", "27 to 27", "1.50", "1.50 to 1.50", "56.2"]
    assert "No module named 'timm'" in table(_result())


def test_the_plot_is_the_same_file_from_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the plot, and is not installed")
    for name in ("a.svg", "b.svg"):
        plot(_result(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    plot(_result(ours=Measured([Timing(0.5, 2.0, 0.0)])), tmp_path / "c.svg")
    assert (tmp_path / "a.svg").read_bytes() != (tmp_path / "c.svg").read_bytes()


def test_an_epoch_is_long_and_of_the_same_pictures(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    with repeated(tmp_path, least=7) as folder:
        read = sorted(f"{file.parent.name}: {file.read_text()}" for file in folder.glob("*/*.jpg"))
    assert read == sorted(3 * ["a: a/1.jpg", "a: a/2.jpg", "b: b/1.jpg"])
    assert not folder.exists()


@nightly
def test_a_run_measures_every_entry_and_prints_the_same_table_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("lightning", "timm"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    file = tmp_path / "results" / "end-to-end.json"
    command = [sys.executable, "-m", "benchmarks.end_to_end", "--tiny", "--json", str(file)]
    ended = run(command, REPOSITORY, timeout=280)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(file.read_text())
    assert [entry["entry"] for entry in result["entries"]] == [name for name in NAMES if name not in ONLY_ON_GPU]
    for entry in result["entries"]:
        assert entry["problem"] is None
        assert entry["num_threads"] == 1
        assert entry["cpu_seconds_per_image"]["median"] > 0
    assert end_to_end.main(["--json", str(file), "--markdown"]) == 0
    assert capsys.readouterr().out == ended.stdout
