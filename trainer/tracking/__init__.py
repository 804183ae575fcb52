"""Experiment trackers through Accelerate's classes, on rank 0 only, imported late.

Trackers get what `metrics.jsonl` gets, and no step twice. Owns that a tracker that fails is left out and never ends
the training. W&B is `trainer.tracking.wandb_run`; how the others start and take pictures, `trainer.tracking.others`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Progress
from trainer.config import Config
from trainer.errors import UserError, one_line
from trainer.eval_media import EvalMedia
from trainer.tracking.others import Other
from trainer.tracking.wandb_run import WandbRun, has_wandb_key, wandb_server

__all__ = ["Trackers", "check_trackers", "has_wandb_key", "wandb_server"]

logger = logging.getLogger("lockstep")


def check_trackers(config: Config) -> None:
    """Raises UserError where a tracker is named whose package is not installed."""
    tracking = config.tracking
    mode = os.environ.get("WANDB_MODE")
    if "wandb" in tracking.trackers and mode not in (None, "online", "offline", "disabled"):
        raise UserError(f"WANDB_MODE={mode} in the environment; it must be online, offline or disabled")
    for i, name in enumerate(tracking.trackers):
        if importlib.util.find_spec(name) is None:
            message = f"'{name}' is not installed; pip install {name}, or leave it out"
            raise UserError(message, path=f"tracking.trackers.{i}")
    for name in tracking.init:
        if name not in tracking.trackers:
            message = f"tracking.trackers does not name '{name}', so nothing is started with this"
            raise UserError(message, path=f"tracking.init.{name}")


class Tracker(Protocol):
    """What one tracker does with what a run tells of itself."""

    name: str

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Takes values of a step; steps never go back."""

    def show(self, media: EvalMedia, step: int) -> None:
        """Takes the pictures and the tables of an evaluation."""

    def summarise(self, values: Mapping[str, Any], step: int) -> None:
        """Takes values of the whole run so far."""

    def checkpoint(self, folder: CheckpointFolder, progress: Progress) -> None:
        """Is told of a checkpoint that is there now, on the thread that wrote it."""

    def finish(self, failed: bool, open_step: int | None, seconds: float | None) -> None:
        """Flushes and closes."""


class Trackers:
    """The trackers of one attempt at a run.

    Args:
        config: the whole config; trackers store it.
        run_dir: the run folder, where trackers put their files.
        wandb_id: W&B id of the run that is being continued, if any.
        records: what `metrics.jsonl` holds of the attempts before, up to the step that this one starts from.
        goals: for metrics whose best value matters, whether that is the largest or the smallest.

    Raises:
        UserError: a tracker does not take what `tracking.init` says.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        wandb_id: str | None,
        records: Sequence[Mapping[str, Any]] = (),
        goals: Mapping[str, str] | None = None,
    ) -> None:
        self.trackers: list[Tracker] = []
        self.wandb_id = wandb_id
        self._sent: dict[bool, int] = {}  # the last step of reports, and of evaluations, in this attempt
        for name in config.tracking.trackers:
            arguments = config.tracking.init.get(name, {})
            tracker: Tracker
            try:
                if name == "wandb":
                    tracker = run = WandbRun(config, run_dir, wandb_id, records, goals or {}, arguments)
                    self.wandb_id = run.id
                else:
                    start = int(records[-1]["step"]) if records else 0
                    tracker = Other(name, config, run_dir, start, arguments)
            except Exception as error:  # a server that is away, a folder that cannot be written, ...
                if arguments and isinstance(error, TypeError | ValueError):
                    raise UserError(f"'{name}': {one_line(error)}", path=f"tracking.init.{name}") from error
                logger.warning("%s cannot start and is left out: %s", name, one_line(error))
                continue
            self.trackers.append(tracker)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Sends one record to every tracker, unless they have it: after a rollback steps are made again."""
        is_evaluation = any(key.startswith("eval/") for key in record)
        if step <= self._sent.get(is_evaluation, -1):
            return
        self._sent[is_evaluation] = step
        self._with_each(lambda tracker: tracker.log(record, step))

    def show(self, media: EvalMedia, step: int) -> None:
        """Sends the pictures and the tables of an evaluation to every tracker that takes any."""
        self._with_each(lambda tracker: tracker.show(media, step))

    def summarise(self, values: Mapping[str, Any], step: int) -> None:
        """Sends values of the whole run: to W&B's summary, and to the others as values of the last step."""
        self._with_each(lambda tracker: tracker.summarise(values, step))

    def checkpoint(self, folder: CheckpointFolder, progress: Progress) -> None:
        """Tells of a checkpoint that is there now."""
        self._with_each(lambda tracker: tracker.checkpoint(folder, progress))

    def _with_each(self, send: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                send(tracker)
            except Exception as error:  # a tracker that fails must not end the training
                logger.warning("%s fails and is left out from here on: %s", tracker.name, one_line(error))
                self.trackers.remove(tracker)

    def finish(self, failed: bool, open_step: int | None = None, seconds: float | None = None) -> None:
        """Flushes and closes every tracker; W&B shows a failed run as such.

        Args:
            failed: the run ended with an error.
            open_step: a step that is still to be evaluated, which the next attempt does.
            seconds: no more than this may be spent on waiting for servers; None for as long as is configured.
        """
        self._with_each(lambda tracker: tracker.finish(failed, open_step, seconds))
