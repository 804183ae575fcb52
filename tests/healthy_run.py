"""Figures of a healthy run, changed as a test wants them, and what a rule says of these."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trainer.advice.adviser import advice
from trainer.advice.measured import Advice, Batch, Exchange, Host, Loading, Measured, Memory

GIB = 2**30
MIB = 2**20
ACCUMULATING = Batch(64, 8, 8, (1, 2, 4, 8, 16, 32, 64), has_batchnorm=True)
EXCHANGE = Exchange(num_ranks=8, num_nodes=2, share=0.3, gradient_bytes=100 * MIB, hosts=("a",) * 4 + ("b",) * 4)


def measured(shares: dict[str, float] | None = None, **changes: Any) -> Measured:
    """A healthy run on a GPU, in 100 steps of 0.1 s, with other shares of the time and other facts."""
    others = shares or {}
    left = 1 - sum(others.values())
    healthy = Measured(
        seconds=10.0,
        num_steps=100,
        steps_per_epoch=1000,
        total_steps=100_000,
        shares={"forward": left / 3, "backward": left * 2 / 3, **others},
        device="cuda",
        loading=Loading(num_workers=4, seconds=0.1, cpu_seconds=0.1),
        batch=Batch(64, 64, 1, (1, 2, 4, 8, 16, 32, 64)),
        host=Host(num_cores=16),
        memory=Memory(peak=60 * GIB, fixed=10 * GIB, target=72 * GIB, num_blocks=12),
    )
    return replace(healthy, **changes)


def said(rule: str, shares: dict[str, float] | None = None, **changes: Any) -> Advice | None:
    """Returns what this rule says of such a run."""
    return next((a for a in advice(measured(shares, **changes)) if a.rule == rule), None)


def heard(rule: str, shares: dict[str, float] | None = None, **changes: Any) -> Advice:
    """Returns what this rule says of such a run, and fails where it says nothing."""
    found = said(rule, shares, **changes)
    assert found is not None
    return found
