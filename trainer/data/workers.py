"""Worker processes that load batches, in order, into shared memory.

Owns the processes: starting, feeding, adding, removing and ending them, and saying what one of them died of or
hangs at. What a batch is and how it is loaded is `trainer.data.loader`; which samples it has, `trainer.data.sampler`.

torch's DataLoader cannot be interrupted, resized or asked what it is reading, and pickles every batch through
/dev/shm; so the pool is ours.

Nothing here waits for a worker while that may wait for us: a task is a few bytes, for which its pipe has room (the
samples' keys travel in the slot), so only workers ever wait for a full pipe.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.sampler import SampleKey, key_array
from trainer.data.slots import Slot
from trainer.faults.stopping import STOP_SIGNALS
from trainer.placement import use_one_thread
from trainer.system import die_with_parent

logger = logging.getLogger("lockstep")

_IDLE = -1
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


class WorkerDied(RuntimeError):
    """A worker process ended on its own."""


class PoolBatch(NamedTuple):
    """What a worker loaded; its tensors are memory of `slot` until that is released."""

    data: Any
    slot: Slot
    load_seconds: float
    cpu_seconds: float  # of these, on a core


class Reading(NamedTuple):
    """What a worker is doing now."""

    worker: int
    sample: int
    seconds: float


class _Task(NamedTuple):
    number: int
    slot: int
    num_keys: int  # they lie at the start of the slot


# The training process's ends of the pipes of all its workers. Every forked worker inherits them, and unless it closes
# them no worker sees the training process go.
_our_ends: weakref.WeakSet[Connection] = weakref.WeakSet()


class _Worker:
    """The training process's side of one worker."""

    def __init__(self, pool: WorkerPool, number: int) -> None:
        context = pool.context
        tasks, self.tasks = context.Pipe(duplex=False)
        self.results, results = context.Pipe(duplex=False)
        _our_ends.update([self.tasks, self.results])
        self.number = number
        self.outstanding: dict[int, _Task] = {}
        self.process = context.Process(
            target=_work,
            args=(pool.load, pool.slots, pool.board, number, tasks, results),
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
        self.process.kill()
        self.process.join(_END_SECONDS)
        if self.process.exitcode is None:
            logger.warning("loader worker %d (pid %d) cannot be ended", self.number, self.process.pid)
        else:
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
        context: how processes start; default: Python's way on this system. Where they are not forked, `load` must
            be picklable.
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
        context: BaseContext | None = None,
    ) -> None:
        assert prefetch_factor >= 1
        self.load = load
        self.describe = describe
        self.prefetch_factor = prefetch_factor
        self.max_workers = max_workers
        self.context: Any = context or multiprocessing.get_context()
        self._workers: list[_Worker] = []
        self._retired: list[_Worker] = []
        self._lock = threading.Lock()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)  # a full pipe wakes as well
        self._interrupted = self._is_running = False
        self._next_number = self._start = 0  # of the next task; of the first task of this call of `batches`
        self.slots: list[Slot] = []
        self.board = Slot()
        try:
            for _ in range(max_workers * prefetch_factor + held):
                self.slots.append(Slot(pin))
            self._free = list(range(len(self.slots)))
            # (sample, monotonic ns) per worker, with rows for retired ones: each of these has a slot at least.
            self._states = self.board.allocate((max_workers + len(self.slots), 2), torch.int64).numpy()
            self._states.fill(_IDLE)
            self.resize(num_workers)
        except BaseException:
            self.close()
            raise

    @property
    def num_workers(self) -> int:
        """Worker processes that take batches now."""
        return len(self._workers)

    def pids(self) -> list[int]:
        """Returns the process ids of the workers that take batches now."""
        return [worker.process.pid for worker in self._workers]

    def resize(self, num_workers: int) -> None:
        """Starts or retires workers; batches and their order stay the same.

        Call it from a thread that outlives the workers: on Linux they end with the thread that started them.
        A retired worker ends once its last batch has been taken.
        """
        assert 1 <= num_workers <= self.max_workers
        with self._lock:
            while len(self._workers) > num_workers:
                self._retired.append(self._workers.pop())
            while len(self._workers) < num_workers:
                busy = [worker for worker in self._retired if worker.outstanding]
                taken = {worker.number for worker in [*self._workers, *busy]}
                number = next(n for n in range(len(self._states)) if n not in taken)
                self._states[number] = _IDLE
                self._workers.append(_Worker(self, number))
            if not self._is_running:
                self._end_retired()
        self._wake()

    def batches(self, requests: Iterable[list[SampleKey]]) -> Iterator[PoolBatch]:
        """Yields a batch per request, in order; the caller releases each. One call at a time.

        Raises:
            WorkerDied: a worker process ended.
            Exception: what loading a batch raised, with the worker's traceback as a note.
        """
        pending = iter(requests)
        done: dict[int, PoolBatch | BaseException] = {}
        assert not self._is_running, "the batches of an earlier call are still under way"
        with self._lock:
            first = self._start = self._next_number
            self._is_running = True
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
            self._is_running = False
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
        workers = [*self._workers, *self._retired]
        for worker in workers:
            worker.process.kill()  # all of them, before waiting for one
        for worker in workers:
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
                request = next(requests, None)
                if request is None:
                    return True
                keys = key_array(request)
                worker = min(self._workers, key=lambda w: len(w.outstanding))
                task = _Task(self._next_number, self._free.pop(), len(keys))
                self._next_number += 1
                worker.outstanding[task.number] = task
                slot = self.slots[task.slot]
                slot.clear()
                slot.allocate(keys.shape, torch.int64).numpy()[:] = keys
                try:
                    worker.tasks.send(tuple(task))
                except OSError:  # it died; waiting for its result says of what
                    return False
        return False

    def _receive(self, done: dict[int, PoolBatch | BaseException]) -> bool:
        """Waits for a result, a death or an interruption; returns whether to go on."""
        with self._lock:
            self._end_retired()
            workers = {w.results: w for w in [*self._workers, *self._retired]}
        ready = connection.wait([*workers, self._wake_reader])
        if self._wake_reader in ready:
            os.read(self._wake_reader, 1 << 16)
        if self._interrupted:
            return False
        for results in ready:
            if results == self._wake_reader:
                continue
            assert isinstance(results, Connection)
            worker = workers[results]
            try:
                message = results.recv_bytes()
            except (EOFError, OSError):
                raise WorkerDied(self._explain_death(worker)) from None
            number, seconds, cpu_seconds, payload = pickle.loads(message)
            with self._lock:
                task = worker.outstanding.pop(number)
            if number >= self._start:
                done[number] = self._loaded(task, seconds, cpu_seconds, payload)
            else:  # of an earlier call that was left early
                self._free.append(task.slot)
        return True

    def _loaded(self, task: _Task, seconds: float, cpu_seconds: float, payload: bytes) -> PoolBatch | BaseException:
        slot = self.slots[task.slot]
        try:
            data = pickle.loads(payload)
            if not isinstance(data, _Raised):
                return PoolBatch(slot.get(data), slot, seconds, cpu_seconds)
            result = data.exception()
        except Exception as error:  # unpickling may run the user's code
            result = error
        self._free.append(task.slot)
        return result

    def _end_retired(self) -> None:
        """Ends retired workers without a task. Not while another thread waits for results: it would see them die."""
        for worker in [w for w in self._retired if not w.outstanding]:
            self._retired.remove(worker)
            worker.close()

    def _wake(self) -> None:
        if self._wake_writer >= 0:
            with suppress(BlockingIOError):
                os.write(self._wake_writer, b"\0")

    def _explain_death(self, worker: _Worker) -> str:
        worker.process.join(_END_SECONDS)
        code = worker.process.exitcode
        sample = int(self._states[worker.number, 0])
        at = f" while it read {self.describe(sample)}" if sample != _IDLE else ""
        who = f"loader worker {worker.number} (pid {worker.process.pid})"
        if code is None:
            return f"{who} closed its pipe but did not end{at}"
        if code >= 0:
            return f"{who} ended with exit code {code}{at}; the data set or a transform ended it"
        try:
            name = signal.Signals(-code).name
        except ValueError:  # a real-time signal
            name = f"signal {-code}"
        return f"{who} was killed by {name}{at}; {_CAUSES.get(-code, 'somebody ended it')}"


class _Raised:
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
            task = _Task(*tasks.recv())
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
            payload = pickle.dumps(_Raised(error))
        state[0] = _IDLE
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
