"""The planner: what it predicts of a setting, and what it chooses among many, on models small enough for tests."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import few, nightly
from torch import nn
from torch.nn import functional
from torchvision import models

from trainer.memory.devices import find_device
from trainer.memory.fakes import fake_tensors
from trainer.memory.planner import Job, Planner, Prediction, solve_policies
from trainer.memory.table import Row, config_lines, parts_table, settings_table

pytestmark = pytest.mark.usefixtures("one_thread")

H100 = find_device("h100-80g")
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)


def vit() -> nn.Module:
    """65 tokens of 128 numbers."""
    return models.VisionTransformer(64, 8, 4, 4, 128, 512, num_classes=10, dropout=0.1)


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def job_of(model: nn.Module, **changes: Any) -> Job:
    example = torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.long)
    known: dict[str, Any] = {"share": SIZES[-1], "micro_batch_sizes": SIZES}
    return Job(model, loss_of, adamw, example, **(known | changes))


@functools.cache
def planner() -> Planner:
    return Planner(job_of(vit()), H100)


@functools.cache
def convolutions() -> Planner:
    return Planner(job_of(models.resnet18(num_classes=10)), H100)


def other(**changes: Any) -> Planner:
    """The planner of the transformer's job with changes; nothing that was simulated is shared."""
    return Planner(replace(planner().job, **changes), H100)


# ---- one setting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", few([planner, convolutions], planner))
def test_the_peak_grows_with_the_micro_batch(of: Any) -> None:
    peaks = [of().uniform(size, "none").peak_bytes for size in (1, 4, 8, 24)]
    assert peaks == sorted(set(peaks))
    grown = (peaks[3] - peaks[2]) / (peaks[2] - peaks[1])
    assert grown == pytest.approx(16 / 4, rel=0.1)  # evenly


@nightly
def test_recomputing_more_takes_less_and_longer() -> None:
    full, selective, none = (planner().uniform(24, policy) for policy in ("full", "selective", "none"))
    assert full.peak_bytes < selective.peak_bytes < none.peak_bytes
    assert full.step_seconds > selective.step_seconds > none.step_seconds
    assert (full.num_recomputed, selective.num_recomputed, none.num_recomputed) == (4, 4, 0)
    assert planner().uniform(24, "every_2").num_recomputed == 2


def test_the_parts_are_the_peak() -> None:
    found = planner().uniform(8, "none")
    weights = sum(4 * p.numel() for p in planner().job.model.parameters())
    assert sum(found.parts.values()) == found.peak_bytes
    assert found.parts["parameters"] == pytest.approx(weights, rel=0.02)  # torch's allocator rounds up
    assert found.parts["optimizer"] == pytest.approx(2 * weights, rel=0.02)


def test_data_that_waits_or_lives_on_the_device_counts() -> None:
    plain = planner().uniform(8, "none").peak_bytes
    assert other(feed_bytes=1000).uniform(8, "none").peak_bytes == plain + 8 * 1000
    assert other(resident_bytes=12345).uniform(8, "none").peak_bytes == plain + 12345


def test_ddp_has_gradients_at_the_forward() -> None:
    """One process has none there, so that they come while activations go."""
    whole = SIZES[-1]
    alone, many = planner().uniform(whole, "none"), other(num_ranks=2).uniform(whole, "none")
    weights = alone.parts["parameters"]
    assert alone.memory.peak_by_phase["forward"] + weights <= many.memory.peak_by_phase["forward"] + 1024
    assert alone.parts.get("gradients", 0) < weights == many.parts["gradients"]
    assert many.peak_bytes > alone.peak_bytes


def test_gradients_that_accumulate_are_there_too() -> None:
    part = planner().uniform(24, "none")
    assert part.parts["gradients"] == part.parts["parameters"]


@nightly
def test_what_ddp_exchanges_counts() -> None:
    def communication(size: int = SIZES[-1], **settings: Any) -> int:
        return other(num_ranks=2, **settings).uniform(size, "none").parts.get("communication", 0)

    weights = planner().uniform(2, "none").parts["parameters"]
    assert communication() == 0
    assert communication(gradient_as_bucket_view=False) == weights
    assert communication(24) == weights  # gradients of earlier micro-batches are beside the buckets
    assert communication(compresses_gradients=True, bucket_bytes=2**18) == 2**18  # two buckets in half the bytes
    assert communication(compresses_gradients=True) == weights // 2  # no more than there is
    assert communication(gradient_as_bucket_view=False, compresses_gradients=True) == weights + weights // 2
    alone = other(gradient_as_bucket_view=False, compresses_gradients=True).uniform(2, "none")
    assert "communication" not in alone.parts


def test_averages_take_what_the_parameters_do() -> None:
    plain, averaging = planner().uniform(2, "none"), other(keeps_averages=True).uniform(2, "none")
    assert averaging.parts["averages"] == sum(4 * p.numel() for p in planner().job.model.parameters())
    assert averaging.peak_bytes == plain.peak_bytes + averaging.parts["averages"]
    assert "averages" not in plain.parts
    assert "  averages" in parts_table(averaging)
    # Of weights in fewer bits they are float32, and frozen weights have none.
    model = vit().to(torch.bfloat16).requires_grad_(False)
    model.heads.requires_grad_(True)
    job = job_of(model, keeps_averages=True)
    assert Planner(job, H100)._average_bytes() == 4 * (128 * 10 + 10)
    # They are on the GPU when a planned step is tried, and nothing counts them on the host.
    held = {kind: averaging.missing_bytes(replace(job, device_type=kind), 2) for kind in ("cuda", "cpu")}
    assert held["cpu"] - held["cuda"] == averaging.parts["averages"]


def test_a_share_of_the_model_per_process_takes_less() -> None:
    ddp = other(num_ranks=4).uniform(2, "none")
    fsdp = other(num_ranks=4).sharded(ddp)
    assert fsdp.parts["optimizer"] < 0.3 * ddp.parts["optimizer"]
    assert fsdp.peak_bytes < ddp.peak_bytes
    assert (fsdp.micro_batch_size, fsdp.policies) == (ddp.micro_batch_size, ddp.policies)


def test_autocast_reaches_the_step() -> None:
    short, plain = other(autocast_dtype=torch.bfloat16).uniform(24, "none"), planner().uniform(24, "none")
    assert short.peak_bytes < plain.peak_bytes


# ---- many settings ---------------------------------------------------------------------------------------------


def test_the_largest_micro_batch_is_the_largest() -> None:
    peaks = {size: planner().uniform(size, "none").peak_bytes for size in SIZES}
    for limit in [*peaks.values(), *(peak - 1 for peak in peaks.values()), 10 * peaks[48]]:
        expected = max((size for size, peak in peaks.items() if peak <= limit), default=None)
        found = planner().largest_micro_batch("none", limit)
        assert (None if found is None else found.micro_batch_size) == expected
        assert found is None or found.peak_bytes <= limit


def test_the_solver_stays_within_the_budget_and_costs_less_than_full() -> None:
    none, full = planner().uniform(24, "none"), planner().uniform(24, "full")
    for share in (0.2, 0.5, 0.8):
        budget = full.peak_bytes + share * (none.peak_bytes - full.peak_bytes)
        found = planner().solve(24, budget)
        assert found is not None
        assert found.checkpointing == "auto"
        assert found.peak_bytes <= budget < none.peak_bytes
        assert none.step_seconds < found.step_seconds < full.step_seconds
        assert planner().predict(24, "auto", found.policies).peak_bytes == found.peak_bytes


def test_the_solver_recomputes_nothing_where_all_fits() -> None:
    none = planner().uniform(24, "none")
    found = planner().solve(24, none.peak_bytes)
    assert found is not None
    assert (found.num_recomputed, found.peak_bytes) == (0, none.peak_bytes)


def test_the_solver_finds_nothing_where_nothing_fits() -> None:
    full = planner().uniform(24, "full")
    assert planner().solve(24, 0.9 * full.peak_bytes) is None
    assert planner().solve(24, full.memory.persistent["parameters"]) is None


def test_a_model_without_blocks() -> None:
    flat = Planner(job_of(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10))), H100)
    peak = flat.uniform(8, "none").peak_bytes
    assert flat.blocks == []
    assert flat.solve(8, peak - 1) is None
    found = flat.fastest(peak)
    assert found is not None
    assert found.micro_batch_size == 8


def test_the_fastest_is_plain_where_that_fits() -> None:
    found = planner().fastest(10**12)
    assert found is not None
    assert (found.micro_batch_size, found.checkpointing, found.num_recomputed) == (48, "none", 0)


@nightly
def test_the_fastest_recomputes_where_plain_does_not_fit() -> None:
    limit = int(0.9 * planner().uniform(24, "none").peak_bytes)
    given = planner().fastest(limit, 24)
    assert given is not None
    assert (given.micro_batch_size, given.peak_bytes <= limit) == (24, True)
    assert given.num_recomputed > 0
    smallest = int(0.99 * planner().uniform(1, "none").peak_bytes)
    if planner().uniform(1, "full").peak_bytes <= smallest:
        found = planner().fastest(smallest)
        assert found is not None
        assert found.num_recomputed > 0
    assert planner().fastest(1000) is None


@nightly
def test_the_fastest_is_no_slower_than_any_uniform_setting_that_fits() -> None:
    limit = planner().uniform(12, "none").peak_bytes
    fitting = [
        p for size in SIZES for policy in ("none", "full") if (p := planner().uniform(size, policy)).peak_bytes <= limit
    ]
    found = planner().fastest(limit)
    assert found is not None
    assert found.peak_bytes <= limit
    assert found.step_seconds <= 1.03 * min(p.step_seconds for p in fitting)


def test_choosing_among_fewer_micro_batches() -> None:
    found = planner().restricted_to((1, 2)).largest_micro_batch("none", 10**12)
    assert found is not None
    assert found.micro_batch_size == 2
    assert planner().job.micro_batch_sizes == SIZES


@nightly
def test_policies_that_keep_a_share() -> None:
    example = planner().job.example
    policies = solve_policies(vit(), loss_of, example, 24, 0.6, "none", H100, "cuda")
    assert policies is not None
    assert set(policies) == set(planner().blocks)
    assert sum(policy != "none" for policy in policies.values()) > 0
    assert solve_policies(vit(), loss_of, example, 24, 0.01, "none", H100, "cuda") is None


# ---- the model -------------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Everything that a step could change: dropout, running statistics, gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)) for _ in "123")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return inputs


def test_the_model_stays_as_it_is() -> None:
    model = Stateful().eval()
    model.blocks[0][0].weight.grad = torch.ones(8, 8)  # type: ignore[index]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inside = [dict(module.__dict__) for module in model.modules()]
    generator = torch.get_rng_state()
    example = torch.zeros(2, 8), torch.zeros(2, dtype=torch.long)
    job = replace(job_of(model), example=example, block_patterns=("blocks.*",))
    several = Planner(job, H100)
    assert len(several.blocks) == 3
    limit = several.uniform(24, "none").peak_bytes - 1
    several.fastest(limit)
    several.solve(24, limit)
    several.uniform(8, "selective")
    assert torch.equal(torch.get_rng_state(), generator)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["blocks.0.0.weight"]
    for module, before in zip(model.modules(), inside, strict=True):
        assert not module.training
        assert "forward" not in vars(module)
        assert vars(module).keys() == before.keys()
        assert len(module._forward_hooks) == len(module._forward_pre_hooks) == 0


def test_a_model_without_memory_is_planned_alike() -> None:
    with fake_tensors():
        fake = vit()
    assert Planner(job_of(fake), H100).uniform(4, "none").parts == planner().uniform(4, "none").parts


# ---- as text ---------------------------------------------------------------------------------------------------


def test_the_table_of_parts() -> None:
    found = planner().uniform(8, "none")
    text = parts_table(found, found.peak_bytes)
    for name in found.parts:
        assert (f"  {name} " in text) == bool(found.parts[name])
    assert "   fits: " in text
    assert "does not fit: " in parts_table(found, found.peak_bytes - 1)
    assert "fit" not in parts_table(found)


def test_the_table_of_settings() -> None:
    found = planner().uniform(24, "full")
    text = settings_table([Row("full", "ddp", found), Row("none", "fsdp", None)], 48)
    full, none = text.splitlines()[1:]
    assert full.split()[:4] == ["full", "ddp", "24", "2x"]
    assert full.split()[-1] == "1.00"
    assert none.split() == ["none", "fsdp", "does", "not", "fit"]
    assert config_lines(found) == "train.micro_batch_size=24 memory.checkpointing=full"


def test_a_choice_in_one_line() -> None:
    found = planner().uniform(24, "every_2")
    assert found.describe().startswith("micro-batch 24, 2 of 4 blocks recomputed: ")
    assert isinstance(found, Prediction)
