"""A step under FSDP2 is simulated in one process, in every setting that the planner knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import few, nightly
from memory_models import loss_of
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param as fsdp_param
from torchvision import models

from trainer.memory.devices import find_device
from trainer.memory.planner import Job, Planner
from trainer.memory.sharding import _Shares, simulate_sharded_step


def planner_of(**settings: Any) -> Planner:
    model = models.VisionTransformer(64, 8, 4, 4, 128, 512, num_classes=10)
    batch = {"image": torch.zeros(8, 3, 64, 64), "label": torch.zeros(8, dtype=torch.long)}
    args: dict[str, Any] = {"num_ranks": 4} | settings
    return Planner(
        Job(model, loss_of, lambda m: torch.optim.AdamW(m.parameters(), foreach=True), batch, 16, [8, 16], **args),
        find_device("a100-40g"),
    )


@pytest.mark.parametrize("checkpointing", few(["none", "selective", "full"], "selective"))
@pytest.mark.parametrize("device_type", few(["cpu", "cuda"], "cuda"))
@pytest.mark.parametrize("dtype", few([None, torch.bfloat16], torch.bfloat16))
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


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 7, 64])
def test_shares_on_demand_are_those_of_torch(num_ranks: int, dim: int) -> None:
    whole = torch.arange(7 * 7).view(7, 7)
    shares = _Shares(whole, num_ranks, dim)
    for rank, expected in enumerate(fsdp_param._chunk_with_empty(whole, num_ranks, dim)):
        assert shares[rank].shape == expected.shape
        assert torch.equal(shares[rank], expected)


@nightly
def test_no_share_is_made_of_processes_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def for_all(tensor: torch.Tensor, num_chunks: int, dim: int) -> list[torch.Tensor]:
        raise AssertionError

    monkeypatch.setattr(fsdp_param, "_chunk_with_empty", for_all)
    planner = planner_of(num_ranks=1024)
    assert planner.sharded(planner.uniform(8, "none")).peak_bytes > 0
    assert fsdp_param._chunk_with_empty is for_all


@nightly
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


@nightly
def test_more_processes_take_less_each() -> None:
    peaks = [(p := planner_of(num_ranks=n)).sharded(p.uniform(16, "none")).peak_bytes for n in (1, 2, 8)]
    assert peaks == sorted(peaks, reverse=True)


def test_an_optimizer_that_gathers_whole_matrices() -> None:
    """Twice: torch remembers from the first time how it gathered them, and from which processes."""

    def muon(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2])

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).sum()

    settings: dict[str, Any] = {"device_type": "cpu", "granularity": 1}
    for size in (2, 4):
        batch = torch.randn(size, 8)
        step = simulate_sharded_step(nn.Linear(8, 6), loss, muon, batch, 2, lambda model: {}, **settings)
        assert step.persistent["optimizer"] == 3 * 8 * 4
