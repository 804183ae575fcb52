"""Experiment trackers through Accelerate's classes, on rank 0 only, imported late.

Trackers get what `metrics.jsonl` gets, and no step twice. Owns that a tracker that fails never ends the training, and
is left out if it keeps failing. W&B is `trainer.tracking.wandb_run`; how the others start and take pictures is
`trainer.tracking.others`, and that they never hold a step, `trainer.tracking.behind`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Progress
from trainer.config import Config
from trainer.errors import UserError, one_line
from trainer.eval_media import EvalMedia
from trainer.tracking.behind import Behind
from trainer.tracking.others import Other, check_arguments
from trainer.tracking.tracker import RECORDS, Patience, Tracker
from trainer.tracking.wandb_run import WandbRun, check_wandb_arguments, has_wandb_key, reminder, wandb_server

__all__ = ["Trackers", "check_trackers", "has_wandb_key", "reminder", "wandb_server"]

logger = logging.getLogger("lockstep")

_FAILED_SECONDS = 20.0  # for uploads of a run that failed: others may be waiting for this process to go
_OVER_SECONDS = 4.0  # for trackers to give up by themselves, where they waited for as long as they were told
_BEAT_SECONDS = 0.5


def check_trackers(config: Config) -> None:
    """Raises UserError where a tracker's package is not installed, or does not take what `tracking.init` says."""
    tracking = config.tracking
    mode = os.environ.get("WANDB_MODE") if tracking.wandb.mode is None else None
    if "wandb" in tracking.trackers and mode not in (None, "online", "offline", "disabled"):
        raise UserError(f"WANDB_MODE={mode} in the environment; it must be online, offline or disabled")
    for i, name in enumerate(tracking.trackers):
        if importlib.util.find_spec(name) is None:
            message = f"'{name}' is not installed; pip install {name}, or leave it out"
            raise UserError(message, path=f"tracking.trackers.{i}")
    for name, arguments in tracking.init.items():
        if name not in tracking.trackers:
            message = f"tracking.trackers does not name '{name}', so nothing is started with this"
            raise UserError(message, path=f"tracking.init.{name}")
        if name == "wandb":
            check_wandb_arguments(arguments)
        else:
            check_arguments(name, arguments)


class Trackers:
    """The trackers of one attempt at a run. Used from the training's thread and from the one that writes checkpoints.

    Args:
        config: the whole config; trackers store it.
        run_dir: the run folder, where trackers put their files.
        step: that this attempt starts from.
        wandb_id: W&B id of the run that is being continued, if any.
        records: what `metrics.jsonl` holds of the attempts before, up to that step.
        goals: for metrics whose best value matters, whether that is the largest or the smallest.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        step: int,
        wandb_id: str | None,
        records: Sequence[Mapping[str, Any]] = (),
        goals: Mapping[str, str] | None = None,
    ) -> None:
        self.trackers: list[Tracker] = []
        self.wandb_id = wandb_id
        self._finish_seconds = config.tracking.wandb.finish_timeout.seconds
        self._sent: dict[str, int] = {}  # the last step of each kind of record in this attempt
        self._lock = threading.Lock()  # of the list
        self._patience: dict[str, Patience] = {}
        for name in config.tracking.trackers:
            arguments = config.tracking.init.get(name, {})
            tracker: Tracker
            try:
                if name == "wandb":
                    tracker = run = WandbRun(config, run_dir, wandb_id, records, goals or {}, arguments)
                    self.wandb_id = run.id
                else:
                    tracker = Behind(name, partial(Other, name, config, run_dir, step, arguments))
            except Exception as error:  # a server that is away, a folder that cannot be written, ...
                logger.warning("%s cannot start and is left out: %s", name, one_line(error))
                continue
            self.add(tracker)

    def add(self, tracker: Tracker) -> None:
        """Takes one more."""
        self._patience[tracker.name] = Patience(tracker.name)
        self.trackers.append(tracker)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Sends one record to every tracker, unless they have it: after a rollback steps are made again."""
        is_evaluation = any(key.startswith("eval/") for key in record)
        if self._is_new("evaluation" if is_evaluation else "report", step):
            self._with_each(RECORDS, lambda tracker: tracker.log(record, step))

    def show(self, media: EvalMedia, step: int) -> None:
        """Sends the pictures and the tables of an evaluation to every tracker that takes any."""
        if self._is_new("pictures", step):
            self._with_each("pictures", lambda tracker: tracker.show(media, step))

    def end_step(self, step: int) -> None:
        """Tells that nothing more comes of a step."""
        self._with_each(RECORDS, lambda tracker: tracker.end_step(step))

    def summarise(self, values: Mapping[str, Any], step: int) -> None:
        """Sends values of the whole run: to W&B's summary, and to the others as values of the last step."""
        self._with_each("values of the run", lambda tracker: tracker.summarise(values, step))

    def checkpoint(self, folder: CheckpointFolder, progress: Progress) -> None:
        """Tells of a checkpoint that is there now."""
        self._with_each("checkpoints", lambda tracker: tracker.checkpoint(folder, progress))

    def _is_new(self, kind: str, step: int) -> bool:
        is_new = step > self._sent.get(kind, -1)
        if is_new:
            self._sent[kind] = step
        return is_new

    def _with_each(self, what: str, send: Callable[[Tracker], None]) -> None:
        with self._lock:
            trackers = list(self.trackers)
        for tracker in trackers:
            patience = self._patience[tracker.name]
            patience.attempt(what, partial(send, tracker))
            if not patience.is_left():
                with self._lock:
                    is_ours = tracker in self.trackers
                    if is_ours:
                        self.trackers.remove(tracker)
                if is_ours:
                    self._close(tracker, True, None, _FAILED_SECONDS)

    def _close(self, tracker: Tracker, failed: bool, open_step: int | None, seconds: float) -> threading.Thread:
        """Closes a tracker on a thread of its own."""
        close = partial(tracker.finish, failed, open_step, seconds)
        attempt = self._patience[tracker.name].attempt
        thread = threading.Thread(target=attempt, args=["its end", close], name="tracker-end", daemon=True)
        thread.start()
        return thread

    def finish(
        self,
        failed: bool,
        open_step: int | None = None,
        seconds: float | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Flushes and closes all trackers at the same time; W&B shows a failed run as such.

        Args:
            failed: the run ended with an error.
            open_step: a step that is still to be evaluated, which the next attempt does.
            seconds: no more than this may be spent on waiting for servers; None for as long as is configured.
            beat: called while it waits.
        """
        limit = self._finish_seconds
        if failed:
            limit = min(limit, _FAILED_SECONDS)
        if seconds is not None:
            limit = min(limit, max(seconds, 1.0))
        with self._lock:
            trackers, self.trackers = self.trackers, []
        threads = [self._close(tracker, failed, open_step, limit) for tracker in trackers]
        deadline = monotonic() + limit + _OVER_SECONDS
        for thread in threads:
            while thread.is_alive() and monotonic() < deadline:
                thread.join(_BEAT_SECONDS)
                beat()
