"""Requests to stop: signals, and the file `STOP` in the run folder, that ask a run to end after a checkpoint.

Handlers only set a flag. Ranks agree at the boundaries of steps, groups of micro-batches and evaluation batches
(`trainer.agreement`), the loop saves and ends, and the program exits with code 75: start it again and it goes on. A
second signal, a second or more later, ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOP_FILE = "STOP"
REPEAT_SECONDS = 1.0  # a stop signal that comes again after this ends the process at once
_POLL_SECONDS = 1.0


class StopRequests:
    """Collects what asks this process to stop; what to do about it, all ranks decide together."""

    def __init__(self) -> None:
        self.requested = False
        self.reason = ""  # such as `SIGTERM`
        self._requested_at = 0.0
        self._signalled_at: float | None = None
        self._previous: dict[int, Any] = {}
        self._file: Path | None = None
        self._is_released = threading.Event()

    def install(self) -> None:
        """Takes over the stop signals; only the main thread may (elsewhere signals are left alone)."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._note)

    def watch_file(self, folder: Path) -> None:
        """Looks every second, in a thread of its own, whether the folder has a file `STOP`: one rank is enough.

        The main thread never looks: a file system that hangs must not hold it.
        """
        self._file = folder / STOP_FILE
        threading.Thread(target=self._watch_file, name="stop-file", daemon=True).start()

    def seconds_ago(self) -> float:
        """Returns how long ago this process was asked; 0 where it was not."""
        return time.monotonic() - self._requested_at if self.requested else 0.0

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Nothing but a flag is set in here. A launcher and a terminal may both deliver the same request, so only
        # a second one after a while means that somebody will not wait for the step to end.
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
            self._request(signal.Signals(number).name)
        elif now - self._signalled_at > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _request(self, reason: str) -> None:
        if not self.requested:
            self.reason, self._requested_at = reason, time.monotonic()
            self.requested = True

    def _watch_file(self) -> None:
        assert self._file is not None
        while not self._is_released.is_set():
            with suppress(OSError):
                if self._file.exists():
                    self._request(f"the file {STOP_FILE}")
            self._is_released.wait(_POLL_SECONDS)

    def fulfilled(self) -> None:
        """Removes the file `STOP`, whose request is fulfilled, so that the next start trains."""
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink()

    def release_signals(self) -> None:
        """Gives the signals back; talks to no other rank."""
        self._is_released.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
