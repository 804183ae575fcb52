"""What there is in a run folder, as far as it can be read: any file may be missing, half written or of another version.

Owns the meaning of the files; keeps nothing that is not of the expected kind, so that whoever draws it need not ask.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError
from trainer.files import read_json, read_object, read_summary, read_text
from trainer.report.curves import Curves, records

# Any of these makes a folder a run folder.
_MARKS = ("config.yaml", "metrics.jsonl", "summary.json", "attempts.json")
_MOST_BAD_STEPS = 200
_ENDED = ("finished", "stopped", "failed", "killed")


@dataclass(frozen=True)
class Advice:
    """What to change. `settings` are config lines; `gain` is the expected speed-up, 0.3 for 30%."""

    rule: str
    text: str
    settings: dict[str, Any]
    gain: float | None


@dataclass(frozen=True)
class Attempt:
    """One attempt at the run; times in seconds since 1970. `fault` says what ended it, if that is known."""

    number: int
    status: str
    started: float
    last_seen: float
    num_processes: int | None
    first_step: int | None
    step: int | None
    saved_step: int | None
    seconds: dict[str, float]
    fault: dict[str, Any] | None = None
    fault_folder: Path | None = None


@dataclass(frozen=True)
class Run:
    """A run folder. What is not known is empty or None."""

    folder: Path
    name: str
    status: str  # of the newest attempt: `finished`, `stopped`, `failed`, `killed`, `running`, `unknown`
    summary: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    curves: Curves
    attempts: list[Attempt]
    bad_steps: list[dict[str, Any]]
    advice: list[Advice]
    time_split: dict[str, float]  # of the newest attempt, in shares
    checkpoints: list[Path] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)
    profiles: list[Path] = field(default_factory=list)
    evaluation: Path | None = None  # folder of the newest one with samples or a confusion matrix

    def number(self, *keys: str) -> float | None:
        """Returns a number of the summary, None where there is none."""
        value: Any = self.summary
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return as_number(value)

    @property
    def goals(self) -> dict[str, str]:
        """Of which metric the config says that its largest (`max`) or its smallest (`min`) value is the best."""
        section = self.config.get("checkpoint")
        best = section.get("best") if isinstance(section, dict) else None
        if not isinstance(best, dict) or best.get("mode") not in ("max", "min"):
            return {}
        return {str(best.get("metric")): best["mode"]}

    @property
    def step(self) -> int | None:
        """The last step that is known to have been made."""
        last_of_attempt = self.attempts[-1].step if self.attempts else None
        known = (as_number(self.curves.last_step), last_of_attempt, self.number("step"))
        steps = [int(step) for step in known if step is not None]
        return max(steps) if steps else None

    @property
    def started(self) -> float | None:
        """Seconds since 1970."""
        return self.attempts[0].started if self.attempts else self.curves.first_time

    @property
    def last_seen(self) -> float | None:
        """Seconds since 1970."""
        known = [self.curves.last_time, self.attempts[-1].last_seen if self.attempts else None]
        return max((when for when in known if when is not None), default=None)

    @property
    def goodput(self) -> float | None:
        """From 0 to 1."""
        curve = self.curves.get("goodput")
        told = self.number("goodput")
        # The summary of an earlier attempt is older than the newest record.
        if told is not None and (curve is None or self.status not in ("running", "killed")):
            return told
        return curve.last if curve is not None else None


def is_run_folder(folder: Path) -> bool:
    """Tells whether a folder has any file of a run."""
    return any((folder / name).is_file() for name in _MARKS)


def read_run(folder: Path, curves: Curves | None = None) -> Run:
    """Reads a run folder.

    Args:
        folder: the run folder.
        curves: its curves where they are known already; read by default.

    Raises:
        UserError: it is none.
    """
    if not is_run_folder(folder):
        what = "has no config.yaml, metrics.jsonl or summary.json" if folder.is_dir() else "does not exist"
        raise UserError(f"'{folder}' is not a run folder: it {what}")
    summary, environment = read_summary(folder), read_object(folder / "environment.json")
    config_text = read_text(folder / "config.yaml")
    config = _parse_yaml(config_text)
    section = config.get("run")
    name = section.get("name") if isinstance(section, dict) else None
    attempts = _attempts(folder)
    status = attempts[-1].status if attempts else summary.get("status")
    return Run(
        folder=folder,
        name=str(name) if name else folder.resolve().name,
        status=status if isinstance(status, str) and status in (*_ENDED, "running") else "unknown",
        summary=summary,
        config=config,
        config_text=config_text,
        environment=environment,
        curves=curves if curves is not None else Curves.read(folder),
        attempts=attempts,
        bad_steps=list(itertools.islice(records(folder / "faults" / "bad-steps.jsonl"), _MOST_BAD_STEPS)),
        advice=_advice(summary.get("advice")),
        time_split=numbers(summary.get("time_split")),
        checkpoints=sorted(_listed(folder / "checkpoints", r"step-\d+|best")),
        logs=_by_number(_listed(folder / "logs", r".+\.log")),
        profiles=_by_number(_listed(folder / "profile", r".+")),
        evaluation=_newest_evaluation(folder / "eval"),
    )


def as_number(value: object) -> float | None:
    """Returns a finite number as it is; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def numbers(value: object) -> dict[str, float]:
    """Returns the entries of an object that are finite numbers."""
    if not isinstance(value, Mapping):
        return {}
    return {str(key): number for key, entry in value.items() if (number := as_number(entry)) is not None}


def _parse_yaml(text: str) -> dict[str, Any]:
    try:
        value = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _attempts(folder: Path) -> list[Attempt]:
    found = read_json(folder / "attempts.json")
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    attempts = []
    for position, entry in enumerate(entries):
        started, last_seen = as_number(entry.get("started")), as_number(entry.get("last_seen"))
        if started is None:
            continue
        number = _whole(entry.get("number")) or position + 1
        fault_folder = folder / "faults" / f"attempt-{number:03d}"
        status = str(entry.get("status"))
        if status == "running" and position < len(entries) - 1:
            status = "killed"
        attempts.append(
            Attempt(
                number=number,
                status=status,
                started=started,
                last_seen=max(last_seen if last_seen is not None else started, started),
                num_processes=_whole(entry.get("num_processes")),
                first_step=_whole(entry.get("first_step")),
                step=_whole(entry.get("step")),
                saved_step=_whole(entry.get("saved_step")),
                seconds={part: value for part, value in numbers(entry.get("seconds")).items() if value >= 0},
                fault=read_object(fault_folder / "first.json") or None,
                fault_folder=fault_folder if fault_folder.is_dir() else None,
            )
        )
    return attempts


def _whole(value: object) -> int | None:
    number = as_number(value)
    return int(number) if number is not None else None


def _advice(value: object) -> list[Advice]:
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    return [
        Advice(
            rule=str(entry.get("rule", "")),
            text=str(entry["text"]),
            settings=dict(settings) if isinstance(settings := entry.get("settings"), dict) else {},
            gain=as_number(entry.get("gain")),
        )
        for entry in entries
        if isinstance(entry.get("text"), str)
    ]


def _listed(folder: Path, pattern: str) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if re.fullmatch(pattern, path.name)]
    except OSError:
        return []


def _by_number(files: list[Path]) -> list[Path]:
    """Sorts `rank-10.log` behind `rank-9.log`."""
    return sorted(files, key=lambda file: ([int(part) for part in re.findall(r"\d+", file.name)], file.name))


def _newest_evaluation(folder: Path) -> Path | None:
    kept = [
        path
        for path in _listed(folder, r"step-\d+")
        if (path / "samples.json").is_file() or (path / "confusion.json").is_file()
    ]
    return max(kept, key=lambda path: int(path.name.removeprefix("step-")), default=None)
