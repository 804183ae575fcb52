"""The worker pool: order, resizing, early exits, batches of any size."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import loads
import numpy as np
import psutil
import pytest
from conftest import nightly
from worker_pools import MakePool, check, delayed, drain, take

from trainer.data.sampler import SampleKey

# ---- order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_batches_come_in_order_from_all_workers(num_workers: int, make_pool: MakePool) -> None:
    pool = make_pool(num_workers=num_workers)
    for _ in range(2):
        assert len(set(take(pool, delayed(40)))) == num_workers
    assert len(pool._free) == len(pool.slots)


def test_workers_load_no_further_ahead_than_asked_for(make_pool: MakePool) -> None:
    pool, asked = make_pool(num_workers=2, prefetch_factor=3), []

    def requests() -> Iterator[list[SampleKey]]:
        for request in delayed(50, most_ms=0):
            asked.append(request)
            yield request

    with closing(pool.batches(requests())) as batches:  # type: ignore[type-var]
        for taken in range(1, 20):
            pool.release(next(batches))
            assert taken <= len(asked) <= taken + 6


def test_resizing_in_mid_stream_keeps_order_and_ends_processes(make_pool: MakePool) -> None:
    others = set(psutil.Process().children())  # such as Python's resource tracker
    pool = make_pool(num_workers=4)
    before = set(psutil.Process().children()) - others
    requests = delayed(200)
    sizes = iter([1, 3, 2, 4, 1, 4, 2, 2, 1])
    for i, (batch, request) in enumerate(zip(pool.batches(requests), requests, strict=True)):
        check(batch, request)
        pool.release(batch)
        if i % 20 == 10 and (size := next(sizes, None)) is not None:
            pool.resize(size)
            assert pool.num_workers == size
    assert pool.num_workers == 1
    assert not pool._retired or all(not worker.outstanding for worker in pool._retired)
    take(pool, delayed(10))
    assert not pool._retired
    assert len([child for child in before if child.is_running()]) <= 1
    assert len(pool._free) == len(pool.slots)
    pool.resize(4)
    for size in [1, 4] * 15:  # more processes than the board has rows, one after the other
        pool.resize(size)
    take(pool, delayed(20))
    assert len(pool._free) == len(pool.slots)


@nightly
def test_resizing_while_results_are_waited_for(make_pool: MakePool) -> None:
    pool, stop = make_pool(num_workers=1, max_workers=3), threading.Event()
    problems: list[BaseException] = []

    def consume() -> None:
        try:
            while not stop.is_set():
                take(pool, delayed(30, most_ms=1))
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=consume)
    thread.start()
    rng = random.Random(0)
    for _ in range(60):
        pool.resize(rng.randint(1, 3))
        time.sleep(rng.random() / 50)
    stop.set()
    thread.join(30)
    assert not thread.is_alive()
    assert not problems
    assert len(pool._free) == len(pool.slots)


def test_a_new_worker_does_not_write_over_what_a_retired_one_reads(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=2, prefetch_factor=1)
    batches = pool.batches([[SampleKey(0, 0)], *[[SampleKey(5000, i)] for i in (1, 2, 3)]])
    pool.release(next(batches))
    pool.resize(1)  # retires the worker that reads sample 1
    pool.resize(2)
    thread = threading.Thread(target=lambda: list(map(pool.release, batches)))
    thread.start()
    deadline = time.monotonic() + 4.5
    while len(readings := pool.readings()) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    thread.join()
    assert {reading.sample for reading in readings} == {1, 2, 3}
    assert len({reading.worker for reading in readings}) == 3


# ---- early exits -----------------------------------------------------------------------------------------------


def test_a_pool_left_early_can_be_used_again(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=3)
    for left_after in [0, 1, 2, 5, 6, 11] * 3:
        requests = delayed(12, first=1000 * left_after)
        with closing(pool.batches(requests)) as batches:  # type: ignore[type-var]
            for request in requests[:left_after]:
                batch = next(batches)
                check(batch, request)
                pool.release(batch)
    take(pool, delayed(30))
    assert len(pool._free) == len(pool.slots)
    assert not any(worker.outstanding for worker in pool._workers)


def test_interrupting_ends_the_wait_and_the_pool_goes_on(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=1)
    timer = threading.Timer(0.2, pool.interrupt)
    timer.start()
    started = time.monotonic()
    assert list(pool.batches([[SampleKey(6000, 0)]])) == []
    assert time.monotonic() - started < 4
    timer.join()
    for _ in range(70_000):  # as many closed epochs, none of which ever waited
        pool._wake()
    pool.resume()
    take(pool, delayed(5))
    assert len(pool._free) == len(pool.slots)


def test_requests_that_raise_and_empty_requests(make_pool: MakePool) -> None:
    def requests() -> Iterator[list[SampleKey]]:
        yield from delayed(5)
        raise ValueError("no such epoch")

    pool = make_pool()
    with pytest.raises(ValueError, match="no such epoch"):
        drain(pool, requests())
    assert list(pool.batches([])) == []
    take(pool, [[], *delayed(3), []])
    assert len(pool._free) == len(pool.slots)


# ---- sizes -------------------------------------------------------------------------------------------------------


def test_batches_that_grow_and_shrink(make_pool: MakePool) -> None:
    sizes = [1, 3000, 10, 700, 701, 6000, 2, 6001, 0, 3000]  # KiB
    pool = make_pool(loads.sized)
    batches = pool.batches([[SampleKey(0, size)] for size in sizes])
    for batch, size in zip(batches, sizes, strict=True):
        for tensor, divisor in zip(batch.data, (251, 241, 239), strict=True):
            assert tensor.shape == (size, 1024)
            assert (tensor == size % divisor).all()
        pool.release(batch)
    # What was made in a slot before it grew is not copied within it.
    assert max(os.fstat(slot._file).st_size for slot in pool.slots) <= 3 * (6001 << 10) + (2 << 20)


def test_tasks_and_results_larger_than_pipes(make_pool: MakePool) -> None:
    """20,000 keys of 16 bytes in every task that waits, and as many in every result that nobody has taken."""
    pool = make_pool(loads.with_keys, num_workers=2, prefetch_factor=8)
    requests = [[SampleKey(-1, i) for i in range(first, first + 20_000)] for first in range(0, 400_000, 20_000)]
    for batch, request in zip(pool.batches(requests), requests, strict=True):
        check(batch, request)
        assert np.array_equal(batch.data["keys"], np.array(request))
        pool.release(batch)
