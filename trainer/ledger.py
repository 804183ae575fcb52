"""The ledger of a run's attempts: what the present one does is written down as it goes.

Owns when what is noted in `attempts.json`. What a record means, and what all of them come to, is `trainer.goodput`.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from trainer.errors import one_line_text
from trainer.goodput import FILE, IN_STEPS, Attempt, Goodput, Passed, attempts_text, read_attempts

if TYPE_CHECKING:
    from trainer.run_folder import RunFolder

logger = logging.getLogger("lockstep")

_EXACT_SAVES = 20  # of one attempt; of older saves every second is forgotten, again and again
_MOST_SAVES = 60
_EXACT_ATTEMPTS = 20  # of which every save is remembered; older ones count as if all their steps had taken equally long


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
            seconds=dict.fromkeys(("startup", *IN_STEPS), 0.0),
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
        others = {k: max(v, 0) for k, v in seconds.items() if k not in ("total", "startup", *IN_STEPS)}
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
        self._folder.write(FILE, attempts_text([*self.earlier, self._attempt]))


def _earlier_attempts(file: Path) -> list[Attempt]:
    """Returns the attempts so far. A file that cannot be used is put aside with a warning, and stops no run."""
    try:
        return read_attempts(file)
    except (OSError, ValueError) as error:
        logger.warning("goodput counts from this attempt on, as '%s' cannot be used: %s", file, one_line_text(error))
        with suppress(OSError):
            os.replace(file, file.with_name(f"{file.name}.damaged"))
        return []


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
