"""Who the ranks are, which of them run on this machine, and what can be done there about one that is stuck.

A process that is stopped, or whose native code never gives Python's lock back, can neither say what it does nor end
itself: a rank next to it finds out what it can and kills it. Imports no torch.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from trainer.faults.board import Board, OthersBoard, Position
from trainer.faults.stacks import SignalledStacks, within

_DUMP_SECONDS = 1.0  # for another process to write its stacks
_DEATH_SECONDS = 3.0  # in which the rank that is to do it has killed another
_MOST_THREADS = 64  # that are described


def introduce(stacks: SignalledStacks, board: Board) -> dict[str, Any]:
    """Returns what the other ranks are told about this process."""
    machine = [socket.gethostname()]
    with suppress(OSError):  # what processes have in common that see each other's process ids
        machine += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": " ".join(machine),
        "pid": pid,
        "start": _start(pid),
        "stacks": stacks.descriptor,
        "board": board.descriptor,
    }


class Neighbours:
    """All ranks, as seen from one of them.

    Args:
        rank: of this process.
        introductions: of all ranks, in their order.
    """

    def __init__(self, rank: int, introductions: Sequence[Mapping[str, Any]]) -> None:
        self._rank = rank
        self._ranks = introductions
        self._boards: dict[int, OthersBoard] = {}
        # Rank 0 judges the others, and they judge rank 0.
        for other in range(1, len(introductions)) if rank == 0 else [0]:
            if other != rank and self.is_here(other):
                with suppress(OSError):
                    self._boards[other] = OthersBoard(self.pid(other), introductions[other]["board"])

    def host(self, rank: int) -> str:
        """Returns the name of a rank's machine."""
        return str(self._ranks[rank]["host"])

    def pid(self, rank: int) -> int:
        """Returns a rank's process id."""
        return int(self._ranks[rank]["pid"])

    def position(self, rank: int) -> Position | None:
        """Returns where a rank was to the last, if that can be known here."""
        return self._boards[rank].read() if rank in self._boards else None

    def is_here(self, rank: int) -> bool:
        """Returns whether a rank's process is, or was, on this machine."""
        return bool(self._ranks[rank]["machine"] == self._ranks[self._rank]["machine"])

    def is_alive(self, rank: int) -> bool:
        """Returns whether the process of a rank of this machine is still there."""
        start = self._ranks[rank]["start"]
        return start is not None and _start(self.pid(rank)) == start

    def speaks(self, apart_from: Collection[int]) -> bool:
        """Returns whether this is the rank that does what one rank of each machine is to do."""
        able = [rank for rank in range(len(self._ranks)) if self.is_here(rank) and rank not in apart_from]
        return self._rank == min(able, default=self._rank)

    def state(self, rank: int) -> str:
        """Returns what keeps the process of a rank of this machine from running; empty if nothing seems to."""
        try:
            status = psutil.Process(self.pid(rank)).status()
        except psutil.Error:
            return "its process is gone"
        return _STATES.get(status, "")

    def end(self, rank: int, apart_from: Collection[int]) -> str:
        """Kills the process of a rank of this machine, and returns what was found out about it before.

        One rank of the machine does so; the others wait until it is done, and do it if it is not.

        Args:
            rank: who cannot end itself.
            apart_from: ranks that cannot do it.
        """
        if not self.is_alive(rank):
            return ""
        found = ""
        if self.speaks(apart_from):
            found = within(_DUMP_SECONDS, lambda: _describe(self.pid(rank)), "")
            if self.state(rank) != _STATES[psutil.STATUS_STOPPED]:
                found += "\n" + _ask_for_stacks(self.pid(rank), self._ranks[rank]["stacks"])
        else:
            deadline = time.monotonic() + _DEATH_SECONDS
            while self.is_alive(rank) and time.monotonic() < deadline:
                time.sleep(0.05)
        if self.is_alive(rank):
            with suppress(OSError):
                os.kill(self.pid(rank), signal.SIGKILL)
        return found

    def close(self) -> None:
        """Lets go of the memory of other ranks."""
        for board in self._boards.values():
            board.close()
        self._boards.clear()


_STATES = {
    psutil.STATUS_STOPPED: "its process is stopped (by SIGSTOP or the like)",
    psutil.STATUS_TRACING_STOP: "a debugger has stopped its process",
    psutil.STATUS_DISK_SLEEP: "the kernel makes its process wait for a disk or a file system",
    psutil.STATUS_ZOMBIE: "its process has ended",
}


def _start(pid: int) -> float | None:
    """Returns when a process started, to tell it from another with its number; None where it has ended."""
    if sys.platform == "linux":  # psutil's is relative to a clock that may be set
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if state in "ZX" else float(fields[18])
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def _describe(pid: int) -> str:
    """Returns what the kernel tells of a process and its threads."""
    text = f"status: {psutil.Process(pid).status()}\n"
    with suppress(OSError):
        for thread in sorted(os.listdir(f"/proc/{pid}/task"), key=int)[:_MOST_THREADS]:
            found = []
            for what in ("comm", "wchan", "stack"):  # the last for root only
                with suppress(OSError):
                    found.append(f"{what} {Path(f'/proc/{pid}/task/{thread}/{what}').read_text().strip()}")
            text += f"thread {thread}: {', '.join(found)}\n"
    return text


def _ask_for_stacks(pid: int, descriptor: int) -> str:
    """Makes a process write its stacks, by SIGUSR2, and returns them; empty if it does not."""
    if descriptor < 0:  # the signal would end it
        return ""
    file = Path(f"/proc/{pid}/fd/{descriptor}")
    with suppress(OSError):
        before = size = file.stat().st_size
        os.kill(pid, signal.SIGUSR2)
        deadline = time.monotonic() + _DUMP_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.05)
            previous, size = size, file.stat().st_size
            if size > before and size == previous:
                break
        with file.open("rb") as opened:
            opened.seek(before)
            return opened.read().decode(errors="replace")
    return ""
