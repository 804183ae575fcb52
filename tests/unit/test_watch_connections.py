"""Connections between watches: strangers, networks that cut or divert them, and watches that fail end no job."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from typing import Any

import pytest
from watching import HANG, TICK, WatchedJob, stay

from trainer.faults.fault import Fault
from trainer.faults.watch import Watch
from trainer.faults.wire import Listener, Peer, line


def test_strangers_are_refused(watched_job: WatchedJob) -> None:
    watched_job.start(2, stay)
    server = json.loads((watched_job.folder / "share-0").read_text())["server"]
    fault = line({"rank": 1, "token": "guess", "fault": Fault(1, "error", "forged").to_json()})
    for greeting in (fault, b"\x80\x04pickle\n", b'{"rank": 1}\n', b"[]\n", b"\n"):
        with socket.create_connection(("127.0.0.1", server["port"]), timeout=5) as stranger:
            stranger.sendall(greeting)
            assert stranger.recv(1000) == b""
    time.sleep(0.5)
    assert watched_job.nothing_ended()
    watched_job.kill(1)
    assert watched_job.ends(0).rank == 1


def test_a_rank_that_leaves_before_it_knows_that_it_is_connected_is_not_missed(watched_job: WatchedJob) -> None:
    def leave(watch: Watch, rank: int) -> None:
        watch.at("ending", step=1)
        if rank == 0:
            watched_job.wait_for("leave")

    watched_job.start(2, leave)
    assert watched_job.join(1) == 0
    server = json.loads((watched_job.folder / "share-0").read_text())["server"]
    with socket.create_connection(("127.0.0.1", server["port"]), timeout=5) as early:
        early.sendall(line({"rank": 1, "token": server["token"]}))
        assert b'"report"' in early.recv(1000)
    watched_job.note("leave", "")
    assert watched_job.wait_for("done-0") == "null"
    assert watched_job.nothing_ended()


def test_a_rank_that_cannot_reach_rank_0_goes_on(watched_job: WatchedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)

    def cut(introductions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            introductions[0]["server"]["port"] = unused.getsockname()[1]
        return introductions

    def work(watch: Watch, rank: int) -> None:
        for _ in range(30):
            watch.at("forward", step=1)
            time.sleep(0.1)
        assert watch.first_fault(0) is None

    watched_job.start(2, work, hang=HANG, change=cut, is_cut=True)
    for rank in range(2):
        assert watched_job.wait_for(f"done-{rank}") == "null"
        assert watched_job.join(rank) == 0
    assert watched_job.nothing_ended()
    assert len(watched_job.log(0)) == 0
    assert len(watched_job.log(1)) == 1
    assert watched_job.log(1)[0].startswith("rank 1 cannot reach rank 0")


def test_the_wrong_server_at_the_right_port_is_not_believed(watched_job: WatchedJob) -> None:
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

        watched_job.start(2, work, change=divert, is_cut=True)
        thread.start()
        for rank in range(2):
            assert watched_job.wait_for(f"done-{rank}") == "null"
        wrong.shutdown(socket.SHUT_RDWR)
    assert watched_job.nothing_ended()


def test_a_connection_that_the_network_cuts_is_made_again(watched_job: WatchedJob) -> None:
    def cut(watch: Watch, rank: int) -> None:
        watch.at("backward", step=1)
        time.sleep(2 * TICK)
        if rank == 1:
            watch._links.peers[0].socket.shutdown(socket.SHUT_RDWR)
            watched_job.note("cut", "")
            watched_job.wait_for("die", seconds=60)
            os._exit(5)
        time.sleep(60)

    watched_job.start(3, cut)
    watched_job.wait_for("cut")
    time.sleep(1)
    assert watched_job.nothing_ended()
    watched_job.note("die", "")
    assert watched_job.ends(0, 2).rank == 1  # only now it died


def test_a_watch_that_fails_inside_ends_no_job(watched_job: WatchedJob) -> None:
    def break_it(watch: Watch, rank: int) -> None:
        if rank == 1:
            watch._report_and_judge = None  # type: ignore[method-assign, assignment]
        for _ in range(30):
            watch.at("forward", step=1)
            time.sleep(0.1)

    watched_job.start(3, break_it, HANG)
    for rank in range(3):
        assert watched_job.wait_for(f"done-{rank}") == "null"
    assert watched_job.nothing_ended()
    assert len(watched_job.log(1)) == 1
    assert watched_job.log(1)[0].startswith("the watch of rank 1 has ended, and the run goes on without it: TypeError")


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
