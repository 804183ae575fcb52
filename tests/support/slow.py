"""Data sets that are late or absent on one rank, named by import path."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from vectors import Counting, Vectors

from trainer.errors import UserError


class Sleepy(Counting):
    """Goes to sleep in sample number `after`, and leaves a file `asleep`."""

    def reached(self) -> None:
        Path("asleep").touch()
        time.sleep(100)


class BuggyWhileOthersSleep(Vectors):
    """Has a bug in sample 1 while other workers are in a read that takes long."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 1:
            raise ZeroDivisionError("a bug of the user's")
        time.sleep(60)
        return super().__getitem__(index)


class MissingOnRank1(Vectors):
    """Cannot be built on rank 1."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        if os.environ.get("RANK") == "1":
            raise UserError("no such mount")


class Downloads(Vectors):
    """Fetches what is missing, slowly, and writes down which rank did."""

    def __init__(self, length: int, folder: str) -> None:
        super().__init__(length)
        if not Path(folder, "complete").exists():
            with open(Path(folder, "fetched-by"), "a", encoding="utf-8") as file:
                file.write(os.environ.get("RANK", "0"))
            time.sleep(0.5)
            Path(folder, "complete").touch()


class Steady(Vectors):
    """Takes the same time for every sample."""

    def __init__(self, length: int, seconds: float) -> None:
        super().__init__(length)
        self.seconds = seconds

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(self.seconds)
        return super().__getitem__(index)


class SlowWhileTold(Vectors):
    """Takes its time for every sample as long as there is a file `slowly`."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if Path("slowly").exists():
            time.sleep(0.02)
        return super().__getitem__(index)
