"""What only a GPU shows: no waiting in a step, half precision, pinned copies, equality with the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train, WriteConfig, forget_accelerate, no_waiting
from run_results import checkpoint, losses, summary

from trainer.config import load_config
from trainer.loop import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_a_step_never_waits_for_the_device(write_config: WriteConfig) -> None:
    config = load_config(str(write_config(optim__clip_norm=1.0, data__workers=2, precision="bf16")))
    trainer = Trainer(config)
    trainer.start()
    for _ in range(3):  # warm-up: allocator, cuBLAS, lazy state
        trainer.train_step()
    with no_waiting():
        for _ in range(3):
            trainer.train_step()
    trainer.close()


def test_batches_leave_pinned_memory(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    trainer = Trainer(load_config(str(write_config(data__workers=2))))
    monkeypatch.setattr(trainer.task, "check", lambda data, ids: pinned.append(data[0].is_pinned()))
    trainer.start()
    trainer.train_step()
    trainer.close()
    assert pinned
    assert all(pinned)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_losses_are_those_of_the_cpu(
    precision: str, train: Train, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: dict[str, Any] = {"model__args__dropout": 0.0}
    assert train("--config", write_config(precision=precision, **plain)).code == 0
    forget_accelerate()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert train("--config", write_config("cpu.yaml", run__dir=str(tmp_path / "cpu"), **plain)).code == 0
    devices = [json.loads((tmp_path / d / "environment.json").read_text())["device"] for d in ("run", "cpu")]
    assert devices[0] != "cpu"
    assert devices[1] == "cpu"
    tolerance = 1e-4 if precision == "no" else 0.03
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)


def test_loss_scale_survives_a_restart(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    assert train("--config", write_config(precision="fp16")).code == 0
    saved = checkpoint(tmp_path / "run", 10).manifest.values["scaler"]
    assert saved["scale"] > 0
    trainer = Trainer(load_config(str(write_config(precision="fp16", train__epochs=3))))
    trainer.restore()
    assert trainer.runtime.scaler is not None
    assert trainer.runtime.scaler.state_dict() == saved
    trainer.close()


def test_synthetic_data_stays_on_the_device(write_config: WriteConfig) -> None:
    data = {"train": {"name": "synthetic", "args": {"num_samples": 64, "shape": [8], "num_classes": 3}}}
    trainer = Trainer(load_config(str(write_config(data=data))))
    trainer.start()
    trainer.train_step()
    dataset: Any = trainer.feed.dataset
    images = dataset._images
    trainer.train_step()
    assert images.is_cuda
    assert dataset._images is images
    trainer.close()


def test_class_weights_are_on_the_device(train: Train, write_config: WriteConfig) -> None:
    loss = {"name": "cross_entropy", "args": {"weight": [1.0, 2.0, 3.0]}}
    assert train("--config", write_config(task={"loss": loss})).code == 0


def test_overflow_skips_the_step_and_is_counted(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    sgd = {"name": "sgd", "lr": 1e-3}
    file = write_config(precision="fp16", optim=sgd, data__train={"name": "vectors:Huge", "args": {"length": 60}})
    assert train("--config", file).code == 0
    assert summary(tmp_path / "run")["skipped_steps"] > 0
