"""What `python -m launch chaos` tells: what happened to a job, what that cost, and whether it can be seen. No torch."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.faults.judging import AFTER_STEP
from trainer.goodput import PARTS

CHAOS, QUIET = "chaos", "quiet"  # the two runs, and their folders
_SHOWN = 10  # differences
_SAID = {
    "kill": "is killed",
    "kill-all": "is killed, and all others with it",
    "stop": "is stopped by SIGSTOP",
    "hang": "hangs",
    "delay": "is held up",
    "corrupt-checkpoint": "damages the newest checkpoint and is killed",
}


@dataclass
class Suffered:
    """A fault that happened, and what it cost.

    Args:
        action: of `trainer.faults.plan`.
        rank: whose.
        step: that was being made.
        place: what it was doing.
        time: seconds since 1970.
        attempt: what tells it from others.
        back_after: seconds until the next attempt began its first step; None where none had to, or the end came first.
        steps_again: steps that had to be made once more.
    """

    action: str
    rank: int
    step: int
    place: str
    time: float
    attempt: str
    back_after: float | None = None
    steps_again: int = 0

    @property
    def needs_start(self) -> bool:
        """Whether it ends the attempt."""
        return self.action != "delay"

    def lose(self, first_step: int) -> None:
        """Notes that the next attempt began with this step."""
        made = self.step - (self.place != AFTER_STEP)
        self.steps_again = max(made - (first_step - 1), 0)

    def __str__(self) -> str:
        return f"rank {self.rank} {_SAID[self.action]}, step {self.step} ({self.place})"


@dataclass
class Report:
    """The result.

    Args:
        config: file of it.
        processes: ranks.
        seed: of the faults.
        minutes: of faults, in fact.
        same: whether both runs are the same; None where it did not come to that.
        step: the last one, which both have made.
        problem: why there is no comparison.
        differences: in a few words each.
        faults: in order.
        runs: of `chaos` and `quiet`: seconds, and from their summaries goodput, where the time went, attempts.
    """

    config: str
    processes: int
    seed: int
    minutes: float = 0.0
    same: bool | None = None
    step: int | None = None
    problem: str | None = None
    differences: list[str] = field(default_factory=list)
    faults: list[Suffered] = field(default_factory=list)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Returns everything, where it was, and the table's sums under `by_action`."""
        where = {
            "command": shlex.join(["python", "-m", "launch", *sys.argv[1:]]),
            "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "accelerate")},
        }
        return json.dumps({**where, **asdict(self), "by_action": self.by_action()}, indent=2) + "\n"

    def by_action(self) -> dict[str, dict[str, float | None]]:
        """Returns per kind of fault how often it happened, and its mean and largest cost."""
        sums: dict[str, dict[str, float | None]] = {}
        for action in dict.fromkeys(fault.action for fault in self.faults):
            them = [fault for fault in self.faults if fault.action == action]
            seconds = [fault.back_after for fault in them if fault.back_after is not None]
            steps = [fault.steps_again for fault in them]
            sums[action] = {
                "count": len(them),
                "back_after_mean": statistics.fmean(seconds) if seconds else None,
                "back_after_max": max(seconds, default=None),
                "steps_again_mean": statistics.fmean(steps),
                "steps_again_max": max(steps),
            }
        return sums

    def table(self) -> str:
        """Returns it for a person."""
        lines = [f"{'fault':<20}{'count':>7}{'back after, mean':>19}{'most':>9}{'steps again, mean':>20}{'most':>7}"]
        for action, sums in self.by_action().items():
            seconds = ["-" if (s := sums[f"back_after_{of}"]) is None else f"{s:.1f} s" for of in ("mean", "max")]
            steps = f"{sums['steps_again_mean']:>20.1f}{sums['steps_again_max']:>7.0f}"
            lines.append(f"{action:<20}{sums['count']:>7.0f}{seconds[0]:>19}{seconds[1]:>9}{steps}")
        for name, told in (("under faults", self.runs.get(CHAOS)), ("in peace", self.runs.get(QUIET))):
            if told is not None and told["goodput"] is not None:
                parts = ", ".join(_largest(told["goodput_seconds"] or {}))
                attempts = f"{told['num_attempts']} attempt{'' if told['num_attempts'] == 1 else 's'}"
                lines.append(f"{name:<20}goodput {told['goodput']:.1%} in {attempts}: {parts}")
        if self.problem is not None:
            lines.append(f"no comparison: {self.problem}")
        elif self.same:
            lines.append(f"step {self.step} is the same as in peace, bit for bit")
        else:
            lines.append(f"step {self.step} is NOT the same as in peace:")
            lines += [f"  {difference}" for difference in self.differences[:_SHOWN]]
            if len(self.differences) > _SHOWN:
                lines.append(f"  and {len(self.differences) - _SHOWN} more")
        return "\n".join(lines) + "\n"


def _largest(seconds: dict[str, float]) -> list[str]:
    return [
        f"{PARTS.get(name, name)} {s:.0f} s"
        for name, s in sorted(seconds.items(), key=lambda item: -item[1])
        if s >= 0.5
    ]
