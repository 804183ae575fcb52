"""One Weights & Biases run, however many attempts it takes: one clean curve, and no waiting for a network.

W&B's own step is our step, so that a row holds all that a step has, and `wandb` itself knows how far a run has got.
History cannot be taken back, so a step is sent once: a resumed attempt sends nothing that W&B has of the attempts
before, and first sends what it lacks, as `metrics.jsonl` has it. Owns choosing the mode so that a missing key or
network never stops a run, and two files in `wandb/` in the run folder: `run-id`, and `complete` where the server has
all. Sending what it lacks later is `trainer.tracking.syncing`; checkpoints are `trainer.tracking.artifacts`.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import shlex
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
from trainer.errors import UserError, one_line_text
from trainer.eval_media import EvalMedia
from trainer.tracking.artifacts import CheckpointUploads
from trainer.tracking.others import check_names, stored_config
from trainer.tracking.wandb_file import last_step, mark_as_synced, newest_id

logger = logging.getLogger("lockstep")

_PROBE_SECONDS = 5.0  # for a server to show a sign of life
_INIT_SECONDS = 30.0  # for it to take a new run; wandb's own default is 90
_OWN_SECONDS = 2.0  # for wandb to give up by itself, where it waited for as long as it was told
_FLUSH_SECONDS = 1.0  # a killed process loses no more of its `.wandb` file than this; wandb's own default is 15
_MOST_CELLS = 10_000  # of a confusion matrix: what W&B draws
_ID_FILE, _COMPLETE_FILE = "run-id", "complete"
# Arguments of wandb.init that would get in the way, and what to use instead.
_NOT_TO_GIVE = {
    "mode": "use tracking.wandb.mode",
    "dir": "W&B's files are in the run folder; use run.dir",
    **dict.fromkeys(
        ("id", "resume", "resume_from", "fork_from"),
        "a run is continued by itself, and another run folder (run.dir) has a run of its own",
    ),
}


def check_wandb_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises UserError where `wandb.init` does not know an argument, or must not be given it here."""
    for key, reason in _NOT_TO_GIVE.items():
        if key in arguments:
            raise UserError(reason, path=f"tracking.init.wandb.{key}")
    if not arguments:
        return
    import wandb

    check_names("wandb", arguments, inspect.signature(wandb.init).parameters)
    try:
        wandb.Settings(**arguments.get("settings", {}))
    except (TypeError, ValueError) as error:
        raise UserError(one_line_text(error), path="tracking.init.wandb.settings") from error


def known_id(run_dir: Path) -> str | None:
    """Returns the id of the W&B run of a run folder, if it has one."""
    folder = run_dir / "wandb"
    with suppress(OSError):
        return (folder / _ID_FILE).read_text(encoding="utf-8").strip() or newest_id(folder)
    return newest_id(folder)


def sync_command(run_dir: Path) -> str:
    """Returns the command that sends a server what it lacks of a run."""
    return f"python -m trainer sync {shlex.quote(str(run_dir))}"


def reminder(config: Config, run_dir: Path) -> str | None:
    """Returns what to do where W&B's server may lack something of a run that is at its end; None where it is fine."""
    wanted = config.tracking.wandb.mode or os.environ.get("WANDB_MODE")
    if "wandb" not in config.tracking.trackers or wanted in ("offline", "disabled"):
        return None
    if (run_dir / "wandb" / _COMPLETE_FILE).exists() or known_id(run_dir) is None:
        return None
    return f"wandb: the server may lack a part of the run; this sends it: {sync_command(run_dir)}"


class WandbRun:
    """A W&B run, or the continuation of one.

    Args:
        config: the whole config; W&B stores it.
        run_dir: the run folder.
        wandb_id: of the run that is being continued; None for that of the run folder, or a new one.
        records: what `metrics.jsonl` holds of the attempts before.
        goals: for metrics whose best value matters, whether that is the largest or the smallest.
        arguments: of the user's, for `wandb.init`.
        must_be_online: raise an exception where that cannot be.
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
        must_be_online: bool = False,
    ) -> None:
        self._config = config.tracking.wandb
        self._run_dir, self._folder = run_dir, run_dir / "wandb"
        self._goals = goals
        self._bests: dict[str, float] = {}
        self._row: dict[str, Any] = {}  # of a step that may get more values
        self._row_step = -1
        self.num_sent = 0  # rows of this attempt
        self.is_complete = False  # the server has all, once it is finished
        self._uploads: CheckpointUploads | None = None
        # A sweep's agent says which run it is; a run that may not be continued is a new one.
        if wandb_id is None and "WANDB_RUN_ID" not in os.environ and config.checkpoint.resume != "never":
            wandb_id = known_id(run_dir)
        with suppress(OSError):
            (self._folder / _COMPLETE_FILE).unlink(missing_ok=True)
        before = {"id": wandb_id, "resume": "allow"} if wandb_id is not None else {}
        given = {**arguments, **before}
        if must_be_online:
            self._tracker, self.mode = _start(config, run_dir, "online", given), "online"
        else:
            self._tracker, self.mode = start(config, run_dir, wandb_mode(self._config), given)
        self.run = self._tracker.tracker
        self.id: str | None = self.run.id if self.mode != "disabled" else wandb_id
        try:
            self._begin(config, wandb_id, records)
        except Exception:
            end = threading.Thread(target=self.run.finish, kwargs={"exit_code": 1}, daemon=True)
            end.start()
            end.join(_PROBE_SECONDS)
            raise

    def _begin(self, config: Config, wandb_id: str | None, records: Sequence[Mapping[str, Any]]) -> None:
        """Tells what the run is, and what W&B lacks of the attempts before."""
        if self.mode != "disabled":
            try:
                (self._folder / _ID_FILE).write_text(f"{self.run.id}\n", encoding="utf-8")
            except OSError as error:
                logger.warning("wandb: the id of the run, %s, cannot be kept: %s", self.run.id, one_line_text(error))
        sent = -1
        if self.mode == "online":
            sent = self.run.starting_step - 1 if self.run.resumed else -1
        elif self.mode == "offline" and wandb_id is not None:
            sent = last_step(self._folder, wandb_id, Path(self.run.settings.sync_file))
        self._sent = sent  # the last step that W&B has
        self._define()
        self._tracker.store_init_configuration(stored_config(config))
        if self._config.checkpoints != "none" and self.mode != "disabled":
            self._uploads = CheckpointUploads(self.run, self._folder, self._config.checkpoints, self.mode == "online")
        for record in records:
            values = {key: value for key, value in record.items() if key not in ("step", "time") and value is not None}
            self._note(values)
            self._log(values, record["step"])

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
        """Adds values to the row of a step. The row goes out when the step ends, or else when the next one begins."""
        if step <= self._sent or step < self._row_step:
            return
        if step > self._row_step:
            self._send_row()
            self._row_step = step
        self._row.update(values)

    def end_step(self, step: int) -> None:
        self._send_row()

    def _send_row(self) -> None:
        if not self._row:
            return
        self._tracker.log({**self._row, "step": self._row_step}, step=self._row_step, commit=True)
        self._sent = self._row_step
        self.num_sent += 1
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

    def finish(self, failed: bool, open_step: int | None, seconds: float) -> None:
        if self._row_step != open_step:  # else the next attempt adds its evaluation to the row, and sends it whole
            self._send_row()
        thread = threading.Thread(target=self._finish, args=[failed, seconds], name="wandb-finish", daemon=True)
        thread.start()
        thread.join(seconds + _OWN_SECONDS)
        if thread.is_alive():
            end_service()
        if self.mode == "online" and self.is_complete:
            with suppress(OSError):
                (self._folder / _COMPLETE_FILE).touch()
        elif self.mode == "online":
            message = "wandb: not all is uploaded after %.0f s; it is kept, and this sends it: %s"
            logger.warning(message, seconds, sync_command(self._run_dir))

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
            if self.mode == "online" and not self._is_behind():
                if self.id is not None:
                    mark_as_synced(self._folder, self.id)
                self.is_complete = True
        except Exception as error:
            logger.warning("wandb: %s", " ".join(str(error).split()))


def start(config: Config, run_dir: Path, mode: str, arguments: Mapping[str, Any]) -> tuple[WandBTracker, str]:
    """Starts a run in a mode, or offline where it cannot be online; returns it with the mode that it has."""
    try:
        return _start(config, run_dir, mode, arguments), mode
    except TypeError:  # an argument that wandb.init does not know
        raise
    except Exception as error:  # no key, a key that the server refuses, a server that does not answer, ...
        if mode != "online":
            raise
        message = "wandb: offline, as it cannot start online (%s); once the run has ended, this uploads it: %s"
        logger.warning(message, one_line_text(error), sync_command(run_dir))
        return _start(config, run_dir, "offline", arguments), "offline"


def _start(config: Config, run_dir: Path, mode: str, arguments: Mapping[str, Any]) -> WandBTracker:
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
    tracker.start()
    return tracker


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
            logger.info("wandb: offline, as no API key was found; `python -m trainer sync` uploads the run later")
    if mode == "online" and not answers(wandb_server()):
        host = urlsplit(wandb_server()).hostname
        logger.warning("wandb: offline, as %s cannot be reached; `python -m trainer sync` uploads later", host)
        mode = "offline"
    return mode


def answers(server: str) -> bool:
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


def end_service() -> None:
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
