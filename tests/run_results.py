"""Reads what a run left behind, and compares tensors by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"step-{step:08d}" / "model.pt", weights_only=True)


def optimizer_state(run: Path, step: int) -> dict[int, dict[str, torch.Tensor]]:
    return torch.load(run / "checkpoints" / f"step-{step:08d}" / "optimizer.pt", weights_only=True)["state"]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {r["step"]: r["train/loss"] for r in records(run) if "train/loss" in r}


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def identical(a: dict[Any, torch.Tensor], b: dict[Any, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a: dict[Any, torch.Tensor], b: dict[Any, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-6) for k in a)
