"""Memory on a real GPU: what the planner says against what torch's allocator counts, and what runs do with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train, WriteConfig
from run_results import losses, summary
from torch import nn
from torchvision import models

from trainer.config import load_config
from trainer.config_model import OptimConfig
from trainer.loop import Trainer
from trainer.memory.blocks import repeated_blocks
from trainer.memory.checkpointing import Setting, apply_checkpointing, uniform_policies
from trainer.memory.devices import this_device
from trainer.memory.planner import Job, Planner
from trainer.optim import build_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

MODELS = ("resnet50", "convnext_tiny", "vit_b_16", "swin_t", "efficientnet_b0")
SYNTHETIC = {"name": "synthetic", "args": {"num_samples": 256, "shape": [3, 64, 64], "num_classes": 10}}


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def _peak(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> int:
    """Returns the most that is allocated in the second of two steps."""
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            outputs = model(batch[0])
        nn.functional.cross_entropy(outputs.float(), batch[1], reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_the_predicted_peak_is_the_allocators(name: str, checkpointing: Setting) -> None:
    size = 64
    model = getattr(models, name)()
    config = OptimConfig(name="adamw", lr=1e-3)
    example = torch.zeros(2, 3, 224, 224), torch.zeros(2, dtype=torch.int64)
    job = Job(
        model, _loss, lambda m: build_optimizer(config, m, "cuda"), example, size, [size], autocast_dtype=torch.bfloat16
    )
    predicted = Planner(job, this_device(torch.device("cuda", 0))).uniform(size, checkpointing).peak_bytes
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model.cuda().to(memory_format=torch.channels_last)
    blocks = repeated_blocks(model)
    apply_checkpointing(blocks, uniform_policies(list(blocks), checkpointing))
    optimizer = build_optimizer(config, model, "cuda")
    images = torch.randn(size, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    measured = _peak(model, optimizer, (images, torch.zeros(size, dtype=torch.int64, device="cuda"))) - before
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("checkpointing", ["full", "selective", "every_2"])
def test_checkpointing_takes_less_and_learns_the_same(
    checkpointing: str, train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "data": {"train": SYNTHETIC},
        "model": {"name": "resnet50"},
        "train": {"steps": 5, "batch_size": 128},
    }
    runs = {}
    for setting in ("none", checkpointing):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        file = write_config(
            f"{setting}.yaml", **changes, memory__checkpointing=setting, run__dir=str(tmp_path / setting)
        )
        assert train("--config", file).code == 0
        runs[setting] = losses(tmp_path / setting), summary(tmp_path / setting)["peak_memory_bytes"]
    assert runs[checkpointing][1] < runs["none"][1]
    assert list(runs[checkpointing][0].values()) == pytest.approx(list(runs["none"][0].values()), rel=1e-3)


def test_the_micro_batch_that_is_chosen_keeps_to_the_target(
    train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    file = write_config(
        data={"train": SYNTHETIC},
        model={"name": "resnet50"},
        train={"steps": 3, "batch_size": 256, "micro_batch_size": "auto"},
        memory={"target": "2GiB"},
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert train("--config", file).code == 0
    found = summary(tmp_path / "run")
    assert 1 < found["micro_batch_size"] < 256
    assert found["peak_memory_bytes"] <= 2 * 2**30


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("compiled", ["blocks", "model"])
def test_compiled_models_learn_the_same(
    compiled: str, mode: str, train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"data": {"train": SYNTHETIC}, "train": {"steps": 4, "batch_size": 64}}
    model = {"name": "resnet18"}
    assert train("--config", write_config("a.yaml", **changes, model=model, run__dir=str(tmp_path / "a"))).code == 0
    model |= {"compile": compiled, "compile_mode": mode}
    assert train("--config", write_config("b.yaml", **changes, model=model, run__dir=str(tmp_path / "b"))).code == 0
    assert list(losses(tmp_path / "b").values()) == pytest.approx(list(losses(tmp_path / "a").values()), rel=1e-2)


def test_optimizers_are_fused_by_default(write_config: WriteConfig) -> None:
    trainer = Trainer(load_config(str(write_config())))
    assert all(group["fused"] for group in trainer.bare_optimizer.param_groups)
    trainer.close()


def test_a_device_without_tf32_switches_computes_in_float32(write_config: WriteConfig) -> None:
    trainer = Trainer(load_config(str(write_config(backends={"cudnn_tf32": False}))))
    a, b = torch.randn(2, 1024, 1024, device="cuda")
    assert torch.allclose(a @ b, (a.double() @ b.double()).float(), rtol=1e-4, atol=1e-3)
    trainer.close()
