"""The order of samples: a pure function of (seed, step), on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from trainer.data.sampler import (
    EVAL_EPOCH,
    BatchPlan,
    EvalSampler,
    MicroBatchSampler,
    SampleKey,
    StepSampler,
    named_keys,
)
from trainer.errors import UserError


def sampler(plan: BatchPlan, rank: int = 0, seed: int = 0) -> StepSampler:
    return StepSampler(plan, rank, seed)


def plan(samples: int, batch: int, ranks: int = 1, micro: int | None = None, drop_last: bool = False) -> BatchPlan:
    return BatchPlan.split(samples, batch, micro, ranks, drop_last)


def listed(batches: MicroBatchSampler) -> list[list[SampleKey]]:
    return [named_keys(keys) for keys in batches]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("samples", [96, 100, 89, 25])
def test_global_batch_is_a_slice_of_the_permutation(samples: int, ranks: int) -> None:
    seed, batch = 5, 12
    for epoch in range(3):
        permutation = torch.randperm(samples, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        p = plan(samples, batch, ranks)
        for k in range(p.steps_per_epoch):
            step = epoch * p.steps_per_epoch + k
            keys = [named_keys(sampler(p, r, seed).keys(step)) for r in range(ranks)]
            assert all(key.epoch == epoch for share in keys for key in share)
            expected = permutation[k * batch : (k + 1) * batch]
            assert sorted(key.sample for share in keys for key in share) == sorted(expected)
            assert [[key.sample for key in share] for share in keys] == [expected[r::ranks] for r in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_whole_batches_are_those_of_torchs_distributed_sampler(ranks: int) -> None:
    for epoch in (0, 1):
        for rank in range(ranks):
            torchs = DistributedSampler(range(96), num_replicas=ranks, rank=rank, seed=3)  # type: ignore[arg-type, var-annotated]
            ours = sampler(plan(96, 12, ranks), rank, seed=3)
            torchs.set_epoch(epoch)
            ours.set_epoch(epoch)
            assert list(ours) == list(torchs)
            assert len(ours) == len(torchs)


def test_an_epoch_covers_every_sample_once() -> None:
    p = plan(101, 12, 3)
    seen = [i for r in range(3) for i in sampler(p, r)]
    assert sorted(seen) == list(range(101))
    assert sum(len(sampler(p, r)) for r in range(3)) == 101


def test_seeking_equals_replaying() -> None:
    p = plan(50, 12, 2, micro=3)
    whole = listed(MicroBatchSampler(sampler(p, 1), 0, 15))
    for start in range(15):
        skipped = sum(len(MicroBatchSampler(sampler(p, 1), 0, 15).micro_batch_sizes(s)) for s in range(start))
        assert listed(MicroBatchSampler(sampler(p, 1), start, 15)) == whole[skipped:]


def test_micro_batches_are_the_share_in_pieces() -> None:
    p = plan(100, 24, 2, micro=5 - 1)
    s = sampler(p, 1)
    micro = MicroBatchSampler(s, 0, 5)
    batches = iter(micro)
    for step in range(5):
        pieces = [next(batches) for _ in micro.micro_batch_sizes(step)]
        assert np.concatenate(pieces).tolist() == s.keys(step).tolist()
        assert [len(piece) for piece in pieces] == micro.micro_batch_sizes(step)
    assert next(batches, None) is None


def test_a_rank_without_a_sample_gets_a_stand_in() -> None:
    p = plan(13, 12, 3)  # the last batch has one sample
    for rank in range(3):
        micro = MicroBatchSampler(sampler(p, rank), 1, 2)
        assert micro.micro_batch_sizes(1) == [1 if rank == 0 else 0]
        assert listed(micro) == listed(MicroBatchSampler(sampler(p, 0), 1, 2))


def test_counting_samples() -> None:
    p = plan(50, 12)
    assert [p.step_samples(s) for s in range(6)] == [12, 12, 12, 12, 2, 12]
    assert [p.samples_before(s) for s in range(7)] == [0, 12, 24, 36, 48, 50, 62]
    q = plan(50, 12, drop_last=True)
    assert [q.step_samples(s) for s in range(5)] == [12] * 5
    assert [q.samples_before(s) for s in (0, 4, 5)] == [0, 48, 60]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("samples", [1, 2, 20, 23])
def test_evaluation_counts_every_sample_once(samples: int, ranks: int) -> None:
    keys = [key for r in range(ranks) for batch in EvalSampler(samples, 4, r, ranks) for key in named_keys(batch)]
    assert sorted(keys) == [SampleKey(EVAL_EPOCH, i) for i in range(samples)]
    assert len(EvalSampler(samples, 4, 0, ranks)) == len(list(EvalSampler(samples, 4, 0, ranks)))


def test_accumulation() -> None:
    assert plan(999, 96, 2, micro=16).num_micro_batches == 3
    assert plan(999, 96, 2).num_micro_batches == 1
    assert plan(999, 96, 8, micro=32).micro_batch_size == 12  # an upper bound on what a device holds


def test_refusals_name_sizes_that_work() -> None:
    with pytest.raises(UserError, match=r"nearest sizes: 99 and 102"):
        plan(999, 100, 3)
    with pytest.raises(UserError, match=r"nearest sizes: 3$"):
        plan(999, 2, 3)
    with pytest.raises(UserError, match=r": 1 sample does not split into pairs to mix; nearest sizes: 2$"):
        BatchPlan.split(999, 1, None, 1, False, group_size=2)
    with pytest.raises(UserError, match=r"nearest sizes: 4 and 6, or train.batch_size 20 and 30"):
        plan(999, 24, 2, micro=5)
    for batch, micro in ((4, None), (20, 5), (30, 5), (24, 4), (24, 6)):
        plan(999, batch, 2, micro)
