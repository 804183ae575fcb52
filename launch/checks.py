"""Whether hosts can train together, before anything is started: asks them all at once, and judges the answers.

All that is wrong is said together, a line each that names the host. What a host finds out is `launch.host_facts`.
"""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from launch.host_facts import Facts, listed
from launch.ssh import Conversation, Host, Ssh
from trainer.config import Config, flatten
from trainer.errors import UserError

_START_SECONDS = 60  # for ssh, setup lines and Python
_ANSWER_SECONDS = 120  # for an answer that takes an import of torch from a slow file system
_SHORT_SECONDS = 20
_CONNECT_SECONDS = 5
_FILE_SECONDS = 10  # for a file to be seen on other hosts
_CLOCK_READINGS = 5
_SHOWN = 3  # of what differs
_MOST_ADDRESSES = 6

T = TypeVar("T")


@dataclass(frozen=True)
class Meeting:
    """Where the agents of a job meet, on its first host."""

    address: str
    port: int


@dataclass
class Findings:
    """What was found.

    Args:
        errors: by host.
        warnings: for the person who reads along.
        absent: hosts that cannot be reached, with the reason.
        meeting: on the first host that is there; None where there are errors.
    """

    errors: dict[Host, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    absent: dict[Host, str] = field(default_factory=dict)
    meeting: Meeting | None = None

    def lines(self, hosts: Sequence[Host]) -> list[str]:
        """Returns all problems in the order of the hosts, each with its host's name."""
        return [
            error for host in hosts for error in ([self.absent[host]] if host in self.absent else self.errors[host])
        ]


@dataclass(frozen=True)
class Clock:
    """How far a host's clock is ahead of ours, in seconds, and how wrong that may be."""

    ahead: float
    error: float

    @classmethod
    def from_readings(cls, readings: Sequence[tuple[float, float, float]]) -> Clock:
        """Returns the best of several readings: the one that took the shortest.

        Args:
            readings: our time before, the host's time, our time after.
        """
        before, there, after = min(readings, key=lambda reading: reading[2] - reading[0])
        return cls(there - (before + after) / 2, (after - before) / 2)


def check(hosts: Sequence[Host], ssh: Ssh, config: Config, arguments: tuple[str, list[str]], here: Facts) -> Findings:
    """Asks all hosts, and has them try out what training needs.

    Args:
        hosts: the first one that is there is where the others will meet.
        ssh: how they are reached.
        config: of the run.
        arguments: config file and overrides that every host is to read.
        here: of this machine: code and config must be the same everywhere.
    """
    # What closes is not what asks: at a Ctrl-C those threads are still waiting for answers, until there is a close.
    with ThreadPoolExecutor(len(hosts)) as closers, ThreadPoolExecutor(len(hosts)) as pool, ExitStack() as stack:
        asked = _Asked(hosts, pool)
        opened = asked.each(hosts, lambda host: Conversation(ssh, host, _START_SECONDS))
        stack.callback(lambda: list(closers.map(Conversation.close, opened.values())))
        for host in hosts:
            if asked.errors[host] and "cannot be reached" in asked.errors[host][0]:
                asked.absent[host] = asked.errors[host].pop()
        file, overrides = arguments
        asked.there = opened
        answers = asked.ask(list(opened), "facts", _ANSWER_SECONDS, config=file, overrides=overrides)
        facts = asked.each(list(answers), lambda host: _read_facts(host, answers[host]))
        asked.there = {host: opened[host] for host in facts}
        clocks = asked.each(list(facts), lambda host: _read_clock(opened[host]))
        errors, warnings = judge(facts, clocks, here, config)
        for host, lines in errors.items():
            asked.errors[host] += lines
        meeting = None
        if facts:
            for folder in shared_folders(config):
                asked.try_folder(folder)
            meeting = asked.find_meeting(facts, config.launch.port)
    return Findings(asked.errors, warnings, asked.absent, meeting)


def judge(
    facts: Mapping[Host, Facts], clocks: Mapping[Host, Clock], here: Facts, config: Config
) -> tuple[dict[Host, list[str]], list[str]]:
    """Compares what hosts have said.

    Args:
        facts: of each host that answered.
        clocks: of each host that answered.
        here: of this machine.
        config: says how many processes there shall be, and how far apart clocks may be.

    Returns:
        The problems of each host, and warnings.
    """
    errors: dict[Host, list[str]] = {host: [] for host in facts}
    warnings: list[str] = []
    if not facts:
        return errors, warnings
    first = next(iter(facts))
    wanted = config.launch.processes
    for host, found in facts.items():

        def wrong(text: str, host: Host = host) -> None:
            errors[host].append(f"{host.name}: {text}")

        if different := _different(found.code, here.code):
            wrong(f"other code than here: {different}")
        if different := _different(flatten(found.config), flatten(here.config), values=True):
            wrong(f"other config than here: {different}")
        for what, version in found.versions.items():
            if (expected := facts[first].versions.get(what)) != version:
                wrong(f"{what} {version}; {first.name} has {expected}")
        if wanted and found.devices and wanted > len(found.devices):
            wrong(f"{wanted} processes: it has {len(found.devices)} GPUs")
        if bool(found.devices) != bool(facts[first].devices):
            wrong(f"has {listed(found.devices)}; {first.name} has {listed(facts[first].devices)}")
        elif sorted(found.devices) != sorted(facts[first].devices):
            theirs = listed(facts[first].devices)
            warnings.append(f"{host.name} has {listed(found.devices)}; {first.name} has {theirs}")
        if not found.addresses:
            wrong(f"has no network interface {config.launch.interface} (launch.interface)")
    tolerance = config.launch.hosts.clock_tolerance
    middle = statistics.median_low([0.0, *(clock.ahead for clock in clocks.values())])  # ours among them
    for host, clock in clocks.items():
        apart = clock.ahead - middle
        if abs(apart) - clock.error > tolerance.seconds:
            direction = "ahead of" if apart > 0 else "behind"
            errors[host].append(
                f"{host.name}: its clock is {abs(apart):.1f} s {direction} the others "
                f"(launch.hosts.clock_tolerance: {tolerance})"
            )
    return errors, warnings


def shared_folders(config: Config) -> list[str]:
    """Returns the folders that must be the same on all hosts.

    Where checkpoints are in an object store these are none, or the run folder if a smaller micro-batch is noted there.
    """
    saved = config.checkpoint.dir
    if saved is not None and "://" in saved:
        return [str(config.run_dir)] if config.memory.on_oom == "shrink" else []
    return [str(config.run_dir), *([saved] if saved is not None else [])]


class _Asked:
    """Hosts that are asked together, and what is wrong with each."""

    def __init__(self, hosts: Sequence[Host], pool: ThreadPoolExecutor) -> None:
        self.errors: dict[Host, list[str]] = {host: [] for host in hosts}
        self.absent: dict[Host, str] = {}
        self.there: dict[Host, Conversation] = {}
        self._pool = pool

    def each(self, hosts: Sequence[Host], question: Callable[[Host], T], place: str = "") -> dict[Host, T]:
        """Does something with several hosts at once.

        Args:
            hosts: which.
            question: what; a UserError is noted down.
            place: to add to what is noted down.

        Returns:
            The answers of the hosts that have one.
        """
        answers: dict[Host, T] = {}
        for host, answer in zip(hosts, self._pool.map(lambda host: _outcome(question, host), hosts), strict=True):
            if isinstance(answer, UserError):
                self.errors[host] += [f"{problem}{place}" for problem in answer.problems]
            else:
                answers[host] = answer
        return answers

    def ask(
        self, hosts: Sequence[Host], what: str, timeout: float = _SHORT_SECONDS, place: str = "", **arguments: object
    ) -> dict[Host, Any]:
        """Puts the same question to several hosts, and returns the answers of those that have one."""
        return self.each(hosts, lambda host: self.there[host].ask(what, timeout, **arguments), place)

    def try_folder(self, folder: str) -> None:
        """Has the first host write a file that all others must see, where the folder is or would be made."""
        first, *others = self.there
        place, name = f" (writing into {folder})", f".lockstep-{secrets.token_hex(8)}"
        written = self.ask([first], "leave_file", place=place, folder=folder, name=name)
        if first not in written:
            return
        path, timeout = written[first], _SHORT_SECONDS + _FILE_SECONDS
        seen = self.ask(others, "find_file", timeout, place=place, path=path, seconds=_FILE_SECONDS)
        for host, is_seen in seen.items():
            if not is_seen:
                self.errors[host].append(
                    f"{host.name}: {folder} is not shared: a file that {first.name} wrote is not seen "
                    "(run.dir must be on a shared file system, or checkpoint.dir in an object store "
                    "without memory.on_oom: shrink)"
                )
        self.ask([first], "remove_file", path=path)

    def find_meeting(self, facts: Mapping[Host, Facts], port: int | None) -> Meeting | None:
        """Has the first host listen at a port and all others connect to it; takes the first address that all can."""
        first, *others = self.there
        greeting = secrets.token_hex(16)
        place = f" (launch.port {port})" if port else " (listening at a port)"
        listening = self.ask([first], "listen", place=place, port=port, greeting=greeting)
        if first not in listening:
            return None
        number = listening[first]
        candidates = list(dict.fromkeys([*facts[first].addresses[:_MOST_ADDRESSES], first.address]))
        failed: dict[Host, list[str]] = {host: [] for host in others}
        for address in candidates:
            question = {"address": address, "port": number, "greeting": greeting, "seconds": _CONNECT_SECONDS}
            answers = list(self._pool.map(lambda host, asked=question: _failure(self.there[host], asked), others))
            if not any(answers):
                self.ask([first], "stop_listening")
                return Meeting(address, number)
            for host, failure in zip(others, answers, strict=True):
                if failure is not None:
                    failed[host].append(f"{address}: {failure}")
        never = [host for host in others if len(failed[host]) == len(candidates)]
        for host in never:
            reasons = "; ".join(failed[host])
            self.errors[host].append(f"{host.name}: cannot connect to {first.name} at port {number}: {reasons}")
        if not never:
            self.errors[first].append(f"{first.name}: has no address that all reach, of {', '.join(candidates)}")
        return None


def _failure(conversation: Conversation, question: Mapping[str, object]) -> str | None:
    """Returns why a host cannot connect; None where it can."""
    try:
        conversation.ask("connect", _SHORT_SECONDS, **question)
    except UserError as error:
        return str(error.problems[0]).removeprefix(f"{conversation.host.name}: ")
    return None


def _read_facts(host: Host, answer: dict[str, Any]) -> Facts:
    try:
        return Facts.from_answer(answer)
    except UserError as error:
        raise UserError(*(f"{host.name}: {problem}" for problem in error.problems)) from None


def _read_clock(conversation: Conversation) -> Clock:
    readings = []
    for _ in range(_CLOCK_READINGS):
        before = time.time()
        there = float(conversation.ask("clock", _SHORT_SECONDS))
        readings.append((before, there, time.time()))
    return Clock.from_readings(readings)


def _outcome(question: Callable[[Host], T], host: Host) -> T | UserError:
    try:
        return question(host)
    except UserError as error:
        return error


def _different(there: Mapping[str, Any], here: Mapping[str, Any], values: bool = False) -> str:
    """Returns the first keys whose values differ, and how many more there are."""
    keys = [key for key in {**here, **there} if there.get(key) != here.get(key)]
    shown = [f"{key} is {there.get(key)!r} (here {here.get(key)!r})" if values else key for key in keys[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
