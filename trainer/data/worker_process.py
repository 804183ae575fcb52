"""One worker process: the training process's side of it, and what runs in it.

Owns starting and ending it, what it does about signals, and saying what it died of. Who has how many workers, and what
they are given to load, is `trainer.data.workers`.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.sampler import SampleKey
from trainer.data.slots import Slot
from trainer.faults.stopping import STOP_SIGNALS
from trainer.placement import use_one_thread
from trainer.system import die_with_parent

logger = logging.getLogger("lockstep")

IDLE = -1  # in the place of the sample that a worker reads
_END_SECONDS = 5.0  # what a process may take to end after SIGKILL; in a read of a dead file system it never does
_CAUSES = {
    signal.SIGKILL: "most likely the system was out of memory: fewer data.workers or data.prefetch_factor",
    signal.SIGBUS: "most likely a file that it had mapped shrank, or memory could not be had",
    signal.SIGSEGV: "a crash in native code, of a decoder or of the data set",
    signal.SIGABRT: "native code gave up, in a decoder or in the data set",
    signal.SIGILL: "native code that this CPU cannot run, in a decoder or in the data set",
}

# Loads one batch: (sample keys (B, 3), slot for its tensors, called with each sample before it is read) -> anything.
Load = Callable[[NDArray[np.int64], Slot, Callable[[int], None]], Any]


class Task(NamedTuple):
    """A batch to load."""

    number: int
    slot: int  # where to
    num_keys: int  # they lie at the start of the slot


# The training process's ends of the pipes of all its workers. Every forked worker inherits them, and unless it closes
# them no worker sees the training process go.
_our_ends: weakref.WeakSet[Connection] = weakref.WeakSet()


class Worker:
    """The training process's side of one worker.

    Args:
        context: of multiprocessing: how the process starts.
        load: loads one batch, in the worker.
        slots: memory for batches, which tasks refer to.
        board: memory where row `number` says which sample the worker reads, and since when; int64 (workers, 2).
        number: of the worker.
    """

    def __init__(self, context: Any, load: Load, slots: list[Slot], board: Slot, number: int) -> None:
        tasks, self.tasks = context.Pipe(duplex=False)
        self.results, results = context.Pipe(duplex=False)
        _our_ends.update([self.tasks, self.results])
        self.number = number
        self.outstanding: dict[int, Task] = {}
        self.process = context.Process(
            target=_work,
            args=(load, slots, board, number, tasks, results),
            name=f"lockstep-loader-{number}",
            daemon=True,
        )
        try:
            with _stop_signals_held_back():
                self.process.start()
        except BaseException:
            self.tasks.close()
            self.results.close()
            raise
        finally:
            tasks.close()
            results.close()

    def close(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.join(_END_SECONDS)
        if self.process.exitcode is None:
            logger.warning("loader worker %d (pid %d) cannot be ended", self.number, self.process.pid)
        else:
            self.process.close()
        self.tasks.close()
        self.results.close()

    def explain_death(self, at: str) -> str:
        """Returns what it died of; `at` says where, and may be empty."""
        self.process.join(_END_SECONDS)
        code = self.process.exitcode
        who = f"loader worker {self.number} (pid {self.process.pid})"
        if code is None:
            return f"{who} closed its pipe but did not end{at}"
        if code >= 0:
            return f"{who} ended with exit code {code}{at}; the data set or a transform ended it"
        try:
            name = signal.Signals(-code).name
        except ValueError:  # a real-time signal
            name = f"signal {-code}"
        return f"{who} was killed by {name}{at}; {_CAUSES.get(-code, 'somebody ended it')}"


class Raised:
    """An exception on its way from a worker, with the traceback that it had there."""

    def __init__(self, error: BaseException) -> None:
        self.text = "".join(traceback.format_exception(error))
        self.name = "".join(traceback.format_exception_only(error)).strip()
        try:
            self.pickled: bytes | None = pickle.dumps(error)
            pickle.loads(self.pickled)
        except Exception:  # an exception that cannot travel
            self.pickled = None

    def exception(self) -> BaseException:
        """Returns the exception as it can be raised here: of its own type, where that is known."""
        error: BaseException = RuntimeError(self.name)
        if self.pickled is not None:
            with suppress(Exception):  # of a class that only the worker has
                error = pickle.loads(self.pickled)
        error.add_note(f"in a loader worker:\n{self.text}")
        return error


def _work(load: Load, slots: list[Slot], board: Slot, number: int, tasks: Connection, results: Connection) -> None:
    """Loads batches until there are no more tasks; runs in a worker process."""
    _settle_in()
    board.clear()
    state = board.allocate((number + 1, 2), torch.int64).numpy()[number]

    def reading(sample: int) -> None:
        state[1] = time.monotonic_ns()
        state[0] = sample

    while True:
        try:
            task = Task(*tasks.recv())
        except (EOFError, OSError):  # the training process is gone
            return
        started, cpu_started = time.perf_counter(), time.process_time()
        slot = slots[task.slot]
        slot.clear()
        keys = slot.allocate((task.num_keys, len(SampleKey._fields)), torch.int64).numpy().copy()
        slot.clear()
        try:
            payload = pickle.dumps(slot.put(load(keys, slot, reading)))
        except Exception as error:
            payload = pickle.dumps(Raised(error))
        state[0] = IDLE
        try:
            times = time.perf_counter() - started, time.process_time() - cpu_started
            results.send_bytes(pickle.dumps((task.number, *times, payload)))
        except OSError:
            return


@contextmanager
def _stop_signals_held_back() -> Iterator[None]:
    """Starts processes with the stop signals blocked: they may come before `_settle_in` has run."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _settle_in() -> None:
    for end in list(_our_ends):  # copies that a fork made
        end.close()
    # A group of its own: Ctrl-C and a launcher's SIGTERM go to the whole group of the training process, which
    # alone decides when to stop and needs its workers until then.
    os.setpgid(0, 0)
    # Inherited by fork, the training process's handler would only set a flag here, and never end the worker.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # which forgets one that has come already
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    use_one_thread()
    if sys.platform == "linux":
        die_with_parent()
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    if sys.platform != "linux" or os.getppid() != trainer.pid:  # the kernel's parent is the fork server, which stays
        threading.Thread(target=_end_with, args=(trainer,), name="lockstep-orphan", daemon=True).start()


def _end_with(trainer: Any) -> None:
    trainer.join()
    os.kill(os.getpid(), signal.SIGKILL)
