"""One job on several hosts from its start to its end: an agent on each, what is passed on, who is lost, how it ended.

Within a set of machines torch's agents start failed ranks again by themselves. Here is what is left to somebody who
sees all hosts: a lost host ends the job or, where that may go on without it, is tried until it is back; the job is
started again, under another name, where a start needs other machines; and nothing is left on any host in the end.
"""

from __future__ import annotations

import itertools
import logging
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from launch.checks import Findings, Meeting
from launch.remote_agent import RemoteAgent, Screen
from launch.ssh import LOST, Host, Ssh, end_all
from launch.stopping import SIGNALS
from trainer.cli import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_USAGE
from trainer.config_values import NodeRange
from trainer.errors import one_line
from trainer.faults.stopping import REPEAT_SECONDS

logger = logging.getLogger("lockstep")

RETRY_SECONDS = 15.0  # between attempts to reach a lost host
_TICK_SECONDS = 0.25
_NATURAL_SECONDS = 10.0  # which agents get to end by themselves when another has, and to say why
_ASKED_SECONDS = 8.0  # and then after SIGTERM, before all is killed
_NOW_SECONDS = 3.0  # after a second request to stop


@dataclass(frozen=True)
class JobSettings:
    """What a job on hosts is given.

    Args:
        name: unique to this launch.
        nodes: how many machines.
        max_restarts: how often to start it again from here.
        stop_seconds: which a stop on request may take.
        return_seconds: how long to wait for lost hosts that are needed.
    """

    name: str
    nodes: NodeRange
    max_restarts: int
    stop_seconds: float
    return_seconds: float


class HostsJob:
    """Runs a job on hosts.

    Args:
        hosts: all of them.
        settings: of the job.
        ssh: how hosts are reached.
        command: the ssh that runs an agent, given its host, its node rank, the job's name and the meeting.
        recheck: the checks, for hosts that shall start again, or join the first of them.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        settings: JobSettings,
        ssh: Ssh,
        command: Callable[[Host, int, str, Meeting], list[str]],
        recheck: Callable[[Sequence[Host], bool], Findings],
    ) -> None:
        self._hosts = hosts
        self._settings = settings
        self._ssh = ssh
        self._command = command
        self._recheck = recheck
        self._screen = Screen(hosts)
        self._signals: list[signal.Signals] = []  # that have come, and are to be passed on
        self._asked_at: float | None = None  # when the first came
        # Of the present start:
        self._job = settings.name
        self._head = hosts[0]
        self._meeting: Meeting | None = None
        self._agents: dict[Host, RemoteAgent] = {}  # that run
        self._ended: list[RemoteAgent] = []
        self._ends: queue.Queue[RemoteAgent] = queue.Queue()
        self._lost: dict[Host, str] = {}
        self._needed: Host | None = None  # the lost host without which the job could not go on
        self._is_ending = False
        self._ask_at = self._kill_at = float("inf")
        # Hosts that are tried again, and what came of it:
        self._try_at: dict[Host, float] = {}
        self._tried: queue.Queue[tuple[Host, str | None]] = queue.Queue()
        self._searches: list[threading.Event] = []  # for what is left on them: set when that is over
        self._joins: dict[Host, int] = {}

    def run(self, present: Sequence[Host], meeting: Meeting) -> int:
        """Runs the job to its end and returns its exit code.

        Args:
            present: the hosts that have passed the checks.
            meeting: on the first of them.
        """
        with self._catch_signals():
            try:
                for number in itertools.count():
                    self._begin(present, meeting, number)
                    while self._agents:
                        self._wait(_TICK_SECONDS)
                    code = self._exit_code()
                    if code != EXIT_FAILED or self._asked_at is not None or self._needed is None:
                        break
                    if number >= self._settings.max_restarts:
                        break
                    gathered = self._gather()
                    if gathered is None:
                        code = EXIT_STOPPED if self._asked_at is not None else code
                        break
                    present, meeting = gathered
                    reason = f"{self._needed.name} was lost"
                    logger.info("starting again (%d of %d): %s", number + 1, self._settings.max_restarts, reason)
            finally:
                self._clear()
            self._explain(code)
            return code

    def _begin(self, present: Sequence[Host], meeting: Meeting, number: int) -> None:
        self._job = f"{self._settings.name}.{number}"
        self._head, self._meeting = present[0], meeting
        self._ended, self._lost, self._needed = [], {}, None
        self._is_ending, self._ask_at, self._kill_at = False, float("inf"), float("inf")
        self._try_at = {host: time.monotonic() + RETRY_SECONDS for host in self._hosts if host not in present}
        self._tried = queue.Queue()  # what still comes of an earlier start is of no use
        for host in present:
            self._start(host)

    def _start(self, host: Host) -> None:
        assert self._meeting is not None
        rank = 0 if host == self._head else host.number or len(self._hosts)  # only 0 means anything
        command = self._command(host, rank, self._job, self._meeting)
        self._ended = [agent for agent in self._ended if agent.host != host]
        self._agents[host] = RemoteAgent(host, command, self._screen, self._ends)

    def _wait(self, seconds: float) -> None:
        """Takes notice of what happens within a moment, and does what is due."""
        with suppress(queue.Empty):
            self._note_end(self._ends.get(timeout=seconds))
        self._pass_signals()
        now = time.monotonic()
        if now >= self._ask_at:
            self._ask_at = float("inf")
            self._say_all("SIGTERM")
        if now >= self._kill_at:
            self._kill_at = float("inf")
            self._kill()
        for agent in self._agents.values():
            agent.keep_alive()
        self._try_lost()

    def _note_end(self, agent: RemoteAgent) -> None:
        del self._agents[agent.host]
        is_cut = agent.code is None or agent.code < 0  # by `_kill`, as its host does not answer
        if (agent.code == LOST or is_cut) and not agent.is_killed:
            self._note_loss(agent.host, self._lost.get(agent.host) or agent.reason)
            return
        self._ended.append(agent)
        if self._is_ending or not self._agents:
            return
        is_member = self._settings.nodes.is_elastic and agent.host != self._head
        if agent.code == EXIT_FINISHED:
            self._end(float("inf"), self._settings.stop_seconds)
        elif is_member and agent.code == EXIT_STOPPED:
            logger.info("%s has left the job, as it was asked to", agent.host.name)
        elif is_member and agent.code == EXIT_FAILED and self._settings.max_restarts:
            # Where the job itself has failed, the others are about to end, too. A host that fails again and again would
            # have all others restart every time.
            if self._joins.get(agent.host, 0) < self._settings.max_restarts:
                self._try_at[agent.host] = time.monotonic() + RETRY_SECONDS
            else:
                logger.warning("%s has failed too often: going on without it", agent.host.name)
        else:
            self._end(_NATURAL_SECONDS, _NATURAL_SECONDS + _ASKED_SECONDS)

    def _note_loss(self, host: Host, reason: str) -> None:
        self._lost[host] = reason
        nodes = self._settings.nodes
        is_needed = host == self._head or not nodes.is_elastic or len(self._agents) < nodes.least
        if self._asked_at is not None or not (self._agents or is_needed):
            return
        if is_needed or not self._settings.max_restarts:
            logger.warning("%s is lost: %s", host.name, reason)
            self._needed = self._needed or host
            natural = 0.0 if host == self._head else _NATURAL_SECONDS
            self._end(natural, natural + _ASKED_SECONDS)
        else:
            every = f"it is tried again every {RETRY_SECONDS:.0f} s"
            logger.warning("%s is lost (%s): the others go on, and %s", host.name, reason, every)
            self._try_at[host] = time.monotonic() + RETRY_SECONDS

    def _end(self, ask_in: float, kill_in: float) -> None:
        """Has all agents end: by themselves, then asked, then killed."""
        self._is_ending = True
        now = time.monotonic()
        self._ask_at, self._kill_at = min(self._ask_at, now + ask_in), min(self._kill_at, now + kill_in)

    def _kill(self) -> None:
        agents = list(self._agents.values())
        for agent in agents:
            agent.is_killed = True
        for host, num_killed in end_all(self._ssh, [agent.host for agent in agents], self._settings.name).items():
            if num_killed is None:
                self._lost.setdefault(host, "it does not answer")
                self._agents[host].is_killed = False
        for agent in agents:
            agent.cut()

    def _say_all(self, word: str) -> None:
        for agent in self._agents.values():
            agent.say(word)

    @contextmanager
    def _catch_signals(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self._signals.append(signal.Signals(number))

        previous = {number: signal.signal(number, note) for number in map(signal.Signals.__getitem__, SIGNALS)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _pass_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            now = time.monotonic()
            if self._asked_at is None:
                self._asked_at = now
                self._end(float("inf"), self._settings.stop_seconds)
            elif now - self._asked_at < REPEAT_SECONDS:
                continue  # a terminal and a launcher above us may both have sent it
            else:
                self._end(float("inf"), _NOW_SECONDS)
            self._say_all(number.name)

    def _try_lost(self) -> None:
        """Tries to reach hosts that the job does without, and has those join that answer."""
        if self._is_ending:
            self._try_at = {}
        now = time.monotonic()
        for host in [host for host, due in self._try_at.items() if now >= due]:
            del self._try_at[host]
            is_searched = threading.Event()
            self._searches = [search for search in self._searches if not search.is_set()] + [is_searched]
            given = (host, self._head, is_searched, self._tried)
            threading.Thread(target=self._try, args=given, daemon=True).start()
        while not self._tried.empty():
            host, problem = self._tried.get()
            if self._is_ending or not self._agents or host in self._agents:
                continue
            if problem is None:
                logger.info("%s answers again: it joins", host.name)
                self._joins[host] = self._joins.get(host, 0) + 1
                self._lost.pop(host, None)
                self._start(host)
                continue
            if problem != self._lost.get(host):
                logger.warning("not yet: %s", problem)
                self._lost[host] = problem
            self._try_at[host] = time.monotonic() + RETRY_SECONDS

    def _try(
        self, host: Host, head: Host, is_searched: threading.Event, tried: queue.Queue[tuple[Host, str | None]]
    ) -> None:
        """Ends what is left on a host, and sees whether it may join. Whatever happens, the host is tried again."""
        problem: str | None = f"{host.name}: the attempt to reach it has failed"
        try:
            left = end_all(self._ssh, [host], self._settings.name)[host]
            is_searched.set()
            if left is None:
                problem = self._lost.get(host, f"{host.name} does not answer")
            else:
                problem = next(iter(self._recheck([head, host], True).lines([host])), None)
        except Exception as error:
            problem = f"{host.name}: {one_line(error)}"
        finally:
            is_searched.set()
            tried.put((host, problem))

    def _wait_for_searches(self) -> None:
        """Waits until nobody is about to kill what the launch runs on a host, which would be what is started next."""
        for is_searched in self._searches:
            while not is_searched.wait(_TICK_SECONDS):
                self._pass_signals()
        self._searches = []

    def _gather(self) -> tuple[list[Host], Meeting] | None:
        """Waits until enough hosts can start again; returns them and where they meet, or None where that is not so."""
        nodes = self._settings.nodes
        needed = nodes.least if nodes.is_elastic else len(self._hosts)
        until = time.monotonic() + self._settings.return_seconds
        is_said = False
        self._wait_for_searches()
        while self._asked_at is None:
            left = end_all(self._ssh, self._hosts, self._settings.name)
            present = [host for host in self._hosts if left[host] is not None]
            if len(present) >= needed:
                findings = self._recheck(present, False)
                present = [host for host in present if host not in findings.absent]
                problems = findings.lines(present)
                if findings.meeting is not None and not problems and len(present) >= needed:
                    return present, findings.meeting
                for problem in problems:
                    logger.warning("not yet: %s", problem)
            if time.monotonic() > until:
                return None
            if not is_said:
                names = ", ".join(host.name for host in self._hosts if host not in present)
                logger.info("waiting %.0f s for %s", self._settings.return_seconds, names or "the hosts")
                is_said = True
            again = time.monotonic() + RETRY_SECONDS / 3
            while time.monotonic() < again and self._asked_at is None:
                time.sleep(_TICK_SECONDS)
                self._pass_signals()
        return None

    def _clear(self) -> None:
        """Leaves nothing on any host that answers, and says so where there was something."""
        for agent in self._agents.values():  # after an error of ours
            agent.cut()
        for host, num_killed in end_all(self._ssh, self._hosts, self._settings.name).items():
            if num_killed is None:
                logger.warning("%s does not answer: what runs there ends by itself within a minute", host.name)
            elif num_killed:
                logger.warning("%s: killed %d processes that were left", host.name, num_killed)

    def _exit_code(self) -> int:
        codes = {
            agent.host: agent.code if agent.code is not None and not agent.is_killed else EXIT_FAILED
            for agent in self._ended
        }
        found = set(codes.values())
        if EXIT_USAGE in found:
            return EXIT_USAGE
        if self._needed is not None and self._asked_at is None and found != {EXIT_FINISHED}:
            return EXIT_FAILED  # the others have stopped because we asked them to
        if self._settings.nodes.is_elastic and codes.get(self._head) in (EXIT_FINISHED, EXIT_STOPPED):
            return codes[self._head]
        if found and found <= {EXIT_FINISHED, EXIT_STOPPED}:
            return max(found)
        return EXIT_FAILED

    def _explain(self, code: int) -> None:
        """Writes the error that ended the job, as the last line."""
        if code == EXIT_USAGE:
            agent = next(agent for agent in self._ended if agent.code == EXIT_USAGE)
            lines = list(dict.fromkeys(text for _, text in agent.errors))
        elif code == EXIT_FAILED:
            lines = [self._reason()]
        else:
            return
        for line in lines:
            sys.stderr.write(f"error: {line}\n")

    def _reason(self) -> str:
        if self._needed is not None:
            return f"{self._needed.name} was lost: {self._lost[self._needed]}"
        said = [(agent.host, when, text) for agent in self._ended for when, text in agent.errors]
        if not said:
            killed = [agent.host.name for agent in self._ended if agent.is_killed]
            if killed:
                return f"{', '.join(killed)}: did not end in time, and was killed"
            failed = [f"{agent.host.name} ended with exit code {agent.code}" for agent in self._ended if agent.code]
            return "; ".join(failed) or "; ".join(f"{host.name}: {text}" for host, text in self._lost.items())
        # The first rank's error is known to the agents that can read it; others have only lost their peers.
        host, _, text = min(
            said, key=lambda entry: (not entry[2].startswith("rank "), "said why" in entry[2], entry[1])
        )
        return text if " on " in text.partition(":")[0] else f"{host.name}: {text}"
