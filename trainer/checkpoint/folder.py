"""Which checkpoints a run has: choosing one that verifies, and keeping the right ones.

Owns names, the choice on resume and what is deleted. How one is written is `trainer.checkpoint.writing`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, TypeVar

from trainer.checkpoint.layout import Ranks
from trainer.checkpoint.manifest import Damaged, Manifest, Progress
from trainer.checkpoint.reading import Checkpoint
from trainer.checkpoint.storage import Storage, open_storage
from trainer.config import Config
from trainer.errors import UserError, one_line_text

logger = logging.getLogger("lockstep")

T = TypeVar("T")

_PREFIX = "step-"


class AgreeingRanks(Ranks, Protocol):
    """Ranks of which one's problem is everybody's; `trainer.world.World` is it."""

    def agree(self, build: Callable[[], T]) -> T: ...


class CheckpointFolder:
    """The checkpoints of a run.

    Args:
        storage: where they are.
        keep: how many of the newest to keep.
        is_kept_for_good: tells whether the checkpoint of a step is never deleted.
    """

    def __init__(
        self, storage: Storage, keep: int, is_kept_for_good: Callable[[int], bool] = lambda step: False
    ) -> None:
        self.storage = storage
        self.keep = keep
        self.is_kept_for_good = is_kept_for_good

    @property
    def location(self) -> str:
        """The folder, as a user would write it."""
        return self.storage.location

    @staticmethod
    def name(step: int) -> str:
        """Returns the name of a step's checkpoint."""
        return f"{_PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints by their names, oldest first; some may be damaged.

        Raises:
            UserError: the folder cannot be read.
        """
        try:
            names = self.storage.names()
        except OSError as error:
            raise UserError(f"cannot read '{self.location}': {one_line_text(error)}", path="checkpoint.dir") from error
        numbers = (name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX))
        return sorted(int(number) for number in numbers if number.isdigit())

    def open(self, step: int) -> Checkpoint:
        """Opens a checkpoint.

        Raises:
            Damaged: it has no readable manifest.
        """
        return Checkpoint(self.storage, self.name(step))

    def best(self) -> int | None:
        """Returns the step of the best checkpoint, if any was evaluated and it is still there."""
        steps = self.steps()
        for step in reversed(steps):
            try:
                best = self.open(step).manifest.progress.best_step
            except Damaged:
                continue
            return best if best in steps else None
        return None

    def newest(self) -> Checkpoint:
        """Returns the newest checkpoint that verifies, for a single process.

        Raises:
            UserError: there is none.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                checkpoint = self.open(step)
                checkpoint.verify()
                return checkpoint
            except Damaged as error:
                logger.warning("skipped '%s/%s': %s", self.location, self.name(step), error)
        raise UserError(f"'{self.location}' holds no {'good ' if steps else ''}checkpoint")

    def choose(self, ranks: AgreeingRanks) -> Checkpoint | None:
        """Returns the newest checkpoint that verifies on all ranks, the same one on each; all call it together.

        What is damaged and newer is put aside, so that it is neither counted nor in the way.

        Returns:
            None where the run has no checkpoint yet.

        Raises:
            UserError: there are checkpoints, and not one is good.
        """
        seen = ranks.agree(lambda: self.steps() if ranks.rank == 0 else [])
        steps = ranks.from_main(lambda: seen)
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            checkpoint, problem = self._examine(step, ranks)
            problems = [f"rank {rank}: {p}" for rank, p in enumerate(ranks.gather(problem)) if p is not None]
            if not problems:
                if damaged and ranks.rank == 0:
                    self._put_aside(damaged)
                return checkpoint
            damaged[step] = problems[0] if ranks.num_ranks > 1 else problems[0].removeprefix("rank 0: ")
        if not damaged:
            return None
        told = [f"'{self.location}/{self.name(step)}': {problem}" for step, problem in damaged.items()]
        message = "no checkpoint is good, and starting anew would lose the run; to do so, take the folder away"
        raise UserError(*told, message, path="checkpoint.resume", agreed=True)

    def _examine(self, step: int, ranks: Ranks) -> tuple[Checkpoint | None, str | None]:
        """Every rank reads the manifest and its share of the files."""
        try:
            checkpoint = self.open(step)
            checkpoint.verify(sorted(checkpoint.manifest.files)[ranks.rank :: ranks.num_ranks])
            return checkpoint, None
        except Damaged as error:
            return None, str(error)

    def _put_aside(self, damaged: dict[int, str]) -> None:
        for step, problem in damaged.items():
            try:
                where = self.storage.set_aside(self.name(step))
            except OSError as error:
                where = f"still there, as it cannot be moved: {one_line_text(error)}"
            logger.warning("skipped the checkpoint of step %d: %s (now %s)", step, problem, where)

    # ---- called by rank 0 alone ---------------------------------------------------------------------------

    def clean(self) -> None:
        """Removes what interrupted writes left, while nothing is being written."""
        try:
            self.storage.clean()
        except OSError as error:
            logger.warning("cannot clean '%s': %s", self.location, one_line_text(error))

    def publish(self, staged: str, manifest: Manifest) -> None:
        """Makes what was staged a checkpoint, and only then deletes what need not be kept.

        Raises:
            OSError: it is not there, and everything else is as it was.
        """
        name = self.name(manifest.progress.step)
        for file, record in manifest.files.items():
            size = self.storage.size(staged, file)
            if size != record.size:
                found = "is not there" if size is None else f"has {size} bytes instead of {record.size}"
                raise OSError(f"{file} {found} as rank 0 sees it: checkpoints must be on storage that all ranks share")
        self.storage.publish(staged, name, manifest.to_bytes())
        self._prune(manifest.progress)

    def replace_progress(self, progress: Progress) -> None:
        """Writes new results into the checkpoint of the step they belong to.

        Raises:
            OSError: it is as it was.
        """
        try:
            manifest = replace(self.open(progress.step).manifest, progress=progress)
        except Damaged as error:
            raise OSError(str(error)) from error
        self.storage.replace_manifest(self.name(progress.step), manifest.to_bytes())
        self._prune(progress)

    def give_up(self, staged: str) -> None:
        """Removes what was staged and cannot be finished."""
        try:
            self.storage.remove(staged)
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("cannot remove '%s/%s': %s", self.location, staged, one_line_text(error))

    def _prune(self, progress: Progress) -> None:
        """Deletes what need not be kept. What cannot be deleted is tried again after the next checkpoint."""
        best_step = progress.best_step
        try:
            # A later one is damaged and could not be put aside: counted, it would push out a good one.
            steps = [step for step in self.steps() if step <= progress.step]
            if best_step in steps:
                assert best_step is not None
                self.storage.point("best", self.name(best_step))
            for step in steps[: -self.keep]:
                if step != best_step and not self.is_kept_for_good(step):
                    self.storage.remove(self.name(step))
        except (OSError, UserError) as error:
            logger.warning("cannot delete old checkpoints in '%s': %s", self.location, one_line_text(error))


def location(config: Config) -> str:
    """Returns where the checkpoints of a run go: a folder, or a URL."""
    return config.checkpoint.dir or str(config.run_dir / "checkpoints")


def open_folder(config: Config, is_kept_for_good: Callable[[int], bool] = lambda step: False) -> CheckpointFolder:
    """Returns the checkpoints of a run: in `checkpoint.dir`, or in the run folder.

    Raises:
        UserError: the location cannot be opened.
    """
    try:
        storage = open_storage(location(config))
    except OSError as error:
        raise UserError(one_line_text(error), path="checkpoint.dir") from error
    return CheckpointFolder(storage, config.checkpoint.keep, is_kept_for_good)
