"""Stop requests: a signal to any rank becomes one decision of all ranks.

A handler only sets a flag. Ranks agree at step boundaries, the loop saves and ends, and the program exits with
code 75: start it again and it goes on.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequests:
    """Collects stop signals, and tells all ranks at the same step.

    Args:
        group: a gloo group of all ranks, or None for a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.requested = False
        self._previous: dict[int, Any] = {}
        self._in_flight: tuple[dist.Work, torch.Tensor] | None = None

    def install(self) -> None:
        """Takes over SIGINT and SIGTERM; only the main thread may (elsewhere signals are left alone)."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True  # a launcher may deliver a signal twice; nothing else may happen in here

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

    def close(self) -> None:
        """Finishes the last exchange and gives the signals back."""
        _answer(self._in_flight)
        self._in_flight = None
        self.release_signals()

    def release_signals(self) -> None:
        """Gives the signals back without talking to other ranks."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


def _answer(in_flight: tuple[dist.Work, torch.Tensor] | None) -> bool:
    if in_flight is None:
        return False
    work, flag = in_flight
    work.wait()
    return bool(flag.item())
