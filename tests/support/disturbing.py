"""A data set that does something to a disk at certain steps, named by import path."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from vectors import Vectors


class Disturbing(Vectors):
    """Does something while the first sample of a step is read, in the process of the step.

    Args:
        length: samples, a multiple of the batch size.
        batch_size: of the run.
        events: step -> `ACTION PATH`.
    """

    def __init__(self, length: int, batch_size: int, events: dict[str, str]) -> None:
        super().__init__(length)
        self.batch_size = batch_size
        self.events = {int(step): event for step, event in events.items()}
        self.reads = 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        step, position = divmod(self.reads, self.batch_size)
        self.reads += 1
        if position == 0 and step + 1 in self.events:
            action, path = self.events[step + 1].split(" ")
            ACTIONS[action](Path(path))
        return super().__getitem__(index)


def _fill(file: Path) -> None:
    """Leaves not a byte on the disk."""
    with suppress(OSError), open(file, "wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass


def _take(folder: Path) -> None:
    """A file is where the folder was."""
    folder.rename(folder.with_name("taken"))
    folder.touch()


def _give(folder: Path) -> None:
    folder.unlink()
    folder.with_name("taken").rename(folder)


def _remount(how: str) -> Callable[[Path], object]:
    return lambda disk: subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


ACTIONS: dict[str, Callable[[Path], object]] = {
    "fill": _fill,
    "free": Path.unlink,
    "take": _take,
    "give": _give,
    "ro": _remount("ro"),
    "rw": _remount("rw"),
}
