"""One Weights & Biases run, however many attempts it takes: one clean curve, and no waiting for a network.

W&B's own step is our step, so that a row holds all that a step has, and `wandb` itself knows how far a run has got.
History cannot be taken back, so a step is sent once: a resumed attempt sends nothing that W&B has of the attempts
before, and first sends what it lacks, as `metrics.jsonl` has it. Owns choosing the mode so that a missing key or
network never stops a run; checkpoints are `trainer.tracking.artifacts`.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
from accelerate.tracking import WandBTracker

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Progress
from trainer.config import Config
from trainer.config_reporting import WandbConfig
from trainer.eval_media import EvalMedia
from trainer.tracking.artifacts import CheckpointUploads
from trainer.tracking.wandb_file import last_step, mark_as_synced, mend

logger = logging.getLogger("lockstep")

_PROBE_SECONDS = 5.0  # for a server to show a sign of life
_INIT_SECONDS = 30.0  # for it to take a new run; wandb's own default is 90
_FAILED_SECONDS = 20.0  # for uploads of a run that failed: others may be waiting for this process to go
_OWN_SECONDS = 2.0  # for wandb to give up by itself, where it waited for as long as it was told
_FLUSH_SECONDS = 1.0  # a killed process loses no more of its `.wandb` file than this; wandb's own default is 15
_MOST_CELLS = 10_000  # of a confusion matrix: what W&B draws


class WandbRun:
    """A W&B run, or the continuation of one.

    Args:
        config: the whole config; W&B stores it.
        run_dir: the run folder.
        wandb_id: of the run that is being continued, if any.
        records: what `metrics.jsonl` holds of the attempts before.
        goals: for metrics whose best value matters, whether that is the largest or the smallest.
        arguments: of the user's, for `wandb.init`.
    """

    name = "wandb"

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        wandb_id: str | None,
        records: Sequence[Mapping[str, Any]],
        goals: Mapping[str, str],
        arguments: Mapping[str, Any],
    ) -> None:
        self._config = config.tracking.wandb
        self._goals = goals
        self._bests: dict[str, float] = {}
        self._row: dict[str, Any] = {}  # of a step that may get more values
        self._row_step = -1
        folder = run_dir / "wandb"
        sent = -1
        if wandb_id is not None:
            mend(folder, wandb_id)
            sent = last_step(folder, wandb_id)
        mode = wandb_mode(self._config)
        before = {"id": wandb_id, "resume": "allow"} if wandb_id is not None else {}
        self._tracker, self.mode = start(config, run_dir, mode, {**before, **arguments})
        self.run = self._tracker.tracker
        self.id: str | None = self.run.id if self.mode != "disabled" else wandb_id
        if self.mode == "online":
            sent = self.run.starting_step - 1 if self.run.resumed else -1
        self._sent = sent  # the last step that W&B has
        self._define()
        self._tracker.store_init_configuration(config.model_dump(mode="json"))
        self._uploads: CheckpointUploads | None = None
        if self._config.checkpoints != "none" and self.mode != "disabled":
            self._uploads = CheckpointUploads(self.run, folder, self._config.checkpoints, self.mode == "online")
        for record in records:
            values = {key: value for key, value in record.items() if key not in ("step", "time") and value is not None}
            self._note(values)
            self._log(values, record["step"])
        if self.mode == "online" and wandb_id is not None:
            current = Path(self.run.settings.sync_file)
            mark_as_synced(folder, wandb_id)
            current.with_name(f"{current.name}.synced").unlink(missing_ok=True)

    def _define(self) -> None:
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    # ---- history --------------------------------------------------------------------------------------------

    def log(self, record: Mapping[str, Any], step: int) -> None:
        self._note(record)
        self._log(record, step)
        if any(key.startswith("eval/") for key in record):
            self.run.summary.update(self._bests)

    def show(self, media: EvalMedia, step: int) -> None:
        if step > self._sent:
            self._log(_wandb_media(media), step)

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        """Adds values to the row of a step. The row goes out when the next one begins."""
        if step <= self._sent:
            return
        if step != self._row_step:
            # An earlier step after a later one: a rollback, after which that later one comes again.
            if step > self._row_step:
                self._send_row()
            self._row, self._row_step = {}, step
        self._row.update(values)

    def _send_row(self) -> None:
        if not self._row:
            return
        self._tracker.log({**self._row, "step": self._row_step}, step=self._row_step, commit=True)
        self._sent = self._row_step
        self._row = {}

    # ---- summary --------------------------------------------------------------------------------------------

    def _note(self, values: Mapping[str, Any]) -> None:
        """Keeps the best values of metrics. What `define_metric` can do by itself is of one attempt only."""
        for name, goal in self._goals.items():
            value = values.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                choose = max if goal == "max" else min
                self._bests[f"best/{name}"] = choose(self._bests.get(f"best/{name}", value), value)

    def summarise(self, values: Mapping[str, Any], step: int) -> None:
        self.run.summary.update({**self._bests, **values})

    # ---- checkpoints ----------------------------------------------------------------------------------------

    def checkpoint(self, folder: CheckpointFolder, progress: Progress) -> None:
        if self._uploads is not None:
            self._uploads.add(folder, progress)

    # ---- the end --------------------------------------------------------------------------------------------

    def finish(self, failed: bool, open_step: int | None, seconds: float | None) -> None:
        if self._row_step != open_step:  # else the next attempt adds its evaluation to the row, and sends it whole
            self._send_row()
        limit = self._config.finish_timeout.seconds
        if failed:
            limit = min(limit, _FAILED_SECONDS)
        if seconds is not None:
            limit = min(limit, max(seconds, 1.0))
        thread = threading.Thread(target=self._finish, args=[failed, limit], name="wandb-finish", daemon=True)
        thread.start()
        thread.join(limit + _OWN_SECONDS)
        if thread.is_alive():
            _end_service()
        if self.mode == "online" and (thread.is_alive() or self._is_behind()):
            folder = Path(self.run.settings.sync_dir)
            logger.warning(
                "wandb: not all is uploaded after %.0f s; it is kept, and this uploads it: "
                "wandb sync --include-online %s",
                limit,
                folder,
            )

    def _is_behind(self) -> bool:
        """Tells whether W&B gave up on uploads."""
        return bool(getattr(self.run, "_finish_timed_out", False))

    def _finish(self, failed: bool, limit: float) -> None:
        try:
            if self._uploads is not None:
                self._uploads.finish(limit / 2)
            self.run.finish(exit_code=int(failed))
            if self._uploads is not None:
                self._uploads.clean()
        except Exception as error:
            logger.warning("wandb: %s", " ".join(str(error).split()))


def start(config: Config, run_dir: Path, mode: str, arguments: Mapping[str, Any]) -> tuple[WandBTracker, str]:
    """Starts a run in a mode, or offline where it cannot be online; returns it with the mode that it has."""
    import wandb

    settings = config.tracking.wandb
    given: dict[str, Any] = {
        "name": settings.name or config.run.name,
        "dir": str(run_dir),
        "entity": settings.entity,
        "group": settings.group,
        "tags": list(settings.tags) or None,
        "notes": settings.notes,
        **arguments,
    }
    own = given.pop("settings", {})
    project = given.pop("project", settings.project)
    given["mode"] = mode
    given["settings"] = wandb.Settings(
        **{
            "silent": mode != "online",
            "init_timeout": _INIT_SECONDS,
            "finish_timeout": settings.finish_timeout.seconds,
            "x_transaction_log_flush_interval": _FLUSH_SECONDS,
            **own,
        }
    )
    tracker = WandBTracker(project, **given)
    try:
        tracker.start()
    except TypeError:  # an argument that wandb.init does not know
        raise
    except Exception as error:  # no key, a key that the server refuses, a server that does not answer, ...
        if mode != "online":
            raise
        logger.warning("wandb: offline, as it cannot start online: %s", " ".join(str(error).split()))
        return start(config, run_dir, "offline", arguments)
    return tracker, mode


def wandb_server() -> str:
    """Returns the address of the W&B server that a run would talk to."""
    import wandb

    return str(wandb.setup().settings.base_url)


def has_wandb_key() -> bool:
    """Tells whether there is an API key for it."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


def wandb_mode(config: WandbConfig) -> str:
    """Returns the mode that works here: asked for, or online with a key, and offline without a network."""
    mode = config.mode or os.environ.get("WANDB_MODE")
    if mode is None:
        mode = "online" if has_wandb_key() else "offline"
        if mode == "offline":
            logger.info("wandb: offline, as no API key was found; `wandb sync` uploads the run later")
    if mode == "online" and not _answers(wandb_server()):
        host = urlsplit(wandb_server()).hostname
        logger.warning("wandb: offline, as %s cannot be reached; `wandb sync` uploads later", host)
        mode = "offline"
    return mode


def _answers(server: str) -> bool:
    """Tells whether a server answers, through a proxy where there is one; wandb would wait much longer to find out."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.build_opener().open(server, timeout=_PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer, too
        except urllib.error.URLError as error:
            if "SSL" not in type(error.reason).__name__:  # wandb may trust what we do not
                return
        except Exception:
            return
        answered.set()

    # On a thread, as looking up a name can hang for as long as the resolver likes.
    thread = threading.Thread(target=ask, name="wandb-probe", daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return answered.is_set()


def _end_service() -> None:
    """Ends wandb's own process, which has written everything down and would hold this one at its exit."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "wandb-core" in child.name():
                child.terminate()
    with suppress(Exception):  # wandb's own: without this it looks for that process at the exit, with a traceback
        import wandb

        wandb.setup()._connection._cleanup()  # type: ignore[union-attr,misc]


def _wandb_media(media: EvalMedia) -> dict[str, Any]:
    import wandb

    found: dict[str, Any] = {}
    if media.examples:
        images = [
            wandb.Image(example.image, caption=example.caption) if example.image is not None else None
            for example in media.examples
        ]
        shown = [image for image in images if image is not None]
        columns: list[str | int] = ["target", "prediction", "confidence"]
        rows: list[list[Any]] = [[e.target, e.prediction, e.confidence] for e in media.examples]
        if len(shown) == len(images):
            columns = ["image", *columns]
            rows = [[image, *row] for image, row in zip(images, rows, strict=True)]
            found["eval/images"] = shown
        found["eval/samples"] = wandb.Table(columns=columns, data=rows)
    for name, table in media.tables.items():
        flat = table.reshape(-1)
        shown_cells = np.arange(flat.size)  # also what is empty, so that all classes are there
        if flat.size > _MOST_CELLS:
            shown_cells = np.argpartition(flat, -_MOST_CELLS)[-_MOST_CELLS:]
            shown_cells = np.sort(shown_cells[flat[shown_cells] > 0])
        actual, predicted = np.divmod(shown_cells, len(table))
        cells = [
            [media.classes[i], media.classes[j], count]
            for i, j, count in zip(actual.tolist(), predicted.tolist(), flat[shown_cells].tolist(), strict=True)
        ]
        found[f"eval/{name}"] = wandb.plot_table(
            vega_spec_name="wandb/confusion_matrix/v1",
            data_table=wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=cells),
            fields={"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"},
            string_fields={"title": f"{name}, eval"},
        )
    return found
