"""Reads what a run left behind, and compares tensors by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.reading import Checkpoint
from trainer.checkpoint.storage import LocalStorage


def checkpoint(run: Path, step: int) -> Checkpoint:
    return Checkpoint(LocalStorage(run / "checkpoints"), f"step-{step:08d}")


def tensors(run: Path, step: int, prefix: str) -> dict[str, torch.Tensor]:
    """Returns the whole tensors of a checkpoint whose names begin so, without that."""
    found = checkpoint(run, step)
    return {name: found.read(prefix + name) for name in found.names(prefix)}


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return tensors(run, step, "model.")


def optimizer_state(run: Path, step: int) -> dict[str, torch.Tensor]:
    return tensors(run, step, "optimizer.")


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
