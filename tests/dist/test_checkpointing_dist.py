"""Checkpointed blocks under DDP and FSDP2 on two processes: the same bits as without, wrapped in the same way."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpointed_models import MODELS
from checkpointing_worker import PLANS
from conftest import NIGHTLY, nightly
from launching import on_processes

NAMES = tuple(MODELS) if NIGHTLY else ("vit_b_16",)


@pytest.mark.parametrize("wrapping", ["ddp", pytest.param("fsdp2", marks=nightly)])
def test_same_bits_as_without(wrapping: str, tmp_path: Path) -> None:
    done = on_processes(2, "checkpointing_worker.py", tmp_path, wrapping, *NAMES)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in NAMES:
        for plan in PLANS:
            assert f"same: {name} {plan}" in done.stdout
