"""Batches on their way from the workers to the device, ahead of the step, on a thread and a stream of their own.

Owns the thread, the copies and their ordering against the step's stream. What is loaded is `trainer.data.loader`;
what the device does with a batch is `trainer.data.augment`.
"""

from __future__ import annotations

import collections
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NamedTuple

import torch

from trainer.data.augment import AugmentationPlan
from trainer.data.loader import LoadedBatch, LoadFailure
from trainer.data.nested import map_tensors
from trainer.data.sampler import KeyRows
from trainer.data.workers import PoolBatch, WorkerPool
from trainer.errors import UserError

logger = logging.getLogger("lockstep")

SLOW_SECONDS = 30.0  # after so long without a batch, what the workers are reading is logged


class DeviceBatch(NamedTuple):
    """A batch on the device; on CUDA, the step's stream may use it once it has waited for `copied`."""

    batch: LoadedBatch
    plan: AugmentationPlan | None
    load_seconds: float = 0.0  # that one worker took
    load_cpu_seconds: float = 0.0  # of these, on a core
    copied: torch.cuda.Event | None = None
    copying: tuple[float, float] | None = None  # from when to when it was copied, by time.perf_counter


class _Failure(NamedTuple):
    """Why there are no more batches; raised whenever one is asked for."""

    error: BaseException
    traceback: TracebackType | None  # without what each raising adds


class Prefetcher:
    """Loads and copies the batches of `requests`, at most `depth` ahead of who takes them.

    Args:
        pool: the workers; no one else may use them meanwhile.
        requests: the samples of each batch.
        device: where batches go.
        depth: batches that wait on the device.
        check: called with each batch while it is in host memory; raises UserError on bad data.
        move: returns a batch with its data on the device; called on the copy stream.
        draw: returns the augmentation of a batch, in host memory.
    """

    def __init__(
        self,
        pool: WorkerPool,
        requests: Iterable[KeyRows],
        device: torch.device,
        depth: int,
        check: Callable[[LoadedBatch], None],
        move: Callable[[LoadedBatch], LoadedBatch],
        draw: Callable[[LoadedBatch], AugmentationPlan | None],
    ) -> None:
        pool.resume()
        self._pool = pool
        self._requests = requests
        self._device = device
        self._depth = depth
        self._check = check
        self._move = move
        self._draw = draw
        self._stream = _copy_stream(device) if device.type == "cuda" else None
        self._ready: collections.deque[DeviceBatch | _Failure | None] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="lockstep-feed", daemon=True)
        self._thread.start()

    def get(self) -> DeviceBatch | None:
        """Returns the next batch, or None after the last and once closed; waits for it.

        Raises:
            UserError: bad data.
            WorkerDied: a worker process ended.
            Exception: what loading raised.
        """
        patience = SLOW_SECONDS
        started = time.monotonic()
        with self._changed:
            while not self._ready and not self._closed:
                if not self._changed.wait(timeout=max(started + patience - time.monotonic(), 0.0)):
                    self._report_slowness(time.monotonic() - started)
                    patience *= 2
            if self._closed:
                return None
            item = self._ready[0]
            if isinstance(item, DeviceBatch):  # the end and a failure stay, for whoever asks again
                self._ready.popleft()
                self._changed.notify_all()
        if isinstance(item, _Failure):
            raise item.error.with_traceback(item.traceback)
        return None if item is None else self._handed_over(item)

    def close(self) -> None:
        """Ends the thread, wherever it is; the workers stay."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pool.interrupt()
        self._thread.join()
        self._ready.clear()

    # ---- on the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        batches = self._pool.batches(self._requests)
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # the current device is a thread's own
            for loaded in batches:
                try:
                    ready = self._copied(loaded)
                finally:
                    self._pool.release(loaded)
                if not self._put(ready):
                    return
            self._put(None)
        except BaseException as error:
            self._put(_Failure(error, error.__traceback__))
        finally:
            batches.close()  # type: ignore[attr-defined]  # a generator

    def _copied(self, loaded: PoolBatch) -> DeviceBatch:
        batch: LoadedBatch | LoadFailure = loaded.data
        if isinstance(batch, LoadFailure):
            raise UserError(*batch.problems)
        if len(batch.keys):
            self._check(batch)
        began = time.perf_counter()
        if self._stream is None:
            batch = self._move(batch)
            plan, copying = self._draw(batch), (began, time.perf_counter())
            return DeviceBatch(batch, plan, loaded.load_seconds, loaded.cpu_seconds, copying=copying)
        with torch.cuda.stream(self._stream):
            batch = self._move(batch)
            plan = self._draw(batch)
            plan = plan.pin_memory().to(self._device, non_blocking=True) if plan is not None else None
            copied = torch.cuda.Event(blocking=True)  # waiting for it must not take a core from the workers
            copied.record(self._stream)
        # This thread has nothing else to do, and the workers may write into the slot again only after the copy.
        copied.synchronize()
        copying = began, time.perf_counter()
        return DeviceBatch(batch, plan, loaded.load_seconds, loaded.cpu_seconds, copied, copying)

    def _put(self, item: DeviceBatch | _Failure | None) -> bool:
        """Hands an item over as soon as there is room; returns False once closed."""
        with self._changed:
            while len(self._ready) >= self._depth and not self._closed:
                self._changed.wait()
            self._ready.append(item)
            self._changed.notify_all()
            return not self._closed

    # ---- on the thread of the step ---------------------------------------------------------------------------

    def _handed_over(self, item: DeviceBatch) -> DeviceBatch:
        if item.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(item.copied)

            def record(tensor: torch.Tensor) -> Any:
                # Its memory belongs to the copy stream, which must not reuse it before the step's is done with it.
                tensor.record_stream(stream)
                return tensor

            map_tensors(record, item.batch.data)
            if item.plan is not None:
                map_tensors(record, item.plan)
        return item

    def _report_slowness(self, waited: float) -> None:
        longest = max(self._pool.readings(), key=lambda r: r.seconds, default=None)
        if longest is None:
            logger.warning("waited %.0f s for data; no worker is reading", waited)
        else:
            where = self._pool.describe(longest.sample)
            logger.warning(
                "waited %.0f s for data: worker %d has been reading %s for %.0f s",
                waited,
                longest.worker,
                where,
                longest.seconds,
            )


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: freed memory stays with the stream that it was allocated on."""
    return torch.cuda.Stream(device)
