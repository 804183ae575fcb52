"""What the ranks see of time and memory from one report to the next, and the figures of all of them together.

Owns which figures there are and how those of several ranks become one. They are measured in the modules beside it.
"""

from __future__ import annotations

import math
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.feed import DeviceFeed
from trainer.telemetry.machine import PERIOD_SECONDS, Machine
from trainer.telemetry.memory import MemoryUse, memory_use, own_memory_bytes
from trainer.telemetry.stopwatch import PARTS, Stopwatch
from trainer.world import World

_GIB = 2**30


@dataclass(frozen=True)
class Observation:
    """What one rank saw since the last report.

    Args:
        host: name of its machine.
        local_rank: its number on this machine.
        seconds: by part of `stopwatch.PARTS`; None where that is not measured.
        idle_share: share of the steps at whose beginning a GPU had nothing left to do; None where that is not known.
        to_exchange: mean seconds of a step before the exchange with the other ranks.
        memory: of its process, now.
        worker_bytes: memory of its first loader worker, which the others are like. Of rank 0; None on others, without
            workers, and where it was measured a moment ago.
        num_workers: how many it has.
        machine: figures of its machine, from one rank of each; None where they were taken a moment ago.
    """

    host: str
    local_rank: int
    seconds: dict[str, float] | None
    idle_share: float | None
    to_exchange: float
    memory: MemoryUse
    worker_bytes: int | None
    num_workers: int
    machine: dict[str, float] | None

    def share(self, part: str) -> float:
        """Returns the share of this rank's time that a part took."""
        assert self.seconds is not None
        total = math.fsum(self.seconds.values())
        return self.seconds[part] / total if total else 0.0


class Observer:
    """Observes this rank.

    Args:
        world: the processes that train together.
        feed: of the training data.
        stopwatch: of the steps, or None where they are not split.
    """

    def __init__(self, world: World, feed: DeviceFeed, stopwatch: Stopwatch | None) -> None:
        self._device = world.device
        self._feed = feed
        self._stopwatch = stopwatch
        self._host, self._local_rank = socket.gethostname(), world.local_rank
        self._machine = Machine() if world.local_rank == 0 else None
        self._asks_workers = world.rank == 0
        self._copy_seconds = 0.0
        self._workers_due = time.monotonic()
        self.seconds = dict.fromkeys(PARTS, 0.0) if stopwatch is not None else None
        """Of this attempt by part, the mean over all ranks."""

    def restart(self) -> None:
        """Observes from now on: what came before was start-up."""
        self._copy_seconds = self._feed.copy_wait_seconds
        if self._stopwatch is not None:
            self._stopwatch.restart()

    def observe(self, to_exchange: float = 0.0) -> Observation:
        """Returns what this rank saw since the last call. Call it when the device has nothing to do.

        Args:
            to_exchange: mean seconds of a step before the exchange with the other ranks.
        """
        return Observation(
            self._host,
            self._local_rank,
            self._part_seconds(),
            self._stopwatch.take_idle_share() if self._stopwatch is not None else None,
            to_exchange,
            memory_use(self._device),
            self._worker_bytes(),
            len(self._feed.worker_pids()),
            self._machine.sample() if self._machine is not None else None,
        )

    def _part_seconds(self) -> dict[str, float] | None:
        if self._stopwatch is None:
            return None
        seconds = self._stopwatch.take()
        # The wait for a batch knows nothing of copies; who copied knows when somebody waited for it.
        copies = min(self._feed.copy_wait_seconds - self._copy_seconds, seconds["data_wait"])
        self._copy_seconds = self._feed.copy_wait_seconds
        return {**seconds, "data_wait": seconds["data_wait"] - copies, "h2d": copies}

    def _worker_bytes(self) -> int | None:
        """Returns the memory of one worker: they are alike, and asking takes milliseconds."""
        workers = self._feed.worker_pids() if self._asks_workers else []
        if not workers or time.monotonic() < self._workers_due:
            return None
        self._workers_due = time.monotonic() + PERIOD_SECONDS
        return own_memory_bytes(workers[0])

    # ---- of all ranks -----------------------------------------------------------------------------------------

    def figures(self, seen: Sequence[Observation]) -> dict[str, float]:
        """Returns the figures of a report, from what every rank saw, in rank order."""
        figures: dict[str, float] = {}
        if self.seconds is not None:
            figures |= {f"time/{part}": statistics.fmean(rank.share(part) for rank in seen) for part in PARTS}
            for part in PARTS:
                self.seconds[part] += statistics.fmean((rank.seconds or {})[part] for rank in seen)
        memories = [rank.memory for rank in seen]
        figures["memory/allocated_gib"] = max(memory.allocated for memory in memories) / _GIB
        if memories[0].reserved is not None:
            figures["memory/reserved_gib"] = max(memory.reserved or 0 for memory in memories) / _GIB
        figures["memory/peak_gib"] = max(memory.peak for memory in memories) / _GIB
        if seen[0].worker_bytes is not None:
            figures["memory/workers_gib"] = seen[0].worker_bytes * seen[0].num_workers / _GIB
        node = -1  # machines may have the same name
        for rank in seen:
            node += rank.local_rank == 0
            for name, value in (rank.machine or {}).items():
                figures[f"system/{node}/{name}"] = value
        return figures

    def time_split(self, to_the_end: bool) -> dict[str, float] | None:
        """Returns the shares of this attempt's time by part; None where it is not split.

        Args:
            to_the_end: with this rank's time since the last report, for which the device must have nothing to do; off
                where it may never get there.
        """
        if self.seconds is None:
            return None
        if to_the_end:
            for part, seconds in (self._part_seconds() or {}).items():
                self.seconds[part] += seconds
        total = math.fsum(self.seconds.values())
        return {part: seconds / total for part, seconds in self.seconds.items()} if total else None


def rank_record(seen: Sequence[Observation]) -> dict[str, Any]:
    """Returns what tells ranks apart, a list per figure in rank order, for `ranks.jsonl`."""
    record: dict[str, Any] = {
        "hosts": [rank.host for rank in seen],
        "seconds_to_exchange": [rank.to_exchange for rank in seen],
        "peak_gib": [rank.memory.peak / _GIB for rank in seen],
    }
    if seen[0].seconds is not None:
        for part in ("data_wait", "communication"):
            record[part] = [rank.share(part) for rank in seen]
    return record
