"""What all readings come to, for a person (a table), for a program (JSON) and for a shell (error lines, exit code)."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.doctor.situation import PROBLEM, SKIPPED, Check
from launch.doctor.verdicts import Finding, Judgement, Place, Reading, Values, Verdict, worst
from trainer.units import counted

WIDTH = 100  # and the name of a host before it, where lines come from several
_MOST_FINDINGS = 6  # of a check in the table; all are in the JSON
_LABELS = {Verdict.OK: "ok", Verdict.SKIPPED: "skipped", Verdict.WARN: "WARN", Verdict.FAIL: "FAIL"}
_FIRST, _SECOND = 9, 14  # columns


@dataclass(frozen=True)
class Line:
    """One check in the report."""

    name: str
    judgement: Judgement
    readings: tuple[Reading, ...] = ()


@dataclass
class Report:
    """All of it.

    Args:
        places: of the ranks that came.
        facts: of the whole: when, what was asked for.
        lines: in order.
    """

    places: list[Place]
    facts: dict[str, Any]
    lines: list[Line] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """The worst of all."""
        return worst([line.judgement.verdict for line in self.lines])

    def table(self) -> str:
        """Returns a line per check, and more about those that are not as they should be."""
        machines = len({place.node for place in self.places})
        devices = ", ".join(dict.fromkeys(place.device.partition(":")[0] for place in self.places))
        parts = [f"{counted(len(self.places), 'rank')} on {counted(machines, 'machine')} ({devices})"]
        if self.facts.get("config"):
            parts.append(str(self.facts["config"]))
        lines = [f"doctor: {', '.join(parts)}"]
        for line in self.lines:
            lines += _rows(line)
        counts = {verdict: sum(line.judgement.verdict == verdict for line in self.lines) for verdict in _LABELS}
        lines.append(", ".join(f"{number} {_LABELS[verdict]}" for verdict, number in counts.items() if number))
        return "\n".join(lines) + "\n"

    def errors(self) -> list[str]:
        """Returns an `error:` line for each failure."""
        return [
            f"error: {line.name} on {finding.message}"
            for line in self.lines
            for finding in line.judgement.findings
            if finding.verdict == Verdict.FAIL
        ]

    def to_json(self) -> str:
        """Returns everything, with all numbers of all ranks."""
        checks = [
            {
                "name": line.name,
                "verdict": line.judgement.verdict.value,
                "summary": line.judgement.summary,
                "findings": [asdict(finding) for finding in line.judgement.findings],
                "ranks": [{**asdict(reading.place), "values": reading.values} for reading in line.readings],
            }
            for line in self.lines
        ]
        return json.dumps({**self.facts, "verdict": self.verdict.value, "checks": checks}, indent=2) + "\n"


def judge(check: Check, readings: Sequence[Reading]) -> Judgement:
    """Returns what the readings of a check come to, also where some or all of them hold no values."""
    problems = [reading for reading in readings if PROBLEM in reading.values]
    good = [reading for reading in readings if PROBLEM not in reading.values and SKIPPED not in reading.values]
    judgement = check.judge(good) if good else None
    if judgement is None and not problems:
        reasons = dict.fromkeys(str(reading.values[SKIPPED]) for reading in readings)
        return Judgement("; ".join(reasons) or "no rank measured it", verdict=Verdict.SKIPPED)
    if not problems:
        assert judgement is not None
        return judgement
    findings = [Finding(check.on_problem, f"{r.place}: {_explain(r.values, check.name)}") for r in problems]
    summary = judgement.summary if judgement is not None else "could not be measured"
    return Judgement(summary, (*findings, *(judgement.findings if judgement is not None else ())))


def _explain(values: Values, name: str) -> str:
    at = values.get("at")
    return f"{values[PROBLEM]}" + (f", at: {at}" if at and at != name else "")


def judge_ranks(num_ranks: int, places: Mapping[int, Place], missing: Mapping[int, str], patience: float) -> Judgement:
    """Says which ranks did not come, or did not come to the end."""
    findings = []
    for rank, last in sorted(missing.items()):
        who = f"{places[rank]}" if rank in places else f"rank {rank}"
        what = "did not come" if rank not in places else f"was last seen at: {last}"
        hint = f"its output is in the log of rank {rank}; --timeout gives it longer"
        findings.append(Finding(Verdict.FAIL, f"{who}: {what}, within {patience:.0f} s", hint))
    return Judgement(f"{num_ranks - len(missing)} of {num_ranks} came to the end", tuple(findings))


def _rows(line: Line) -> list[str]:
    judgement = line.judgement
    reason = judgement.verdict == Verdict.SKIPPED
    head = f"{_LABELS[judgement.verdict] + ':' * reason:{_FIRST}}{line.name:{_SECOND}}"
    rows = _wrap(judgement.summary, head, _FIRST + _SECOND)
    shown = judgement.findings[:_MOST_FINDINGS]
    for finding in shown:
        rows += _wrap(finding.message, " " * _FIRST + "* ", _FIRST + 2)
        if finding.hint:
            rows += _wrap(finding.hint, " " * _FIRST + "  -> ", _FIRST + 5)
    if len(judgement.findings) > len(shown):
        rows.append(" " * _FIRST + f"* and {len(judgement.findings) - len(shown)} more, in the JSON")
    return rows


def _wrap(text: str, head: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=head, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    ) or [head.rstrip()]
