"""Checkpoints and exported files as W&B artifacts of type `model`.

Owns that uploading never holds a step and outlives the pruning of old checkpoints: files are hard links under
`wandb/checkpoints` in the run folder, a folder per upload, which goes when it is uploaded. What is not uploaded stays
for the next attempt or `wandb sync`, up to a few. What such a folder is, its own manifest says.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Damaged, Manifest, Progress
from trainer.checkpoint.storage import MANIFEST, LocalStorage
from trainer.config import Config
from trainer.errors import UserError, one_line, one_line_text

logger = logging.getLogger("lockstep")

_MOST_STAGED = 3  # folders that wait for their upload; without a network they would fill the disk
_DONE_SECONDS = 1.0  # for W&B to say of an upload that it is done, once the run is finished


@dataclass(eq=False)
class _Upload:
    """A checkpoint on its way.

    Args:
        progress: where it stands.
        url: of a checkpoint in an object store.
        links: folder of links to a local one.
        source: the local one, where there can be no links to it, so that it is still to be copied.
        is_left: an attempt before left it; newer ones may be uploaded already.
        is_given: W&B has it, and still has to upload it.
    """

    progress: Progress
    url: str | None = None
    links: Path | None = None
    source: Path | None = None
    is_left: bool = False
    is_given: bool = False

    @property
    def is_best(self) -> bool:
        return self.progress.best_step == self.progress.step

    @property
    def aliases(self) -> list[str]:
        latest, best = ["latest"] * (not self.is_left), ["best"] * self.is_best
        return [*latest, f"step-{self.progress.step}", *best]


class CheckpointUploads:
    """Uploads the checkpoints of one W&B run, on a thread of its own, one after the other.

    Offline they are given to W&B when the run ends, as only then it is known which ones are kept.

    Args:
        run: the W&B run.
        folder: where W&B's files are.
        which: what to upload.
        is_online: whether uploading happens now, so that links can go afterwards.
    """

    def __init__(self, run: Any, folder: Path, which: Literal["best", "last", "all"], is_online: bool) -> None:
        self._run = run
        self._root = folder / "checkpoints"
        self._which = which
        self._is_online = is_online
        self._most_staged = _MOST_STAGED if is_online or which == "all" else 1
        self._numbers = count(1)
        self._newest: tuple[CheckpointFolder, Progress] | None = None
        self._known: dict[int, bool] = {}  # step -> whether it was the best one when it was last sent
        self._waiters: list[threading.Thread] = []
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: list[_Upload] = []
        self._busy: list[_Upload] = []  # being read, by this thread or by W&B
        self._failed: list[_Upload] = []  # for the next attempt
        self._has_dropped = False
        self._is_ending = False
        self._has_given_up = False
        for upload in _left(self._root):
            self._enqueue(upload)
        self._thread = threading.Thread(target=self._work, name="wandb-artifacts", daemon=True)
        self._thread.start()

    def add(self, folder: CheckpointFolder, progress: Progress) -> None:
        """Uploads a checkpoint, if it is one of those to upload. Returns at once; it may be deleted then."""
        self._newest = (folder, replace(progress))
        is_best = progress.best_step == progress.step
        if self._which == "all" or (self._which == "best" and is_best):
            self._put(folder, progress, is_best)

    def _put(self, folder: CheckpointFolder, progress: Progress, is_best: bool) -> None:
        if self._known.get(progress.step, -1) >= is_best:  # sent once more where it turns out to be the best
            return
        self._known[progress.step] = is_best
        name = folder.name(progress.step)
        if not isinstance(folder.storage, LocalStorage):
            self._enqueue(_Upload(replace(progress), url=f"{folder.location}/{name}"))
            return
        source = folder.storage.root / name
        links = next(path for i in self._numbers if not (path := self._root / f"{name}-{i}").exists())
        try:
            _fill(links, source, os.link)
            self._enqueue(_Upload(replace(progress), links=links))
        except OSError:  # another file system, or one without links
            self._enqueue(_Upload(replace(progress), links=links, source=source))

    def _enqueue(self, upload: _Upload) -> None:
        with self._changed:
            dropped = [old for old in self._waiting if old.progress.step == upload.progress.step]
            staged = [old for old in [*self._failed, *self._waiting] if old.links and old not in dropped]
            best = max((old.progress.step for old in [*staged, upload] if old.is_best), default=None)
            free = [old for old in staged if old.progress.step != best]
            left_out = free[: max(len(staged) + 1 - self._most_staged, 0)]
            dropped += left_out
            self._failed = [old for old in self._failed if old not in dropped]
            self._waiting = [old for old in self._waiting if old not in dropped] + [upload]
            self._changed.notify_all()
        for old in dropped:
            _remove(old.links)
        if left_out and self._most_staged > 1 and not self._has_dropped:
            self._has_dropped = True
            message = "wandb: more than %d checkpoints wait for their upload; the oldest are left out, but not the best"
            logger.warning(message, self._most_staged)

    # ---- the end ------------------------------------------------------------------------------------------

    def finish(self, seconds: float) -> bool:
        """Gives everything to W&B, which may still have to upload it. Returns whether that was done in time."""
        if self._which == "last" and self._newest is not None:
            folder, progress = self._newest
            self._put(folder, progress, progress.best_step == progress.step)
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        self._thread.join(seconds)
        with self._changed:
            self._has_given_up = self._thread.is_alive()
            left = [upload.progress.step for upload in [*self._busy, *self._waiting] if not upload.is_given]
        if self._has_given_up:
            logger.warning(
                "wandb: not uploaded after %.0f s: checkpoints of steps %s; they stay in '%s' for the next attempt at "
                "the run, and a longer tracking.wandb.finish_timeout gives them more time",
                seconds,
                ", ".join(map(str, left)),
                self._root,
            )
        return not self._has_given_up

    def clean(self) -> None:
        """Waits a moment for W&B's word on what it has uploaded; call it once the run is finished."""
        for waiter in list(self._waiters):
            waiter.join(_DONE_SECONDS)

    # ---- threads ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_ending or (self._is_online and bool(self._waiting)))
                if not self._waiting or self._has_given_up:
                    return
                upload = self._waiting.pop(0)
                self._busy.append(upload)
            try:
                logged = self._give(upload)
            except Exception as error:  # the run goes on without
                if not self._has_given_up:
                    self._fail(upload, error)
                continue
            if self._is_online and logged is not None:
                waiter = threading.Thread(target=self._wait, args=[upload, logged], name="wandb-wait", daemon=True)
                waiter.start()
                self._waiters = [known for known in self._waiters if known.is_alive()] + [waiter]
                with self._changed:  # at the end W&B gets the others at once
                    while upload in self._busy and not self._is_ending:
                        self._changed.wait()

    def _give(self, upload: _Upload) -> Any:
        """Gives a checkpoint to W&B, which reads all of it; returns what W&B makes of it."""
        import wandb

        progress = upload.progress
        metadata: dict[str, Any] = {"step": progress.step}
        if progress.evaluated_step == progress.step:
            metadata |= {f"eval/{name}": value for name, value in progress.eval_metrics.items()}
        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata=metadata)
        if upload.links is not None:
            if upload.source is not None:
                _fill(upload.links, upload.source, shutil.copyfile)
            artifact.add_dir(str(upload.links), policy="immutable", skip_cache=True)
        else:
            assert upload.url is not None
            artifact.add_reference(upload.url, name=upload.url.rpartition("/")[2], checksum=False)
        if self._has_given_up:  # the run is finished
            return None
        logged = self._run.log_artifact(artifact, aliases=upload.aliases)
        upload.is_given = True
        return logged

    def _wait(self, upload: _Upload, logged: Any) -> None:
        try:
            logged.wait()  # without a limit: W&B cancels an upload when a wait for it ends
        except Exception as error:
            # When the run ends, W&B says itself what it has not uploaded.
            if not self._is_ending or isinstance(error, ValueError):
                self._fail(upload, error)
            return
        _remove(upload.links)
        with self._changed:
            self._busy.remove(upload)
            self._changed.notify_all()

    def _fail(self, upload: _Upload, error: Exception) -> None:
        logger.warning("wandb: checkpoint of step %d not uploaded: %s", upload.progress.step, one_line(error))
        with self._changed:
            self._busy.remove(upload)
            self._failed.append(upload)
            self._changed.notify_all()


def _left(root: Path) -> list[_Upload]:
    """Returns what attempts before left in a folder, oldest first, and removes what they left half-made."""
    found: dict[tuple[int, int], _Upload] = {}
    for path in root.iterdir() if root.is_dir() else ():
        name = re.fullmatch(r"step-(\d+)-(\d+)", path.name)
        try:
            if not name:
                raise Damaged("it is half-made")
            progress = Manifest.from_bytes((path / MANIFEST).read_bytes()).progress
            found[int(name[1]), int(name[2])] = _Upload(progress, links=path, is_left=True)
        except (Damaged, OSError):
            shutil.rmtree(path, ignore_errors=True)
    return [found[key] for key in sorted(found)]


def _fill(target: Path, source: Path, put: Callable[[Path, Path], object]) -> None:
    """Links or copies all files of a checkpoint to a folder, which is there only when it is whole."""
    new = target.with_name(f".{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        manifest = (source / MANIFEST).read_bytes()
        for file in sorted(source.iterdir()):
            put(file, new / file.name)
        if (source / MANIFEST).read_bytes() != manifest:
            raise OSError("it was replaced meanwhile")
        new.rename(target)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _remove(links: Path | None) -> None:
    """Removes a folder of links, and the one they are in with the last of them."""
    if links is None:
        return
    going = links.with_name(f".{links.name}.old")  # a kill in between leaves no half of a checkpoint
    with suppress(OSError):
        links.rename(going)
    shutil.rmtree(going, ignore_errors=True)
    with suppress(OSError):
        links.parent.rmdir()


def check_export(config: Config, run_dir: Path, wandb_id: str | None) -> str:
    """Returns the id of the W&B run of a training run that a file is to be added to.

    Raises:
        UserError: it has none, or W&B cannot be used here.
    """
    if wandb_id is None:
        raise UserError(f"the run in '{run_dir}' has no W&B run to add the file to", path="tracking.trackers")
    if importlib.util.find_spec("wandb") is None:
        raise UserError("'wandb' is not installed; pip install wandb, or leave out --artifact", path="tracking.wandb")
    if (config.tracking.wandb.mode or os.environ.get("WANDB_MODE")) == "disabled":
        raise UserError("W&B is disabled, so that no file can be added to the run", path="tracking.wandb.mode")
    return wandb_id


def log_export(config: Config, run_dir: Path, wandb_id: str, file: Path, metadata: dict[str, Any]) -> None:
    """Adds a file to the W&B run of a training run, as an artifact of type `model`.

    Args:
        config: that of the run.
        run_dir: the run folder.
        wandb_id: of its W&B run.
        file: what to add.
        metadata: what it is; `step` and `format` become aliases.

    Raises:
        UserError: W&B did not take it, or not all of it in time.
    """
    try:
        left_in = _log_export(config, run_dir, wandb_id, file, metadata)
    except Exception as error:
        message = f"'{file}' is written, but not added to the W&B run {wandb_id}: {one_line_text(error)}"
        raise UserError(message, path="tracking.wandb") from error
    if left_in is not None:
        seconds = config.tracking.wandb.finish_timeout.seconds
        message = f"'{file}' is written, but not uploaded after {seconds:.0f} s; this uploads it: "
        raise UserError(f"{message}wandb sync --include-online {left_in}", path="tracking.wandb")


def _log_export(config: Config, run_dir: Path, wandb_id: str, file: Path, metadata: dict[str, Any]) -> Path | None:
    """Returns the folder that is still to be synced, where W&B gave up on the upload."""
    import wandb
    from accelerate import PartialState

    from trainer.tracking.wandb_run import start, wandb_mode

    PartialState(cpu=True)  # without which accelerate's trackers cannot log a line
    # The state of the run is the training's business.
    settings = {"x_update_finish_state": False, "x_disable_stats": True}
    arguments = {"id": wandb_id, "resume": "allow", "settings": settings}
    tracker, mode = start(config, run_dir, wandb_mode(config.tracking.wandb), arguments)
    run = tracker.tracker
    artifact = wandb.Artifact(f"export-{run.id}", type="model", metadata=metadata)
    artifact.add_file(str(file))  # a copy of W&B's own: the file may go before it is uploaded
    started = time.monotonic()
    logged = run.log_artifact(artifact, aliases=["latest", f"step-{metadata['step']}", str(metadata["format"])])
    run.finish()
    folder = Path(run.settings.sync_dir)
    if mode == "offline":
        logger.info("added to the W&B run %s, to be uploaded with: wandb sync %s", run.id, folder)
        return None
    if getattr(run, "_finish_timed_out", False):
        return folder
    logged.wait(timeout=round(_DONE_SECONDS))  # raises what the server says against it
    logger.info("added to the W&B run %s in %.1f s", run.id, time.monotonic() - started)
    return None
