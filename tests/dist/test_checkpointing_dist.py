"""Checkpointed blocks under DDP and FSDP2 on two processes: the same bits as without, wrapped in the same way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpointed_models import MODELS
from checkpointing_worker import PLANS
from conftest import SUPPORT
from launching import run


@pytest.mark.parametrize("wrapping", ["ddp", "fsdp2"])
def test_same_bits_as_without(wrapping: str, tmp_path: Path) -> None:
    torchrun = shutil.which("torchrun")
    assert torchrun is not None
    command = [torchrun, "--standalone", "--nproc-per-node", "2", str(SUPPORT / "checkpointing_worker.py"), wrapping]
    done = run(command, tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in MODELS:
        for plan in PLANS:
            assert f"same: {name} {plan}" in done.stdout
