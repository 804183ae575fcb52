"""Checkpoints and exported files as W&B artifacts of type `model`.

Owns that uploading never holds a step and outlives the pruning of old checkpoints: files are hard links under
`wandb/checkpoints` in the run folder, which go when they are uploaded. Without a network they stay, for `wandb sync`.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Progress
from trainer.checkpoint.storage import LocalStorage
from trainer.config import Config
from trainer.errors import UserError, one_line

logger = logging.getLogger("lockstep")

_UPLOAD_SECONDS = 24 * 3600


@dataclass(frozen=True)
class _Upload:
    """A checkpoint on its way.

    Args:
        progress: where it stands.
        location: URL of a checkpoint in an object store, or a folder of links.
        is_local: whether it is such a folder.
    """

    progress: Progress
    location: str
    is_local: bool


class CheckpointUploads:
    """Uploads the checkpoints of one W&B run, on a thread of its own.

    Args:
        run: the W&B run.
        folder: where W&B's files are.
        which: what to upload.
        is_online: whether uploading happens now, so that links can go afterwards.
    """

    def __init__(self, run: Any, folder: Path, which: Literal["best", "last", "all"], is_online: bool) -> None:
        self._run = run
        self._staging = folder / "checkpoints"
        self._which = which
        self._is_online = is_online
        self._newest: tuple[CheckpointFolder, Progress] | None = None
        self._known: dict[int, bool] = {}  # step -> whether it was the best one when it was last sent
        self._waiting: queue.Queue[_Upload | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="wandb-artifacts", daemon=True)
        self._thread.start()
        if is_online:  # what an attempt left that was killed or had no network
            for links in sorted(self._staging.glob("step-*")):
                self._waiting.put(_Upload(Progress(step=int(links.name[5:])), str(links), is_local=True))

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
        try:
            if isinstance(folder.storage, LocalStorage):
                links = self._staging / name
                _link_all(folder.storage.root / name, links)
                self._waiting.put(_Upload(replace(progress), str(links), is_local=True))
            else:
                self._waiting.put(_Upload(replace(progress), f"{folder.location}/{name}", is_local=False))
        except OSError as error:
            logger.warning("wandb: checkpoint of step %d not uploaded: %s", progress.step, one_line(error))

    def finish(self, seconds: float) -> None:
        """Hands everything to W&B, which may still have to upload it."""
        if self._which == "last" and self._newest is not None:
            folder, progress = self._newest
            self._put(folder, progress, progress.best_step == progress.step)
        self._waiting.put(None)
        self._thread.join(seconds)

    def clean(self) -> None:
        """Removes all links; call it once everything is uploaded."""
        shutil.rmtree(self._staging, ignore_errors=True)

    def _work(self) -> None:
        while (upload := self._waiting.get()) is not None:
            try:
                self._upload(upload)
            except Exception as error:  # the run goes on without
                step = upload.progress.step
                logger.warning("wandb: checkpoint of step %d not uploaded: %s", step, one_line(error))

    def _upload(self, upload: _Upload) -> None:
        import wandb

        progress = upload.progress
        metadata = {"step": progress.step, **{f"eval/{name}": value for name, value in progress.eval_metrics.items()}}
        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata=metadata)
        if upload.is_local:
            artifact.add_dir(upload.location, policy="immutable", skip_cache=True)
        else:
            artifact.add_reference(upload.location, name=upload.location.rpartition("/")[2], checksum=False)
        aliases = ["latest", f"step-{progress.step}", *(["best"] if progress.best_step == progress.step else [])]
        logged = self._run.log_artifact(artifact, aliases=aliases)
        if self._is_online and upload.is_local:
            # Another thread may wait for long: later checkpoints need not.
            threading.Thread(target=_remove_when_uploaded, args=[logged, Path(upload.location)], daemon=True).start()


def _remove_when_uploaded(artifact: Any, links: Path) -> None:
    with suppress(Exception):  # else they stay, for `wandb sync`
        artifact.wait(timeout=_UPLOAD_SECONDS)
        shutil.rmtree(links)
        links.parent.rmdir()


def _link_all(source: Path, target: Path) -> None:
    """Makes a folder of hard links to the files of another; copies where there can be none."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)


def log_export(config: Config, run_dir: Path, wandb_id: str | None, file: Path, metadata: dict[str, Any]) -> None:
    """Adds a file to the W&B run of a training run, as an artifact of type `model`.

    Args:
        config: that of the run.
        run_dir: the run folder.
        wandb_id: of its W&B run.
        file: what to add.
        metadata: what it is; `step` and `format` become aliases.

    Raises:
        UserError: the run has no W&B run.
    """
    from trainer.tracking.wandb_run import start, wandb_mode

    if wandb_id is None:
        raise UserError("the checkpoint knows of no W&B run to add the file to: tracking.trackers had no wandb")
    import wandb

    mode = wandb_mode(config.tracking.wandb)
    # The state of the run is the training's business.
    settings = {"x_update_finish_state": False, "x_disable_stats": True}
    arguments = {"id": wandb_id, "resume": "allow", "settings": settings}
    tracker, mode = start(config, run_dir, mode, arguments)
    run = tracker.tracker
    artifact = wandb.Artifact(f"export-{run.id}", type="model", metadata=metadata)
    artifact.add_file(str(file))  # a copy of W&B's own: the file may go before it is uploaded
    started = time.monotonic()
    run.log_artifact(artifact, aliases=["latest", f"step-{metadata['step']}", str(metadata["format"])])
    run.finish()
    if mode == "offline":
        where = Path(run.settings.sync_dir)
        logger.info("added to the W&B run %s, to be uploaded with: wandb sync %s", run.id, where)
    else:
        logger.info("added to the W&B run %s in %.1f s", run.id, time.monotonic() - started)
