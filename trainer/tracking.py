"""Experiment trackers through Accelerate's classes, on rank 0 only, imported late.

Trackers get what `metrics.jsonl` gets. Owns choosing W&B's mode so that a missing key or network never stops
or stalls a run.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from trainer.config import Config, flatten
from trainer.config_reporting import WandbConfig
from trainer.errors import UserError, one_line

logger = logging.getLogger("lockstep")


def check_trackers(config: Config) -> None:
    """Raises UserError where a tracker is named whose package is not installed."""
    mode = os.environ.get("WANDB_MODE")
    if "wandb" in config.tracking.trackers and mode not in (None, "online", "offline", "disabled"):
        raise UserError(f"WANDB_MODE={mode} in the environment; it must be online, offline or disabled")
    for i, name in enumerate(config.tracking.trackers):
        if importlib.util.find_spec(name) is None:
            message = f"'{name}' is not installed; pip install {name}, or leave it out"
            raise UserError(message, path=f"tracking.trackers.{i}")


class Trackers:
    """The trackers of one run.

    Args:
        config: the whole config; trackers store it.
        run_dir: the run folder, where trackers put their files.
        wandb_id: W&B id of the run that is being continued, if any.
    """

    def __init__(self, config: Config, run_dir: Path, wandb_id: str | None) -> None:
        self.trackers: list[GeneralTracker] = []
        self.wandb_id = wandb_id
        values = config.model_dump(mode="json")
        for name in config.tracking.trackers:
            if name == "wandb":
                tracker = self._start_wandb(config, run_dir, _wandb_mode(config.tracking.wandb))
                tracker.store_init_configuration(values)
            else:
                tracker = TensorBoardTracker("tensorboard", run_dir)
                tracker.start()
                tracker.store_init_configuration(_plain(values))
            self.trackers.append(tracker)

    def _start_wandb(self, config: Config, run_dir: Path, mode: str) -> WandBTracker:
        import wandb

        settings = config.tracking.wandb
        tracker = WandBTracker(
            settings.project,
            id=self.wandb_id,
            resume="allow" if self.wandb_id else None,
            name=config.run.name,
            dir=str(run_dir),
            mode=mode,
            entity=settings.entity,
            group=settings.group,
            tags=list(settings.tags) or None,
            notes=settings.notes,
            settings=wandb.Settings(silent=mode != "online"),
        )
        try:
            tracker.start()
        except Exception as error:  # no key, a key that the server refuses, a server that does not answer, ...
            if mode != "online":
                raise
            logger.warning("wandb: offline, as it cannot start online: %s", " ".join(str(error).split()))
            return self._start_wandb(config, run_dir, "offline")
        run = tracker.tracker
        # Our own step: W&B's counter would refuse the steps that a resumed run does again.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        if mode != "disabled":
            self.wandb_id = run.id
        return tracker

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Sends one record to every tracker."""

        def send(tracker: GeneralTracker) -> None:
            if tracker.name == "wandb":
                tracker.log({**record, "step": step})
            else:
                tracker.log(dict(record), step=step)

        self._with_each(send)

    def summarise(self, values: Mapping[str, Any], step: int) -> None:
        """Sends values of the whole run, at its end: to W&B's summary, and to the others as values of the last step."""

        def send(tracker: GeneralTracker) -> None:
            if tracker.name == "wandb":
                tracker.tracker.summary.update(dict(values))
            else:
                tracker.log(dict(values), step=step)

        self._with_each(send)

    def _with_each(self, send: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                send(tracker)
            except Exception as error:  # a tracker that fails must not end the training
                logger.warning("%s fails and is left out from here on: %s", tracker.name, one_line(error))
                self.trackers.remove(tracker)

    def finish(self, failed: bool) -> None:
        """Flushes and closes every tracker; W&B shows a failed run as such."""
        for tracker in self.trackers:
            if tracker.name == "wandb" and failed:
                tracker.tracker.finish(exit_code=1)
            else:
                tracker.finish()


def wandb_server() -> str:
    """Returns the address of the W&B server that a run would talk to."""
    import wandb

    return str(wandb.setup().settings.base_url)


def has_wandb_key() -> bool:
    """Tells whether there is an API key for it."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


def _wandb_mode(config: WandbConfig) -> str:
    """Returns the mode that works here: asked for, or online with a key, and offline without a network."""
    mode = config.mode or os.environ.get("WANDB_MODE")
    if mode is None:
        mode = "online" if has_wandb_key() else "offline"
        if mode == "offline":
            logger.info("wandb: offline, as no API key was found; `wandb sync` uploads the run later")
    if mode == "online" and not urllib.request.getproxies():  # a proxy reaches more than we do
        address = urlsplit(wandb_server())
        try:  # wandb.init would wait 90 s before it gives up
            port = address.port or (443 if address.scheme == "https" else 80)
            socket.create_connection((address.hostname or "", port), timeout=2).close()
        except OSError:
            logger.warning("wandb: offline, as %s cannot be reached; `wandb sync` uploads later", address.hostname)
            mode = "offline"
    return mode


def _plain(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Returns settings by dotted key as the plain values that TensorBoard takes."""
    flat = flatten(settings)
    return {key: value if isinstance(value, str | int | float | bool) else str(value) for key, value in flat.items()}
