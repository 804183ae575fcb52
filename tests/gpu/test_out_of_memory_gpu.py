"""Running out of a real GPU's memory."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import Train, WriteConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_the_report_has_the_device_and_a_snapshot(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    model = {"name": "hungry:Hungry", "args": {"limit": 6, "after": 2}}
    config = write_config(model=model, memory={"on_oom": "shrink"})
    done = train("--config", config)
    assert done.code == 1
    assert "error: rank 0 ran out of memory in step 3, micro-batch 1 of 1 (forward)" in done.err
    assert "OutOfMemoryError: CUDA out of memory" in done.err
    assert "Traceback" not in done.err
    folder = tmp_path / "run" / "out-of-memory"
    facts = json.loads((folder / "rank-0.json").read_text())
    assert facts["device"] == "cuda:0"
    assert 0 < facts["device_bytes"]["allocated"] <= facts["device_bytes"]["reserved"]
    assert facts["device_bytes"]["reserved"] < facts["device_bytes"]["in all"]
    assert any(t["name"] == "layers.0.weight" and t["device"] == "cuda:0" for t in facts["tensors"])
    assert "segments" in pickle.loads((folder / facts["snapshot"]).read_bytes())
    again = train("--config", config)
    assert again.code == 0, again.err
    assert "train.micro_batch_size: 6 instead of 12, which ran out of memory at step 3" in again.out
