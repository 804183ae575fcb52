"""Stop requests: a signal to any rank becomes one decision of all ranks.

A handler only sets a flag. Ranks agree at step boundaries, the loop saves and ends, and the program exits with
code 75: start it again and it goes on. A second request, a second or more later, ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_SECONDS = 1.0  # a stop signal that comes again after this ends the process at once


class StopRequests:
    """Collects stop signals, and tells all ranks at the same step.

    Args:
        group: a gloo group of all ranks, or None for a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.requested = False
        self._requested_at = 0.0
        self._previous: dict[int, Any] = {}
        self._in_flight: tuple[dist.Work, torch.Tensor] | None = None

    def install(self) -> None:
        """Takes over SIGINT and SIGTERM; only the main thread may (elsewhere signals are left alone)."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Nothing but a flag is set in here. A launcher and a terminal may both deliver the same request, so only
        # a second one after a while means that somebody will not wait for the step to end.
        now = time.monotonic()
        if self.requested and now - self._requested_at > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.requested:
            self.requested, self._requested_at = True, now

    def agreed(self) -> bool:
        """Tells whether to stop now: the same answer on every rank, called by all after every step."""
        if self.group is None:
            return self.requested
        # The question asked after this step is answered after the next: the exchange runs beside the step
        # and nobody waits for it, least of all for the device.
        previous = self._in_flight
        flag = torch.tensor([int(self.requested)], dtype=torch.int32)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        assert work is not None
        self._in_flight = work, flag
        return _answer(previous)

    def drain(self) -> None:
        """Finishes the last exchange, which every rank has begun."""
        _answer(self._in_flight)
        self._in_flight = None

    def release_signals(self) -> None:
        """Gives the signals back; talks to no other rank."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


def _answer(in_flight: tuple[dist.Work, torch.Tensor] | None) -> bool:
    if in_flight is None:
        return False
    work, flag = in_flight
    work.wait()
    return bool(flag.item())
