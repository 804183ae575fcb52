"""Values of a run over its steps, kept short however long the run is, with their lowest and highest.

Fed record by record, while the run goes on or from its files, so that the page costs nothing to speak of at the end.
"""

from __future__ import annotations

import bisect
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pydantic_core

MOST_STRETCHES = 600  # of a curve; each has up to two points
MOST_COLUMNS = 240  # of what is kept per rank, and of a heat map
_LINES_AT_ONCE = 2000

_NOT_CURVES = frozenset({"step", "epoch", "samples", "time"})


_RAW = 1200  # values of a curve that are kept as they are
_AT_ONCE = 4096


class Curve:
    """One value over the steps: as it is while it is short, then the extremes and the sums of stretches of it."""

    def __init__(self) -> None:
        self._steps: list[float] = []  # of what is in no stretch yet
        self._values: list[float] = []
        self._seconds: list[float] = []
        self._stretches: dict[str, np.ndarray] = {}
        self._per_stretch = 2

    def add(self, step: float, value: float, seconds: float = 0.0) -> None:
        """Adds the value at a step that comes after all others; one that is not finite counts as not known.

        Args:
            step: of it.
            value: at that step.
            seconds: of the run that it is about, for `over_time`.
        """
        self._steps.append(step)
        self._values.append(value)
        self._seconds.append(seconds)
        if len(self._steps) >= _AT_ONCE:
            self._fold()

    def go_back(self, step: float) -> None:
        """Forgets what came after a step, which a run makes again."""
        while self._steps and self._steps[-1] > step:
            self._steps.pop()
            self._values.pop()
            self._seconds.pop()
        if self._stretches:
            kept = self._stretches["first"] <= step
            self._stretches = {name: column[kept] for name, column in self._stretches.items()}

    def _fold(self) -> None:
        """Puts all values into stretches, few enough."""
        if not self._steps:
            return
        new = _stretches(self._steps, self._values, self._seconds, self._per_stretch)
        self._stretches = _joined(self._stretches, new)
        self._steps, self._values, self._seconds = [], [], []
        while len(self._stretches["first"]) > MOST_STRETCHES:
            self._stretches = _halved(self._stretches)
            self._per_stretch *= 2

    def _table(self) -> dict[str, np.ndarray]:
        if self._stretches or len(self._steps) > _RAW:
            self._fold()
            return self._stretches
        return _stretches(self._steps, self._values, self._seconds, 1)

    @property
    def num_values(self) -> int:
        """How many values are known."""
        return int(self._table()["num"].sum())

    @property
    def mean(self) -> float | None:
        """The mean of all known values."""
        table = self._table()
        num = table["num"].sum()
        return float(table["total"].sum() / num) if num else None

    def over_time(self) -> tuple[float, float]:
        """Returns the sum of all known values times the seconds that they are about, and of these seconds."""
        table = self._table()
        return float(table["value_seconds"].sum()), float(table["seconds"].sum())

    @property
    def last(self) -> float | None:
        """The newest known value; of a long curve the mean of its newest stretch."""
        return next((value for _, value in reversed(self.means()) if value is not None), None)

    def best(self, highest: bool) -> tuple[float, float] | None:
        """Returns step and value of the highest or the lowest value, of several the first; None where there is none."""
        table = self._table()
        if not table["num"].any():
            return None
        name = "high" if highest else "low"
        at = int(np.nanargmax(table[name]) if highest else np.nanargmin(table[name]))
        return float(table[f"{name}_at"][at]), float(table[name][at])

    def points(self) -> list[tuple[float, float | None]]:
        """Returns the points to draw: the lowest and the highest of each stretch, None where nothing is known."""
        table = self._table()
        points: list[tuple[float, float | None]] = []
        names = ("first", "num", "low_at", "low", "high_at", "high")
        for first, num, low_at, low, high_at, high in zip(*(table[name].tolist() for name in names), strict=True):
            if not num:
                points.append((first, None))
            elif low_at == high_at:
                points.append((low_at, low))
            else:
                points += sorted(((low_at, low), (high_at, high)))
        return points

    def means(self) -> list[tuple[float, float | None]]:
        """Returns the mean of each stretch, at its last step."""
        table = self._table()
        columns = (table[name].tolist() for name in ("last", "total", "num"))
        return [(last, total / num if num else None) for last, total, num in zip(*columns, strict=True)]


def _stretches(
    steps: Sequence[float], values: Sequence[float], seconds: Sequence[float], length: int
) -> dict[str, np.ndarray]:
    """Returns a row per stretch of this many values; the last one may be shorter."""
    num = -(-len(steps) // length)
    x, y = np.full((num, length), math.nan), np.full((num, length), math.nan)
    about = np.zeros((num, length))
    about.reshape(-1)[: len(seconds)] = seconds
    x.reshape(-1)[: len(steps)], y.reshape(-1)[: len(values)] = steps, values
    known, rows = np.isfinite(y), np.arange(num)
    y[~known] = math.nan
    low_at, high_at = np.where(known, y, math.inf).argmin(axis=1), np.where(known, y, -math.inf).argmax(axis=1)
    return {
        "first": x[:, 0],
        "last": np.fmax.reduce(x, axis=1),
        "num": known.sum(axis=1),
        "total": np.where(known, y, 0.0).sum(axis=1),
        "seconds": np.where(known, about, 0.0).sum(axis=1),
        "value_seconds": np.where(known, y * about, 0.0).sum(axis=1),
        "low": y[rows, low_at],
        "low_at": x[rows, low_at],
        "high": y[rows, high_at],
        "high_at": x[rows, high_at],
    }


def _joined(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([before[name], after[name]]) for name in after} if before else after


def _halved(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Makes one stretch of every two; an odd one stays what it is."""
    num = len(table["first"]) // 2 * 2
    a, b = ({name: column[start:num:2] for name, column in table.items()} for start in (0, 1))
    # NaN, where a stretch has no value, is neither lower nor higher.
    lower, higher = ~(a["low"] <= b["low"]) & (b["num"] > 0), ~(a["high"] >= b["high"]) & (b["num"] > 0)
    halved = {"first": a["first"], "last": b["last"]}
    halved |= {name: a[name] + b[name] for name in ("num", "total", "seconds", "value_seconds")}
    for name, is_second in (("low", lower), ("high", higher)):
        halved[name] = np.where(is_second, b[name], a[name])
        halved[f"{name}_at"] = np.where(is_second, b[f"{name}_at"], a[f"{name}_at"])
    return _joined(halved, {name: column[num:] for name, column in table.items()})


class RankTable:
    """What each rank did over the steps: means over stretches of the run."""

    FIELDS = ("seconds_to_exchange", "communication", "data_wait", "peak_gib")

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._per_column = 1
        self._in_last = 0
        self.steps: list[float] = []  # the last of each column
        self._sums: list[dict[str, np.ndarray]] = []
        self._nums: list[int] = []
        self.hosts: list[str] = []

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds a record of ranks.jsonl; one that makes no sense is passed over."""
        try:
            values = {name: np.asarray(record[name], dtype=float) for name in self.FIELDS if name in record}
            step = float(record["step"])
        except (TypeError, ValueError, KeyError):
            return
        shapes = {value.shape for value in values.values()}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 1:
            return
        if self._sums and self._shape() != shape:  # the run goes on with another number of ranks
            self._clear()
        while self.steps and self.steps[-1] >= step:  # made again
            self.steps.pop()
            self._sums.pop()
            self._nums.pop()
            self._in_last = self._per_column
        hosts = record.get("hosts")
        self.hosts = [str(host) for host in hosts] if isinstance(hosts, list) else []
        if self.steps and self._in_last < self._per_column:
            self.steps[-1] = step
            self._nums[-1] += 1
            _add_all(self._sums[-1], values)
            self._in_last += 1
            return
        if len(self.steps) == MOST_COLUMNS:
            for before, after in zip(self._sums[::2], self._sums[1::2], strict=True):
                _add_all(before, after)
            self._nums = [a + b for a, b in zip(self._nums[::2], self._nums[1::2], strict=True)]
            self._sums, self.steps = self._sums[::2], self.steps[1::2]
            self._per_column *= 2
        self.steps.append(step)
        self._sums.append(values)
        self._nums.append(1)
        self._in_last = 1

    def _shape(self) -> tuple[int, ...]:
        return next(iter(self._sums[-1].values())).shape

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return self._shape()[0] if self._sums else 0

    def columns(self, name: str) -> np.ndarray | None:
        """Returns a value by column and rank, NaN where it is not known; None where no column has it."""
        if not any(name in sums for sums in self._sums):
            return None
        empty = np.full(self.num_ranks, math.nan)
        pairs = zip(self._sums, self._nums, strict=True)
        return np.stack([sums[name] / num if name in sums else empty for sums, num in pairs])


def _add_all(to: dict[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    for name, value in other.items():
        to[name] = to[name] + value if name in to else value


class Curves:
    """All values of a run: those of `metrics.jsonl` by key, and those of `ranks.jsonl`.

    Args:
        folder: of the run, where earlier attempts have left something.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.by_key: dict[str, Curve] = {}
        self.ranks = RankTable()
        self.num_records = 0
        self.first_time: float | None = None  # seconds since 1970
        self.last_time: float | None = None
        self.last_step: float | None = None
        self.last_epoch: float | None = None
        self.last_samples: float | None = None
        # Of attempts, as the time between two of them is nobody's. What is added from now on is of this one.
        earlier = _starts(folder / "attempts.json") if folder is not None else []
        self._starts = sorted([*earlier, time.time()])
        self._last_report: float | None = None

    @classmethod
    def read(cls, folder: Path) -> Curves:
        """Reads what a run folder has of them; lines that are not whole, and files that are not there, do not count."""
        curves = cls(folder)
        for record in records(folder / "metrics.jsonl"):
            curves.add(record)
        for record in records(folder / "ranks.jsonl"):
            curves.ranks.add(record)
        return curves

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds a record of metrics.jsonl."""
        step = record.get("step")
        if not _is_number(step):
            return
        if self.last_step is not None and step < self.last_step:  # it went back, and makes steps again
            for curve in self.by_key.values():
                curve.go_back(step)
        self.num_records += 1
        self.last_step = step
        if _is_number(when := record.get("time")):
            self.first_time = when if self.first_time is None else self.first_time
            self.last_time = when
        if _is_number(epoch := record.get("epoch")):
            self.last_epoch = epoch
        if _is_number(samples := record.get("samples")):
            self.last_samples = samples
        by_key, seconds = self.by_key, self._since_report(record)
        for key, value in record.items():
            known = by_key.get(key)
            if known is None:
                if key in _NOT_CURVES or not (value is None or _is_number(value)):
                    continue
                known = by_key[key] = Curve()
            if type(value) is float:
                known.add(step, value, seconds)
            elif value is None or _is_number(value):
                known.add(step, math.nan if value is None else value, seconds)

    def _since_report(self, record: Mapping[str, Any]) -> float:
        """Returns the seconds that a report is about: those since the one before, within an attempt."""
        when = record.get("time")
        if not _is_number(when) or not any(key.startswith("time/") for key in record):
            return 0.0
        begun = bisect.bisect_right(self._starts, when)
        known = [self._last_report, self._starts[begun - 1] if begun else None]
        since = max((other for other in known if other is not None), default=when)
        self._last_report = when
        return max(when - since, 0.0)

    def get(self, key: str) -> Curve | None:
        """Returns the curve of a key that has a value."""
        curve = self.by_key.get(key)
        return curve if curve is not None and curve.num_values else None

    def keys(self, prefix: str) -> list[str]:
        """Returns the keys with a prefix that have a value, in the order of their first record."""
        return [key for key in self.by_key if key.startswith(prefix) and self.get(key) is not None]


def _starts(file: Path) -> list[float]:
    """Returns when the attempts at a run came to their first steps, as far as that is known, in any order."""
    try:
        attempts = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    starts = []
    for attempt in attempts if isinstance(attempts, list) else []:
        started = attempt.get("started") if isinstance(attempt, dict) else None
        if _is_number(started):
            seconds = attempt.get("seconds")
            startup = seconds.get("startup") if isinstance(seconds, dict) else None
            starts.append(started + (startup if _is_number(startup) and startup > 0 else 0))
    return starts


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def records(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a `.jsonl` file; passes over what is no record, and ends where it cannot be read."""
    try:
        with open(file, "rb") as stream:
            while lines := stream.readlines(_LINES_AT_ONCE * 500):
                yield from filter(lambda record: isinstance(record, dict), _parsed(lines))
    except OSError:
        return


def _parsed(lines: list[bytes]) -> Iterator[Any]:
    try:
        yield from pydantic_core.from_json(b"[" + b",".join(lines) + b"]")  # three times as fast as json
        return
    except ValueError:
        pass
    for line in lines:
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):  # half written by a run that was killed
            continue
