"""The benchmark of training from JPEGs: one short run on the CPU, its table, what it reads from traces and reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, nightly
from launching import run

from benchmarks.feed_training import main, measure, summarize, table
from benchmarks.plain_loop import TINY_MODEL, Measurement, PlainLoop, Setup, count_overlapping_copies
from benchmarks.rounds import Problem
from benchmarks.whole_trainer import read_reports

COMMAND = [sys.executable, "-m", "benchmarks.feed_training"]


def setup(folder: Path, **changes: Any) -> Setup:
    values: dict[str, Any] = {
        "model": TINY_MODEL,
        "folder": folder,
        "batch_size": 8,
        "image_size": 32,
        "workers": 1,
        "device": torch.device("cpu"),
        "compile": False,
        "seconds": 1.0,
        "warm_up_seconds": 1.0,
    }
    return Setup(**{**values, **changes})


def measured(*rates: float) -> list[Measurement]:
    return [Measurement(int(10 * rate), 10.0) for rate in rates]


@nightly
def test_a_run_measures_every_feed_and_prints_the_same_table_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results" / "training.json"
    feeds = ["synthetic", "host", "device_decode", "resident"]
    ended = run([*COMMAND, "--json", str(file), "--device", "cpu", "--tiny", "--feeds", *feeds], REPOSITORY)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(file.read_text())
    assert [(entry["model"], entry["feed"]) for entry in result["entries"]] == [(TINY_MODEL, feed) for feed in feeds]
    medians = {e["feed"]: e["images_per_second"]["median"] for e in result["entries"] if e["images_per_second"]}
    for entry in result["entries"]:
        if entry["problem"]:
            assert "nvidia-nvimgcodec" in entry["problem"]
            continue
        (taken,) = entry["rounds"]
        assert taken["images"] % 4 == 0
        assert taken["seconds"] >= 0.2
        share = entry["images_per_second"]["median"] / medians["synthetic"]
        assert entry["share_of_synthetic"] == pytest.approx(share)
    assert result["settings"]["tiny"]
    assert result["settings"]["rounds"] == 1
    assert result["pictures"]["pixels"] == ["96x72"]
    assert result["environment"]["gpu"] is None
    assert "benchmarks.feed_training" in result["environment"]["command"]
    assert main(["--json", str(file), "--markdown"]) == 0
    assert capsys.readouterr().out == ended.stdout
    assert f"| {TINY_MODEL} | `resident` |" in ended.stdout


def test_without_a_gpu_it_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--json", str(tmp_path / "no.json")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "no CUDA GPU" in captured.err


def test_table_shows_medians_shares_and_what_is_missing() -> None:
    taken = {
        ("resnet50", "synthetic"): measured(2000, 2010, 1990),
        ("resnet50", "host"): measured(1500, 1600, 1400),
        ("resnet50", "timm"): [],
        ("resnet18", "host"): measured(3000),
    }
    problems = {("resnet50", "timm"): Problem("No module named 'timm'", is_absence=True)}
    environment = {"cpu": "Chip", "cores": 16, "python": "3.12", "date": "2026-11-23T01:02:03", "commit": "a" * 40}
    environment["command"] = "python -m benchmarks.feed_training"
    result = {
        "environment": {
            **environment,
            "packages": {"torch": "2.11"},
            "gpu": {"name": "GPU X", "memory_gib": 79.2},
            "cuda": "13.0",
        },
        "settings": {
            "rounds": 3,
            "seconds": 10.0,
            "warm_up_seconds": 4.0,
            "batch_size": 256,
            "image_size": 224,
            "workers": 15,
            "compile": False,
        },
        "pictures": {"pictures": 2000, "pixels": ["500x375"], "mean_bytes": 100_400},
        "trace": {"copies": 16, "overlapping": 15},
        "entries": summarize(taken, problems),
    }
    lines = table(json.loads(json.dumps(result))).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:6]]
    assert [row[3:] for row in rows] == [
        ["2000", "1990 to 2010", "100%"],
        ["1500", "1400 to 1600", "75%"],
        ["-", "No module named 'timm'", ""],
        ["3000", "3000 to 3000", ""],
    ]
    assert {line.count("|") for line in lines[:6]} == {7}
    assert "GPU X (79.2 GiB), CUDA 13.0; Chip, 16 cores" in lines[-1]
    assert "15 of 16 copies to the device overlap" in lines[-1]


def test_a_feed_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    one = setup(tmp_path)
    loop = PlainLoop(one)
    with pytest.raises(Problem) as caught:
        measure("host", one, loop, seed=0)
    assert not caught.value.is_absence


def test_copies_overlap_with_kernels_of_other_streams_only() -> None:
    def event(category: str, name: str, start: float, duration: float, stream: int) -> dict[str, Any]:
        return {"cat": category, "name": name, "ts": start, "dur": duration, "args": {"stream": stream}}

    trace = {
        "traceEvents": [
            {"ph": "M", "name": "process_name"},
            {"cat": "cpu_op", "name": "aten::copy_", "ts": 0, "dur": 100},
            event("kernel", "gemm", 10, 10, 7),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 0, 10, 13),  # ends as the kernel begins
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 12, 2, 13),
            event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 12, 2, 7),  # its own stream
            event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 12, 2, 13),
        ]
    }
    assert count_overlapping_copies(trace) == (3, 1)


def test_reports_of_the_trainer_are_counted_after_the_warm_up(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    one = setup(tmp_path, seconds=2.0, warm_up_seconds=1.0)
    assert read_reports(file, one) is None
    rates = [10, 200, 100, 400, 50]  # 100 images each: 10, 0.5, 1, 0.25 and 2 s
    reports = [json.dumps({"samples": 100 * (i + 1), "train/samples_per_second": r}) for i, r in enumerate(rates)]
    file.write_text("\n".join([*reports, '{"samples": 600, "train/samp']))
    taken = read_reports(file, one)
    assert taken == Measurement(200, 2.25)
    file.write_text("\n".join(reports))  # the last is not complete yet
    assert read_reports(file, one) is None
