"""Runs that have a problem, what they are told, and the same runs with what they were advised to change."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import NIGHTLY
from run_results import records, summary

MARGIN = 2.0  # a promise is kept where the measured gain is between half and twice of it
_TRIES = 3  # what else the machine does may change within a run, and between one and the other

Run = Callable[..., Any]  # of command line arguments


@dataclass(frozen=True)
class Told:
    """What a run was told.

    Args:
        advice: the record in summary.json.
        split: shares of the run's time, by part.
        log: what the run said.
    """

    advice: dict[str, Any]
    split: dict[str, float]
    log: str = field(repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What it is to change."""
        return self.advice["settings"]

    @property
    def promised(self) -> float | None:
        """The speed-up to expect, where that can be known."""
        return self.advice["gain"]


@dataclass(frozen=True)
class Followed:
    """What came of it.

    Args:
        told: what the first run was told.
        gain: the speed-up of the run that followed it; 0.3 is 30% faster.
        split: shares of the second run's time, by part.
        remaining: rules that speak in the second run.
    """

    told: Told
    gain: float
    split: dict[str, float]
    remaining: list[str]

    def keeps_its_promise(self, margin: float = MARGIN) -> bool:
        """Tells whether it is as much faster as it was told to be, within the margin."""
        promised = self.told.promised
        return promised is not None and promised / margin <= self.gain <= margin * promised


def check(
    run: Run,
    config: Path,
    tmp_path: Path,
    rule: str,
    is_right: Callable[[Told], bool],
    *instead: str,
    holds: Callable[[Followed], bool] = Followed.keeps_its_promise,
    follows: bool = NIGHTLY,
) -> None:
    """Runs a config and checks what it is told; nightly, changes exactly that and runs it again. All of it again, where
    it fails, a few times.

    Args:
        run: runs `train.py`.
        config: of the run that has the problem.
        tmp_path: for the runs.
        rule: that is to speak.
        is_right: whether what it says is right.
        instead: arguments of the second run where the advice is no setting.
        holds: whether what came of it is what was promised.
        follows: whether there is a second run.
    """
    failed = []
    for number in range(_TRIES):
        folder = tmp_path / f"try-{number}"
        told = _told(run, config, folder / "before", rule)
        if not isinstance(told, Told) or not is_right(told):
            failed.append(f"told: {told}")
            continue
        if not follows:
            return
        followed = _followed(run, config, folder, told, *instead)
        if holds(followed):
            _write_down(rule, followed, number + 1)
            return
        failed.append(f"followed: {followed}")
    raise AssertionError("\n".join(failed))


def _write_down(rule: str, followed: Followed, number: int) -> None:
    """Prints what came of an advice, and adds it to the figures of `python -m benchmarks.advice`."""
    told = followed.told
    print(f"followed: {rule} {told.settings} promised {told.promised} measured {followed.gain:.3f}")
    if name := os.environ.get("LOCKSTEP_ADVICE_JSON"):
        test = os.environ["PYTEST_CURRENT_TEST"].partition("::test_")[2].partition(" ")[0]
        case = {
            "run": test.replace("_", " "),
            "rule": rule,
            "settings": told.settings,
            "promised": told.promised,
            "measured": round(followed.gain, 4),
            "try": number,
        }
        file = Path(name)
        cases = json.loads(file.read_text()) if file.exists() else []
        file.write_text(json.dumps([*cases, case]))


def _told(run: Run, config: Path, folder: Path, rule: str) -> Told | str:
    outcome = run("--config", config, f"run.dir={folder}")
    assert outcome.code == 0, outcome.err
    found = {advice["rule"]: advice for advice in summary(folder)["advice"]}
    if rule not in found:
        return f"{found} {summary(folder)['time_split']}"
    for key in found[rule]["settings"]:
        assert f"{key}=" in found[rule]["text"]
    return Told(found[rule], summary(folder)["time_split"], outcome.out + outcome.err)


def _followed(run: Run, config: Path, folder: Path, told: Told, *instead: str) -> Followed:
    after = folder / "after"
    changes = [f"{key}={json.dumps(value)}" for key, value in told.settings.items()]
    outcome = run("--config", config, f"run.dir={after}", *changes, *instead)
    assert outcome.code == 0, outcome.err
    gain = steps_per_second(after) / steps_per_second(folder / "before") - 1
    remaining = [advice["rule"] for advice in summary(after)["advice"]]
    return Followed(told, gain, summary(after)["time_split"], remaining)


def steps_per_second(run: Path) -> float:
    """Returns the speed of a run by the clock on the wall, from its first report to its last."""
    reports = [record for record in records(run) if "train/loss" in record]
    return (reports[-1]["step"] - reports[0]["step"]) / (reports[-1]["time"] - reports[0]["time"])
