"""Workers that die, fail or cannot start: found at once and explained, and nothing of them is left."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import loads
import psutil
import pytest
from conftest import few, nightly
from worker_pools import MakePool, check, delayed, drain, take

from trainer.data.sampler import SampleKey
from trainer.data.workers import WorkerDied

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
    assert time.monotonic() - started < 30
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"loader worker 2 (pid {pids[2]}) ")
    with pytest.raises(WorkerDied, match="loader worker 2"):
        next(pool.batches(delayed(9)))
    pool.close()
    assert time.monotonic() - started < 40


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


@nightly
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


@pytest.mark.parametrize("method", few(["fork", "forkserver"], "fork"))
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
