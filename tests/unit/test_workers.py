"""The worker pool: order, resizing, early exits, deaths, errors, and that whatever a batch holds arrives."""

from __future__ import annotations

import collections
import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import loads
import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import default_collate
from torchvision import tv_tensors

from trainer.data.nested import collate, map_tensors
from trainer.data.sampler import SampleKey
from trainer.data.slots import Slot
from trainer.data.worker_process import Load
from trainer.data.workers import WorkerDied, WorkerPool

MakePool = Callable[..., WorkerPool]
Requests = list[list[SampleKey]]


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    pools = []

    def make(load: Load = loads.rows, num_workers: int = 2, **settings: Any) -> WorkerPool:
        given: dict[str, Any] = {"max_workers": 4, "prefetch_factor": 2, "held": 1, "pin": False, **settings}
        pools.append(WorkerPool(load, lambda i: f"sample {i} ('{i}.jpg')", num_workers, **given))
        return pools[-1]

    yield make
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
    batches = pool.batches([[SampleKey(0, 0)], *[[SampleKey(1500, i)] for i in (1, 2, 3)]])
    pool.release(next(batches))
    pool.resize(1)  # retires the worker that reads sample 1
    pool.resize(2)
    thread = threading.Thread(target=lambda: list(map(pool.release, batches)))
    thread.start()
    deadline = time.monotonic() + 1.2
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
    assert list(pool.batches([[SampleKey(1500, 0)]])) == []
    assert time.monotonic() - started < 1
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


# ---- deaths and errors -------------------------------------------------------------------------------------------

DEATHS = [
    ("SIGKILL", "was killed by SIGKILL while it read sample 13 ('13.jpg'); most likely the system was out of memory"),
    ("SIGSEGV", "was killed by SIGSEGV while it read sample 13 ('13.jpg'); a crash in native code"),
    ("SIGABRT", "was killed by SIGABRT while it read sample 13 ('13.jpg'); native code gave up"),
    ("SIGRTMIN", "was killed by SIGRTMIN while it read sample 13"),
    ("exit 3", "ended with exit code 3 while it read sample 13 ('13.jpg'); the data set or a transform ended it"),
    ("_exit 4", "ended with exit code 4 while it read sample 13 ('13.jpg')"),
]


@pytest.mark.parametrize(("what", "message"), DEATHS, ids=[what for what, _ in DEATHS])
def test_a_workers_death_is_found_at_once_and_explained(what: str, message: str, make_pool: MakePool) -> None:
    pool = make_pool(loads.Unlucky(what), num_workers=3)
    pids = {worker.number: worker.process.pid for worker in pool._workers}
    started = time.monotonic()
    # The others are in reads that take long: none of them must be waited for.
    requests = [[SampleKey(60_000, 1)], [SampleKey(60_000, 2)], [SampleKey(0, 13)], [SampleKey(0, 4)]]
    with pytest.raises(WorkerDied) as raised:
        next(pool.batches(requests))
    assert time.monotonic() - started < 4
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"loader worker 2 (pid {pids[2]}) ")
    with pytest.raises(WorkerDied, match="loader worker 2"):
        next(pool.batches(delayed(9)))
    pool.close()
    assert time.monotonic() - started < 6


def test_the_death_of_an_idle_worker_is_found(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=2)
    drain(pool, delayed(1))
    os.kill(pool._workers[1].process.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"worker 1 \(pid \d+\) was killed by SIGKILL; most likely"):
        take(pool, delayed(100))


def test_a_retired_worker_without_work_may_die(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=2)
    requests = delayed(20, most_ms=0)
    batches = pool.batches(requests)
    pool.release(next(batches))
    time.sleep(0.2)
    worker = pool._workers[1]
    pool.resize(1)
    for request in requests[1:]:
        if not worker.outstanding and worker in pool._retired:
            os.kill(worker.process.pid, signal.SIGKILL)
        batch = next(batches)
        check(batch, request)
        pool.release(batch)
    assert next(batches, None) is None
    take(pool, delayed(5))


def test_stop_signals_of_the_group_do_not_reach_workers(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=2)
    for worker in pool._workers:
        os.kill(worker.process.pid, signal.SIGINT)
    processes = take(pool, delayed(20))
    assert {os.getpgid(pid) for pid in processes} == set(processes)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_workers_hold_no_pipe_end_of_the_training_process(make_pool: MakePool) -> None:
    """Else a worker would never see that the training process is gone."""
    pools = [make_pool(loads.open_ends, num_workers=3) for _ in range(2)]
    for pool in pools:
        for batch in pool.batches(delayed(6, most_ms=0)):
            assert batch.data == 0
            pool.release(batch)


def test_an_exception_arrives_with_its_type_and_the_workers_traceback(make_pool: MakePool) -> None:
    pool = make_pool(loads.Unlucky("ZeroDivisionError"))
    requests = delayed(10, size=2)
    with pytest.raises(ZeroDivisionError, match="thirteen") as raised:
        drain(pool, requests)
    shown = "".join(traceback.format_exception(raised.value))
    assert "in a loader worker:\nTraceback" in shown
    assert "loads.py" in shown
    assert "in happen" in shown
    take(pool, delayed(20, first=100))
    assert len(pool._free) == len(pool.slots)


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("Cannot travel", RuntimeError, "CannotTravel: 13: thirteen"),
        ("lambda", Exception, "pickle"),
        ("NeverArrives", LookupError, "not from here"),
        ("StopIteration", RuntimeError, "StopIteration"),
    ],
)
def test_what_cannot_be_sent_is_an_error_and_not_a_death(
    what: str, error: type[Exception], message: str, make_pool: MakePool
) -> None:
    pool = make_pool(loads.Unlucky(what), num_workers=1, prefetch_factor=1)
    with pytest.raises(error, match=message) as raised:
        next(pool.batches([[SampleKey(0, 13)]]))
    assert not isinstance(raised.value, WorkerDied)
    take(pool, delayed(5, first=100))
    assert len(pool._free) == len(pool.slots)


def test_a_pool_that_cannot_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch, make_pool: MakePool) -> None:
    started = 0
    start = multiprocessing.Process.start

    def fail_third(process: Any) -> None:
        nonlocal started
        started += 1
        if started == 3:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        start(process)

    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(context.Process, "start", fail_third)
    gc.collect()
    files, children = set(os.listdir("/proc/self/fd")), set(psutil.Process().children())
    with pytest.raises(BlockingIOError):
        make_pool(num_workers=4, context=context)
    assert set(os.listdir("/proc/self/fd")) == files
    assert set(psutil.Process().children()) == children


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


# ---- contents ----------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True, slots=True)
class Frozen:
    image: torch.Tensor
    name: str


@dataclass
class Scaled:
    """Changes what it is given, and computes a part itself."""

    image: torch.Tensor
    total: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.image = self.image / 2
        self.total = self.image.sum()


def same(a: Any, b: Any, strides: bool = True) -> bool:
    """Tells whether two structures are equal, in types, values and the strides of tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and (a.stride() == b.stride() or not strides) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[k], b[k], strides) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, strides) for x, y in zip(a, b, strict=True))
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)
    return bool(a == b)


def structure() -> Any:
    images = torch.rand(4, 3, 6, 5)
    return {
        "channels last": images.contiguous(memory_format=torch.channels_last),
        "transposed": images.permute(3, 1, 0, 2),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "types": [torch.ones(3).to(d) for d in (torch.bool, torch.bfloat16, torch.complex64, torch.uint8, torch.int16)],
        "tuple": (1, "text", b"bytes", None, True, 2.5, np.float32(1.5)),
        "array": np.arange(6).reshape(2, 3)[:, ::-1],
        "pair": Pair(images[0], {"deep": [torch.arange(3)]}),
        "frozen": Frozen(images[1].clone(), "name"),
        "scaled": Scaled(torch.ones(3)),
        "ordered": collections.OrderedDict(a=torch.ones(2)),
        7: [],
    }


def test_whatever_a_batch_holds_arrives(make_pool: MakePool) -> None:
    data = structure()
    pool = make_pool(loads.Structure(data))
    batches = pool.batches([[SampleKey(0, 0)]] * 9)
    for batch in batches:
        assert same(batch.data, data)
        pool.release(batch)


def test_tensors_with_gaps_arrive_as_clone_would_have_them(make_pool: MakePool) -> None:
    images = torch.rand(4, 3, 6, 5).contiguous(memory_format=torch.channels_last)
    data = [images[:, :, ::2], images[:, :2], torch.rand(3, 1).expand(3, 4), torch.rand(4, requires_grad=True) * 2]
    pool = make_pool(loads.Structure(data))
    for batch in pool.batches([[SampleKey(0, 0)]] * 9):
        assert all(same(sent.detach().clone(), got) for sent, got in zip(data, batch.data, strict=True))
        pool.release(batch)


def test_mapping_over_a_structure_keeps_it() -> None:
    data = structure()
    assert same(map_tensors(torch.clone, data), data)
    counts = collections.defaultdict(int, a=torch.ones(2))  # type: ignore[arg-type]
    mapped = map_tensors(torch.clone, counts)
    assert mapped["missing"] == 0


COLLATED: list[list[Any]] = [
    [1, 2, 3],
    [1.5, 2.5],
    [1, 2.5],
    [True, False],
    [np.float32(1), np.float32(2)],
    [np.int16(1), np.int16(2)],
    [np.bool_(True), np.bool_(False)],
    [np.array(1.5), np.array(2.5)],
    [np.array([1, 2], np.uint8), np.array([3, 4], np.uint8)],
    [np.arange(6.0).reshape(2, 3).T, np.ones((3, 2))],
    [np.array([1, 2], np.int32), np.array([1.5, 2.5])],
    [torch.tensor(1), torch.tensor(2)],
    [torch.ones(2), torch.ones(2, dtype=torch.float64)],
    [torch.rand(3, 4, 5).permute(2, 0, 1), torch.rand(5, 3, 4)],
    [torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last) for _ in range(2)],
    [torch.empty(0, 3), torch.empty(0, 3)],
    ["a", "b"],
    [b"a", b"b"],
    [[], []],
    [(), ()],
    [{}, {}],
    [[1, torch.ones(2)], [2, torch.zeros(2)]],
    [{"a": 1, "b": [1.5]}, {"a": 2, "b": [2.5]}],
    [collections.OrderedDict(a=1), collections.OrderedDict(a=2)],
    [collections.defaultdict(int, a=1), collections.defaultdict(int, a=2)],
    [collections.UserDict(a=1), collections.UserDict(a=2)],
    [Pair(1, torch.ones(2)), Pair(2, torch.ones(2))],
    [tv_tensors.Image(torch.ones(3, 2, 2)), tv_tensors.Image(torch.zeros(3, 2, 2))],
    [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(2))],
]


@pytest.mark.parametrize("items", COLLATED, ids=lambda items: type(items[0]).__name__)
def test_batches_are_those_of_torch_and_lie_in_the_slot(items: list[Any], make_pool: MakePool) -> None:
    slot = Slot()
    expected, made = default_collate(items), collate(items, slot.allocate)
    assert same(map_tensors(torch.Tensor.detach, expected), made, strides=False)  # contiguous, as DataLoader's workers
    arrived = slot.get(slot.put(made))
    assert same(made, arrived)

    def is_in_slot(tensor: torch.Tensor) -> None:
        assert tensor.numel() == 0 or slot._offset_of(tensor) is not None
        assert not tensor.requires_grad

    map_tensors(is_in_slot, arrived)
    slot.close()


def test_batches_that_torch_does_not_make() -> None:
    assert collate([None, None], _in_new_memory) is None
    frozen = collate([Frozen(torch.ones(2), "a"), Frozen(torch.zeros(2), "b")], _in_new_memory)
    assert same(frozen, Frozen(torch.tensor([[1.0, 1], [0, 0]]), ["a", "b"]))  # type: ignore[arg-type]
    scaled = collate([Scaled(torch.ones(2)), Scaled(torch.zeros(2))], _in_new_memory)
    assert scaled.image.tolist() == [[0.5, 0.5], [0, 0]]
    assert scaled.total.tolist() == [1, 0]


@pytest.mark.parametrize(
    "items",
    [
        [torch.ones(2), torch.ones(3)],
        [torch.ones(2), None],
        [None, 1],
        [{"a": 1}, {"a": 1, "b": 2}],
        [[1], [1, 2]],
        [object(), object()],
        [np.array(["a"]), np.array(["b"])],
        [torch.ones(2).to_sparse(), torch.ones(2).to_sparse()],
    ],
    ids=["shapes", "none last", "none first", "keys", "lengths", "objects", "text", "sparse"],
)
def test_what_makes_no_batch_is_refused(items: list[Any]) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError, KeyError)):
        collate(items, _in_new_memory)


def _in_new_memory(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


# ---- how processes start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked(method: str, make_pool: MakePool) -> None:
    context = multiprocessing.get_context(method)
    pool = make_pool(partial(loads.rows), num_workers=1, max_workers=2, context=context)
    take(pool, delayed(10))
    pids = set(take(pool, [[SampleKey(0, i) for i in range(20_000)]] * 3))
    assert os.getpid() not in pids
    assert {os.getpgid(pid) for pid in pids} == pids
    os.kill(pids.pop(), signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"SIGKILL|exit code"):
        take(pool, delayed(10))


ORPHANS = """
import multiprocessing, sys, time
import loads
from trainer.data.sampler import SampleKey
from trainer.data.workers import WorkerPool

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    pool = WorkerPool(loads.rows, str, 2, 2, 2, held=1, pin=False, context=context)
    batches = pool.batches([[SampleKey(0, 0)], [SampleKey(3_600_000, 1)], [SampleKey(0, 2)]])
    pool.release(next(batches))
    while not any(reading.sample == 1 for reading in pool.readings()):
        time.sleep(0.01)
    print(*(worker.process.pid for worker in pool._workers), flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_a_training_process_that_is_killed(
    method: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    folders = [str(request.config.rootpath), str(Path(loads.__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    with subprocess.Popen([sys.executable, script, method], stdout=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in run.stdout.readline().split()]
        run.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 10

    def is_alive(process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [process.pid for process in workers if is_alive(process)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
