"""A tracker on a thread of its own: no server that is slow or away holds a step, or the start or end of a run.

What the tracker is given waits in a queue of limited length; where it is full, what comes is dropped.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Progress
from trainer.errors import one_line
from trainer.eval_media import EvalMedia
from trainer.tracking.tracker import RECORDS, Patience, Tracker

logger = logging.getLogger("lockstep")

_START_SECONDS = 10.0  # that the training waits for a tracker to start
_MOST_WAITING = 1000
_MOST_WAITING_FOR_PICTURES = 20  # these take memory

_Task = Callable[[Tracker], None]


class Behind:
    """A tracker that is called on one thread, from its start to its end: some keep state by thread.

    Args:
        name: of the tracker.
        make: starts it.

    Raises:
        Exception: what `make` raised, if it did so soon.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name = name
        self._patience = Patience(name)
        self._waiting: queue.SimpleQueue[tuple[str, _Task] | None] = queue.SimpleQueue()
        self._end: _Task | None = None
        self._problem: Exception | None = None
        self._has_started, self._is_over = threading.Event(), threading.Event()
        self._has_dropped = False
        self._lock = threading.Lock()  # of what decides who tells of a start that failed
        self._is_late = False
        self._thread = threading.Thread(target=self._work, args=[make], name=f"tracker-{name}", daemon=True)
        self._thread.start()
        self._has_started.wait(_START_SECONDS)
        with self._lock:
            if self._problem is not None:
                raise self._problem
            self._is_late = not self._has_started.is_set()
        if self._is_late:
            logger.warning("%s has not started after %.0f s; what it is to get waits", name, _START_SECONDS)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        self._put(RECORDS, lambda tracker: tracker.log(record, step))

    def show(self, media: EvalMedia, step: int) -> None:
        self._put("pictures", lambda tracker: tracker.show(media, step), _MOST_WAITING_FOR_PICTURES)

    def end_step(self, step: int) -> None:
        self._put(RECORDS, lambda tracker: tracker.end_step(step))

    def summarise(self, values: Mapping[str, Any], step: int) -> None:
        self._put("values of the run", lambda tracker: tracker.summarise(values, step))

    def checkpoint(self, folder: CheckpointFolder, progress: Progress) -> None:
        self._put("checkpoints", lambda tracker: tracker.checkpoint(folder, progress))

    def finish(self, failed: bool, open_step: int | None, seconds: float) -> None:
        self._end = lambda tracker: tracker.finish(failed, open_step, seconds)
        self._waiting.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"it did not finish within {seconds:.0f} s")

    def _put(self, what: str, task: _Task, most: int | None = None) -> None:
        if self._is_over.is_set():
            return
        if self._waiting.qsize() < (most or _MOST_WAITING):
            self._waiting.put((what, task))
        elif not self._has_dropped:
            self._has_dropped = True
            logger.warning("%s is slow or away: it will lack what comes while so much waits for it", self.name)

    def _work(self, make: Callable[[], Tracker]) -> None:
        try:
            tracker = make()
        except Exception as error:  # a server that is away, a folder that cannot be written, ...
            self._is_over.set()
            with self._lock:
                self._problem = error
                is_late = self._is_late
                self._has_started.set()
            if is_late:
                logger.warning("%s cannot start and is left out: %s", self.name, one_line(error))
            return
        self._has_started.set()
        while self._patience.is_left() and (waiting := self._waiting.get()) is not None:
            what, task = waiting
            self._patience.attempt(what, lambda task=task: task(tracker))  # type: ignore[misc]
        self._is_over.set()
        end = self._end or (lambda tracker: tracker.finish(True, None, _START_SECONDS))  # it failed too often
        self._patience.attempt("its end", lambda: end(tracker))
