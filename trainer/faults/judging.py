"""Who holds up a job that does not get on: a judgement on what every rank last said of itself. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

LOADING = "loading a batch"
EVALUATION = "evaluation"
METRICS = "metrics of an evaluation"

WITHIN_A_STEP = (LOADING, "forward", "backward", "optimizer")
PROFILE = "writing a profile"
AFTER_STEP = "exchange of decisions"

# Where a rank may be, in the order in which it passes through them in a step.
PLACES = (
    "building",
    "restoring a checkpoint",
    *WITHIN_A_STEP,
    PROFILE,
    AFTER_STEP,
    EVALUATION,
    METRICS,
    "saving a checkpoint",
    "report",
    "ending",
)

_OVERDUE_TICKS = 1.5  # reports come at every tick: after so many without one the next is overdue
SILENT_TICKS = 3.0  # and after so many the rank cannot speak


@dataclass(frozen=True)
class Report:
    """What a rank says of itself at every tick.

    Args:
        place: what its main thread is doing, one of `PLACES` or anything else.
        step: the optimizer step that it is making; None before training.
        samples: ids of the micro-batch that it is working on.
        idle: seconds since it last got on.
        allowance: how many times the usual limit it may stay there; 0: without a limit.
        sequence: number of collectives that it has begun, where known.
        feed: what its feed is reading, where it has been waiting for that.
    """

    place: str
    step: int | None = None
    samples: tuple[int, ...] = ()
    idle: float = 0.0
    allowance: float = 1.0
    sequence: int | None = None
    feed: tuple[str, ...] = ()

    def to_message(self) -> dict[str, Any]:
        """Returns it as an object for JSON."""
        return dict(vars(self))

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Report:
        """Reads what `to_message` returned."""
        return cls(**{**message, "samples": tuple(message["samples"]), "feed": tuple(message["feed"])})


class Standing(NamedTuple):
    """A rank's last report, and when it came by the listener's own clock."""

    report: Report
    heard: float

    def idle(self, now: float) -> float:
        """Returns for how many seconds the rank has not got on, as far as is known."""
        return self.report.idle + now - self.heard

    def is_late(self, now: float, hang_seconds: float, least: float = 0.0) -> bool:
        """Returns whether it has stayed where it is for longer than it may, or than `least` times `hang_seconds`."""
        return 0 < max(self.report.allowance, least) * hang_seconds < self.idle(now)


class Hang(NamedTuple):
    """Who holds up the job.

    Args:
        rank: the culprit, the lowest if there are several.
        message: what is known of it, in one line.
        silent: ranks that do not even report, and so cannot end themselves.
    """

    rank: int
    message: str
    silent: tuple[int, ...] = ()


def find_hang(standings: Mapping[int, Standing], now: float, hang_seconds: float, tick: float) -> Hang | None:
    """Returns who holds up the job, or None as long as all may be well.

    A rank that says nothing is no proof of anything as long as the others get on. When one of those who speak has
    waited for too long, those who cannot speak are to blame, or else those who are behind all others; but whoever is
    to blame has its own time, by the place where it is.

    Args:
        standings: of all ranks that are watched, the judge's own among them.
        now: of the clock of `Standing.heard`, seconds.
        hang_seconds: what a rank may take without getting on, times its allowance.
        tick: seconds between reports.
    """
    quiet = {rank: now - standing.heard for rank, standing in standings.items()}
    if any(_OVERDUE_TICKS * tick < seconds <= SILENT_TICKS * tick for seconds in quiet.values()):
        return None  # either its report or its silence comes soon, and tells more
    silent = [rank for rank, seconds in quiet.items() if seconds > SILENT_TICKS * tick]
    late = {rank for rank, standing in standings.items() if standing.is_late(now, hang_seconds)}
    if not late.difference(silent):
        return None
    speaking = {rank: standing.report for rank, standing in standings.items() if rank not in silent}
    if silent:
        # One whose last report had no limit had one since: those who wait for it are past the places without.
        culprits = [rank for rank in sorted(silent) if standings[rank].is_late(now, hang_seconds, least=1.0)]
    else:
        culprits = sorted(late.intersection(_least_far(speaking)))
    if not culprits:
        return None
    rank = culprits[0]
    if silent:
        message = f"has not answered for {quiet[rank]:.0f} s"
        return Hang(rank, message + _like(culprits[1:]), tuple(culprits))
    report = standings[rank].report
    message = f"has been in '{report.place}' for {standings[rank].idle(now):.0f} s"
    if len(standings) > 1:
        everybody = len(culprits) == len(standings)
        message += ", and so has every other rank" if everybody else " while the others wait for it"
        message += "" if everybody else _like(culprits[1:])
    return Hang(rank, "; ".join([message, *report.feed[:3]]))


def _like(others: Sequence[int]) -> str:
    if not others:
        return ""
    return f" (and so for {name_ranks(others)})"


def name_ranks(ranks: Sequence[int]) -> str:
    """Returns `ranks 1, 2`, however many there are in a few words."""
    listed = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"


def _least_far(reports: Mapping[int, Report]) -> set[int]:
    """Returns the ranks that all others may be waiting for."""
    ranks = set(reports)
    sequences = {rank: report.sequence for rank, report in reports.items() if report.sequence is not None}
    if len(sequences) == len(ranks):  # the surest sign: whoever has begun fewer collectives is waited for in the next
        smallest = min(sequences.values())
        ranks = {rank for rank, sequence in sequences.items() if sequence == smallest}
    first = min(_progress(reports[rank]) for rank in ranks)
    return {rank for rank in ranks if _progress(reports[rank]) == first}


def _progress(report: Report) -> tuple[int, int]:
    place = PLACES.index(report.place) if report.place in PLACES else len(PLACES)
    return -1 if report.step is None else report.step, place
