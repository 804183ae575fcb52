"""Every rank's watch: the rank that the others wait for is named and ended, and nobody who gets on."""

from __future__ import annotations

import ctypes
import signal
import time
from typing import Any

import pytest
from watching import HANG, TICK, WatchedJob

from trainer.faults.judging import Report, Standing, find_hang
from trainer.faults.watch import Watch


def train(watch: Watch, rank: int) -> None:
    while True:
        watch.at("forward", step=1)
        time.sleep(0.01)


def test_the_rank_that_the_others_wait_for_is_named_with_what_its_feed_reads(watched_job: WatchedJob) -> None:
    def wait(watch: Watch, rank: int) -> None:
        watch.at("loading a batch" if rank == 1 else "backward", step=9, samples=(rank,))
        time.sleep(60)

    watched_job.start(3, wait, HANG, describe_feed=lambda rank: lambda: [f"worker 0 of rank {rank} reads dog.jpg"])
    fault = watched_job.ends(0, 1, 2)
    assert (fault.rank, fault.kind, fault.place, fault.step, fault.samples) == (1, "hang", "loading a batch", 9, (1,))
    assert "has been in 'loading a batch' for " in fault.message
    assert "while the others wait for it; worker 0 of rank 1 reads dog.jpg" in fault.message
    for rank in range(3):
        assert "in wait" in watched_job.text(rank)
        assert f"worker 0 of rank {rank} reads dog.jpg" in watched_job.text(rank)
        assert watched_job.join(rank) == 1


def test_fewer_collectives_tell_more_than_the_place(watched_job: WatchedJob) -> None:
    def wait(watch: Watch, rank: int) -> None:
        watch.at("loading a batch" if rank == 1 else "backward", step=9)
        time.sleep(60)

    watched_job.start(3, wait, HANG, sequence_numbers=lambda rank: lambda: 40 if rank == 2 else 41)
    assert watched_job.ends(0, 1, 2).rank == 2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_named_and_killed(watched_job: WatchedJob, victim: int) -> None:
    others = [rank for rank in range(3) if rank != victim]

    def wait(watch: Watch, rank: int) -> None:
        watch.at("backward", step=3)
        time.sleep(60)

    watched_job.start(3, wait, HANG)
    time.sleep(2 * TICK)
    stopped = watched_job.kill(victim, signal.SIGSTOP)
    fault = watched_job.ends(*others)
    assert (fault.rank, fault.kind, fault.place, fault.step) == (victim, "hang", "backward", 3)
    assert "its process is stopped" in fault.message
    for rank in others:
        assert watched_job.end(rank)[1] - stopped < HANG + 10
    assert watched_job.join(victim) == -signal.SIGKILL
    assert "status: stopped" in watched_job.text(victim)


def test_a_rank_that_never_gives_the_lock_back_is_named_and_killed_and_its_stacks_are_kept(
    watched_job: WatchedJob,
) -> None:
    def native(watch: Watch, rank: int) -> None:
        watch.at("forward" if rank == 1 else "backward", step=3)
        time.sleep(2 * TICK)
        if rank == 1:
            ctypes.PyDLL(None).sleep(60)
        time.sleep(60)

    watched_job.start(3, native, HANG)
    fault = watched_job.ends(0, 2)
    assert (fault.rank, fault.kind, fault.place) == (1, "hang", "forward")
    assert "native code holds Python's lock" in fault.message
    assert watched_job.join(1) == -signal.SIGKILL
    assert "in native" in watched_job.text(1)  # by faulthandler, on SIGUSR2


def test_one_rank_alone_judges_itself(watched_job: WatchedJob) -> None:
    def wait(watch: Watch, rank: int) -> None:
        watch.at("loading a batch", step=1)
        time.sleep(60)

    watched_job.start(1, wait, HANG, describe_feed=lambda rank: lambda: ["reads cat.jpg"])
    fault = watched_job.ends(0)
    assert fault.message.endswith(" s; reads cat.jpg")
    assert "has been in 'loading a batch' for" in fault.message


def test_progress_without_a_change_of_place_is_progress(watched_job: WatchedJob) -> None:
    def load(watch: Watch, rank: int) -> None:
        watch.at("loading a batch" if rank == 1 else "backward", step=1)
        for _ in range(30):
            time.sleep(0.1)
            if rank == 1:
                watch.beat()

    watched_job.start(2, load, HANG)
    for rank in range(2):
        assert watched_job.wait_for(f"done-{rank}") == "null"
    assert watched_job.nothing_ended()


def test_a_place_has_the_time_that_it_was_given(watched_job: WatchedJob) -> None:
    def save(watch: Watch, rank: int) -> None:
        if rank == 0:
            watch.at("saving a checkpoint", step=4, allowance=2)
        elif rank == 1:
            watch.at("report", step=4)
        else:
            watch.at("building", allowance=0)
            for _ in range(100):
                time.sleep(0.1)
                watch.at("ending", step=4)
        time.sleep(60)

    began = time.monotonic()
    watched_job.start(3, save, HANG)
    fault = watched_job.ends(0, 1, 2)
    assert (fault.rank, fault.place) == (0, "saving a checkpoint")
    assert watched_job.end(0)[1] - began > 2 * HANG


def test_a_feed_that_does_not_answer_hides_no_hang(watched_job: WatchedJob) -> None:
    def wait(watch: Watch, rank: int) -> None:
        watch.at("loading a batch", step=1)
        time.sleep(60)

    watched_job.start(2, wait, HANG, describe_feed=lambda rank: lambda: time.sleep(60) if rank == 1 else 1 / 0)
    assert watched_job.ends(0, 1).place == "loading a batch"
    assert "feed: the feed cannot say what it does: ZeroDivisionError" in watched_job.text(0)


def test_when_all_were_stopped_nobody_is_accused(watched_job: WatchedJob) -> None:
    watched_job.start(3, train, HANG)
    time.sleep(2 * TICK)
    for rank in range(3):
        watched_job.kill(rank, signal.SIGSTOP)
    time.sleep(HANG + 1.0)
    for rank in (1, 2, 0):
        watched_job.kill(rank, signal.SIGCONT)
    time.sleep(HANG + 0.5)
    assert watched_job.nothing_ended()
    watched_job.kill(1)  # and it still works
    assert watched_job.ends(0, 2).rank == 1


def stand(place: str, idle: float, quiet: float = 0.0, **more: Any) -> Standing:
    return Standing(Report(place, idle=idle, **{"step": 1, **more}), heard=100.0 - quiet)


def judge(*standings: Standing) -> int | None:
    hang = find_hang(dict(enumerate(standings)), now=100.0, hang_seconds=10, tick=1)
    return None if hang is None else hang.rank


def test_whoever_is_behind_is_judged_by_its_own_time() -> None:
    assert judge(stand("backward", 11), stand("forward", 11)) == 1
    assert judge(stand("backward", 11), stand("forward", 9)) is None
    assert judge(stand("backward", 11), stand("forward", 11, allowance=2)) is None
    assert judge(stand("backward", 21), stand("forward", 21, allowance=2)) == 1
    assert judge(stand("backward", 99), stand("forward", 99, allowance=0)) is None
    assert judge(stand("loading a batch", 11, step=2), stand("report", 11)) == 1
    assert judge(stand("building", 11, step=None), stand("forward", 11)) == 0
    assert judge(stand("backward", 11, sequence=8), stand("forward", 11, sequence=9)) == 0
    assert judge(stand("backward", 11, sequence=8), stand("forward", 11, sequence=8)) == 1
    assert judge(stand("backward", 11, sequence=8), stand("forward", 11)) == 1


def test_a_silent_rank_is_to_blame_only_when_the_others_wait() -> None:
    assert judge(stand("forward", 11), stand("backward", 0, quiet=11)) == 1
    assert judge(stand("forward", 3), stand("backward", 0, quiet=11)) is None
    assert judge(stand("forward", 11), stand("backward", 0, quiet=9)) is None  # its own time is not over
    assert judge(stand("forward", 11), stand("backward", 9, quiet=2)) is None  # its report is overdue
    assert judge(stand("forward", 11), stand("backward", 9, quiet=4)) == 1


def test_where_all_are_in_the_same_place_nobody_is_said_to_wait() -> None:
    hang = find_hang({0: stand("backward", 11), 1: stand("backward", 12)}, 100.0, 10, 1)
    assert hang is not None
    assert hang.message == "has been in 'backward' for 11 s, and so has every other rank"
    hang = find_hang({0: stand("backward", 11), 1: stand("forward", 12), 2: stand("forward", 12)}, 100.0, 10, 1)
    assert hang is not None
    assert hang.message.endswith("for 12 s while the others wait for it (and so for rank 2)")


def test_a_rank_that_fell_silent_after_a_report_without_a_limit_is_named() -> None:
    """It went from building to its steps, and was stopped there, before its next report."""
    late = Report("forward", 8, (), 30.0, 1.0, 5, ())
    building = Report("building", None, (), 0.5, 0.0, 1, ())
    standings = {0: Standing(late, 100.0), 1: Standing(building, 70.0)}
    hang = find_hang(standings, now=100.0, hang_seconds=10.0, tick=1.0)
    assert hang is not None
    assert (hang.rank, hang.silent) == (1, (1,))
    others_build = {0: Standing(building, 100.0), 1: Standing(building, 70.0)}
    assert find_hang(others_build, now=100.0, hang_seconds=10.0, tick=1.0) is None
