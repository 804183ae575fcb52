"""Processes that take turns on one machine: each goes on with its loop for so many steps while the others wait.

Owns the hand-over, the rounds and what a turn costs. What the loops are is the caller's business. Nothing is forked:
each process starts from nothing, so that no library finds what another has left.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.loops import AfterStep
from benchmarks.rounds import Clocks, Problem, Timing, in_rounds, waiting_for
from trainer.errors import one_line

TIMEOUT = 900  # seconds, of one turn

Loop = Callable[[AfterStep, Path], None]  # endless; told what to call after a step, and where to write


class Turn(NamedTuple):
    """Leave to make some steps."""

    lead: int
    steps: int


@dataclass(frozen=True)
class Taken:
    """What a turn gave."""

    timing: Timing
    num_threads: int  # of torch


class _Failure(NamedTuple):
    """What there is instead of a turn's figures; a `Problem` cannot be pickled."""

    message: str
    is_absence: bool


class Turns:
    """The end of a loop's step, in the loop's process: counts, and waits for leave.

    Args:
        connection: to the process that gives leave.
        device: whose work is waited for at both ends of what is counted, and nowhere else.
        first: the turn that the loop begins with.
    """

    def __init__(self, connection: Connection, device: torch.device, first: Turn) -> None:
        self._connection = connection
        self._device = device
        self._wait = waiting_for(device)
        self._turn = first
        self._num_made = 0
        self._before = Clocks.read()
        self._began = time.perf_counter()

    def after_step(self, num_samples: int) -> None:
        """Counts a step, and does not come back before it is this loop's turn."""
        self._num_made += 1
        if self._num_made == self._turn.lead:
            self._wait()
            self._before = Clocks.read()
            self._began = time.perf_counter()
        elif self._num_made == self._turn.lead + self._turn.steps:
            self._hand_over()

    def _hand_over(self) -> None:
        self._wait()
        seconds = time.perf_counter() - self._began
        after = Clocks.read()
        own = (after.tree - self._before.tree) / (after.wall - self._before.wall)
        timing = Timing(seconds / self._turn.steps, own, after.foreign_cores(self._before))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # the others need the memory
        self._connection.send(Taken(timing, torch.get_num_threads()))
        turn = self._connection.recv()
        if turn is None:
            os._exit(0)  # the loops have no end of their own, and leave nothing behind but a temporary folder
        self._turn, self._num_made = turn, 0


def _run(connection: Connection, loop: Loop, device: torch.device, num_threads: int, first: Turn, folder: Path) -> None:
    """Runs a loop in this process, with its output in a file."""
    log = os.open(folder / "log.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    try:
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # as timm's train.py and torchvision's reference have it
        loop(Turns(connection, device, first).after_step, folder)
    except BaseException as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):  # nobody may be there to hear it
            connection.send(_Failure(one_line(error), isinstance(error, ImportError)))
    os._exit(1)


class Entrant:
    """A loop in a process of its own, as the process that gives leave sees it.

    Args:
        loop: it is pickled.
        device: on which it works.
        num_threads: of torch.
        first: the turn that it begins with, which compiles, allocates and imports, and whose figures are dropped.
        folder: for what it writes; made here.

    Raises:
        Problem: it could not begin.
    """

    def __init__(self, loop: Loop, device: torch.device, num_threads: int, first: Turn, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        folder.mkdir()
        self._process = context.Process(target=_run, args=(theirs, loop, device, num_threads, first, folder))
        self._process.start()
        theirs.close()
        try:
            self._receive()
        except Problem:
            self.close()
            raise

    def take(self, turn: Turn) -> Taken:
        """Gives leave, and waits until the turn is over.

        Raises:
            Problem: the loop failed.
        """
        try:
            self._connection.send(turn)
        except OSError:
            raise Problem("its process ended", is_absence=False) from None
        return self._receive()

    def _receive(self) -> Taken:
        if not self._connection.poll(TIMEOUT):
            raise Problem(f"not done after {TIMEOUT} s", is_absence=False)
        try:
            answer = self._connection.recv()
        except EOFError:
            raise Problem("its process ended", is_absence=False) from None
        if isinstance(answer, _Failure):
            raise Problem(*answer)
        return answer

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()


@dataclass
class Measured:
    """What is known of a loop."""

    times: list[Timing] = field(default_factory=list)  # of a step, once a round
    num_threads: int | None = None
    problem: Problem | None = None


def take_turns(
    loops: Mapping[str, Loop | Problem],
    device: torch.device,
    num_threads: int,
    turn: Turn,
    rounds: int,
    seed: int,
    what: str,
) -> dict[str, Measured]:
    """Gives each loop one turn a round, in random order; one that fails is left out of all rounds.

    Args:
        loops: by name; or why there is none.
        device: on which they work.
        num_threads: of torch, in each of them.
        turn: how many steps.
        rounds: how many turns each has.
        seed: of the order.
        what: they do, for messages.
    """
    measured = {name: Measured() for name in loops}

    def leave_out(name: str, where: str, problem: Problem) -> None:
        measured[name] = Measured(problem=problem)
        sys.stderr.write(f"{where}: {problem}\n")

    # Loops are ended where they stand; that Python then gives back their semaphores is no news.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    with (
        tempfile.TemporaryDirectory(prefix="lockstep-turns-", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as stack,
    ):
        entrants: dict[str, Entrant] = {}
        for name, loop in loops.items():
            try:
                if isinstance(loop, Problem):
                    raise loop
                entrants[name] = Entrant(loop, device, num_threads, turn, Path(folder, name))
                stack.callback(entrants[name].close)
            except Problem as problem:
                leave_out(name, f"{what}: {name}", problem)
        left = [name for name in entrants if measured[name].problem is None]
        for number, name in in_rounds(left, rounds, seed):
            where = f"round {number + 1}: {what}: {name}"
            try:
                taken = entrants[name].take(turn)
            except Problem as problem:
                leave_out(name, where, problem)
                left.remove(name)
                continue
            measured[name].times.append(taken.timing)
            measured[name].num_threads = taken.num_threads
            sys.stderr.write(
                f"{where}: {1000 * taken.timing.seconds:.3f} ms, "
                f"others kept {taken.timing.foreign_cores:.2f} cores busy\n"
            )
    return measured
