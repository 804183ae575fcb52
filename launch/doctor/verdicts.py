"""What a check says: readings of ranks, findings about them, and how one is told from its peers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

T = TypeVar("T")
Values = dict[str, Any]  # as JSON has them


class Verdict(StrEnum):
    """How it looks. A warning is worth a look; what fails will end the run, or make it much slower."""

    SKIPPED = "skipped"
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


_SEVERITY = [Verdict.SKIPPED, Verdict.OK, Verdict.WARN, Verdict.FAIL]


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Returns the worst of some verdicts."""
    return max(verdicts, key=_SEVERITY.index, default=Verdict.SKIPPED)


class Skip(Exception):
    """Raised by a check that cannot measure anything here, with the reason."""


@dataclass(frozen=True)
class Place:
    """A rank, where it runs and on what.

    Args:
        rank: of all.
        node: number of its machine; tells apart machines with one name.
        host: name of its machine.
        device: such as `cpu` or `cuda:0`.
        is_first: of its machine; it speaks for it.
    """

    rank: int
    node: int
    host: str
    device: str
    is_first: bool

    def __str__(self) -> str:
        return f"{self.host} rank {self.rank} {self.device}"


@dataclass(frozen=True)
class Reading:
    """What one rank has measured in one check."""

    place: Place
    values: Values


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Args:
        verdict: WARN or FAIL.
        message: a sentence that begins with the host, and the device where it is one's.
        hint: what to do about it.
    """

    verdict: Verdict
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Judgement:
    """What all readings of one check come to.

    Args:
        summary: the figures of all, in one line.
        findings: about some.
        verdict: the worst of the findings', unless given.
    """

    summary: str
    findings: tuple[Finding, ...] = ()
    verdict: Verdict = field(default=Verdict.OK)

    def __post_init__(self) -> None:
        if self.findings:
            object.__setattr__(self, "verdict", worst([finding.verdict for finding in self.findings]))


@dataclass(frozen=True)
class Ladder:
    """How much slower than its peers something may be.

    Args:
        warn: share of the peers' median that it may lack.
        fail: the same, for a failure.
    """

    warn: float
    fail: float

    def judge(self, shortfall: float) -> Verdict:
        """Returns the verdict on something that is slower than its peers by this share."""
        if shortfall > self.fail:
            return Verdict.FAIL
        return Verdict.WARN if shortfall > self.warn else Verdict.OK


COMPUTE = Ladder(0.15, 0.30)  # one device does little else than another of its kind
TRANSFER = Ladder(0.35, 0.60)  # links and disks are shared, and their speed varies


@dataclass(frozen=True)
class Slow:
    """One that is slower than its peers."""

    verdict: Verdict
    rate: float
    peers: float  # their median

    @property
    def percent(self) -> int:
        """By how much."""
        return round(100 * (1 - self.rate / self.peers))


def find_slow(rates: Mapping[T, float], ladder: Ladder) -> dict[T, Slow]:
    """Returns those whose rate is below the median of the others' by more than a ladder allows.

    Without itself among them, one of two is seen as well as one of many.
    """
    slow = {}
    for key, rate in rates.items():
        others = [other for peer, other in rates.items() if peer != key]
        if not others:
            continue
        peers = statistics.median(others)
        verdict = ladder.judge(1 - rate / peers) if peers > 0 else Verdict.OK
        if verdict != Verdict.OK:
            slow[key] = Slow(verdict, rate, peers)
    return slow


def span(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Returns `low to high`, or one value where they read the same."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def group(readings: Sequence[Reading], of: Callable[[Reading], T]) -> dict[T, list[Reading]]:
    """Returns readings by what they have in common, the most common first."""
    groups: dict[T, list[Reading]] = {}
    for reading in readings:
        groups.setdefault(of(reading), []).append(reading)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def odd_ones(readings: Sequence[Reading], name: str, hint: str, verdict: Verdict, unit: str = "") -> list[Finding]:
    """Returns a finding for each machine whose value of this name is not that of most."""
    groups = group(readings, lambda reading: str(reading.values.get(name)))
    (usual, most), *rest = groups.items()
    return [
        Finding(verdict, f"{_hosts(odd)}: {unit or name} {value}, and {usual} on {_hosts(most)}", hint)
        for value, odd in rest
    ]


def _hosts(readings: Sequence[Reading]) -> str:
    names = list(dict.fromkeys(f"{r.place.host} rank {r.place.rank}" for r in readings))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
