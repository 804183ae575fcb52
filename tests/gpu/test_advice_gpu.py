"""What a run is told on a GPU: that its host is slow, where that can be known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Train, WriteConfig
from run_results import summary

from trainer.advice.trials import copied_per_second

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
    assert said["gain"] is None


def test_a_host_that_waits_in_each_step_is_not_called_slow(
    train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = write_config(
        data__train={"name": "vectors:Vectors", "args": {"length": 640}},
        data__eval=None,
        data__workers=2,
        checkpoint__every=1000,
        model={"name": "mlp", "args": {"in_features": 8, "hidden": [8] * 40}},
        precision="fp16",  # whose scaler is asked after each step
        train={"steps": 120, "batch_size": 64, "micro_batch_size": 8},
        log__every=20,
    )
    assert train("--config", config).code == 0
    assert "host_bound" not in [advice["rule"] for advice in summary(tmp_path / "run")["advice"]]
    often = ("precision=no", "log.every=1", f"run.dir={tmp_path / 'often'}")  # or at each report
    assert train("--config", config, *often).code == 0
    assert "host_bound" not in [advice["rule"] for advice in summary(tmp_path / "often")["advice"]]


def test_copies_of_a_state_to_the_host() -> None:
    speed = copied_per_second(torch.device("cuda", torch.cuda.current_device()))
    assert speed is None or 1e8 < speed < 1e13


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
