"""Sharing a model between processes, as far as one process can tell: settings, stand-ins, and the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Train, WriteConfig, nightly
from fitted_model import Stack
from run_results import losses
from sharded_models import Odd
from torch import nn
from torchvision import models

from launch.cli import main as launch
from trainer.config import load_config
from trainer.config_devices import ParallelConfig
from trainer.data.feed import MicroBatch
from trainer.data.sampler import BatchPlan, EvalSampler, MicroBatchSampler, StepSampler
from trainer.errors import UserError
from trainer.memory.devices import find_device
from trainer.memory.planner import Job, Planner
from trainer.memory.sharding import _with_parameters_of_their_own
from trainer.parallel import broadcast, choose_shard_size, gradient_norm, in_lockstep
from trainer.sync_batchnorm import CpuSyncBatchNorm, synchronise_batchnorm

# ---- settings ----------------------------------------------------------------------------------------------------


class Refused(NamedTuple):
    changes: dict[str, Any]
    path: str
    message: str


REFUSED = [
    Refused({"parallel": {"cpu_offload": True}}, "parallel.cpu_offload", "has no effect with strategy: ddp"),
    Refused({"parallel": {"reshard_after_forward": False}}, "parallel.reshard_after_forward", "strategy: ddp"),
    Refused({"parallel": {"shard_size": 2}}, "parallel.shard_size", "strategy: ddp"),
    Refused({"parallel": {"strategy": "fsdp", "shard_size": 2}}, "parallel.shard_size", "strategy: fsdp"),
    Refused({"parallel": {"strategy": "hsdp", "shard_size": 1}}, "parallel.shard_size", "that is strategy: ddp"),
    Refused({"parallel": {"strategy": "hsdp", "static_graph": True}}, "parallel.static_graph", "strategy: hsdp"),
    *(
        Refused({"parallel": {"strategy": "fsdp", key: value}}, f"parallel.{key}", "no effect with strategy: fsdp")
        for key, value in {
            "static_graph": True,
            "find_unused_parameters": True,
            "gradient_as_bucket_view": False,
            "bucket_mb": 5,
            "gradient_compression": "bf16",
        }.items()
    ),
    Refused({"parallel": {"strategy": "zero3"}}, "parallel.strategy", "must be 'ddp', 'fsdp' or 'hsdp'"),
    Refused({"parallel": {"strategy": "fsdp"}, "precision": "fp8"}, "precision", "does not go with strategy: fsdp"),
    Refused(
        {"parallel": {"strategy": "fsdp"}, "precision": "bf16", "model__dtype": "bfloat16"},
        "model.dtype",
        "keeps parameters in float32",
    ),
    Refused(
        {"parallel": {"strategy": "fsdp"}, "model__channels_last": True}, "model.channels_last", "weights row by row"
    ),
]


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: f"{refused.path} {refused.message}")
def test_what_has_no_effect_is_refused(refused: Refused, write_config: WriteConfig) -> None:
    with pytest.raises(UserError) as caught:
        load_config(str(write_config(**refused.changes)))
    (problem,) = caught.value.problems
    assert problem.path == refused.path
    assert refused.message in problem.message
    assert problem.origin.startswith(str(write_config()))


def test_blocks_have_an_effect_with_fsdp(write_config: WriteConfig) -> None:
    file = write_config(parallel={"strategy": "fsdp"}, memory={"blocks": ["layers.*"]})
    assert load_config(str(file)).memory.blocks == ("layers.*",)


def test_who_shares_a_copy() -> None:
    def size(strategy: str, machines: list[int], shard_size: int | None = None) -> int:
        config = ParallelConfig.model_validate({"strategy": strategy, "shard_size": shard_size})
        return choose_shard_size(config, [n for n in machines for _ in range(n)])

    assert size("ddp", [4, 4]) == 1
    assert size("fsdp", [4, 4]) == 8
    assert size("hsdp", [4, 4]) == 4
    assert size("hsdp", [4, 4], 2) == 2
    assert size("hsdp", [4, 4], 8) == size("fsdp", [8]) == 8
    assert size("fsdp", [1]) == size("hsdp", [1]) == size("hsdp", [1], 4) == 1  # a process alone
    assert size("hsdp", [4, 2], 3) == 3
    for machines, shard_size, message in (
        ([4, 4], 3, "8 processes do not split into groups of 3; these sizes fit: 2, 4, 8"),
        ([4, 2], None, "machines have 2, 4 processes"),
        ([1, 1], None, "every machine has one process"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            size("hsdp", machines, shard_size)
        assert caught.value.problems[0].path == "parallel.shard_size"
        assert caught.value.agreed


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
def test_a_process_alone_trains_the_whole_model(strategy: str, train: Train, write_config: WriteConfig) -> None:
    plain = write_config("plain.yaml", run__name="plain", run__dir=str(write_config().parent / "plain"))
    assert train("--config", plain).code == 0
    file = write_config(parallel={"strategy": strategy, "cpu_offload": True})
    outcome = train("--config", file)
    assert outcome.code == 0, outcome.err
    assert f"parallel   {strategy}: one process has nobody to share with, so the model is whole" in outcome.out
    assert losses(file.parent / "run") == losses(file.parent / "plain")


# ---- what is gathered by itself ----------------------------------------------------------------------------------


def test_blocks_that_share_a_weight_are_gathered_with_the_rest() -> None:
    def alone(model: Odd) -> list[int]:
        blocks = list(model.blocks)
        return [blocks.index(block) for block in _with_parameters_of_their_own(model, blocks)]

    assert alone(Odd(tied=False)) == [0, 1, 2, 3]
    assert alone(Odd()) == [0, 1]
    within = Odd(tied=False)
    block = within.blocks[0]
    block.shift_too = block.shift
    assert alone(within) == [0, 1, 2, 3]
    twice = Odd(tied=False)
    twice.again = twice.blocks[0]  # the same module, not another with the same weight
    assert alone(twice) == [0, 1, 2, 3]


# ---- lockstep ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_samples", "micro"), [(101, 2), (101, 4), (97, 8), (99, 1), (96, 8)])
def test_every_rank_takes_as_many_turns(num_samples: int, micro: int) -> None:
    free = BatchPlan.split(num_samples, 16, micro, 2, False)
    plan = replace(free, in_lockstep=True)
    samplers = [StepSampler(plan, rank, seed=0) for rank in range(2)]
    by_rank = [MicroBatchSampler(sampler, 0, plan.steps_per_epoch) for sampler in samplers]
    batches = [iter(sampler) for sampler in by_rank]
    stood_in = []
    for step in range(plan.steps_per_epoch):
        sizes = [sampler.micro_batch_sizes(step) for sampler in by_rank]
        assert len(sizes[0]) == len(sizes[1])
        for rank in range(2):
            expected = MicroBatchSampler(StepSampler(free, rank, seed=0), 0, 1).micro_batch_sizes(step)
            assert [n for n in sizes[rank] if n] == [n for n in expected if n]
            loaded = [next(batches[rank]) for _ in sizes[rank]]
            assert [len(keys) for keys in loaded] == [max(n, 1) for n in sizes[rank]]
            seen = [sample for keys, n in zip(loaded, sizes[rank], strict=True) for sample in keys[:n, 1]]
            assert seen == samplers[rank].samples(step)
        stood_in.append(any(0 in rank for rank in sizes))
    assert [plan.needs_stand_ins(step) for step in range(plan.steps_per_epoch)] == stood_in
    assert all(next(rank, None) is None for rank in batches)


def batches_of(*sizes: int) -> Iterator[MicroBatch]:
    for size in sizes:
        yield MicroBatch([torch.full((size, 2), float(size))], size, torch.arange(size), is_last=True)


def gathering(*answers: list[Any]) -> Callable[[Any], list[Any]]:
    """What all ranks say, in the order in which they are asked."""
    said = iter(answers)
    return lambda own: next(said)


def test_stand_ins_follow_a_ranks_own_batches() -> None:
    cpu = torch.device("cpu")
    own = list(in_lockstep(batches_of(4, 3), 4, 1, cpu, gathering([True, True])))
    assert [batch.num_samples for batch in own] == [4, 3, 0, 0]
    assert own[3].data[0].shape == (3, 2)
    lent = [torch.ones(5, 2)]
    borrowed = list(in_lockstep(batches_of(), 2, 1, cpu, gathering([True, False], [lent, None])))
    assert [batch.num_samples for batch in borrowed] == [0, 0]
    assert torch.equal(borrowed[0].data[0], lent[0])
    lender = list(in_lockstep(batches_of(2), 2, 0, cpu, gathering([True, False], [lent, None])))
    assert [batch.num_samples for batch in lender] == [2, 0]
    assert lender[1].data[0].shape == (2, 2)  # its own
    assert list(in_lockstep(batches_of(), 3, 0, cpu, gathering([False, False]))) == []


@pytest.mark.parametrize("num_samples", [0, 1, 2, 7, 23, 24])
def test_no_rank_has_more_batches_than_the_first(num_samples: int) -> None:
    counts = [len(EvalSampler(num_samples, 4, rank, 3)) for rank in range(3)]
    assert EvalSampler.most_batches(num_samples, 4, 3) == max(counts)


def test_clipping_is_torchs_own() -> None:
    ours, torchs = ([nn.Parameter(torch.ones(n)) for n in (3, 1, 5)] for _ in range(2))
    for parameters in (ours, torchs):
        for i, parameter in enumerate(parameters[:2]):
            parameter.grad = torch.linspace(-1, 2, len(parameter)) * (i + 1)
    norm = gradient_norm(ours)
    nn.utils.clip_grads_with_norm_(ours, 0.7, norm)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(torchs, 0.7))
    for one, other in zip(ours[:2], torchs[:2], strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_tensors_are_sent_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their shape and memory format; those of rank 0 are here the ones of a fake."""
    sent: list[torch.Tensor] = []

    def receive(tensor: torch.Tensor, src: int, group: Any) -> None:
        assert src == 0
        sent.append(tensor)
        tensor.copy_(torch.arange(tensor.numel()))

    monkeypatch.setattr(torch.distributed, "broadcast", receive)
    images = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    tensors = [
        torch.zeros(3),
        torch.zeros((), dtype=torch.int64),
        torch.zeros(0),
        images,
        torch.ones(1, dtype=torch.int64),
    ]
    broadcast(tensors)
    assert [tensor.numel() for tensor in sent] == [3 + 96, 2]
    assert tensors[0].tolist() == [0, 1, 2]
    assert images.flatten().tolist() == list(range(3, 99))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (int(tensors[1]), int(tensors[4])) == (0, 1)


# ---- BatchNorm ---------------------------------------------------------------------------------------------------


def test_batchnorm_is_converted_in_place() -> None:
    model = models.resnet18()
    names, parameters = list(model.state_dict()), list(model.parameters())
    assert synchronise_batchnorm(model, 1, "cpu") is model
    assert not any(isinstance(module, CpuSyncBatchNorm) for module in model.modules())
    assert synchronise_batchnorm(model, 2, "cpu") is model
    assert sum(isinstance(module, CpuSyncBatchNorm) for module in model.modules()) == 20
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    plain = models.resnet18().eval()
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), plain(images))


def test_batchnorm_of_torch_on_gpus() -> None:
    model = synchronise_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 2, "cuda")
    assert [type(module) for module in model.children()] == [nn.Linear, nn.SyncBatchNorm]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 2, 2)])
def test_batchnorm_of_one_rank_is_torchs(
    shape: tuple[int, ...], momentum: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)  # nobody else is there
    classes = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    plain, synced = (classes[len(shape)](3, momentum=momentum) for _ in range(2))
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    synced.load_state_dict(plain.state_dict())
    synced = synchronise_batchnorm(nn.Sequential(synced), 2, "cpu")[0]  # type: ignore[index]
    for _ in range(3):
        inputs = 100 + torch.randn(shape)
        ours, theirs = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
        weights = torch.randn(shape)
        (synced(ours) * weights).sum().backward()
        (plain(theirs) * weights).sum().backward()
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(synced.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(synced.named_buffers()), dict(plain.named_buffers()), rtol=1e-5, atol=1e-5)
    assert synced(inputs.bfloat16()).dtype is torch.bfloat16
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        synced(torch.ones(1, *shape[1:2]))


def test_no_batchnorm_to_synchronise(train: Train, write_config: WriteConfig) -> None:
    outcome = train("--config", write_config(parallel={"sync_batchnorm": True}))
    assert outcome.code == 2
    assert "parallel.sync_batchnorm: the model has no BatchNorm" in outcome.err


# ---- the plan ----------------------------------------------------------------------------------------------------


def planner_of(shard_size: int) -> Planner:
    job = Job(
        Stack(),
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"),
        lambda model: torch.optim.AdamW(model.parameters(), foreach=False),
        (torch.zeros(2, 8), torch.zeros(2, dtype=torch.long)),
        share=256,
        micro_batch_sizes=[64, 128, 256],
        num_ranks=4,
        device_type="cpu",
        shard_size=shard_size,
    )
    return Planner(job, find_device("a100-40g"))


@nightly
def test_the_plan_is_that_of_the_strategy() -> None:
    whole, shared, pairs = planner_of(1), planner_of(4), planner_of(2)
    ddp, fsdp = whole.uniform(128, "none"), shared.uniform(128, "none")
    assert fsdp.parts == whole.sharded(ddp).parts
    assert fsdp.parts["optimizer"] < pairs.uniform(128, "none").parts["optimizer"] < ddp.parts["optimizer"]
    assert shared.under_ddp().uniform(128, "none").parts == ddp.parts
    # What has to be recomputed is found for the share: here nothing, where whole copies leave no room.
    limit = (fsdp.peak_bytes + ddp.peak_bytes) // 2
    found = shared.solve(128, limit)
    assert found is not None
    assert found.num_recomputed == 0
    needed = whole.solve(128, limit)
    assert needed is None or needed.num_recomputed > 0
    less = shared.solve(128, int(0.9 * fsdp.peak_bytes))
    assert less is not None
    assert less.num_recomputed > 0
    assert less.peak_bytes <= 0.9 * fsdp.peak_bytes


def test_the_plan_command_takes_the_strategy(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(model={"name": "fitted_model:Stack", "args": {"width": 128}}, train__batch_size=512)
    peaks = {}
    for strategy in ("ddp", "fsdp"):
        arguments = ["--device", "24GiB", "--processes", "4", f"parallel.strategy={strategy}"]
        assert launch(["plan", "--config", str(file), *arguments]) == 0
        out = capsys.readouterr().out
        assert ("strategy   fsdp: 4 processes share one copy" in out) == (strategy == "fsdp")
        own = out.split("predicted:")[1].split("the largest micro-batch")[0]
        peaks[strategy] = next(line.split()[1:3] for line in own.splitlines() if line.split()[:1] == ["optimizer"])
    assert peaks["ddp"] != peaks["fsdp"]
