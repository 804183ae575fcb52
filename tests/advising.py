"""Runs that have a problem, and the same runs with what they were advised to change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from run_results import records, summary

MARGIN = 2.0  # a promise is kept where the measured gain is between half and twice of it
_TRIES = 3  # of both runs: what else the machine does may change between the one and the other

Run = Callable[..., Any]  # of command line arguments


@dataclass(frozen=True)
class Followed:
    """What a run was told, and what it did.

    Args:
        gain: the speed-up of the run that followed it; 0.3 is 30% faster.
        promised: the speed-up that it was told to expect, where that can be known.
        advice: the record in summary.json.
        split: shares of the first run's time, by part.
        split_after: the same of the second run.
        remaining: rules that speak in the second run.
        log: what the first run said.
    """

    gain: float
    promised: float | None
    advice: dict[str, Any]
    split: dict[str, float]
    split_after: dict[str, float]
    remaining: list[str]
    log: str = field(repr=False)

    def keeps_its_promise(self, margin: float = MARGIN) -> bool:
        """Tells whether it is as much faster as it was told to be, within the margin."""
        return self.promised is not None and self.promised / margin <= self.gain <= margin * self.promised


def follow(run: Run, config: Path, tmp_path: Path, rule: str, *instead: str, margin: float = MARGIN) -> Followed:
    """Runs a config, changes exactly what the rule advises, and runs it again; all of it again if that fails.

    Args:
        run: runs `train.py`.
        config: of the run that has the problem.
        tmp_path: for the runs.
        rule: that is to speak.
        instead: arguments of the second run where the advice is no setting.
        margin: how many times more or less than promised may be gained.
    """
    for number in range(_TRIES):
        followed = _followed(run, config, tmp_path / f"try-{number}", rule, *instead)
        if followed.promised is None or followed.keeps_its_promise(margin):
            break
    return followed


def _followed(run: Run, config: Path, folder: Path, rule: str, *instead: str) -> Followed:
    before, after = folder / "before", folder / "after"
    first = run("--config", config, f"run.dir={before}")
    assert first.code == 0, first.err
    found = {advice["rule"]: advice for advice in summary(before)["advice"]}
    assert rule in found, f"{sorted(found)}\n{first.out}{first.err}"
    settings = found[rule]["settings"]
    for key in settings:
        assert f"{key}=" in found[rule]["text"]
    changes = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    second = run("--config", config, f"run.dir={after}", *changes, *instead)
    assert second.code == 0, second.err
    return Followed(
        gain=steps_per_second(after) / steps_per_second(before) - 1,
        promised=found[rule]["gain"],
        advice=found[rule],
        split=summary(before)["time_split"],
        split_after=summary(after)["time_split"],
        remaining=[advice["rule"] for advice in summary(after)["advice"]],
        log=first.out + first.err,
    )


def steps_per_second(run: Path) -> float:
    """Returns the speed of a run by the clock on the wall, from its first report to its last."""
    reports = [record for record in records(run) if "train/loss" in record]
    return (reports[-1]["step"] - reports[0]["step"]) / (reports[-1]["time"] - reports[0]["time"])
