"""What a tracker is, and how long one that fails is kept."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Progress
from trainer.errors import one_line
from trainer.eval_media import EvalMedia

logger = logging.getLogger("lockstep")

RECORDS = "records"  # without these a tracker is of no use any more
_MOST_FAILURES = 10  # in a row


class Tracker(Protocol):
    """What one tracker does with what a run tells of itself."""

    name: str

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Takes values of a step; steps never go back."""

    def show(self, media: EvalMedia, step: int) -> None:
        """Takes the pictures and the tables of an evaluation."""

    def end_step(self, step: int) -> None:
        """Is told that nothing more comes of a step."""

    def summarise(self, values: Mapping[str, Any], step: int) -> None:
        """Takes values of the whole run so far."""

    def checkpoint(self, folder: CheckpointFolder, progress: Progress) -> None:
        """Is told of a checkpoint that is there now, on the thread that wrote it."""

    def finish(self, failed: bool, open_step: int | None, seconds: float) -> None:
        """Flushes and closes, in about so many seconds; on any thread."""


class Patience:
    """How often in a row a tracker has failed, by what it was given. Used from several threads.

    Args:
        name: of the tracker.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._failures: dict[str, int] = {}
        self._lock = threading.Lock()

    def is_left(self, what: str = RECORDS) -> bool:
        """Tells whether the tracker is still to be given this."""
        return self._failures.get(what, 0) < _MOST_FAILURES

    def attempt(self, what: str, send: Callable[[], None]) -> None:
        """Gives the tracker something, unless that failed too often. Never raises."""
        if not self.is_left(what):
            return
        try:
            send()
        except Exception as error:  # a tracker that fails must not end the training
            with self._lock:
                self._failures[what] = number = self._failures.get(what, 0) + 1
            if number == 1:
                logger.warning("%s fails with %s: %s", self._name, what, one_line(error))
            elif number == _MOST_FAILURES:
                message = "%s has failed with %s %d times in a row, and gets none from here on: %s"
                logger.warning(message, self._name, what, number, one_line(error))
        else:
            with self._lock:
                self._failures[what] = 0
