"""Pools of loader workers that are closed with their test, and loading with them what `loads` makes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import loads
import torch

from trainer.data.sampler import SampleKey
from trainer.data.worker_process import Load
from trainer.data.workers import WorkerPool

MakePool = Callable[..., WorkerPool]
Requests = list[list[SampleKey]]


@contextmanager
def opened_pools() -> Iterator[MakePool]:
    """Gives what makes a pool, and closes all that it has made."""
    pools = []

    def make(load: Load = loads.rows, num_workers: int = 2, **settings: Any) -> WorkerPool:
        given: dict[str, Any] = {"max_workers": 4, "prefetch_factor": 2, "held": 1, "pin": False, **settings}
        pools.append(WorkerPool(load, lambda i: f"sample {i} ('{i}.jpg')", num_workers, **given))
        return pools[-1]

    try:
        yield make
    finally:
        for pool in pools:
            pool.close()


def delayed(count: int, size: int = 3, most_ms: int = 4, first: int = 0) -> Requests:
    """Requests for consecutive samples, each of which takes a random time to load."""
    rng = random.Random(count)
    starts = range(first, first + count * size, size)
    return [[SampleKey(rng.randint(0, most_ms), i) for i in range(start, start + size)] for start in starts]


def check(batch: Any, request: list[SampleKey]) -> None:
    assert torch.equal(batch.data["rows"], loads.rows_of([key.sample for key in request]))


def take(pool: WorkerPool, requests: Requests) -> list[int]:
    """Loads all requests, checks them, and returns which process loaded each."""
    processes = []
    for batch, request in zip(pool.batches(requests), requests, strict=True):
        check(batch, request)
        processes.append(batch.data["worker"])
        pool.release(batch)
    return processes


def drain(pool: WorkerPool, requests: Iterable[list[SampleKey]]) -> None:
    """Loads all requests."""
    for batch in pool.batches(requests):
        pool.release(batch)
