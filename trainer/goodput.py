"""Goodput: the share of a run's wall time, over all its attempts, that went into optimizer steps that counted.

Owns what a record per attempt, in `attempts.json` in the run folder, comes to. The present attempt's is written by
`trainer.ledger`. The rest of the time, by name:

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
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from trainer.units import duration

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
IN_STEPS = ("train", "data_wait", "lost")

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
    if not all({"startup", *IN_STEPS} <= set(attempt.seconds) for attempt in attempts):
        raise ValueError("times are missing")
    return attempts


def attempts_text(attempts: Iterable[Attempt]) -> str:
    """Returns `attempts.json`: a line per attempt; times to the microsecond."""
    lines = [json.dumps(_rounded(asdict(attempt))) for attempt in attempts]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
