"""What happened in a stretch of an attempt: windows between reports, added up for the rules.

Owns the sums. Which windows count, and what is made of them, is `trainer.advice.survey`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.checkpoint.writing import Saver
from trainer.data.feed import DeviceFeed
from trainer.faults.pace import LEAST_SHARE, Straggler
from trainer.telemetry.observer import Observation
from trainer.telemetry.stopwatch import PARTS

WORKERS_SETTLE_SECONDS = 60.0  # after their start, in which they read all that they go on to use


@dataclass
class Stretch:
    """What happened in some windows, added up."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))  # by part, mean over ranks
    by_rank: list[dict[str, float]] = field(default_factory=list)
    num_steps: int = 0
    first_step: int = 0
    last_step: int = 0
    load_seconds: float = 0.0
    load_cpu_seconds: float = 0.0
    num_loaded: int = 0
    num_saved: int = 0
    write_seconds: float = 0.0
    num_evaluated: int = 0
    num_idle: float = 0.0  # steps at whose begin the GPU had nothing left to do
    num_after_pauses: int = 0  # steps that reports, evaluations and saves, which wait for the GPU, come just before

    def add(self, other: Stretch) -> None:
        """Adds the window that follows."""
        if not self.num_steps:
            self.first_step = other.first_step
        self.last_step = other.last_step
        for part in PARTS:
            self.seconds[part] += other.seconds[part]
        if not self.by_rank:
            self.by_rank = [dict.fromkeys(PARTS, 0.0) for _ in other.by_rank]
        for mine, theirs in zip(self.by_rank, other.by_rank, strict=True):
            for part in PARTS:
                mine[part] += theirs[part]
        for name in (
            "num_steps",
            "load_seconds",
            "load_cpu_seconds",
            "num_loaded",
            "num_saved",
            "write_seconds",
            "num_evaluated",
            "num_idle",
            "num_after_pauses",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def times_due(self, every: int) -> int:
        """Returns how often something was due that is so every so many steps: it comes after the report of its step."""
        return (self.last_step - 1) // every - (self.first_step - 1) // every


class Since:
    """Running figures, and what was new in a window."""

    def __init__(self, feed: DeviceFeed, saver: Saver) -> None:
        self._feed = feed
        self._saver = saver
        self._before = self._now()

    def _now(self) -> tuple[float, ...]:
        feed, saves = self._feed, self._saver.statistics
        return feed.load_seconds, feed.load_cpu_seconds, feed.num_loaded, saves.num_saved, saves.write_seconds

    def take(self, step: int, num_steps: int, seen: Sequence[Observation]) -> Stretch:
        """Returns the window since the last call.

        Args:
            step: the last one.
            num_steps: how many they are.
            seen: what every rank saw.
        """
        now = self._now()
        load, cpu, num_loaded, num_saved, write = (b - a for a, b in zip(self._before, now, strict=True))
        self._before = now
        by_rank = [dict(rank.seconds or {}) for rank in seen]
        mean = {part: math.fsum(rank.get(part, 0.0) for rank in by_rank) / len(by_rank) for part in PARTS}
        return Stretch(
            mean,
            by_rank,
            num_steps,
            step - num_steps,
            step,
            load,
            cpu,
            int(num_loaded),
            int(num_saved),
            write,
        )


class Stragglers:
    """Adds up what each slow rank has cost."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._by_rank: dict[int, list[float]] = {}  # steps, and times them: share, seconds, seconds of the others

    def add(self, found: Straggler | None, num_steps: int) -> None:
        """Adds the steps of a window, and who was slow in it."""
        self._num_steps += num_steps
        if found is not None:
            sums = self._by_rank.setdefault(found.rank, [0.0] * 4)
            for i, figure in enumerate((1.0, found.share, found.seconds, found.others)):
                sums[i] += figure * num_steps

    def worst(self) -> Straggler | None:
        """Returns the rank that has cost most, with its share of all steps, if that is as much as matters."""
        if not self._by_rank or not self._num_steps:
            return None
        rank, (steps, lost, seconds, others) = max(self._by_rank.items(), key=lambda item: item[1][1])
        share = lost / self._num_steps
        return Straggler(rank, seconds / steps, others / steps, share) if share > LEAST_SHARE else None


class WorkerMemory:
    """The memory of a worker over time, while there are as many, and once they have settled."""

    def __init__(self) -> None:
        self.series: list[tuple[float, int]] = []
        self.latest = 0
        self._num_workers = 0
        self._since = time.monotonic()

    def add(self, num_workers: int, worker_bytes: int | None) -> None:
        """Adds what one of so many workers takes now, where that was measured."""
        now = time.monotonic()
        if num_workers != self._num_workers:
            self._num_workers, self._since = num_workers, now
            self.series.clear()
        self.latest = worker_bytes or self.latest
        if worker_bytes is not None and now - self._since >= WORKERS_SETTLE_SECONDS:
            self.series.append((now, worker_bytes))
