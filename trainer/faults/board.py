"""Where a rank is, in memory that outlives its process: another rank of the same machine reads it after a kill.

Reports come once per second, and a process that is killed says nothing: only what it had written before is exact.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MOST_SAMPLES = 1024  # that are kept

# Ids of the samples of a micro-batch.
Samples = Sequence[int] | NDArray[np.int64]
# Place, step (None before training) and samples.
Position = tuple[str, int | None, tuple[int, ...]]

_HEAD = struct.Struct("<qq48s")  # step, number of samples, place
_NO_STEP = -1
_SIZE = _HEAD.size + 8 * MOST_SAMPLES


class Board:
    """This process's own board."""

    def __init__(self) -> None:
        self.descriptor = -1  # by which other processes find it; -1: this system has no such memory
        self._memory: mmap.mmap | None = None
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("lockstep-board")
            os.ftruncate(self.descriptor, _SIZE)
            self._memory = mmap.mmap(self.descriptor, _SIZE)

    def write(self, place: str, step: int | None, samples: Samples) -> None:
        """Notes where the process is."""
        if self._memory is None:
            return
        if len(samples) > MOST_SAMPLES:
            samples = samples[:MOST_SAMPLES]
        data = _HEAD.pack(_NO_STEP if step is None else step, len(samples), place.encode())
        if len(samples):
            data += samples.tobytes() if isinstance(samples, np.ndarray) else array("q", samples).tobytes()
        self._memory[: len(data)] = data  # at once: nothing comes between the parts

    def close(self) -> None:
        """Gives the memory back; other processes keep what they have mapped."""
        if self._memory is not None:
            self._memory.close()
            os.close(self.descriptor)
            self._memory, self.descriptor = None, -1


class OthersBoard:
    """The board of another process of this machine, readable until `close` whether it lives or not.

    Args:
        pid: of that process, which must be alive now.
        descriptor: of its board.

    Raises:
        OSError: it cannot be had.
    """

    def __init__(self, pid: int, descriptor: int) -> None:
        with Path(f"/proc/{pid}/fd/{descriptor}").open("rb") as file:
            try:
                self._memory = mmap.mmap(file.fileno(), _SIZE, access=mmap.ACCESS_READ)
            except ValueError as error:  # another file
                raise OSError(str(error)) from error

    def read(self) -> Position | None:
        """Returns where the process is, or was; None where it has written nothing."""
        step, count, place = _HEAD.unpack_from(self._memory)
        name = place.rstrip(b"\0").decode(errors="replace")
        if not name:
            return None
        ids = struct.unpack_from(f"<{min(max(count, 0), MOST_SAMPLES)}q", self._memory, _HEAD.size)
        return name, None if step == _NO_STEP else step, ids

    def close(self) -> None:
        """Lets go of it."""
        self._memory.close()
