"""Worker processes that load batches, in order, into shared memory.

Owns the pool: feeding, adding and removing workers, and the order of what they load. One of them is
`trainer.data.worker_process`; what a batch is and how it is loaded, `trainer.data.loader`; which samples it has,
`trainer.data.sampler`.

torch's DataLoader cannot be interrupted, resized or asked what it is reading, and pickles every batch through
/dev/shm; so the pool is ours.

Nothing here waits for a worker while that may wait for us: a task is a few bytes, for which its pipe has room (the
samples' keys travel in the slot), so only workers ever wait for a full pipe.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import torch

from trainer.data.sampler import KeyRows, key_array
from trainer.data.slots import Slot
from trainer.data.worker_process import IDLE, Load, Raised, Task, Worker


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
        self._load = load
        self.describe = describe
        self.prefetch_factor = prefetch_factor
        self.max_workers = max_workers
        self._context: Any = context or multiprocessing.get_context()
        self._workers: list[Worker] = []
        self._retired: list[Worker] = []
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
            self._states.fill(IDLE)
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
                self._states[number] = IDLE
                self._workers.append(Worker(self._context, self._load, self.slots, self.board, number))
            if not self._is_running:
                self._end_retired()
        self._wake()

    def batches(self, requests: Iterable[KeyRows]) -> Iterator[PoolBatch]:
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
        return [Reading(i, s, (now - since) / 1e9) for i, (s, since) in enumerate(states) if s != IDLE]

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

    def _dispatch(self, requests: Iterator[KeyRows], num_done: int) -> bool:
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
                task = Task(self._next_number, self._free.pop(), len(keys))
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

    def _loaded(self, task: Task, seconds: float, cpu_seconds: float, payload: bytes) -> PoolBatch | BaseException:
        slot = self.slots[task.slot]
        try:
            data = pickle.loads(payload)
            if not isinstance(data, Raised):
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

    def _explain_death(self, worker: Worker) -> str:
        sample = int(self._states[worker.number, 0])
        return worker.explain_death(f" while it read {self.describe(sample)}" if sample != IDLE else "")
