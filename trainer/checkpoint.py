"""Checkpoints: written under a temporary name and renamed, so that a reader never sees half of one.

A checkpoint is `checkpoints/step-00001000/` with `model.pt`, `optimizer.pt`, `generators.pt`, `progress.json` and,
with fp16, `scaler.pt`. Rank 0 writes all of it; every rank reads it. Owns the folder's layout, what is kept, and
refusing a checkpoint of another run. What is in the state is the loop's business.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.system import sync_folder

_PREFIX = "step-"
_STAGING = ".tmp-"


@dataclass
class Progress:
    """Where a run stands: everything but tensors that it needs to go on."""

    step: int = 0
    evaluated_step: int = -1  # the last step that was evaluated
    best_step: int | None = None
    best_value: float | None = None
    eval_metrics: dict[str, float] = field(default_factory=dict)  # of `evaluated_step`
    skipped_steps: int = 0  # steps that the fp16 loss scaler skipped
    best_of: str | None = None  # what `best_value` is a value of, such as `max accuracy`
    wandb_id: str | None = None


@dataclass(frozen=True)
class Identity:
    """What must not change when a run goes on: the kind of state, and the order of samples."""

    model: str
    optimizer: str
    num_samples: int
    batch_size: int
    seed: int
    drop_last: bool

    CONFIG_PATHS = {
        "model": "model.name",
        "optimizer": "optim.name",
        "num_samples": "data.train",
        "batch_size": "train.batch_size",
        "seed": "run.seed",
        "drop_last": "data.drop_last",
    }


class CheckpointFolder:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Returns the steps of all published checkpoints, oldest first."""
        names = (p.name for p in self.folder.glob(f"{_PREFIX}*") if (p / "progress.json").is_file())
        return sorted(int(n.removeprefix(_PREFIX)) for n in names if n.removeprefix(_PREFIX).isdigit())

    def best(self) -> int | None:
        """Returns the step of the best checkpoint, if any was evaluated."""
        link = self.folder / "best"
        return int(link.resolve().name.removeprefix(_PREFIX)) if link.exists() else None

    def path(self, step: int) -> Path:
        """Returns the folder of a step's checkpoint."""
        return self.folder / f"{_PREFIX}{step:08d}"

    def write(self, progress: Progress, identity: Identity, tensors: Mapping[str, Any], num_ranks: int) -> None:
        """Writes a checkpoint and then prunes old ones. Call on rank 0 only.

        Args:
            progress: position and results so far.
            identity: what a resuming run must agree on.
            tensors: file stem -> state, each saved as `<stem>.pt`.
            num_ranks: how many ranks' generator states are in it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        published = self.path(progress.step)
        if published.exists():
            # A run that was stopped before its evaluation went on: only the progress is new.
            record = json.loads((published / "progress.json").read_text(encoding="utf-8"))
            self._write_record(published, {**record, "progress": asdict(progress)})
            self._after_publishing(progress.best_step)
            return
        staging = self.folder / f"{_STAGING}{_PREFIX}{progress.step:08d}"
        staging.mkdir()
        for stem, state in tensors.items():
            with open(staging / f"{stem}.pt", "wb") as file:
                torch.save(state, file)
                os.fsync(file.fileno())
        record = {"progress": asdict(progress), "identity": asdict(identity), "num_ranks": num_ranks}
        self._write_record(staging, record)
        os.rename(staging, published)
        sync_folder(self.folder)
        self._after_publishing(progress.best_step)

    @staticmethod
    def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
        with open(folder / ".progress.json.new", "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / ".progress.json.new", folder / "progress.json")

    def _after_publishing(self, best_step: int | None) -> None:
        if best_step is not None and self.path(best_step).exists():
            self._point("best", best_step)
        self._prune(best_step)

    def read(self, step: int, identity: Identity) -> tuple[Progress, int]:
        """Reads a checkpoint's progress, and the number of ranks that wrote it.

        Raises:
            UserError: the checkpoint belongs to a run with another order of samples, or cannot be read.
        """
        file = self.path(step) / "progress.json"
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            progress, num_ranks = Progress(**record["progress"]), int(record["num_ranks"])
            saved = record["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read checkpoint '{file}': {error}", path="run.dir") from error
        for name, value in asdict(identity).items():
            if saved.get(name) != value:
                message = (
                    f"'{self.path(step)}' was trained with {name.replace('_', ' ')} {saved.get(name)}, this config "
                    f"has {value}; change it back, or choose another run.dir"
                )
                raise UserError(message, path=Identity.CONFIG_PATHS[name])
        return progress, num_ranks

    def has(self, step: int, stem: str) -> bool:
        """Tells whether a checkpoint has `<stem>.pt`."""
        return (self.path(step) / f"{stem}.pt").is_file()

    def load(self, step: int, stem: str) -> Any:
        """Loads `<stem>.pt` of a checkpoint into host memory; never runs code from it."""
        file = self.path(step) / f"{stem}.pt"
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for a broken file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"cannot read checkpoint file '{file}': {reason}", path="run.dir") from error

    def _point(self, name: str, step: int) -> None:
        link = self.folder / f".{name}-new"
        link.unlink(missing_ok=True)
        link.symlink_to(self.path(step).name)
        os.replace(link, self.folder / name)

    def _prune(self, best_step: int | None) -> None:
        for step in self.steps()[: -self.keep]:
            if step != best_step:
                # Renamed first: a reader sees a whole checkpoint or none, and a kill here leaves a leftover
                # that the next save removes.
                os.rename(self.path(step), self.folder / f"{_STAGING}old-{step:08d}")
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for leftover in self.folder.glob(f"{_STAGING}*"):
            shutil.rmtree(leftover)
