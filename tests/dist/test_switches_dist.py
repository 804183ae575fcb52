"""DDP's settings reach DDP, and two processes find one micro-batch together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteConfig
from resuming import TrainServer
from run_results import losses, summary

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {"gradient_as_bucket_view": True, "static_graph": False, "find_unused_parameters": False}),
    "copied, small buckets, unused": (
        {"gradient_as_bucket_view": False, "bucket_mb": 0.5, "find_unused_parameters": True},
        {"gradient_as_bucket_view": False, "bucket_bytes_cap": 2**19, "find_unused_parameters": True},
    ),
    "static": ({"static_graph": True, "bucket_mb": 3}, {"static_graph": True, "bucket_bytes_cap": 3 * 2**20}),
    "bf16": ({"gradient_compression": "bf16"}, {}),
    "fp16": ({"gradient_compression": "fp16"}, {}),
}


def watched(write_config: WriteConfig, folder: Path, parallel: dict[str, Any]) -> Path:
    folder.mkdir()
    return write_config(
        f"{folder.name}/run.yaml",
        run__dir=str(folder / "run"),
        task={"name": "exchange:Watching"},
        model={"name": "fitted_model:Stack", "args": {"depth": 2}},
        optim={"name": "exchange:Recorded", "lr": 0.05},
        parallel=parallel,
        train={"epochs": 1, "batch_size": 12},
    )


def gradients(folder: Path) -> list[torch.Tensor]:
    return torch.load(folder / "gradients-1-0.pt", weights_only=True)


def test_settings_reach_ddp(server: TrainServer, write_config: WriteConfig, tmp_path: Path) -> None:
    for name, (parallel, expected) in SETTINGS.items():
        folder = tmp_path / name.replace(", ", "-").replace(" ", "-")
        done = server.train("--config", watched(write_config, folder, parallel), ranks=2, folder=folder)
        assert done.code == 0, done.err
        lines = [json.loads(line) for line in (folder / "settings.jsonl").read_text().splitlines()]
        assert len(lines) == 2 * 5
        assert all(line[key] == value for line in lines for key, value in expected.items())
        assert summary(folder / "run")["status"] == "finished"
        types = {"bf16": torch.bfloat16, "fp16": torch.float16}  # the first has fewer digits, so it fits both
        found = gradients(folder)
        fits = [key for key, dtype in types.items() if all(torch.equal(g, g.to(dtype).float()) for g in found)]
        assert fits[:1] == ([name] if name in types else [])
        rel = {"bf16": 2e-2, "fp16": 2e-3}.get(name, 1e-5)
        assert losses(folder / "run") == pytest.approx(losses(tmp_path / "defaults" / "run"), rel=rel)


def test_ranks_take_what_fits_on_all_of_them(server: TrainServer, write_config: WriteConfig, tmp_path: Path) -> None:
    """A rank that takes more than was planned decides for the others."""
    changes: dict[str, Any] = {
        "data__train__args__length": 256,
        "train": {"steps": 2, "batch_size": 128, "micro_batch_size": "auto"},
        "memory": {"target": "3MiB"},
    }
    extra = {"rank": 1, "extra": 2**17}
    file = write_config(model={"name": "fitted_model:HungryRank", "args": extra}, **changes)
    done = server.train("--config", file, ranks=2)
    assert done.code == 0, done.err
    assert "memory     micro-batch 64, " in done.out  # as planned
    tried = done.out.split("tried: micro-batch ")[1].split()[0]
    assert 1 <= int(tried) <= 16
    assert f"batch      128 = 2 processes x {tried} x {64 // int(tried)} micro-batches" in done.out
    assert summary(tmp_path / "run")["status"] == "finished"
