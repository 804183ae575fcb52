"""Which samples each rank sees in each step: a pure function of (seed, step), with O(1) seeking.

Global batch k of epoch e is `permutation(seed, e)[k*B:(k+1)*B]`, whatever the world size. With repeated augmentation
the permutation has each of its samples several times, and is cut to the epoch's length. Owns the order and the batch
arithmetic; loading the samples is `trainer.data.loader`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler, Sampler

from trainer.errors import UserError
from trainer.units import counted

EVAL_EPOCH = -1  # evaluation samples are the same every time, and never those of a training epoch


class SampleKey(NamedTuple):
    """What a loader is asked for: a sample, and what its augmentation depends on."""

    epoch: int
    sample: int
    repeat: int = 0  # which of the epoch's appearances of this sample, where it has several


KeyRows = Sequence[Sequence[int]] | NDArray[np.int64]  # a SampleKey per row: (B, 3)


def key_array(keys: KeyRows) -> NDArray[np.int64]:
    """Returns sample keys as an array (B, 3): the same one where they are an array already."""
    return np.asarray(keys, dtype=np.int64).reshape(-1, len(SampleKey._fields))


def named_keys(keys: KeyRows) -> list[SampleKey]:
    """Returns each row as a `SampleKey`."""
    return [SampleKey(*key) for key in key_array(keys).tolist()]


def divisors(number: int) -> list[int]:
    """Returns what divides a number evenly, ascending."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of a run on this world size. `batch_size` is global, `micro_batch_size` per rank."""

    num_samples: int
    batch_size: int
    micro_batch_size: int
    num_ranks: int
    drop_last: bool
    group_size: int = 1  # neighbours in the global batch that stay neighbours on one rank: 2 where pairs are mixed
    in_lockstep: bool = False  # a forward is a collective: every rank runs as many micro-batches as the others
    num_repeats: int = 1  # of a sample in an epoch, each augmented differently; fewer samples then have a turn

    @classmethod
    def split(
        cls,
        num_samples: int,
        batch_size: int,
        micro_batch_size: int | None,
        num_ranks: int,
        drop_last: bool,
        group_size: int = 1,
        in_lockstep: bool = False,
        num_repeats: int = 1,
    ) -> BatchPlan:
        """Splits the global batch over ranks and micro-batches, in groups.

        Raises:
            UserError: the batch does not split evenly (the nearest sizes that do are named), the data hold no whole
                batch while `drop_last` asks for one, or fewer samples than repeats of each.
        """
        unit = num_ranks * group_size
        if batch_size % unit:
            below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
            sizes = " and ".join(str(size) for size in (below, above) if size)
            over = f" over {num_ranks} process{'es' if num_ranks > 1 else ''}"
            parts = over if group_size == 1 else " into pairs to mix" + (over if num_ranks > 1 else "")
            verb = "does" if batch_size == 1 else "do"
            message = f"{counted(batch_size, 'sample')} {verb} not split{parts}; nearest sizes: {sizes}"
            raise UserError(message, path="train.batch_size")
        share = batch_size // num_ranks
        micro = min(micro_batch_size or share, share)
        if share % micro:
            fits = divisors(share)
            below, above = max(m for m in fits if m < micro), min(m for m in fits if m > micro)
            unit = micro * num_ranks
            batches = " and ".join(
                str(size) for size in (batch_size // unit * unit, -(-batch_size // unit) * unit) if size
            )
            message = (
                f"{share} samples per process do not split into micro-batches of {micro}; nearest sizes: {below} "
                f"and {above}, or train.batch_size {batches}"
            )
            raise UserError(message, path="train.micro_batch_size")
        if micro % group_size:
            message = f"augmentation mixes pairs of samples, and {micro} samples are not whole pairs"
            raise UserError(message, path="train.micro_batch_size")
        if num_samples < 1:
            raise UserError("the data set is empty", path="data.train")
        if drop_last and num_samples < batch_size:
            message = f"drop_last leaves nothing: {num_samples} samples make no batch of {batch_size}"
            raise UserError(message, path="data.drop_last")
        if num_repeats > num_samples:
            message = f"an epoch of {num_samples} samples has no room for {num_repeats} repeats of one"
            raise UserError(message, path="data.augment_repeats")
        return cls(num_samples, batch_size, micro, num_ranks, drop_last, group_size, in_lockstep, num_repeats)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        if self.drop_last:
            return self.num_samples // self.batch_size
        return math.ceil(self.num_samples / self.batch_size)

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """The micro-batches that split a rank's share of the batch evenly, ascending."""
        return tuple(size for size in divisors(self.batch_size // self.num_ranks) if size % self.group_size == 0)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each rank accumulates in a full step."""
        return self.batch_size // self.num_ranks // self.micro_batch_size

    def step_samples(self, step: int) -> int:
        """Returns the number of samples of a step over all ranks; the last step of an epoch may have fewer."""
        start = step % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, self.num_samples - start)

    def positions(self, step: int, rank: int) -> torch.Tensor:
        """Returns which positions of a step's global batch a rank has, int64, in order: groups in turn.

        The next call may return the same tensor: it must not be changed.
        """
        return _positions(self.step_samples(step), self.group_size, self.num_ranks, rank)

    def num_turns(self, step: int, rank: int) -> int:
        """Returns how many micro-batches a rank runs in a step, stand-ins included."""
        # Rank 0 has as many samples as any.
        share = len(self.positions(step, 0 if self.in_lockstep else rank))
        return max(math.ceil(share / self.micro_batch_size), 1)

    def needs_stand_ins(self, step: int) -> bool:
        """Tells whether some rank has fewer micro-batches with samples than it runs in a step."""
        last = self.num_ranks - 1  # which has as few samples as any
        return self.num_turns(step, last) > math.ceil(len(self.positions(step, last)) / self.micro_batch_size)

    def samples_before(self, step: int) -> int:
        """Returns the number of samples that all steps before `step` saw together."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        per_epoch = self.num_samples
        if self.drop_last:
            per_epoch = self.steps_per_epoch * self.batch_size
        return epochs * per_epoch + steps * self.batch_size


@functools.lru_cache(maxsize=8)  # full steps and the last of an epoch, of this rank and of those it is compared with
def _positions(num_samples: int, group_size: int, num_ranks: int, rank: int) -> torch.Tensor:
    first = rank * group_size  # its other groups are a round of all ranks further each: no others are looked at
    groups = torch.arange(first, max(num_samples, first), num_ranks * group_size)
    positions = (groups[:, None] + torch.arange(group_size)).flatten()
    return positions[positions < num_samples]


class StepSampler(DistributedSampler[int]):
    """torch's `DistributedSampler` with a position: this rank's share of any step, without replaying others.

    Ranks interleave as in the base class: rank r of W takes `batch[r::W]` of every global batch, or every W-th group
    of neighbours. Unlike there, nothing is padded: in a last, smaller batch some ranks have fewer samples, or none.
    """

    def __init__(self, plan: BatchPlan, rank: int, seed: int) -> None:
        super().__init__(
            range(plan.num_samples),  # type: ignore[arg-type]  # only its length is used
            num_replicas=plan.num_ranks,
            rank=rank,
            shuffle=True,
            seed=seed,
            drop_last=plan.drop_last,
        )
        self.plan = plan
        self._permutation: tuple[int, NDArray[np.int64]] | None = None

    def samples(self, step: int) -> list[int]:
        """Returns the sample indices of this rank in global step `step`, in order."""
        indices: list[int] = self.keys(step)[:, 1].tolist()
        return indices

    def keys(self, step: int) -> NDArray[np.int64]:
        """Returns the sample keys (B, 3) of this rank in global step `step`, in order."""
        return self._keys_at(step, self.plan.positions(step, self.rank))

    def first(self, step: int) -> NDArray[np.int64]:
        """Returns the key (1, 3) of the first sample of a step's global batch."""
        return self._keys_at(step, torch.zeros(1, dtype=torch.int64))

    def _keys_at(self, step: int, positions: torch.Tensor) -> NDArray[np.int64]:
        """Returns the keys of what is at some positions of a step's global batch.

        Repeats follow one another (a a a b b b ...), so that ranks in turn each have another. Where pairs are mixed,
        repeats are those of pairs (a b a b a b c d ...): none is mixed with itself, and pairs go to ranks in turn.
        """
        plan = self.plan
        epoch, k = divmod(step, plan.steps_per_epoch)
        places = positions.numpy() + k * plan.batch_size  # numpy: these are small, and torch takes longer to begin
        groups, within = np.divmod(places, plan.group_size * plan.num_repeats)
        repeats, member = np.divmod(within, plan.group_size)
        samples = self._order(epoch)[plan.group_size * groups + member]
        keys = np.empty((len(samples), len(SampleKey._fields)), dtype=np.int64)
        keys[:, 0], keys[:, 1], keys[:, 2] = epoch, samples, repeats
        return keys

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._permutation is None or self._permutation[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)  # as DistributedSampler does
            self._permutation = epoch, torch.randperm(self.plan.num_samples, generator=generator).numpy()
        return self._permutation[1]

    def __iter__(self) -> Iterator[int]:
        """Yields this rank's samples of the epoch given to `set_epoch`."""
        first = self.epoch * self.plan.steps_per_epoch
        for step in range(first, first + self.plan.steps_per_epoch):
            yield from self.samples(step)

    def __len__(self) -> int:
        steps = range(self.plan.steps_per_epoch)
        return sum(len(self.plan.positions(step, self.rank)) for step in steps)


class MicroBatchSampler(Sampler[NDArray[np.int64]]):
    """The micro-batches of this rank from step `start` up to step `stop`, across epochs without a gap.

    A rank without a sample in an epoch's last batch gets one stand-in sample (the batch's first), so that every
    rank runs forward and backward in every step; `micro_batch_sizes` counts it as 0 samples, so it has no weight.
    In lockstep so does a rank that has fewer micro-batches than another.
    """

    def __init__(self, sampler: StepSampler, start: int, stop: int) -> None:
        self.sampler = sampler
        self.start = start
        self.stop = stop

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        size = self.sampler.plan.micro_batch_size
        for step in range(self.start, self.stop):
            keys = self.sampler.keys(step)
            for turn in range(self.sampler.plan.num_turns(step, self.sampler.rank)):
                own = keys[turn * size : (turn + 1) * size]
                yield own if len(own) else self.sampler.first(step)

    def micro_batch_sizes(self, step: int) -> list[int]:
        """Returns how many real samples each micro-batch of this rank holds in a step: `[0]` for a stand-in."""
        plan = self.sampler.plan
        share = len(plan.positions(step, self.sampler.rank))
        firsts = range(0, plan.num_turns(step, self.sampler.rank) * plan.micro_batch_size, plan.micro_batch_size)
        return [min(plan.micro_batch_size, max(share - first, 0)) for first in firsts]


class EvalSampler(Sampler[NDArray[np.int64]]):
    """This rank's share of an evaluation set, in batches: every sample on exactly one rank, none padded."""

    def __init__(self, num_samples: int, batch_size: int, rank: int, num_ranks: int) -> None:
        self.indices = range(rank, num_samples, num_ranks)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for first in range(0, len(self.indices), self.batch_size):
            own = self.indices[first : first + self.batch_size]
            keys = np.zeros((len(own), len(SampleKey._fields)), dtype=np.int64)
            keys[:, 0], keys[:, 1] = EVAL_EPOCH, own
            yield keys

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    @staticmethod
    def most_batches(num_samples: int, batch_size: int, num_ranks: int) -> int:
        """Returns how many batches the rank with the most of them has."""
        return len(EvalSampler(num_samples, batch_size, 0, num_ranks))
