"""What this process is doing, and the files in which that is kept when a job ends.

SIGUSR2 makes it write the stacks of all its threads to a file in memory, from C and without Python's lock: its watch
copies them from there or, where that is stuck, the watch of another rank on the same machine. Imports no torch.
"""

from __future__ import annotations

import faulthandler
import linecache
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from trainer.faults.fault import FIRST, Fault, write_first

logger = logging.getLogger("lockstep")

T = TypeVar("T")

OWN_THREADS = "lockstep-watch"  # what the names of the watch's own threads begin with
_GUARD_SECONDS = 5.0

# Threads by name, each with (file, line, function) of its frames, outermost first.
Stacks = list[tuple[str, list[tuple[str, int, str]]]]


def aside(work: Callable[[], object]) -> threading.Thread:
    """Starts a thread that does something that may never return; what it raises is logged."""

    def run() -> None:
        try:
            work()
        except Exception as error:
            logger.warning("what the watch of the ranks tried failed: %s: %s", type(error).__name__, error)

    thread = threading.Thread(target=run, name=f"{OWN_THREADS}-aside", daemon=True)
    thread.start()
    return thread


def within(seconds: float, work: Callable[[], T], default: T) -> T:
    """Returns what `work` returns, or `default` if it raises or takes longer: then it goes on aside."""
    results: list[T] = []
    aside(lambda: results.append(work())).join(seconds)
    return results[0] if results else default


def capture_stacks() -> Stacks:
    """Returns where all threads of this process are, the main thread first, those of the watch left out."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    stacks = [(names.get(ident, f"thread {ident}"), _positions(frame)) for ident, frame in frames]
    return [(name, positions) for name, positions in stacks if not name.startswith(OWN_THREADS)]


def _positions(frame: FrameType | None) -> list[tuple[str, int, str]]:
    positions = []
    while frame is not None:
        positions.append((frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name))
        frame = frame.f_back
    return positions[::-1]


def format_stacks(stacks: Stacks) -> str:
    """Returns stacks as text, with their lines of source, which are read from files."""
    text = ""
    for name, positions in stacks:
        text += f"{name} (most recent call last):\n"
        for file, number, function in positions:
            source = linecache.getline(file, number).strip()
            text += f'  File "{file}", line {number}, in {function}\n' + (f"    {source}\n" if source else "")
        text += "\n"
    return text


class SignalledStacks:
    """Makes SIGUSR2 write the stacks of all threads of this process to a file in memory, until `close`."""

    def __init__(self) -> None:
        self.descriptor = -1  # by which other processes find the file; -1: there is none
        self._seen = 0
        if not hasattr(faulthandler, "register"):  # Windows
            return
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("lockstep-stacks")
        else:
            self.descriptor, name = tempfile.mkstemp(prefix="lockstep-stacks-")
            os.unlink(name)
        faulthandler.register(signal.SIGUSR2, file=self.descriptor, all_threads=True)

    def new(self) -> str:
        """Returns what was written since the last call."""
        size = os.fstat(self.descriptor).st_size if self.descriptor >= 0 else 0
        if size <= self._seen:
            return ""
        text = os.pread(self.descriptor, size - self._seen, self._seen).decode(errors="replace")
        self._seen = size
        return text

    def close(self) -> None:
        """Gives the signal back."""
        if self.descriptor >= 0:
            faulthandler.unregister(signal.SIGUSR2)
            os.close(self.descriptor)
            self.descriptor = -1


class FaultFiles:
    """The files about a fault that one rank writes. The file system may be what hangs: call them `within` a time.

    Args:
        rank: whose they are.
        folder: where they go, or what returns it when there is something to write.
    """

    def __init__(self, rank: int, folder: Callable[[], Path] | Path) -> None:
        self._rank = rank
        self._folder = folder

    def write_first(self, fault: Fault) -> None:
        """Writes `first.json`, unless it is there."""
        if not (self._where() / FIRST).exists():
            write_first(self._where(), fault)

    def append(self, text: str, about: int | None = None) -> Path:
        """Appends to the file of this rank, or of another that cannot write its own, and returns its path."""
        folder = self._where()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{self._rank if about is None else about}.txt"
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        heading = f"{when}, by rank {self._rank} on {socket.gethostname()}, process {os.getpid()}"
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{heading}\n{text.rstrip()}\n\n")
        return path

    def write_flight_recording(self) -> None:
        """Writes NCCL's last collectives, where NCCL and torch's record of them are in use."""
        recording = _flight_recording()
        if recording:
            (self._where() / f"rank-{self._rank}-nccl.json").write_bytes(recording)

    def _where(self) -> Path:
        return self._folder() if callable(self._folder) else self._folder


def _flight_recording() -> bytes:
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or "nccl" not in dist.get_backend():
        return b""
    private: Any = sys.modules.get("torch._C._distributed_c10d")
    dump = getattr(private, "_dump_nccl_trace_json", None)
    if dump is None:
        return b""
    # It asks CUDA for events while it has Python's lock. Should that never return, no Python could end this process.
    faulthandler.dump_traceback_later(_GUARD_SECONDS, exit=True, file=2)
    try:
        return bytes(dump())
    finally:
        faulthandler.cancel_dump_traceback_later()
