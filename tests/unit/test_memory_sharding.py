"""A step under FSDP2 is simulated in one process, in every setting that the planner knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from memory_models import loss_of
from torchvision import models

from trainer.memory.devices import find_device
from trainer.memory.planner import Job, Planner


def planner_of(**settings: Any) -> Planner:
    model = models.VisionTransformer(64, 8, 4, 4, 128, 512, num_classes=10)
    batch = {"image": torch.zeros(8, 3, 64, 64), "label": torch.zeros(8, dtype=torch.long)}
    args: dict[str, Any] = {"num_ranks": 4} | settings
    return Planner(
        Job(model, loss_of, lambda m: torch.optim.AdamW(m.parameters(), foreach=True), batch, 16, [8, 16], **args),
        find_device("a100-40g"),
    )


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_shares(device_type: str, dtype: torch.dtype | None, checkpointing: str) -> None:
    planner = planner_of(device_type=device_type, autocast_dtype=dtype, clips_gradients=True)
    whole = planner.uniform(16, checkpointing)
    sharded = planner.sharded(whole)
    assert (sharded.micro_batch_size, sharded.checkpointing) == (16, checkpointing)
    for name in ("parameters", "gradients", "optimizer"):
        expected = whole.memory.persistent[name] / 4
        assert sharded.memory.persistent[name] == pytest.approx(expected, rel=0.1)
    assert 0 < sharded.parts["communication"] < whole.memory.persistent["parameters"]
    assert sharded.peak_bytes < whole.peak_bytes
    assert sharded.memory.peak_bytes == sum(sharded.memory.at_peak.values())
    assert not dist.is_initialized()


def test_averages_are_shared() -> None:
    planner = planner_of(keeps_averages=True)
    whole = planner.uniform(8, "none")
    sharded = planner.sharded(whole)
    assert sharded.parts["averages"] == pytest.approx(whole.parts["averages"] / 4, rel=0.01)
    assert sharded.peak_bytes == sharded.memory.peak_bytes + sharded.parts["averages"]


def test_gradients_are_whole_while_they_accumulate() -> None:
    planner = planner_of()
    last = planner.sharded(planner.uniform(8, "none"))
    assert last.parts["communication"] > 0.9 * planner.uniform(8, "none").memory.persistent["gradients"]


def test_more_processes_take_less_each() -> None:
    peaks = [(p := planner_of(num_ranks=n)).sharded(p.uniform(16, "none")).peak_bytes for n in (1, 2, 8)]
    assert peaks == sorted(peaks, reverse=True)
