"""The processes that train together, and what they tell each other.

Owns sums and objects that travel between ranks, and that one rank's problem is everybody's. How ranks come about, and
what they train with, is `trainer.runtime`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.errors import Problem, UserError

T = TypeVar("T")


class World:
    """The processes that train together, as one of them sees it; all of them make it, and call its methods, together.

    Args:
        rank: which of them this is.
        num_ranks: how many they are.
        local_rank: which of those on this machine this is.
        device: of this process.
    """

    def __init__(self, rank: int, num_ranks: int, local_rank: int, device: torch.device) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.local_rank = local_rank
        self.device = device
        self.is_main = rank == 0
        # Objects and decisions travel over gloo, so that agreeing on them never waits for the GPU.
        self.host_group = self.new_host_group()

    def new_host_group(self) -> dist.ProcessGroup | None:
        """Returns another gloo group of all ranks, for a thread of its own; None for a single process."""
        if self.num_ranks == 1:
            return None
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)  # every rank is a member
        return group

    def sum(self, values: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Sums scalars over all ranks and brings them to the host. Waits for the device."""
        if not values:
            return {}
        stacked = torch.stack([self.exact(v).to(self.device) for v in values.values()])
        if self.num_ranks > 1:
            dist.all_reduce(stacked)
        return dict(zip(values, stacked.tolist(), strict=True))

    def sum_tables(self, tables: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums integer tensors over all ranks, on the device; a rank without any of a name adds zeros."""
        if self.num_ranks == 1:
            return dict(tables)
        shapes = {
            name: shape
            for known in self.gather({n: t.shape for n, t in tables.items()})
            for name, shape in known.items()
        }
        found = {}
        for name in sorted(shapes):
            table = tables.get(name)
            found[name] = torch.zeros(shapes[name], dtype=torch.int64, device=self.device) if table is None else table
            found[name] = found[name].to(self.device).contiguous()
            dist.all_reduce(found[name])
        return found

    def sum_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """Sums a tensor of the same shape over all ranks, on the device."""
        total = self.exact(value).to(self.device).contiguous()
        if self.num_ranks > 1:
            dist.all_reduce(total)
        return total

    def exact(self, value: torch.Tensor) -> torch.Tensor:
        """Returns a tensor, where it is, wide enough to add up: float64 holds every count below 2**53 exactly."""
        # Apple's GPUs have no float64.
        return value.detach().to(torch.float32 if self.device.type == "mps" else torch.float64)

    def zero(self) -> torch.Tensor:
        """Returns a scalar on the device to add up in, as wide as `exact`'s."""
        return self.exact(torch.zeros((), device=self.device))

    def gather(self, value: T) -> list[T]:
        """Returns every rank's object, in rank order, on every rank."""
        if self.num_ranks == 1:
            return [value]
        gathered: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(gathered, value, group=self.host_group)
        return gathered

    def gather_on_main(self, value: T) -> list[T]:
        """Returns every rank's object, in rank order, on rank 0; elsewhere an empty list."""
        if self.num_ranks == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.num_ranks if self.is_main else None
        dist.gather_object(value, gathered, dst=0, group=self.host_group)
        return gathered or []

    def from_main(self, value: Callable[[], T]) -> T:
        """Calls `value` on rank 0 and returns its result on every rank."""
        box = [value() if self.is_main else None]
        if self.num_ranks > 1:
            dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]  # type: ignore[return-value]

    def num_collectives(self) -> int:
        """Returns how many collectives the main thread has begun; ranks that have met have begun as many."""
        groups: tuple[Any, ...] = (dist.group.WORLD, self.host_group) if self.num_ranks > 1 else ()
        return sum(group._get_sequence_number_for_group() for group in groups if group is not None)

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.num_ranks > 1:
            dist.barrier(group=self.host_group)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Runs the body on rank 0, then on the first rank of every other host, then on the rest."""
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.barrier()
        try:
            yield
        finally:
            for _ in range(2 - turn):
                self.barrier()

    def agree(self, build: Callable[[], T]) -> T:
        """Calls `build` on every rank; if it raises UserError on any, every rank raises all of them.

        Without this, a problem that only one rank has would leave the others waiting for it.
        """
        problems: tuple[Problem, ...] = ()
        result: T | None = None
        try:
            result = build()
        except UserError as error:
            problems = error.problems
        by_rank = self.gather(problems)
        if not any(by_rank):
            return result  # type: ignore[return-value]
        shared = [p for p in by_rank[0] if all(p in others for others in by_rank)]
        lone = [
            Problem(f"rank {rank}: {p.message}", p.path, p.origin)
            for rank, problems in enumerate(by_rank)
            for p in problems
            if p not in shared
        ]
        raise UserError(*shared, *lone, agreed=True)
