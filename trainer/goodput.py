"""Goodput: the share of a run's wall time, over all its attempts, that went into optimizer steps that counted.

Owns `attempts.json` in the run folder, a record per attempt, and what it comes to. The rest of the time, by name:

- `startup`: from the start of the process to the first step, and what else is no step and has no name below;
- `data_wait`: steps that waited for a batch;
- `evaluation`, `checkpoint`: training stood still for them; any other phase of the clock under its own name;
- `lost`: steps made in vain: after the checkpoint from which the next attempt went on, rolled back, or with an update
  that was left out. Only the time in the steps; an evaluation among them stays one;
- `restarts`: from when an attempt was last seen to the start of the next, with what one that was killed did after its
  last record. After an attempt that finished this does not count, as nobody waited; after one that was stopped, failed
  or was killed it does.

The parts add up to the whole. An attempt is timed by a clock that only goes forward, and where the clock on the wall
went backwards between two attempts, their gap counts as nothing.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import psutil
from pydantic import Field, TypeAdapter, ValidationError

from trainer.errors import one_line_text
from trainer.units import duration

if TYPE_CHECKING:
    from trainer.run_folder import RunFolder

logger = logging.getLogger("lockstep")

FILE = "attempts.json"

PARTS = {
    "train": "steps that counted",
    "startup": "start-up",
    "data_wait": "data wait",
    "evaluation": "evaluation",
    "checkpoint": "checkpoint stalls",
    "lost": "lost work",
    "restarts": "restarts",
}
_IN_STEPS = ("train", "data_wait", "lost")

_EXACT_SAVES = 20  # of one attempt; of older saves every second is forgotten, again and again
_MOST_SAVES = 60
_EXACT_ATTEMPTS = 20  # of which every save is remembered; older ones count as if all their steps had taken equally long

Status = Literal["running", "finished", "stopped", "failed", "killed"]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Passed(NamedTuple):
    """When an attempt had made a step: the seconds in all of its steps up to it that counted.

    Args:
        step: of the run, counted from 1.
        train: seconds in steps, without the waiting.
        data_wait: seconds of waiting for batches.
    """

    step: int
    train: Seconds
    data_wait: Seconds


@dataclass
class Attempt:
    """What is known of one attempt at a run; an entry of `attempts.json`.

    Args:
        number: 1 for the first.
        started: when its process started, in seconds since 1970.
        last_seen: when it was last known to be alive, in seconds since 1970.
        status: how it ended; `killed` where it was `running` when the next attempt began.
        num_processes: ranks.
        first_step: steps that were made before it.
        step: the last step that it is known to have made.
        counted_step: the last step whose work was not lost.
        saved_step: the newest checkpoint that it is known to have.
        seconds: where its life went, by part; they add up to all of it.
        passed: when it had made the steps that it saved, and the last one.
    """

    number: int
    started: Seconds
    last_seen: Seconds
    status: Status
    num_processes: int
    first_step: int
    step: int
    counted_step: int
    saved_step: int | None
    seconds: dict[str, Seconds]
    passed: list[Passed] = field(default_factory=list)

    def at(self, step: int) -> Passed:
        """Returns when it had made a step; between steps of which it is known, all take equally long."""
        end = Passed(step, self.seconds["train"], self.seconds["data_wait"])
        if step >= self.counted_step and self.status in ("finished", "stopped"):
            return end  # after its last step it began no other
        before = Passed(self.first_step, 0.0, 0.0)
        if step <= before.step:
            return before
        for after in self.passed:
            if step == after.step:
                return after
            if step < after.step:
                share = (step - before.step) / (after.step - before.step)
                train = before.train + share * (after.train - before.train)
                data_wait = before.data_wait + share * (after.data_wait - before.data_wait)
                return Passed(step, train, data_wait)
            before = after
        return end

    def lose_after(self, step: int) -> tuple[float, float]:
        """Counts its steps after this one as lost; returns their seconds in steps proper, and of waiting."""
        kept, seconds = self.at(step), self.seconds
        train, data_wait = max(seconds["train"] - kept.train, 0), max(seconds["data_wait"] - kept.data_wait, 0)
        if train or data_wait:
            seconds["train"] -= train
            seconds["data_wait"] -= data_wait
            seconds["lost"] += train + data_wait
        if step < self.counted_step:
            self.counted_step = max(step, self.first_step)
            self.passed = [p for p in self.passed if p.step < step]
            if step > self.first_step:
                self.passed.append(kept)
        return train, data_wait


@dataclass(frozen=True)
class Goodput:
    """Where the wall time of a run went.

    Args:
        goodput: share of steps that counted, from 0 to 1.
        seconds: by part, `train` for the steps that counted; they add up to `total`.
        num_attempts: at the run.
        total: seconds.
    """

    goodput: float
    seconds: dict[str, float]
    num_attempts: int
    total: float

    @classmethod
    def of(cls, attempts: Sequence[Attempt]) -> Goodput:
        """Adds up attempts, from the first on. Of one that failed, work that is in no checkpoint is lost."""
        seconds = dict.fromkeys(PARTS, 0.0)
        for attempt in attempts:
            for part, value in attempt.seconds.items():
                seconds[part] = seconds.get(part, 0.0) + value
        for before, after in itertools.pairwise(attempts):
            if before.status != "finished":
                seconds["restarts"] += max(after.started - before.last_seen, 0)
        if attempts and attempts[-1].status == "failed":
            last = attempts[-1]
            kept = last.at(last.first_step if last.saved_step is None else last.saved_step)
            for part, value in (("train", kept.train), ("data_wait", kept.data_wait)):
                lost = max(last.seconds[part] - value, 0)
                seconds[part] -= lost
                seconds["lost"] += lost
        seconds = {part: max(value, 0.0) for part, value in seconds.items()}  # what rounding left
        total = math.fsum(seconds.values())
        return cls(seconds["train"] / total if total else 0.0, seconds, len(attempts), total)

    def line(self) -> str:
        """Returns one line for a person, with the largest losses first."""
        attempts = f"{self.num_attempts} attempt{'s' if self.num_attempts != 1 else ''}"
        text = f"goodput {self.goodput:.1%} of {duration(self.total)} in {attempts}"
        losses = sorted(((value, part) for part, value in self.seconds.items() if part != "train"), reverse=True)
        shown = [
            f"{PARTS.get(part, part.replace('_', ' '))} {value / self.total:.1%}"
            for value, part in losses
            if value >= 0.0005 * self.total > 0
        ]
        return f"{text}: {', '.join(shown)}" if shown else text


class Ledger:
    """The attempts at a run, this one included; exists on rank 0 only.

    The seconds that its methods take are those of this attempt so far: `Clock.split()`, read outside of any phase, and
    the feed's waiting, which is a part of the clock's `train`.

    Args:
        folder: where `attempts.json` is. Nothing is written before `begin` or `end`.
        started: when this attempt started, in seconds since 1970; by default when this process did, or now where the
            process is older than its first run (a notebook, or a second run in the same process).
        period: seconds between two writes of what may as well be lost.
    """

    def __init__(self, folder: RunFolder, started: float | None = None, period: float = 5.0) -> None:
        self._folder = folder
        self._period = period
        self._written_at = -math.inf
        self.earlier = _earlier_attempts(folder.path / FILE)
        for attempt in self.earlier:
            if attempt.status == "running":
                attempt.status = "killed"
        now = time.time()
        started = now - _age_of_run() if started is None else started
        if self.earlier and started < self.earlier[-1].last_seen <= now:
            started = self.earlier[-1].last_seen  # in the same process
        self._age = max(now - started, 0)  # of this attempt, at the next line
        self._opened = time.perf_counter()
        last = self.earlier[-1] if self.earlier else None
        step = last.counted_step if last is not None else 0
        self._attempt = Attempt(
            number=last.number + 1 if last is not None else 1,
            started=started,
            last_seen=now,
            status="running",
            num_processes=1,
            first_step=step,
            step=step,
            counted_step=step,
            saved_step=None,
            seconds=dict.fromkeys(("startup", *_IN_STEPS), 0.0),
        )
        self._lost = (0.0, 0.0)  # of the clock's time in steps proper, and of the waiting
        self._left_out = 0  # at the last update
        self.has_begun = False
        self._last_is_saved = False  # whether the last of the attempt's passed steps is to stay

    @property
    def number(self) -> int:
        """Which attempt this is, from 1."""
        return self._attempt.number

    def begin(self, first_step: int, num_processes: int, left_out: int = 0) -> None:
        """Begins to count, once it is known where from. What earlier attempts did after that step is lost.

        Args:
            first_step: steps made before this attempt.
            num_processes: ranks.
            left_out: steps of the run so far whose update was left out.
        """
        attempt = self._attempt
        attempt.first_step = attempt.step = attempt.counted_step = first_step
        attempt.num_processes = num_processes
        self.has_begun = True
        self._left_out = left_out
        for earlier in self.earlier:
            earlier.lose_after(first_step)
        for earlier in self.earlier[:-_EXACT_ATTEMPTS]:
            earlier.passed = earlier.passed[-1:]
        self._see({})
        self._write()

    def update(
        self, step: int, seconds: Mapping[str, float], data_wait: float, left_out: int = 0, saves: bool = False
    ) -> None:
        """Notes how far this attempt has come; writes the file if that is long ago.

        Args:
            step: the last step made.
            seconds: per phase, with `train` and `total`.
            data_wait: seconds, a part of `train`.
            left_out: steps of the run so far whose update was left out.
            saves: a save of this step begins. When that was is kept, so that lost work is known exactly.
        """
        attempt = self._attempt
        train, data_wait = self._split(seconds, data_wait)
        lost_train, lost_wait = self._lost
        kept_train, kept_wait = attempt.seconds["train"], attempt.seconds["data_wait"]
        if step > attempt.step and left_out > self._left_out:
            share = min((left_out - self._left_out) / (step - attempt.step), 1)
            lost_train += share * max(train - lost_train - kept_train, 0)
            lost_wait += share * max(data_wait - lost_wait - kept_wait, 0)
            self._lost = lost_train, lost_wait
        self._left_out = left_out
        attempt.seconds["train"] = max(train - lost_train, 0)
        attempt.seconds["data_wait"] = max(data_wait - lost_wait, 0)
        attempt.seconds["lost"] = lost_train + lost_wait
        self._see(seconds)
        self._pass(step, saves)
        self._write(only_after=self._period)

    def saved(self, step: int | None) -> None:
        """Notes the newest checkpoint that is there, if there is one; does nothing where that is no news."""
        if step is not None and step != self._attempt.saved_step:
            self._attempt.saved_step = step
            self._write()

    def rolled_back(
        self, from_step: int, to_step: int, seconds: Mapping[str, float], data_wait: float, left_out: int = 0
    ) -> None:
        """Counts as lost what was done after a step to which the run has gone back, by whichever attempt.

        Call it when the earlier state is there again. The time that this took, if it is no phase, is lost with it.

        Args:
            from_step: the last step made.
            to_step: the step that the run goes on from.
            seconds: per phase, with `train` and `total`.
            data_wait: seconds, a part of `train`.
            left_out: steps of the run whose update was left out, as counted after going back.
        """
        attempt = self._attempt
        self.update(from_step, seconds, data_wait, self._left_out)
        for earlier in self.earlier:
            earlier.lose_after(to_step)
        train, data_wait = attempt.lose_after(to_step)
        self._lost = self._lost[0] + train, self._lost[1] + data_wait
        self._left_out = left_out
        attempt.first_step = min(attempt.first_step, to_step)
        attempt.step = attempt.counted_step = to_step
        if attempt.saved_step is not None:
            attempt.saved_step = min(attempt.saved_step, to_step)
        self._last_is_saved = True
        self._write()

    def end(
        self,
        status: Literal["finished", "stopped", "failed"],
        step: int,
        seconds: Mapping[str, float],
        data_wait: float,
        left_out: int = 0,
    ) -> None:
        """Notes how this attempt ended. Before `begin` it adds an attempt without a step, for one that failed early."""
        self.update(step, seconds, data_wait, left_out)
        self._attempt.status = status
        self._write()

    def summary(self) -> Goodput:
        """Returns where the time went, up to the last update."""
        return Goodput.of([*self.earlier, self._attempt])

    # ---- what is noted ------------------------------------------------------------------------------------

    def _split(self, seconds: Mapping[str, float], data_wait: float) -> tuple[float, float]:
        """Returns the seconds in steps proper, and those of waiting in them."""
        train = max(seconds["train"], 0)
        data_wait = min(max(data_wait, 0), train)
        return train - data_wait, data_wait

    def _see(self, seconds: Mapping[str, float]) -> None:
        """Notes the time, and the phases; what is left of this attempt's life is start-up."""
        attempt = self._attempt
        alive = self._age + time.perf_counter() - self._opened
        if seconds.get("total", 0) > alive:  # a clock that began before the ledger, in a process that was there
            longer = seconds["total"] - alive
            alive, self._age, attempt.started = alive + longer, self._age + longer, max(attempt.started - longer, 0)
        others = {k: max(v, 0) for k, v in seconds.items() if k not in ("total", "startup", *_IN_STEPS)}
        attempt.seconds.update(others)
        named = math.fsum(value for part, value in attempt.seconds.items() if part != "startup")
        attempt.seconds["startup"] = max(alive - named, 0)
        attempt.last_seen = time.time()

    def _pass(self, step: int, saves: bool) -> None:
        """Notes when a step was first seen to be made; of steps in a row that are not saved, the last one only."""
        attempt, passed = self._attempt, self._attempt.passed
        attempt.step = attempt.counted_step = max(step, attempt.first_step)
        if step > (passed[-1].step if passed else attempt.first_step):
            if passed and not self._last_is_saved:
                passed.pop()
            passed.append(Passed(step, attempt.seconds["train"], attempt.seconds["data_wait"]))
            self._last_is_saved = False
        self._last_is_saved |= saves
        if len(passed) > _MOST_SAVES:
            attempt.passed = passed[:-_EXACT_SAVES:2] + passed[-_EXACT_SAVES:]

    def _write(self, only_after: float = 0.0) -> None:
        now = time.perf_counter()
        if now - self._written_at < only_after:
            return
        self._written_at = now
        self._folder.write(FILE, _to_json([*self.earlier, self._attempt]))


_ATTEMPTS = TypeAdapter(list[Attempt])


def read_attempts(file: Path) -> list[Attempt]:
    """Returns the attempts so far, none where there is no file.

    Raises:
        OSError, ValueError: it cannot be read, or is damaged; with a message of one line.
    """
    try:
        attempts = _ATTEMPTS.validate_json(file.read_bytes())
    except FileNotFoundError:
        return []
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"]) from error
    if not all({"startup", *_IN_STEPS} <= set(attempt.seconds) for attempt in attempts):
        raise ValueError("times are missing")
    return attempts


def _earlier_attempts(file: Path) -> list[Attempt]:
    """Returns the attempts so far. A file that cannot be used is put aside with a warning, and stops no run."""
    try:
        return read_attempts(file)
    except (OSError, ValueError) as error:
        logger.warning("goodput counts from this attempt on, as '%s' cannot be used: %s", file, one_line_text(error))
        with suppress(OSError):
            os.replace(file, file.with_name(f"{file.name}.damaged"))
        return []


def _to_json(attempts: Iterable[Attempt]) -> str:
    """Returns a line per attempt; times to the microsecond."""
    lines = [json.dumps(_rounded(asdict(attempt))) for attempt in attempts]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


_has_run = False  # whether this process has made an attempt


def _age_of_run() -> float:
    """Returns the seconds since this process started, if it was started for this run; else 0."""
    global _has_run
    had_run, _has_run = _has_run, True
    if had_run or hasattr(sys, "ps1"):  # which only a prompt has: a person's shell or notebook
        return 0.0
    try:  # psutil knows it to the second
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.time() - psutil.Process().create_time()
