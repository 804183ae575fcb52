"""What a run is told on a GPU: that its host is slow, and that its copies wait for nobody."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Train, WriteConfig
from run_results import summary

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_tiny_kernels_are_the_hosts_doing(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(
        data__train={"name": "vectors:Vectors", "args": {"length": 640}},
        data__eval=None,
        data__workers=2,
        checkpoint__every=1000,
        model={"name": "mlp", "args": {"in_features": 8, "hidden": [8] * 40}},
        train={"steps": 120, "batch_size": 64, "micro_batch_size": 8},
        log__every=20,
    )
    assert train("--config", config).code == 0
    (said,) = [advice for advice in summary(tmp_path / "run")["advice"] if advice["rule"] == "host_bound"]
    assert said["settings"] == {"train.micro_batch_size": 64}
    assert said["gain"] is None or said["gain"] > 0


def test_large_kernels_are_not(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(
        data__train={"name": "vectors:Vectors", "args": {"length": 640}},
        data__eval=None,
        data__workers=2,
        checkpoint__every=1000,
        model={"name": "mlp", "args": {"in_features": 8, "hidden": [16384] * 4}},
        train={"steps": 120, "batch_size": 64},
        log__every=20,
    )
    assert train("--config", config).code == 0
    assert "host_bound" not in [advice["rule"] for advice in summary(tmp_path / "run")["advice"]]
