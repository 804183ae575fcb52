"""What the workers of a pool are made to load in tests; picklable, for workers that are not forked."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data import worker_process
from trainer.data.slots import Slot

Keys = NDArray[np.int64]
Reading = Callable[[int], None]

ROW = 5  # numbers per sample


def rows_of(samples: Any) -> torch.Tensor:
    """The batch that `rows` loads: int64 (B, ROW), different for every sample."""
    return torch.as_tensor(samples, dtype=torch.int64)[:, None] * 1000 + torch.arange(ROW)


def rows(keys: Keys, slot: Slot, reading: Reading) -> Any:
    """Loads rows of numbers; the epoch of a key is how long to sleep for it, in ms, or -1."""
    for delay, sample, _ in keys.tolist():
        if delay >= 0:
            reading(sample)
            time.sleep(delay / 1000)
    loaded = slot.allocate((len(keys), ROW), torch.int64)
    loaded.copy_(rows_of(keys[:, 1]))
    return {"rows": loaded, "worker": os.getpid()}


def with_keys(keys: Keys, slot: Slot, reading: Reading) -> Any:
    """Loads rows, and sends the keys back outside of the slot, as a trainer's batch does."""
    return {**rows(keys, slot, reading), "keys": keys}


def sized(keys: Keys, slot: Slot, reading: Reading) -> Any:
    """Sample n: two tensors of n KiB, made in the slot one after the other, and one made elsewhere."""
    (size,) = keys[:, 1].tolist()
    first, second = (slot.allocate((size, 1024), torch.uint8) for _ in range(2))
    first.fill_(size % 251)
    second.fill_(size % 241)
    return first, second, torch.full((size, 1024), size % 239, dtype=torch.uint8)


def open_ends(keys: Keys, slot: Slot, reading: Reading) -> Any:
    """Tells how many of the training process's pipe ends this worker has open."""
    return sum(not end.closed for end in worker_process._our_ends)


class Structure:
    """Loads the same data each time."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __call__(self, keys: Keys, slot: Slot, reading: Reading) -> Any:
        return self.data


class Unlucky:
    """Loads rows, but something happens at sample 13.

    Args:
        what: `SIGKILL` or another signal, `exit 3`, `_exit 4`, or the name of an exception.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, keys: Keys, slot: Slot, reading: Reading) -> Any:
        if 13 in keys[:, 1]:
            reading(13)
            return self.happen()
        return rows(keys, slot, reading)

    def happen(self) -> Any:
        """Ends this process, raises, or returns something that cannot be sent."""
        if self.what.startswith("SIG"):
            faulthandler.disable()  # pytest's would write pages
            os.kill(os.getpid(), getattr(signal, self.what))
        elif self.what.startswith("exit"):
            sys.exit(int(self.what.split()[1]))
        elif self.what.startswith("_exit"):
            os._exit(int(self.what.split()[1]))
        elif self.what == "ZeroDivisionError":
            raise ZeroDivisionError("thirteen")
        elif self.what == "Cannot travel":
            raise CannotTravel(13, "thirteen")
        elif self.what == "lambda":
            return lambda: None
        elif self.what == "StopIteration":
            raise StopIteration
        return NeverArrives()


class CannotTravel(Exception):
    """An exception that can be pickled, but not unpickled."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"{number}: {text}")


class NeverArrives:
    """Something that cannot be unpickled."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise LookupError("not from here")
