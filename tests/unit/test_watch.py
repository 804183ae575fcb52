"""Every rank's watch: deaths, last words and hangs, in forked processes without torch.distributed."""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trainer.faults.fault import FIRST, Fault
from trainer.faults.judging import PLACES, Report, Standing, find_hang
from trainer.faults.stacks import FaultFiles
from trainer.faults.watch import Watch
from trainer.faults.wire import Listener, Peer, line

TICK = 0.2
HANG = 0.8  # seconds

Scenario = Callable[[Watch, int], Any]
Change = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


class Job:
    """Ranks as forked processes, each of which runs a scenario under its watch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[Any] = []

    def start(
        self,
        num_ranks: int,
        scenario: Scenario,
        hang: float | None = None,
        change: Change = list,
        is_cut: bool = False,
        **options: Any,
    ) -> None:
        context = multiprocessing.get_context("fork")
        for rank in range(num_ranks):
            arguments = (rank, num_ranks, scenario, hang, change, is_cut, options)
            self.processes.append(context.Process(target=self._run, args=arguments, daemon=True))
            self.processes[-1].start()
        for rank in range(num_ranks):
            self._wait(f"ready-{rank}")

    def pid(self, rank: int) -> int:
        return int(self.processes[rank].pid)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> float:
        os.kill(self.pid(rank), number)
        return time.monotonic()

    def end(self, rank: int, seconds: float = 8.0) -> tuple[Fault, float]:
        """Returns what ended the job as this rank saw it, and when."""
        text, when = json.loads(self._wait(f"end-{rank}", seconds))
        return Fault.from_json(text), when

    def ends(self, *ranks: int) -> Fault:
        """Returns what ended the job, the same on all these ranks and in `first.json`."""
        faults = [self.end(rank)[0] for rank in ranks]
        first = Fault.from_json((self.faults / FIRST).read_text())
        for fault in faults:
            assert (fault.rank, fault.kind, fault.step, fault.place) == (
                first.rank,
                first.kind,
                first.step,
                first.place,
            )
        return first

    def nothing_ended(self) -> bool:
        return not list(self.folder.glob("end-*")) and not self.faults.exists()

    def join(self, rank: int, seconds: float = 8.0) -> int | None:
        self.processes[rank].join(seconds)
        return self.processes[rank].exitcode

    @property
    def faults(self) -> Path:
        return self.folder / "faults" / "attempt-001"

    def log(self, rank: int) -> list[str]:
        return (self.folder / f"log-{rank}").read_text().splitlines()

    def text(self, rank: int) -> str:
        return (self.faults / f"rank-{rank}.txt").read_text()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(5)

    def _wait(self, name: str, seconds: float = 8.0) -> str:
        deadline = time.monotonic() + seconds
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"no {name} after {seconds} s"
            time.sleep(0.01)
        return (self.folder / name).read_text()

    def _note(self, name: str, text: str) -> None:
        (self.folder / f".{name}").write_text(text)
        (self.folder / f".{name}").rename(self.folder / name)

    def _run(
        self,
        rank: int,
        num_ranks: int,
        scenario: Scenario,
        hang: float | None,
        change: Change,
        is_cut: bool,
        options: dict[str, Any],
    ) -> None:
        def share(value: Any) -> list[Any]:
            self._note(f"share-{rank}", json.dumps(value))
            return change([json.loads(self._wait(f"share-{other}")) for other in range(num_ranks)])

        def on_end(fault: Fault) -> None:
            self._note(f"end-{rank}", json.dumps([fault.to_json(), time.monotonic()]))
            os._exit(1)

        logging.getLogger("lockstep").addHandler(logging.FileHandler(self.folder / f"log-{rank}"))
        made = {name: value(rank) for name, value in options.items()}
        watch = Watch(rank, num_ranks, share, hang, self.faults, on_end=on_end, tick=TICK, **made)
        while len(watch._standings) < (0 if is_cut else num_ranks - 1 if rank == 0 else min(rank, 1)):
            time.sleep(0.01)  # until all are connected
        self._note(f"ready-{rank}", "")
        for other in range(num_ranks):
            self._wait(f"ready-{other}")
        scenario(watch, rank)
        watch.close()
        self._note(f"done-{rank}", json.dumps(None if watch._fault is None else watch._fault.to_json()))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    job.close()


def stay(watch: Watch, rank: int) -> None:
    """Every rank stays in its own place and step."""
    watch.at(PLACES[2 + rank], step=rank + 5, samples=(rank, rank + 10), allowance=0)
    time.sleep(60)


def train(watch: Watch, rank: int) -> None:
    while True:
        watch.at("forward", step=1)
        time.sleep(0.01)


# ---- deaths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_all_others_at_once(job: Job, victim: int) -> None:
    job.start(3, stay)
    time.sleep(2 * TICK)
    killed = job.kill(victim)
    others = [rank for rank in range(3) if rank != victim]
    fault = job.ends(*others)
    assert (fault.rank, fault.kind, fault.pid) == (victim, "lost", job.pid(victim))
    assert (fault.place, fault.step, fault.samples) == (PLACES[2 + victim], victim + 5, (victim, victim + 10))
    assert "ended without a word" in fault.message
    for rank in others:
        assert job.end(rank)[1] - killed < 1.5
        assert "in stay" in job.text(rank)
        assert f"it has been in '{PLACES[2 + rank]}'" in job.text(rank)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("is_near", [True, False])
def test_a_death_is_put_down_to_the_step_in_which_it_was(job: Job, victim: int, is_near: bool) -> None:
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

    job.start(3, step, change=far)
    fault = job.ends(*{0, 1, 2} - {victim})
    assert (fault.rank, fault.kind, fault.step) == (victim, "lost", 30)
    # As it left it; from another machine nobody can tell more than that all were in this step.
    exact = ("backward", (30, 100 + victim))
    assert (fault.place, fault.samples) in ([exact] if is_near else [exact, (None, ())])


def test_a_forked_child_does_not_keep_a_dead_rank_alive(job: Job) -> None:
    def fork_and_stay(watch: Watch, rank: int) -> None:
        if rank == 1:
            child = os.fork()
            if child == 0:
                time.sleep(60)
            job._note("child", str(child))
        stay(watch, rank)

    job.start(3, fork_and_stay)
    time.sleep(2 * TICK)
    killed = job.kill(1)
    try:
        assert job.end(0, seconds=2)[1] - killed < 1.5
        assert job.ends(0, 2).rank == 1
    finally:
        os.kill(int(job._wait("child")), signal.SIGKILL)


def test_last_words_are_the_verdict_everywhere(job: Job) -> None:
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
            assert time.monotonic() - began < 1
        os._exit(3)

    job.start(3, fail)
    fault = job.ends(0, 1)
    assert (fault.rank, fault.kind, fault.step, fault.place) == (2, "error", 7, "forward")
    assert fault.message == "ValueError('bad sample')"
    assert fault.samples == (3, 4)
    assert job.join(2) == 3
    assert 'raise ValueError("bad sample")' in job.text(2)  # with the traceback


def test_an_error_just_after_a_death_that_it_caused_is_the_first_fault(job: Job) -> None:
    def fall(watch: Watch, rank: int) -> None:
        watch.at("backward", step=2)
        time.sleep(2 * TICK)
        if rank == 1:
            os._exit(9)
        if rank == 2:
            time.sleep(0.1)
            watch.failed(Fault(2, "error", "the cause"))
            assert watch.first_fault(0) == Fault.from_json((job.faults / FIRST).read_text())
        time.sleep(60)

    job.start(4, fall)
    fault = job.ends(0, 3)
    assert (fault.rank, fault.message) == (2, "the cause")


def test_the_first_of_several_errors_is_the_one_of_all(job: Job) -> None:
    def fail(watch: Watch, rank: int) -> None:
        watch.at("forward", step=1)
        time.sleep(2 * TICK)
        if rank in (0, 1):
            watch.failed(Fault(rank, "error", f"error of rank {rank}"))
            job._note(f"end-{rank}", json.dumps([watch.first_fault(1).to_json(), 0]))  # type: ignore[union-attr]
        time.sleep(60)

    job.start(3, fail)
    assert job.ends(0, 1, 2).kind == "error"


def test_a_survivor_learns_who_died_from_its_main_thread(job: Job) -> None:
    def ask(watch: Watch, rank: int) -> None:
        watch.at("backward", step=4)
        if rank == 1:
            time.sleep(2 * TICK)
            os._exit(1)
        fault = watch.first_fault(seconds=5)
        job._note(f"asked-{rank}", "nothing" if fault is None else fault.to_json())
        time.sleep(5)

    job.start(3, ask)
    for rank in (0, 2):
        assert Fault.from_json(job._wait(f"asked-{rank}")).rank == 1


def test_last_words_need_neither_rank_0_nor_the_file_system(job: Job) -> None:
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
        job._note("took", str(time.monotonic() - began))
        assert watch.first_fault(0).message == "mine"  # type: ignore[union-attr]

    job.start(2, fail)
    assert float(job._wait("took")) < 1


def test_a_file_system_that_hangs_does_not_delay_the_end(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.faults.watch._WRITE_SECONDS", 1.0)

    def hang_in_files(watch: Watch, rank: int) -> None:
        if rank == 0:
            watch._files.append = lambda *_, **__: time.sleep(60)  # type: ignore[method-assign, assignment]
        stay(watch, rank)

    job.start(2, hang_in_files)
    time.sleep(2 * TICK)
    killed = job.kill(1)
    assert 1 < job.end(0)[1] - killed < 2.5


def test_after_a_goodbye_nobody_is_missed(job: Job) -> None:
    def leave(watch: Watch, rank: int) -> None:
        watch.at("ending", step=1)
        time.sleep((0, 0.2, 1.2)[rank])

    job.start(3, leave, hang=HANG)
    for rank in range(3):
        assert job._wait(f"done-{rank}") == "null"
        assert job.join(rank) == 0
    assert job.nothing_ended()


# ---- hangs ------------------------------------------------------------------------------------------------


def test_the_rank_that_the_others_wait_for_is_named_with_what_its_feed_reads(job: Job) -> None:
    def wait(watch: Watch, rank: int) -> None:
        watch.at("loading a batch" if rank == 1 else "backward", step=9, samples=(rank,))
        time.sleep(60)

    job.start(3, wait, HANG, describe_feed=lambda rank: lambda: [f"worker 0 of rank {rank} reads dog.jpg"])
    fault = job.ends(0, 1, 2)
    assert (fault.rank, fault.kind, fault.place, fault.step, fault.samples) == (1, "hang", "loading a batch", 9, (1,))
    assert "has been in 'loading a batch' for " in fault.message
    assert "while the others wait for it; worker 0 of rank 1 reads dog.jpg" in fault.message
    for rank in range(3):
        assert "in wait" in job.text(rank)
        assert f"worker 0 of rank {rank} reads dog.jpg" in job.text(rank)
        assert job.join(rank) == 1


def test_fewer_collectives_tell_more_than_the_place(job: Job) -> None:
    def wait(watch: Watch, rank: int) -> None:
        watch.at("loading a batch" if rank == 1 else "backward", step=9)
        time.sleep(60)

    job.start(3, wait, HANG, sequence_numbers=lambda rank: lambda: 40 if rank == 2 else 41)
    assert job.ends(0, 1, 2).rank == 2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_named_and_killed(job: Job, victim: int) -> None:
    others = [rank for rank in range(3) if rank != victim]

    def wait(watch: Watch, rank: int) -> None:
        watch.at("backward", step=3)
        time.sleep(60)

    job.start(3, wait, HANG)
    time.sleep(2 * TICK)
    stopped = job.kill(victim, signal.SIGSTOP)
    fault = job.ends(*others)
    assert (fault.rank, fault.kind, fault.place, fault.step) == (victim, "hang", "backward", 3)
    assert "its process is stopped" in fault.message
    for rank in others:
        assert job.end(rank)[1] - stopped < HANG + 3
    assert job.join(victim) == -signal.SIGKILL
    assert "status: stopped" in job.text(victim)


def test_a_rank_that_never_gives_the_lock_back_is_named_and_killed_and_its_stacks_are_kept(job: Job) -> None:
    def native(watch: Watch, rank: int) -> None:
        watch.at("forward" if rank == 1 else "backward", step=3)
        time.sleep(2 * TICK)
        if rank == 1:
            ctypes.PyDLL(None).sleep(60)
        time.sleep(60)

    job.start(3, native, HANG)
    fault = job.ends(0, 2)
    assert (fault.rank, fault.kind, fault.place) == (1, "hang", "forward")
    assert "native code holds Python's lock" in fault.message
    assert job.join(1) == -signal.SIGKILL
    assert "in native" in job.text(1)  # by faulthandler, on SIGUSR2


def test_one_rank_alone_judges_itself(job: Job) -> None:
    def wait(watch: Watch, rank: int) -> None:
        watch.at("loading a batch", step=1)
        time.sleep(60)

    job.start(1, wait, HANG, describe_feed=lambda rank: lambda: ["reads cat.jpg"])
    fault = job.ends(0)
    assert fault.message.endswith(" s; reads cat.jpg")
    assert "has been in 'loading a batch' for" in fault.message


def test_progress_without_a_change_of_place_is_progress(job: Job) -> None:
    def load(watch: Watch, rank: int) -> None:
        watch.at("loading a batch" if rank == 1 else "backward", step=1)
        for _ in range(15):
            time.sleep(0.1)
            if rank == 1:
                watch.beat()

    job.start(2, load, HANG)
    for rank in range(2):
        assert job._wait(f"done-{rank}") == "null"
    assert job.nothing_ended()


def test_a_place_has_the_time_that_it_was_given(job: Job) -> None:
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
    job.start(3, save, HANG)
    fault = job.ends(0, 1, 2)
    assert (fault.rank, fault.place) == (0, "saving a checkpoint")
    assert job.end(0)[1] - began > 2 * HANG


def test_a_feed_that_does_not_answer_hides_no_hang(job: Job) -> None:
    def wait(watch: Watch, rank: int) -> None:
        watch.at("loading a batch", step=1)
        time.sleep(60)

    job.start(2, wait, HANG, describe_feed=lambda rank: lambda: time.sleep(60) if rank == 1 else 1 / 0)
    assert job.ends(0, 1).place == "loading a batch"
    assert "feed: the feed cannot say what it does: ZeroDivisionError" in job.text(0)


def test_when_all_were_stopped_nobody_is_accused(job: Job) -> None:
    job.start(3, train, HANG)
    time.sleep(2 * TICK)
    for rank in range(3):
        job.kill(rank, signal.SIGSTOP)
    time.sleep(HANG + 1.0)
    for rank in (1, 2, 0):
        job.kill(rank, signal.SIGCONT)
    time.sleep(HANG + 0.5)
    assert job.nothing_ended()
    job.kill(1)  # and it still works
    assert job.ends(0, 2).rank == 1


# ---- connections ------------------------------------------------------------------------------------------


def test_strangers_are_refused(job: Job) -> None:
    job.start(2, stay)
    server = json.loads((job.folder / "share-0").read_text())["server"]
    fault = line({"rank": 1, "token": "guess", "fault": Fault(1, "error", "forged").to_json()})
    for greeting in (fault, b"\x80\x04pickle\n", b'{"rank": 1}\n', b"[]\n", b"\n"):
        with socket.create_connection(("127.0.0.1", server["port"]), timeout=5) as stranger:
            stranger.sendall(greeting)
            assert stranger.recv(1000) == b""
    time.sleep(0.5)
    assert job.nothing_ended()
    job.kill(1)
    assert job.ends(0).rank == 1


def test_a_rank_that_leaves_before_it_knows_that_it_is_connected_is_not_missed(job: Job) -> None:
    def leave(watch: Watch, rank: int) -> None:
        watch.at("ending", step=1)
        time.sleep(1 - rank)

    job.start(2, leave)
    job.join(1)
    server = json.loads((job.folder / "share-0").read_text())["server"]
    with socket.create_connection(("127.0.0.1", server["port"]), timeout=5) as early:
        early.sendall(line({"rank": 1, "token": server["token"]}))
        assert b'"report"' in early.recv(1000)
    assert job._wait("done-0") == "null"
    assert job.nothing_ended()


def test_a_rank_that_cannot_reach_rank_0_goes_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)

    def cut(introductions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            introductions[0]["server"]["port"] = unused.getsockname()[1]
        return introductions

    def work(watch: Watch, rank: int) -> None:
        for _ in range(15):
            watch.at("forward", step=1)
            time.sleep(0.1)
        assert watch.first_fault(0) is None

    job.start(2, work, hang=HANG, change=cut, is_cut=True)
    for rank in range(2):
        assert job._wait(f"done-{rank}") == "null"
        assert job.join(rank) == 0
    assert job.nothing_ended()
    assert len(job.log(0)) == 0
    assert len(job.log(1)) == 1
    assert job.log(1)[0].startswith("rank 1 cannot reach rank 0")


def test_the_wrong_server_at_the_right_port_is_not_believed(job: Job) -> None:
    with socket.create_server(("127.0.0.1", 0)) as wrong:

        def serve() -> None:
            while True:
                try:
                    connection = wrong.accept()[0]
                    connection.recv(1000)
                    verdict = Fault(0, "error", "forged").to_json()
                    connection.sendall(line({"answer": "guess", "verdict": verdict}))
                    connection.close()
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)

        def divert(introductions: list[dict[str, Any]]) -> list[dict[str, Any]]:
            introductions[0]["server"] |= {"port": wrong.getsockname()[1], "addresses": []}
            return introductions

        def work(watch: Watch, rank: int) -> None:
            watch.at("forward", step=1)
            time.sleep(1)

        job.start(2, work, change=divert, is_cut=True)
        thread.start()
        for rank in range(2):
            assert job._wait(f"done-{rank}") == "null"
        wrong.shutdown(socket.SHUT_RDWR)
    assert job.nothing_ended()


def test_a_connection_that_the_network_cuts_is_made_again(job: Job) -> None:
    def cut(watch: Watch, rank: int) -> None:
        watch.at("backward", step=1)
        time.sleep(2 * TICK)
        if rank == 1:
            watch._links.peers[0].socket.shutdown(socket.SHUT_RDWR)
        time.sleep(1.5)
        if rank == 1:
            os._exit(5)
        time.sleep(60)

    job.start(3, cut)
    time.sleep(2 * TICK + 1)
    assert job.nothing_ended()
    assert job.ends(0, 2).rank == 1  # only now it died


def test_a_watch_that_fails_inside_ends_no_job(job: Job) -> None:
    def break_it(watch: Watch, rank: int) -> None:
        if rank == 1:
            watch._report_and_judge = None  # type: ignore[method-assign, assignment]
        for _ in range(15):
            watch.at("forward", step=1)
            time.sleep(0.1)

    job.start(3, break_it, HANG)
    for rank in range(3):
        assert job._wait(f"done-{rank}") == "null"
    assert job.nothing_ended()
    assert len(job.log(1)) == 1
    assert job.log(1)[0].startswith("the watch of rank 1 has ended, and the run goes on without it: TypeError")


def test_sigusr2_leaves_stacks_in_the_fault_folder_and_ends_nothing(job: Job) -> None:
    job.start(2, stay)
    time.sleep(2 * TICK)
    job.kill(1, signal.SIGUSR2)
    deadline = time.monotonic() + 5
    while not (job.faults / "rank-1.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.1)
    assert "in stay" in job.text(1)
    assert job.processes[1].is_alive()
    assert sorted(path.name for path in job.faults.iterdir()) == ["rank-1.txt"]


# ---- parts ------------------------------------------------------------------------------------------------


def test_messages_come_whole_and_in_order_in_whatever_pieces() -> None:
    listener = Listener(2)
    sender = socket.create_connection(("127.0.0.1", listener.address()["port"]))
    while (peer := listener.accept()) is None:
        time.sleep(0.01)
    received = []
    for byte in line({"a": 1}) + line({"b": [2, 3]}):
        sender.sendall(bytes([byte]))
        time.sleep(0.001)
        received += peer.receive()
    assert received == [{"a": 1}, {"b": [2, 3]}]
    other = Peer(sender)
    for number in range(20_000):  # more than fits into the socket: it waits with the sender
        other.send({"number": number})
    received = []
    while not other.flush() or len(received) < 20_000:
        received += peer.receive()
    assert [message["number"] for message in received] == list(range(20_000))
    other.close()
    while peer.ended is None:
        peer.receive()
    assert peer.ended == "closed"
    peer.close()
    listener.close()


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
