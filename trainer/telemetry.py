"""Where the time of a run went, and how much memory it took. Host clocks only: nothing here waits for a device."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Wall time of this attempt, split into named phases; what no phase claims is training."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.phases: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the body to a phase; phases do not nest."""
        started = time.perf_counter()
        try:
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


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory allocated on the device, or on the CPU the peak size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
