"""Runs that have a problem, and the same runs with what they were advised to change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_results import records, summary

Run = Callable[..., Any]  # of command line arguments


@dataclass(frozen=True)
class Followed:
    """What a run was told, and what it did.

    Args:
        advice: the record in summary.json.
        gain: the speed-up of the run that followed it; 0.3 is 30% faster.
        log: what the first run said.
        remaining: rules that speak in the second run.
    """

    advice: dict[str, Any]
    gain: float
    log: str
    remaining: list[str]

    def keeps_its_promise(self, least: float = 0.5, most: float = 2.0) -> bool:
        """Tells whether the gain is between these multiples of the promised one."""
        return least * self.advice["gain"] <= self.gain <= most * self.advice["gain"]


def follow(run: Run, config: Path, tmp_path: Path, rule: str, *instead: str) -> Followed:
    """Runs a config, changes exactly what the rule advises, and runs it again.

    Args:
        run: runs `train.py`.
        config: of the run that has the problem.
        tmp_path: for the second run.
        rule: that is to speak.
        instead: arguments of the second run where the advice is no setting.
    """
    first = run("--config", config)
    assert first.code == 0, first.err
    folder = tmp_path / "run"
    found = {advice["rule"]: advice for advice in summary(folder)["advice"]}
    assert rule in found, f"{sorted(found)}\n{first.err}"
    advice = found[rule]
    settings = [f"{key}={json.dumps(value)}" for key, value in advice["settings"].items()]
    for key, value in advice["settings"].items():
        assert key in advice["text"], value
    second = run("--config", config, f"run.dir={tmp_path / 'followed'}", *settings, *instead)
    assert second.code == 0, second.err
    after = tmp_path / "followed"
    remaining = [advice["rule"] for advice in summary(after)["advice"]]
    return Followed(advice, steps_per_second(after) / steps_per_second(folder) - 1, first.err, remaining)


def steps_per_second(run: Path) -> float:
    """Returns the speed of a run by the clock on the wall, from its second report to its last."""
    reports = [record for record in records(run) if "train/loss" in record][1:]
    return (reports[-1]["step"] - reports[0]["step"]) / (reports[-1]["time"] - reports[0]["time"])
