"""Profiles on a real GPU: kernels by kind, how idle it was, and a memory snapshot."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import Train, WriteConfig

from trainer.cli import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_a_profile_has_kernels_and_a_snapshot(
    train: Train, write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = {"name": "synthetic", "args": {"num_samples": 256, "shape": [3, 32, 32], "num_classes": 10}}
    model = {"name": "resnet18", "args": {"num_classes": 10}}
    done = train(
        "--config",
        write_config(
            data={"train": data}, model=model, train={"steps": 10, "batch_size": 64}, profile={"steps": [4, 7]}
        ),
    )
    assert done.code == 0, done.err
    folder = tmp_path / "run" / "profile"
    assert main(["profile", str(tmp_path / "run"), "--json"]) == 0  # looks into the trace where nobody has
    record = json.loads((folder / "rank-0.kernels.json").read_text())
    assert record["kinds_are_of"] == "gpu"
    assert record["kind_seconds"]["matmul"] > 0
    assert record["kind_seconds"]["normalisation"] > 0
    assert record["kind_seconds"]["optimizer"] > 0
    assert record["kind_seconds"].get("other", 0) < 0.2 * sum(record["kind_seconds"].values())
    assert 0 <= record["gpu"]["idle_share"] < 1
    assert record["memory"]["of"] == "gpu"
    parameters = 4 * 11_000_000
    assert record["memory"]["before_bytes"] > 2 * parameters  # with the optimizer's two averages, at least
    assert record["memory"]["peak_bytes"] > record["memory"]["before_bytes"] + 0.9 * parameters  # gradients
    assert any(row["place"] == "backward" for row in record["memory"]["held_by"])

    with gzip.open(folder / "rank-0.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert {event["name"] for event in events if event["name"].startswith("step ")} == {
        f"step {step}" for step in (4, 5, 6, 7)
    }
    assert any(event.get("cat") == "kernel" for event in events)
    snapshot = pickle.loads((folder / "rank-0.memory.pickle").read_bytes())
    assert snapshot["segments"]
    allocations = [entry for trace in snapshot["device_traces"] for entry in trace if entry["action"] == "alloc"]
    assert any(frame["filename"].endswith("loop.py") for entry in allocations for frame in entry["frames"])

    capfd.readouterr()
    assert main(["profile", str(tmp_path / "run")]) == 0
    text = capfd.readouterr().out
    assert "the GPU was idle " in text
    assert "the longest gaps of rank 0:" in text
    assert "rank-N.memory.pickle" in text
