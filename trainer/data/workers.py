"""Worker processes that load batches, in order, into shared memory.

Owns the processes: starting, feeding, adding, removing and ending them, and saying what one of them died of or
hangs at. What a batch is and how it is loaded is `trainer.data.loader`; which samples it has, `trainer.data.sampler`.

torch's DataLoader cannot be interrupted, resized or asked what it is reading, and pickles every batch through
/dev/shm; so the pool is ours.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.sampler import SampleKey
from trainer.data.slots import Slot

logger = logging.getLogger("lockstep")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_F_SETPIPE_SZ = 1031  # linux/fcntl.h
_PIPE_BYTES = 1 << 20  # tasks of many thousand samples must not block their sender
_IDLE = -1

# Loads one batch: (sample keys (B, 2), slot for its tensors, called with each sample before it is read) -> anything.
Load = Callable[[NDArray[np.int64], Slot, Callable[[int], None]], Any]


class WorkerDied(RuntimeError):
    """A worker process ended on its own."""


class PoolBatch(NamedTuple):
    """What a worker loaded; its tensors are memory of `slot` until that is released."""

    data: Any
    slot: Slot
    load_seconds: float


class Reading(NamedTuple):
    """What a worker is doing now."""

    worker: int
    sample: int
    seconds: float


class _Task(NamedTuple):
    number: int
    slot: int
    keys: NDArray[np.int64]  # (B, 2), as a list of SampleKeys would be: quicker to pickle


class _Worker:
    """The training process's side of one worker."""

    def __init__(self, pool: WorkerPool, number: int) -> None:
        context = pool.context
        tasks, self.tasks = context.Pipe(duplex=False)
        self.results, results = context.Pipe(duplex=False)
        if sys.platform == "linux":
            try:
                fcntl.fcntl(self.tasks.fileno(), _F_SETPIPE_SZ, _PIPE_BYTES)
            except OSError:  # the system's limit is lower
                logger.debug("a worker's pipe keeps its size")
        self.number = number
        self.outstanding: dict[int, _Task] = {}
        self.process = context.Process(
            target=_work,
            args=(pool.load, pool.slots, pool.board, number, tasks, results),
            name=f"lockstep-loader-{number}",
            daemon=True,
        )
        self.process.start()
        tasks.close()
        results.close()

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.tasks.close()
        self.results.close()


class WorkerPool:
    """Loads batches in worker processes and yields them in order.

    Args:
        load: loads one batch, in a worker.
        describe: names a sample, for messages.
        num_workers: processes to start with.
        max_workers: most processes that `resize` may ask for.
        prefetch_factor: batches that each worker has ready or in work.
        held: batches that the caller holds at a time before it releases them.
        pin: register the shared memory with CUDA.
    """

    def __init__(
        self,
        load: Load,
        describe: Callable[[int], str],
        num_workers: int,
        max_workers: int,
        prefetch_factor: int,
        held: int,
        pin: bool,
    ) -> None:
        self.load = load
        self.describe = describe
        self.prefetch_factor = prefetch_factor
        self.pin = pin
        self.context: Any = multiprocessing.get_context()
        self.slots = [Slot() for _ in range(max_workers * prefetch_factor + held)]
        self.board = Slot()
        self._states = self.board.allocate((max_workers, 2), torch.int64)  # (sample, monotonic ns) per worker
        self._states.fill_(_IDLE)
        self._free = list(range(len(self.slots)))
        self._workers: list[_Worker] = []
        self._retired: list[_Worker] = []
        self._lock = threading.Lock()
        self._wake_reader, self._wake_writer = os.pipe()
        self._interrupted = False
        self._next_number = self._start = 0  # of the next task; of the first task of this call of `batches`
        self.resize(num_workers)

    @property
    def num_workers(self) -> int:
        """Worker processes that take batches now."""
        return len(self._workers)

    def resize(self, num_workers: int) -> None:
        """Starts or retires workers; batches and their order stay the same. Call it from the main thread."""
        with self._lock:
            while len(self._workers) > num_workers:
                self._retired.append(self._workers.pop())  # ends once its last batch has been taken
            while len(self._workers) < num_workers:
                self._workers.append(_Worker(self, len(self._workers)))
        self._wake()

    def batches(self, requests: Iterable[list[SampleKey]]) -> Iterator[PoolBatch]:
        """Yields a batch per request, in order; the caller releases each.

        Raises:
            WorkerDied: a worker process ended.
            Exception: what loading a batch raised, with the worker's traceback as a note.
        """
        pending = iter(requests)
        first = self._start = self._next_number
        done: dict[int, PoolBatch | BaseException] = {}
        try:
            exhausted = False
            while True:
                exhausted = exhausted or self._dispatch(pending, len(done))
                if first in done:
                    result = done.pop(first)
                    first += 1
                    if isinstance(result, BaseException):
                        raise result
                    yield result
                elif exhausted and first == self._next_number:
                    return
                elif not self._receive(done):
                    return  # interrupted
        finally:
            for result in done.values():
                if isinstance(result, PoolBatch):
                    self.release(result)

    def release(self, batch: PoolBatch) -> None:
        """Gives a batch's memory back to the workers."""
        self._free.append(self.slots.index(batch.slot))

    def interrupt(self) -> None:
        """Makes `batches` return soon, wherever it waits, until `resume`. For other threads."""
        self._interrupted = True
        self._wake()

    def resume(self) -> None:
        """Lets `batches` be called again after `interrupt`."""
        self._interrupted = False

    def readings(self) -> list[Reading]:
        """Returns which sample each busy worker is reading, and for how long."""
        now = time.monotonic_ns()
        states = self._states.tolist()
        return [Reading(i, s, (now - since) / 1e9) for i, (s, since) in enumerate(states) if s != _IDLE]

    def close(self) -> None:
        """Ends all workers and gives their memory back."""
        for worker in [*self._workers, *self._retired]:
            worker.close()
        self._workers, self._retired = [], []
        if self._wake_reader >= 0:
            os.close(self._wake_reader)
            os.close(self._wake_writer)
            self._wake_reader = self._wake_writer = -1
        for slot in [*self.slots, self.board]:
            slot.close()

    def _dispatch(self, requests: Iterator[list[SampleKey]], num_done: int) -> bool:
        """Hands out requests while workers have room; returns whether there are no more."""
        with self._lock:
            while self._free:
                in_work = sum(len(worker.outstanding) for worker in self._workers)
                if in_work + num_done >= len(self._workers) * self.prefetch_factor:
                    return False
                worker = min(self._workers, key=lambda w: len(w.outstanding))
                keys = next(requests, None)
                if keys is None:
                    return True
                task = _Task(self._next_number, self._free.pop(), np.array(keys, dtype=np.int64))
                self._next_number += 1
                worker.outstanding[task.number] = task
                try:
                    worker.tasks.send(task)
                except BrokenPipeError:  # it died; waiting for its result says of what
                    return False
        return False

    def _receive(self, done: dict[int, PoolBatch | BaseException]) -> bool:
        """Waits for a result, a death or an interruption; returns whether to go on."""
        with self._lock:
            workers = {w.results: w for w in [*self._workers, *self._retired]}
        ready = connection.wait([*workers, self._wake_reader])
        if self._wake_reader in ready:
            os.read(self._wake_reader, 4096)
        if self._interrupted:
            return False
        for results in ready:
            if results == self._wake_reader:
                continue
            assert isinstance(results, Connection)
            worker = workers[results]
            try:
                number, seconds, payload = pickle.loads(results.recv_bytes())
            except (EOFError, OSError):
                raise WorkerDied(self._explain_death(worker)) from None
            task = worker.outstanding.pop(number)
            slot = self.slots[task.slot]
            if isinstance(payload, _Raised):
                self._free.append(task.slot)
                result: PoolBatch | BaseException = payload.exception()
            else:
                result = PoolBatch(slot.get(payload, self.pin), slot, seconds)
            if number >= self._start:
                done[number] = result
            elif isinstance(result, PoolBatch):  # of an earlier call that was left early
                self.release(result)
            if worker in self._retired and not worker.outstanding:
                self._retired.remove(worker)
                worker.close()
        return True

    def _wake(self) -> None:
        if self._wake_writer >= 0:
            os.write(self._wake_writer, b"\0")

    def _explain_death(self, worker: _Worker) -> str:
        worker.process.join(5)
        code = worker.process.exitcode
        sample = int(self._states[worker.number, 0])
        at = f" while it read {self.describe(sample)}" if sample != _IDLE else ""
        if code is None:
            return f"loader worker {worker.number} closed its pipe but did not end{at}"
        if code >= 0:
            return f"loader worker {worker.number} ended with exit code {code}{at}"
        name = signal.Signals(-code).name
        causes = {
            signal.SIGKILL: "most likely the system was out of memory: fewer data.workers or data.prefetch_factor",
            signal.SIGBUS: "most likely a file that it had mapped shrank, or memory could not be had",
            signal.SIGSEGV: "a crash in native code, of a decoder or of the data set",
        }
        cause = causes.get(signal.Signals(-code), "somebody ended it")
        return f"loader worker {worker.number} was killed by {name}{at}; {cause}"


class _Raised:
    """An exception on its way from a worker, with the traceback that it had there."""

    def __init__(self, error: BaseException) -> None:
        self.text = "".join(traceback.format_exception(error))
        try:
            self.pickled: bytes | None = pickle.dumps(error)
            pickle.loads(self.pickled)
        except Exception:  # an exception that cannot travel
            self.pickled = None
        self.name = f"{type(error).__name__}: {error}"

    def exception(self) -> BaseException:
        error = pickle.loads(self.pickled) if self.pickled is not None else RuntimeError(self.name)
        error.add_note(f"in a loader worker:\n{self.text}")
        return error


def _work(load: Load, slots: list[Slot], board: Slot, number: int, tasks: Connection, results: Connection) -> None:
    """Loads batches until there are no more tasks; runs in a worker process."""
    _settle_in()
    board.clear()
    states = board.allocate((number + 1, 2), torch.int64)

    def reading(sample: int) -> None:
        states[number, 1] = time.monotonic_ns()
        states[number, 0] = sample

    while True:
        try:
            task = tasks.recv()
        except (EOFError, OSError):  # the training process is gone
            return
        started = time.perf_counter()
        slot = slots[task.slot]
        slot.clear()
        try:
            payload = slot.put(load(task.keys, slot, reading))
        except Exception as error:
            payload = _Raised(error)
        states[number, 0] = _IDLE
        try:
            results.send_bytes(pickle.dumps((task.number, time.perf_counter() - started, payload)))
        except BrokenPipeError:
            return


def _settle_in() -> None:
    # A group of its own: Ctrl-C and a launcher's SIGTERM go to the whole group of the training process, which
    # alone decides when to stop and needs its workers until then.
    os.setpgid(0, 0)
    # Inherited by fork, the training process's handler would only set a flag here, and never end the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # Nobody ends the workers of a training process that was killed: the kernel does, with its SIGKILL.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
