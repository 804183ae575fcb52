"""Data sets for tests, named by import path as a user's own would be."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import numpy as np
import torch


class Vectors:
    """Item i: 8 numbers that depend on i, plus noise from all three global generators; 3 classes."""

    classes = ["a", "b", "c"]

    def __init__(self, length: int, noise: float = 0.1) -> None:
        self.length = length
        self.noise = noise

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        clean = torch.sin(torch.arange(8) * (index + 1.0))
        noise = torch.randn(8) + float(np.random.randn()) + random.gauss(0, 1)
        return clean + self.noise * noise, index % 3


class Dicts(Vectors):
    """The same as dicts under names of its own, with the index."""

    def __getitem__(self, index: int) -> Any:
        vector, label = super().__getitem__(index)
        return {"vector": vector, "kind": label, "index": index}


class Streaming(torch.utils.data.IterableDataset[Any]):
    """A data set without an index, which cannot be trained on exactly."""

    def __iter__(self) -> Any:
        return iter([])


class BadLabel(Vectors):
    """Sample 7 has a label that does not exist."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return super().__getitem__(index)[0], 3 if index == 7 else index % 3


class BadShape(Vectors):
    """Sample 7 is longer than the others."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(9 if index == 7 else 8), 0


class MissingFile(Vectors):
    """Sample 7 is on a disk that is gone."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 7:
            raise FileNotFoundError(2, "No such file or directory", "seven.npy")
        return super().__getitem__(index)


class Buggy(Vectors):
    """Has a bug, not bad data."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        raise ZeroDivisionError("a bug of the user's")


class Arrays(Vectors):
    """Items whose inputs are numpy arrays."""

    def __getitem__(self, index: int) -> Any:
        vector, label = super().__getitem__(index)
        return vector.numpy(), label


def no_schedule(total_steps: int) -> Any:
    """A schedule that gives nothing."""
    return lambda step: None


class NotATask:
    """Named as a task in a config, but not one."""


def not_a_model() -> int:
    """Named as a model in a config, but not one."""
    return 3


def refuses(**kwargs: Any) -> Any:
    """A component whose construction fails."""
    raise ValueError("two  of\n these do not go together")


class Counting(Vectors):
    """Counts its reads, and does something while number `after` is read."""

    def __init__(self, length: int, after: int) -> None:
        super().__init__(length)
        self.after = after
        self.reads = 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.reads += 1
        if self.reads == self.after:
            self.reached()
        return super().__getitem__(index)

    def reached(self) -> None:
        """What a subclass does then."""
        raise AssertionError("a subclass says what happens")


class Interrupting(Counting):
    """Sends its own process SIGTERM then."""

    def reached(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class Huge(Vectors):
    """Inputs so large that float16 gradients overflow at the first loss scales."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        vector, label = super().__getitem__(index)
        return 1e3 * vector, label
