"""How a job on several hosts ends: one code and one error of all agents, and lost hosts that are tried again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from launch import hosts_job
from launch.checks import Findings, Meeting
from launch.hosts_job import HostsJob, JobSettings
from launch.remote_agent import RemoteAgent
from launch.ssh import LOST, Host, Ssh
from trainer.config_values import NodeRange

HOSTS = FIRST, SECOND, THIRD = [Host(f"host{number + 1}", number) for number in range(3)]


class Fake(RemoteAgent):
    """An agent that has ended."""

    def __init__(self, host: Host, code: int, *errors: str) -> None:
        self.host, self.code, self.is_killed = host, code, False
        self.errors = [(float(when), text) for when, text in enumerate(errors)]
        self._last_error = ""


def job(nodes: NodeRange, ended: Sequence[Fake], lost: dict[Host, str], told: bool = False) -> HostsJob:
    settings = JobSettings("job", nodes, 0, 30.0, 30.0)

    def recheck(hosts: Sequence[Host], is_joining: bool) -> Findings:
        raise AssertionError

    def command(host: Host, rank: int, name: str, meeting: Meeting) -> list[str]:
        raise AssertionError

    made = HostsJob(HOSTS, settings, Ssh((), "/", "python"), command, recheck)
    made._ended, made._lost = list(ended), lost
    made._needed = next(iter(lost), None) if len(HOSTS) - len(lost) < nodes.least else None
    made._asked_at = 1.0 if told else None
    return made


FIXED, ELASTIC = NodeRange(3, 3), NodeRange(1, 3)


@pytest.mark.parametrize(
    ("nodes", "codes", "lost", "told", "expected"),
    [
        (FIXED, [0, 0, 0], 0, False, 0),
        (FIXED, [75, 75, 75], 0, True, 75),
        (FIXED, [0, 75, 75], 0, True, 75),
        (FIXED, [75, 75, 75], 0, False, 75),  # the file STOP
        (FIXED, [1, 2, 1], 0, False, 2),
        (FIXED, [1, 1, 1], 0, False, 1),
        (FIXED, [1, 75, 75], 0, False, 1),
        (FIXED, [75, 75], 1, False, 1),  # asked to end by us
        (FIXED, [], 1, False, 1),
        (ELASTIC, [0, 0], 1, False, 0),
        (ELASTIC, [0, 1, 0], 0, False, 0),  # it had come to join
        (ELASTIC, [75, 75], 1, False, 75),
        (NodeRange(2, 3), [75], 2, False, 1),  # asked to end by us
        (ELASTIC, [1, 1, 75], 0, False, 1),
    ],
)
def test_one_code_for_all_hosts(nodes: NodeRange, codes: list[int], lost: int, told: bool, expected: int) -> None:
    ended = [Fake(host, code) for host, code in zip(HOSTS, codes, strict=False)]
    gone = dict.fromkeys(HOSTS[len(codes) : len(codes) + lost], "gone")
    assert job(nodes, ended, gone, told)._exit_code() == expected


SAID = "another machine has ended the job, and said why"


@pytest.mark.parametrize(
    ("ended", "lost", "expected"),
    [
        (
            [Fake(FIRST, 1, SAID), Fake(SECOND, 1, "rank 1 on node-2, step 3: ZeroDivisionError: zero")],
            {},
            "rank 1 on node-2, step 3: ZeroDivisionError: zero",
        ),
        (
            [Fake(FIRST, 1, SAID), Fake(SECOND, 1, "rank 1 was ended by SIGKILL")],
            {},
            "host2: rank 1 was ended by SIGKILL",
        ),
        ([Fake(FIRST, 1, "rank 1 on host2: lost")], {SECOND: "Timeout"}, "host2 was lost: Timeout"),
        ([Fake(FIRST, 1)], {}, "host1 ended with exit code 1"),
    ],
)
def test_the_error_of_the_job(ended: list[Fake], lost: dict[Host, str], expected: str) -> None:
    assert job(FIXED, ended, lost)._reason() == expected


@pytest.mark.parametrize(
    ("nodes", "max_restarts", "host", "code", "joins", "is_ending", "is_tried"),
    [
        (FIXED, 5, SECOND, 1, 0, True, False),
        (FIXED, 5, SECOND, 0, 0, True, False),
        (FIXED, 5, SECOND, LOST, 0, True, False),
        (ELASTIC, 5, FIRST, 1, 0, True, False),
        (ELASTIC, 5, FIRST, LOST, 0, True, False),
        (ELASTIC, 5, SECOND, 1, 0, False, True),  # the others may be about to end, or it was cut off from them
        (ELASTIC, 5, SECOND, 1, 5, False, False),
        (ELASTIC, 5, SECOND, 75, 0, False, False),
        (ELASTIC, 5, SECOND, 2, 0, True, False),
        (ELASTIC, 5, SECOND, LOST, 0, False, True),
        (ELASTIC, 0, SECOND, 1, 0, True, False),
        (ELASTIC, 0, SECOND, LOST, 0, True, False),
        (NodeRange(3, 4), 5, SECOND, LOST, 0, True, False),
    ],
)
def test_what_the_end_of_one_agent_means(
    nodes: NodeRange, max_restarts: int, host: Host, code: int, joins: int, is_ending: bool, is_tried: bool
) -> None:
    made = job(nodes, [], {})
    made._settings = replace(made._settings, max_restarts=max_restarts)
    made._agents = {host: Fake(host, 0) for host in HOSTS}
    made._joins[host] = joins
    made._note_end(Fake(host, code))
    assert (made._is_ending, host in made._try_at) == (is_ending, is_tried)


def elastic_job_that_tries(monkeypatch: pytest.MonkeyPatch, recheck: Callable[..., Findings]) -> HostsJob:
    """Returns a job of which the second host is lost, and due to be tried again."""
    made = job(ELASTIC, [], {})
    made._lost, made._needed, made._recheck = {SECOND: "gone"}, None, recheck
    made._agents = {FIRST: Fake(FIRST, 0)}
    made._try_at = {SECOND: 0.0}
    monkeypatch.setattr(made, "_start", lambda host: made._agents.update({host: Fake(host, 0)}))
    return made


def test_an_attempt_that_breaks_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def recheck(hosts: Sequence[Host], is_joining: bool) -> Findings:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(hosts_job, "end_all", lambda *_: {SECOND: 0})
    made = elastic_job_that_tries(monkeypatch, recheck)
    made._try_lost()
    until = time.monotonic() + 10
    while SECOND not in made._try_at and time.monotonic() < until:
        time.sleep(0.01)
        made._try_lost()
    assert SECOND in made._try_at
    assert "ZeroDivisionError: ours" in made._lost[SECOND]


def test_nothing_of_an_earlier_start_kills_or_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    is_trying, may_end, events = threading.Event(), threading.Event(), list[str]()

    def end_all(ssh: Ssh, found: Sequence[Host], name: str) -> dict[Host, int | None]:
        if threading.current_thread() is not threading.main_thread():
            is_trying.set()
            may_end.wait(10)
            events.append("killed by an attempt")
        return dict.fromkeys(found, 0)

    def recheck(found: Sequence[Host], is_joining: bool) -> Findings:
        events.append("joining" if is_joining else "ready to start")
        return Findings({host: [] for host in found}, meeting=Meeting("host1", 1))

    monkeypatch.setattr(hosts_job, "end_all", end_all)
    made = elastic_job_that_tries(monkeypatch, recheck)
    earlier = made._tried
    made._try_lost()
    assert is_trying.wait(10)
    threading.Timer(0.5, may_end.set).start()
    gathered = made._gather()
    assert gathered is not None
    assert earlier.get(timeout=10) == (SECOND, None)
    assert events.index("killed by an attempt") < events.index("ready to start")
    made._tried.put((THIRD, None))
    made._begin([FIRST], gathered[1], 1)
    made._try_lost()
    assert list(made._agents) == [FIRST]
