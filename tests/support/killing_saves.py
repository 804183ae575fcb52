"""A data set that kills its run in the middle of a save, named by import path."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
from vectors import Vectors

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.storage import STAGING, LocalStorage

Strike = Callable[[], None]


class Killing(Vectors):
    """Kills when one of `PHASES` is reached for the n-th time; never again once the file `killed` is there.

    Args:
        length: samples.
        phase: where in a save.
        time: which time.
        folder: for the file `killed`.
        rank: who is struck.
        everybody: whether all ranks die with it.
    """

    def __init__(self, length: int, phase: str, time: int, folder: str, rank: int = 0, everybody: bool = False) -> None:
        super().__init__(length)
        mark = Path(folder, "killed")
        if mark.exists() or int(os.environ.get("RANK", "0")) != rank:
            return
        left = time

        def strike() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                mark.touch()
                if everybody:
                    _kill_the_others()
                os.kill(os.getpid(), signal.SIGKILL)

        PHASES[phase](strike)


def _kill_the_others() -> None:
    for process in psutil.Process(os.getppid()).children():
        if process.pid != os.getpid():
            process.kill()


def _after_begin(strike: Strike) -> None:
    _replace(LocalStorage, "begin", after=strike)


def _in_a_file(strike: Strike) -> None:
    """With half of this rank's file written."""
    write = LocalStorage.write

    def cut(self: LocalStorage, folder: str, file: str, parts: Iterable[memoryview]) -> None:
        def halves() -> Iterator[memoryview]:
            for i, part in enumerate(parts):
                yield part[: len(part) // 2]
                if i == 1:  # after the header
                    strike()
                yield part[len(part) // 2 :]

        write(self, folder, file, halves() if file.startswith("rank-") else parts)

    LocalStorage.write = cut  # type: ignore[method-assign]


def _before_the_file(strike: Strike) -> None:
    _replace(LocalStorage, "write", before=strike, where=lambda self, folder, file, parts: file.startswith("rank-"))


def _after_the_file(strike: Strike) -> None:
    _replace(LocalStorage, "write", after=strike, where=lambda self, folder, file, parts: file.startswith("rank-"))


def _before_the_manifest(strike: Strike) -> None:
    _replace(LocalStorage, "publish", before=strike)


def _before_the_rename(strike: Strike) -> None:
    _replace(os, "rename", before=strike, where=_publishes)


def _after_the_rename(strike: Strike) -> None:
    _replace(os, "rename", after=strike, where=_publishes)


def _before_pruning(strike: Strike) -> None:
    _replace(CheckpointFolder, "_prune", before=strike)


def _while_removing(strike: Strike) -> None:
    """With an old checkpoint renamed, and all of its files there."""
    _replace(
        shutil, "rmtree", before=strike, where=lambda path, **options: Path(path).name.startswith(f"{STAGING}old-")
    )


def _before_results_replace(strike: Strike) -> None:
    """With the results of an evaluation reported, and in a manifest beside the published one."""
    _replace(os, "replace", before=strike, where=lambda old, new: Path(new).parent.name.startswith("step-"))


def _after_results_replace(strike: Strike) -> None:
    _replace(os, "replace", after=strike, where=lambda old, new: Path(new).parent.name.startswith("step-"))


def _before_pointing(strike: Strike) -> None:
    _replace(os, "replace", before=strike, where=lambda old, new: Path(new).name == "best")


PHASES: dict[str, Callable[[Strike], None]] = {
    "after begin": _after_begin,
    "in a file": _in_a_file,
    "before the file": _before_the_file,
    "after the file": _after_the_file,
    "before the manifest": _before_the_manifest,
    "before the rename": _before_the_rename,
    "after the rename": _after_the_rename,
    "before pruning": _before_pruning,
    "while removing": _while_removing,
    "before results": _before_results_replace,
    "after results": _after_results_replace,
    "before pointing": _before_pointing,
}


def _publishes(old: Path, new: Path) -> bool:
    return Path(old).name.startswith(STAGING) and Path(new).name.startswith("step-")


def _replace(
    owner: Any,
    name: str,
    before: Strike | None = None,
    after: Strike | None = None,
    where: Callable[..., bool] = lambda *arguments, **options: True,
) -> None:
    original = getattr(owner, name)

    def replacement(*arguments: Any, **options: Any) -> Any:
        is_it = where(*arguments, **options)
        if is_it and before is not None:
            before()
        result = original(*arguments, **options)
        if is_it and after is not None:
            after()
        return result

    setattr(owner, name, replacement)
