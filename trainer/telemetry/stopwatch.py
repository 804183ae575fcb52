"""What a step's time goes into, by name, without a wait for the device.

Owns the parts and their measurement: host clocks on the CPU, events on the step's stream elsewhere. On a GPU the host
runs ahead, so what counts is when the device comes to a place: where it gets to the next batch and has to wait for it,
that is `data_wait`, however long the host had known. What is done with the figures is `trainer.telemetry.observer`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

PARTS = {
    "data_wait": "waiting for a batch",
    "h2d": "waiting while a batch was copied to the device",
    "forward": "forward, and the device half of the transforms",
    "backward": "backward",
    "communication": "exchanges between ranks that nothing hides",
    "optimizer": "clipping, optimizer and averages of the weights",
    "checkpoint": "training stood still for a checkpoint",
    "evaluation": "evaluation",
    "host": "everything else: reports, decisions, what lies between steps",
}

# What the loop's places (`Resumable.at`) belong to.
PART_OF_PLACE = {
    "restoring a checkpoint": "checkpoint",
    "loading a batch": "data_wait",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "writing a profile": "host",
    "exchange of decisions": "host",
    "evaluation": "evaluation",
    "metrics of an evaluation": "evaluation",
    "saving a checkpoint": "checkpoint",
    "report": "host",
    "ending": "host",
}

_MOST_PENDING = 512  # intervals that may wait for a report before those that are over are added up

Moment = float | torch.cuda.Event


class Stopwatch:
    """Adds up the time of this rank by part. Every moment belongs to exactly one.

    Args:
        device: of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._num_begun = self._num_idle = 0
        self._part = "host"
        self._since: Moment = self._now()

    @property
    def part(self) -> str:
        """What the present moment belongs to."""
        return self._part

    def restart(self) -> None:
        """Forgets the time so far, such as that of start-up."""
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._pending.clear()
        self._num_begun = self._num_idle = 0
        self._since = self._now()

    def begin_step(self) -> None:
        """The host begins to issue a step: has the device done all of the one before, and waits for work?"""
        if isinstance(self._since, torch.cuda.Event):
            self._num_begun += 1
            self._num_idle += self._since.query()

    def take_idle_share(self) -> float | None:
        """Returns at which share of the steps since the last call the device had nothing to do; None on the CPU."""
        share = self._num_idle / self._num_begun if self._num_begun else None
        self._num_begun = self._num_idle = 0
        return share

    def enter(self, part: str) -> None:
        """From this place on time belongs to `part`.

        In a backward autograd's threads call it, while the main thread waits for them.
        """
        if part == self._part:
            return
        self._close_interval()
        self._part = part

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Time in the body belongs to `part`, where that is one; then to what it belonged to before."""
        before = self._part
        if part in PARTS:
            self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Time in the body is communication, where it is a part of forward or backward; in an evaluation it is not."""
        with self.inside("communication") if self._part in ("forward", "backward") else nullcontext():
            yield

    def take(self) -> dict[str, float]:
        """Returns seconds by part since the last call. Call it when the device has nothing to do."""
        self._close_interval()
        if isinstance(self._since, torch.cuda.Event):
            self._since.synchronize()
        self._add_pending()
        taken, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return taken

    def _close_interval(self) -> None:
        now = self._now()
        if isinstance(now, torch.cuda.Event):
            assert isinstance(self._since, torch.cuda.Event)
            self._pending.append((self._part, self._since, now))
            if len(self._pending) > _MOST_PENDING:
                self._add_pending()
        else:
            assert isinstance(self._since, float)
            self._seconds[self._part] += now - self._since
        self._since = now

    def _add_pending(self) -> None:
        """Adds up the intervals that the device has come to the end of."""
        while self._pending and self._pending[0][2].query():
            part, start, end = self._pending.popleft()
            self._seconds[part] += start.elapsed_time(end) / 1000

    def _now(self) -> Moment:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
