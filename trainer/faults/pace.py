"""How long each rank takes before it meets the others, and who is slow. Host clocks and device events: nobody waits.

What is measured is a step up to the exchange of gradients: waiting for data, forward, and the backwards before the
last one. After that all ranks take as long as the slowest. Where a forward is itself an exchange (sharded models,
`sync_batchnorm`) only the time before it tells ranks apart: the wait for data.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_MOST_PENDING = 256  # steps that may wait for a report before those that are over are added up
LEAST_SHARE = 0.15  # of a step that must be lost before a rank is called slow


class Pace:
    """Times this rank's way to the exchange in each step.

    Args:
        device: of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._started: float | torch.cuda.Event = 0.0
        self._pending: deque[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = deque()
        self._seconds = 0.0
        self._num_steps = 0

    def begin_step(self) -> None:
        """A step begins, before its first batch is there."""
        self._started = self._now()

    def meet(self) -> None:
        """The exchange with the other ranks comes next."""
        self._pending.append((self._started, self._now()))
        if len(self._pending) > _MOST_PENDING:
            self._add_up()

    def mean_seconds(self) -> float:
        """Returns the mean time before the exchange since the last call. Call it when the device has nothing to do."""
        self._add_up()
        mean = self._seconds / self._num_steps if self._num_steps else 0.0
        self._seconds, self._num_steps = 0.0, 0
        return mean

    def _add_up(self) -> None:
        """Adds up the steps whose end the device has come to."""
        while self._pending:
            start, end = self._pending[0]
            if isinstance(end, torch.cuda.Event) and not end.query():
                return
            self._pending.popleft()
            self._seconds += _between(start, end)
            self._num_steps += 1

    def _now(self) -> float | torch.cuda.Event:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1000
    assert isinstance(end, float)
    return end - start


@dataclass(frozen=True)
class Straggler:
    """A rank that the others wait for.

    Args:
        rank: which.
        seconds: of each step, before the exchange.
        others: seconds of the others, their median.
        share: of a step's time that the others wait for it.
    """

    rank: int
    seconds: float
    others: float
    share: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} takes {1000 * self.seconds:.1f} ms to the exchange of gradients, the others "
            f"{1000 * self.others:.1f} ms: it costs {100 * self.share:.0f}% of each step"
        )


def waited_share(by_rank: Sequence[float], step_seconds: float) -> float:
    """Returns the share of a step that the ranks spend waiting for the slowest, which is lost to all but it."""
    return _slowest(by_rank, step_seconds).share if len(by_rank) > 1 else 0.0


def find_straggler(by_rank: Sequence[float], step_seconds: float) -> Straggler | None:
    """Returns the rank that is slower than the others by a share of a step that matters, if there is one.

    Args:
        by_rank: each rank's seconds before the exchange.
        step_seconds: of a whole step.
    """
    if len(by_rank) < 2:
        return None
    slowest = _slowest(by_rank, step_seconds)
    return slowest if slowest.share > LEAST_SHARE else None


def _slowest(by_rank: Sequence[float], step_seconds: float) -> Straggler:
    rank = max(range(len(by_rank)), key=by_rank.__getitem__)
    others = statistics.median(seconds for other, seconds in enumerate(by_rank) if other != rank)
    lost = by_rank[rank] - others
    return Straggler(rank, by_rank[rank], others, lost / step_seconds if step_seconds > 0 else 0.0)
