"""Whether two runs are the same run: every tensor, every plain value and every logged loss, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from trainer.checkpoint.reading import Checkpoint

_OF_THE_ATTEMPT = {"wandb_id"}


def checkpoint_differences(ours: Checkpoint, theirs: Checkpoint) -> list[str]:
    """Returns what differs in two checkpoints, in a few words each; nothing where they are the same run's.

    Raises:
        UserError: a file cannot be read.
    """
    if ours.step != theirs.step:
        return [f"step {ours.step} instead of {theirs.step}"]
    here, there = ours.manifest, theirs.manifest
    told = [
        f"progress.{key}: {value} instead of {expected}"
        for (key, value), expected in zip(asdict(here.progress).items(), asdict(there.progress).values(), strict=True)
        if value != expected and key not in _OF_THE_ATTEMPT
    ]
    if here.values != there.values:
        told.append("plain values of the state")
    if ours.names("") != theirs.names(""):
        return [*told, "names of tensors"]
    return told + [f"tensor {name}" for name in theirs.names("") if not _is_same(ours.read(name), theirs.read(name))]


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compares bits: NaN is NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def logged_differences(ours: Path, theirs: Path) -> list[str]:
    """Returns what differs in the losses of two runs' `metrics.jsonl`; at most ten of the losses themselves.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    told = []
    losses: dict[int, float] = {}
    for step, loss in _losses(ours):
        if step in losses:
            told.append(f"step {step} is logged twice")
        losses[step] = loss
    expected = dict(_losses(theirs))
    if losses.keys() != expected.keys():
        told.append(f"{len(losses)} losses are logged instead of {len(expected)}")
    wrong = [step for step in sorted(losses.keys() & expected.keys()) if losses[step] != expected[step]]
    return told + [f"loss of step {step}: {losses[step]} instead of {expected[step]}" for step in wrong[:10]]


def _losses(file: Path) -> Iterator[tuple[int, float]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "train/loss" in record:
            yield record["step"], record["train/loss"]
