"""Checkpoints on a GPU: the copy on a stream of its own is the state of its moment, and a run goes on exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Train, WriteConfig
from run_results import identical, losses, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

EMA = {"ema": {"decay": 0.9}}


def test_copied_beside_the_next_step_is_what_was_waited_for(
    train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Large enough that the copy is still under way when the next step computes."""
    model = {"in_features": 8, "hidden": [4096, 4096], "dropout": 0.2}
    for name, behind in (("behind", True), ("waited", False)):
        every_step = {"every": 1, "keep": 99, "async_save": behind}
        changes = {"run__dir": str(tmp_path / name), "checkpoint": every_step, "model__args": model}
        optim = {"name": "adamw", "lr": 0.01, **EMA}
        assert train("--config", write_config(f"{name}.yaml", **changes, optim=optim, train__epochs=1)).code == 0
    for step in range(1, 6):
        assert identical(tensors(tmp_path / "behind", step, ""), tensors(tmp_path / "waited", step, ""))


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_run_on_a_gpu_goes_on_exactly(
    precision: str, train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    changes = {"precision": precision, "optim": {"name": "adamw", "lr": 0.01, **EMA}}
    assert train("--config", write_config("whole.yaml", run__dir=str(tmp_path / "whole"), **changes)).code == 0
    for epochs in (1, 2):
        assert train("--config", write_config(**changes, train__epochs=epochs)).code == 0
    assert identical(tensors(tmp_path / "run", 10, ""), tensors(tmp_path / "whole", 10, ""))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
