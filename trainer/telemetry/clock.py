"""Where the time of an attempt went, by the clock on the wall: start-up, training, evaluations, checkpoints.

Host clocks only: nothing here waits for a device. What a step is made of is `trainer.telemetry.stopwatch`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.telemetry.stopwatch import Stopwatch


class Clock:
    """Wall time of this attempt, split into named phases; what no phase claims is training."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.phases: defaultdict[str, float] = defaultdict(float)
        self.stopwatch: Stopwatch | None = None
        """Which is told of phases, once there is one."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the body to a phase; phases do not nest."""
        started = time.perf_counter()
        try:
            with self.stopwatch.inside(name) if self.stopwatch is not None else nullcontext():
                yield
        finally:
            self.phases[name] += time.perf_counter() - started

    def elapsed(self) -> float:
        """Returns the seconds since this attempt started."""
        return time.perf_counter() - self.started

    def split(self) -> dict[str, float]:
        """Returns seconds per phase, `train` (everything else) and `total`."""
        total = self.elapsed()
        return {"total": total, "train": total - sum(self.phases.values()), **self.phases}


class Timer:
    """Rings once per period.

    Args:
        seconds: the period.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = time.monotonic() + seconds

    def rings(self) -> bool:
        """Tells whether the period is over; then the next one begins."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True
