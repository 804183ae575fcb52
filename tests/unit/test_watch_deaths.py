"""Every rank's watch: who died is named by all others at once, last words are kept, and stacks are written down."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from watching import HANG, TICK, WatchedJob, stay

from trainer.faults import watch as watch_module
from trainer.faults.fault import FIRST, Fault
from trainer.faults.judging import PLACES
from trainer.faults.stacks import FaultFiles
from trainer.faults.watch import Watch


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_all_others_at_once(watched_job: WatchedJob, victim: int) -> None:
    watched_job.start(3, stay)
    time.sleep(2 * TICK)
    killed = watched_job.kill(victim)
    others = [rank for rank in range(3) if rank != victim]
    fault = watched_job.ends(*others)
    assert (fault.rank, fault.kind, fault.pid) == (victim, "lost", watched_job.pid(victim))
    assert (fault.place, fault.step, fault.samples) == (PLACES[2 + victim], victim + 5, (victim, victim + 10))
    assert "ended without a word" in fault.message
    for rank in others:
        assert watched_job.end(rank)[1] - killed < 8  # what tells of a rank on a dead machine takes 20 s
        assert "in stay" in watched_job.text(rank)
        assert f"it has been in '{PLACES[2 + rank]}'" in watched_job.text(rank)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("is_near", [True, False])
def test_a_death_is_put_down_to_the_step_in_which_it_was(
    watched_job: WatchedJob, victim: int, is_near: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.faults.watch._GRACE", 2.0)  # until the others are in that step, too

    def step(watch: Watch, rank: int) -> None:
        for step in range(1, 31):
            samples = (step, 100 + rank) if rank == 0 else np.array([step, 100 + rank])
            watch.at("backward", step, samples)
            time.sleep(0.005)
        if rank == victim:
            os._exit(1)
        time.sleep(60)

    def far(introductions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return introductions if is_near else [{**introduction, "board": -1} for introduction in introductions]

    watched_job.start(3, step, change=far)
    fault = watched_job.ends(*{0, 1, 2} - {victim})
    assert (fault.rank, fault.kind, fault.step) == (victim, "lost", 30)
    # As it left it; from another machine nobody can tell more than that all were in this step.
    exact = ("backward", (30, 100 + victim))
    assert (fault.place, fault.samples) in ([exact] if is_near else [exact, (None, ())])


def test_a_forked_child_does_not_keep_a_dead_rank_alive(watched_job: WatchedJob) -> None:
    def fork_and_stay(watch: Watch, rank: int) -> None:
        if rank == 1:
            child = os.fork()
            if child == 0:
                time.sleep(60)
            watched_job.note("child", str(child))
        stay(watch, rank)

    watched_job.start(3, fork_and_stay)
    time.sleep(2 * TICK)
    killed = watched_job.kill(1)
    try:
        assert watched_job.end(0)[1] - killed < 8
        assert watched_job.ends(0, 2).rank == 1
    finally:
        os.kill(int(watched_job.wait_for("child")), signal.SIGKILL)


def test_last_words_are_the_verdict_everywhere(watched_job: WatchedJob) -> None:
    def fail(watch: Watch, rank: int) -> None:
        watch.at("forward", step=7, samples=(3, 4))
        if rank != 2:
            time.sleep(60)
        time.sleep(2 * TICK)
        try:
            raise ValueError("bad sample")
        except ValueError as error:
            began = time.monotonic()
            watch.failed(Fault(2, "error", repr(error)))
            assert time.monotonic() - began < 10
        os._exit(3)

    watched_job.start(3, fail)
    fault = watched_job.ends(0, 1)
    assert (fault.rank, fault.kind, fault.step, fault.place) == (2, "error", 7, "forward")
    assert fault.message == "ValueError('bad sample')"
    assert fault.samples == (3, 4)
    assert watched_job.join(2) == 3
    assert 'raise ValueError("bad sample")' in watched_job.text(2)  # with the traceback


def test_an_error_just_after_a_death_that_it_caused_is_the_first_fault(
    watched_job: WatchedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.faults.watch._GRACE", 3.0)  # however late rank 2 is

    def fall(watch: Watch, rank: int) -> None:
        watch.at("backward", step=2)
        time.sleep(2 * TICK)
        if rank == 1:
            os._exit(9)
        if rank == 2:
            time.sleep(0.1)
            watch.failed(Fault(2, "error", "the cause"))
            assert watch.first_fault(0) == Fault.from_json((watched_job.faults / FIRST).read_text())
        time.sleep(60)

    watched_job.start(4, fall)
    fault = watched_job.ends(0, 3)
    assert (fault.rank, fault.message) == (2, "the cause")


def test_the_first_of_several_errors_is_the_one_of_all(
    watched_job: WatchedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.faults.watch._ANSWER_SECONDS", 5.0)  # however late rank 0 is

    def fail(watch: Watch, rank: int) -> None:
        watch.at("forward", step=1)
        time.sleep(2 * TICK)
        if rank in (0, 1):
            watch.failed(Fault(rank, "error", f"error of rank {rank}"))
            watched_job.note(f"end-{rank}", json.dumps([watch.first_fault(1).to_json(), 0]))  # type: ignore[union-attr]
        time.sleep(60)

    watched_job.start(3, fail)
    assert watched_job.ends(0, 1, 2).kind == "error"


def test_a_survivor_learns_who_died_from_its_main_thread(watched_job: WatchedJob) -> None:
    def ask(watch: Watch, rank: int) -> None:
        watch.at("backward", step=4)
        if rank == 1:
            time.sleep(2 * TICK)
            os._exit(1)
        fault = watch.first_fault(seconds=5)
        watched_job.note(f"asked-{rank}", "nothing" if fault is None else fault.to_json())
        time.sleep(5)

    watched_job.start(3, ask)
    for rank in (0, 2):
        assert Fault.from_json(watched_job.wait_for(f"asked-{rank}")).rank == 1


def test_last_words_need_neither_rank_0_nor_the_file_system(watched_job: WatchedJob) -> None:
    class Stuck:
        def __call__(self) -> Path:
            time.sleep(60)
            raise AssertionError

    def fail(watch: Watch, rank: int) -> None:
        watch.at("forward", step=1)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(2 * TICK)
        watch._files._folder = Stuck()
        began = time.monotonic()
        watch.failed(Fault(1, "error", "mine"))
        watched_job.note("took", str(time.monotonic() - began))
        assert watch.first_fault(0).message == "mine"  # type: ignore[union-attr]

    watched_job.start(2, fail)
    assert float(watched_job.wait_for("took")) < 10
    assert watch_module._ANSWER_SECONDS <= 0.5  # for rank 0, and again for the file system


def test_a_file_system_that_hangs_does_not_delay_the_end(
    watched_job: WatchedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.faults.watch._WRITE_SECONDS", 1.0)

    def hang_in_files(watch: Watch, rank: int) -> None:
        if rank == 0:
            watch._files.append = lambda *_, **__: time.sleep(60)  # type: ignore[method-assign, assignment]
        stay(watch, rank)

    watched_job.start(2, hang_in_files)
    time.sleep(2 * TICK)
    killed = watched_job.kill(1)
    assert 1 < watched_job.end(0)[1] - killed < 10


def test_after_a_goodbye_nobody_is_missed(watched_job: WatchedJob) -> None:
    def leave(watch: Watch, rank: int) -> None:
        watch.at("ending", step=1)
        time.sleep((0, 0.2, 1.5 * HANG)[rank])

    watched_job.start(3, leave, hang=HANG)
    for rank in range(3):
        assert watched_job.wait_for(f"done-{rank}") == "null"
        assert watched_job.join(rank) == 0
    assert watched_job.nothing_ended()


def test_sigusr2_leaves_stacks_in_the_fault_folder_and_ends_nothing(watched_job: WatchedJob) -> None:
    watched_job.start(2, stay)
    time.sleep(2 * TICK)
    watched_job.kill(1, signal.SIGUSR2)
    deadline = time.monotonic() + 5
    while not (watched_job.faults / "rank-1.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.1)
    assert "in stay" in watched_job.text(1)
    assert watched_job.processes[1].is_alive()
    assert sorted(path.name for path in watched_job.faults.iterdir()) == ["rank-1.txt"]


def test_what_nccl_did_is_kept_where_nccl_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ["gloo"]
    group = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_backend=lambda: backend[0])
    monkeypatch.setitem(sys.modules, "torch.distributed", group)
    recorder = SimpleNamespace(_dump_nccl_trace_json=lambda: b'{"entries": []}')
    monkeypatch.setitem(sys.modules, "torch._C._distributed_c10d", recorder)
    files = FaultFiles(3, tmp_path)
    files.write_flight_recording()
    assert not list(tmp_path.iterdir())
    backend[0] = "cuda:nccl,cpu:gloo"
    files.write_flight_recording()
    assert (tmp_path / "rank-3-nccl.json").read_text() == '{"entries": []}'
