"""Stop requests: signals that ask a run to end after a checkpoint.

A handler only sets a flag. Ranks agree at step boundaries (`trainer.agreement`), the loop saves and ends, and the
program exits with code 75: start it again and it goes on. A second request, a second or more later, ends the process
at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_SECONDS = 1.0  # a stop signal that comes again after this ends the process at once


class StopRequests:
    """Collects stop signals of this process; what to do about them, all ranks decide together."""

    def __init__(self) -> None:
        self.requested = False
        self._requested_at = 0.0
        self._previous: dict[int, Any] = {}

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

    def release_signals(self) -> None:
        """Gives the signals back; talks to no other rank."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
