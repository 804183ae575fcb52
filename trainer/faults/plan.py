"""Plans of what is to go wrong in a run, and notes of what has: files, and who may follow them.

A plan is a JSON file and no setting of a run. It is followed only where LOCKSTEP_FAULTS names it, where it was written
for this very run folder, and for so long as it says. `<plan>.done` has the events that have happened, over all attempts
at the run, and `<plan>.starts` the first step of each attempt. Imports no torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trainer.errors import UserError, nearest, one_line
from trainer.faults.judging import PLACES
from trainer.files import replacing
from trainer.system import sync_folder

VARIABLE = "LOCKSTEP_FAULTS"
MOST_SECONDS_VALID = 24 * 3600.0
SPIKE_FACTOR = 1e4
EXIT_CODE = 3  # of the action `exit`
CLOCK_TOLERANCE = 60.0  # seconds by which hosts' clocks may differ

_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL")
# What each does; all but the last four happen to the main thread, wherever it is.
ACTIONS: dict[str, str] = {
    "kill": "SIGKILL to itself",
    "kill-all": "SIGKILL to all ranks on this host",
    "stop": "SIGSTOP to itself",
    **{f"signal:{name}": f"{name} to itself" for name in _SIGNALS},
    **{f"signal-launcher:{name}": f"{name} to the process that started it" for name in _SIGNALS},
    "stop-file": "makes the file STOP in the run folder",
    "raise": "RuntimeError",
    "raise-user-error": "UserError",
    "oom": "torch.OutOfMemoryError",
    "exit": f"ends with code {EXIT_CODE}, and tidies nothing",
    "segfault": "reads address 0",
    "hang": "sleeps for ever; other threads go on",
    "hang-with-gil": "sleeps for ever with the GIL held and signals blocked; no thread that runs Python goes on",
    "delay": "sleeps for a while",
    "kill-worker": "SIGKILL to one of its loader workers",
    "stop-worker": "SIGSTOP to one of its loader workers",
    "corrupt-checkpoint": "flips bytes in the newest checkpoint, and SIGKILL to itself",
    "truncate-checkpoint": "cuts a file of the newest checkpoint in half, and SIGKILL to itself",
    "remove-checkpoint-file": "deletes a file of the newest checkpoint, and SIGKILL to itself",
    "stop-at": "the run is asked to stop, and ends with exactly this step; all ranks do, whichever it names",
    "nan": "NaN in the first sample of a batch",
    "inf-gradient": "a loss whose gradient is infinite",
    "spike": f"a loss that is {SPIKE_FACTOR:g} times as large",
}
NUMBERS = ("nan", "inf-gradient", "spike")
WITHOUT_PLACE = ("stop-at", *NUMBERS)


@dataclass(frozen=True)
class Event:
    """One thing that goes wrong.

    Args:
        action: a key of `ACTIONS`.
        rank: to whom it happens.
        step: the first step, counted from 1, at which it may: the one that is being made, or that was made last. With
            `repeats` the only one. None for any.
        place: one of `PLACES`; None for the beginning of a step. `stop-at` and what happens to numbers take none.
        after_seconds: the earliest it happens, counted from the first step that was begun under this plan.
        in_turn: only when all such events before it in the plan have happened, with its seconds counted from the last
            of these, or from the first step of the present attempt if that is later.
        seconds: length of a delay.
        times: in so many steps in a row; of use with a delay and with numbers.
        repeats: whether it happens whenever the run comes to that step, in every attempt, instead of once.
    """

    action: str
    rank: int = 0
    step: int | None = None
    place: str | None = None
    after_seconds: float | None = None
    in_turn: bool = False
    seconds: float = 0.0
    times: int = 1
    repeats: bool = False

    def problem(self) -> str | None:
        """Returns what is wrong with it, if anything is."""
        if self.action not in ACTIONS:
            return f"there is no action '{self.action}'{nearest(self.action, ACTIONS)}"
        if self.place is not None and self.place not in PLACES:
            return f"there is no place '{self.place}'{nearest(self.place, PLACES)}"
        if self.action in WITHOUT_PLACE and self.place is not None:
            return f"'{self.action}' takes no place"
        if self.rank < 0 or self.times < 1 or self.seconds < 0 or (self.step is not None and self.step < 1):
            return "rank and seconds must be at least 0, step and times at least 1"
        if self.in_turn and (self.after_seconds is None or self.repeats):
            return "an event in turn needs after_seconds, and does not repeat"
        needs_step = self.repeats or self.action == "stop-at"
        return "'stop-at' and an event that repeats need a step" if needs_step and self.step is None else None


@dataclass(frozen=True)
class Plan:
    """What is to go wrong in a run.

    Args:
        run_dir: folder of the only run that it is for, absolute.
        written: seconds since 1970.
        until: the same, at most a day later; from then on nothing more happens, and no attempt starts.
        events: in any order.
    """

    run_dir: Path
    written: float
    until: float
    events: tuple[Event, ...]


def write_plan(file: Path, run_dir: Path, events: Sequence[Event], seconds_valid: float = 3600.0) -> None:
    """Writes a plan, and forgets what was done under an earlier one of that name.

    Args:
        file: to be named by LOCKSTEP_FAULTS.
        run_dir: folder of the run that it is for.
        events: what is to happen; "any" rank is 0.
        seconds_valid: from now on, at most a day.

    Raises:
        UserError: an event makes no sense.
    """
    assert 0 < seconds_valid <= MOST_SECONDS_VALID
    now = time.time()
    plan = Plan(run_dir.resolve(), now, now + seconds_valid, tuple(events))
    _check_events(file, plan.events)
    for old in (done_file(file), starts_file(file)):
        old.unlink(missing_ok=True)
    text = json.dumps({**asdict(plan), "run_dir": str(plan.run_dir)}, indent=2)
    with replacing(file) as staged:
        staged.write_text(text + "\n", encoding="utf-8")


def read_plan(file: Path) -> Plan:
    """Reads a plan.

    Raises:
        UserError: it cannot be read, or makes no sense.
    """
    known = {field.name for field in fields(Event)}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        for event in content["events"]:
            for key in event:
                if key not in known:
                    raise UserError(f"{named(file)}: an event has no '{key}'{nearest(key, known)}")
        plan = Plan(
            Path(content["run_dir"]),
            float(content["written"]),
            float(content["until"]),
            tuple(Event(**{**event, "rank": _rank_number(event.get("rank", 0))}) for event in content["events"]),
        )
        _check_events(file, plan.events)
    except OSError as error:
        raise UserError(f"{named(file)}, which cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{named(file)}, which is no plan of faults: {one_line(error)}") from error
    return plan


def _rank_number(rank: Any) -> int:
    return 0 if rank == "any" else int(rank)


def _check_events(file: Path, events: Sequence[Event]) -> None:
    problems = [f"{named(file)}: event {i}: {problem}" for i, e in enumerate(events) if (problem := e.problem())]
    if problems:
        raise UserError(*problems)


def named(file: Path) -> str:
    return f"{VARIABLE} names '{file}'"


def done_file(plan: Path) -> Path:
    """Returns where the events of a plan that have happened are noted, one JSON object per line."""
    return plan.with_name(f"{plan.name}.done")


def starts_file(plan: Path) -> Path:
    """Returns where rank 0 notes the first step of each attempt, one JSON object per line."""
    return plan.with_name(f"{plan.name}.starts")


def note(file: Path, record: dict[str, Any]) -> None:
    is_new = not file.exists()
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(record) + "\n").encode())  # one write: ranks append to the same file
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        sync_folder(file.parent)


def read_notes(file: Path) -> list[dict[str, Any]]:
    """Reads the records of a `.done` or `.starts` file; none where there is no such file yet."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]
