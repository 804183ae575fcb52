"""Runs that end early: the rule, where they end, what they leave, and that they can go on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Train, WriteConfig, nightly
from resuming import assert_same_end, reported
from run_results import checkpoint, identical, records, summary, tensors

from launch.slurm_watch import _run as how_far
from trainer.checkpoint.manifest import Progress
from trainer.config_run import EarlyStoppingConfig
from trainer.early_stopping import EarlyStopping
from trainer.faults.plan import VARIABLE, Event, write_plan
from trainer.report import write_report
from trainer.tasks.classification import Classification
from trainer.tracking import Trackers

# The loss falls in all six epochs, so that none after the first is larger: of two that are not, the second is step 15.
RULE = {"metric": "loss", "mode": "max", "patience": 2}
PLAIN = {"train": {"epochs": 6, "batch_size": 12}}
EARLY = {"train": {**PLAIN["train"], "early_stopping": RULE}}
END = 15


def ends_after(values: Sequence[float], **rule: Any) -> int | None:
    """Returns how many evaluations a run makes, None where it does not end early."""
    config = EarlyStoppingConfig.model_validate({"metric": "score", "patience": 2, **rule})
    stopping, progress = EarlyStopping(config, "score", "max"), Progress()
    for i, value in enumerate(values, 1):
        stopping.count(progress, {"score": value})
        if stopping.has_ended(progress):
            return i
    return None


@pytest.mark.parametrize(
    ("values", "rule", "expected"),
    [
        ([1, 2, 2, 3, 3, 3], {}, 6),  # as good as before is not better, and the count begins anew
        ([1, 2, 2, 3, 3, 4], {}, None),
        ([3, 2, 1], {}, 3),
        ([3, 2, 1], {"mode": "min"}, None),
        ([1, 2, 3], {"mode": "min"}, 3),
        ([1, 0], {"patience": 1}, 2),
        ([0, 1, 2, 3, 4], {"min_delta": 1.0}, None),  # 2 is better than 0 by more than 1; 3 is not than 2, and 4 is
        ([0, 1, 1.5, 3], {"min_delta": 2.0}, 3),
        ([8, 7, 6, 6, 4], {"mode": "min", "min_delta": 1.0}, None),
        ([1, math.nan, math.nan], {}, 3),
        ([math.nan, math.nan, 1], {}, 2),
        ([math.nan, 1, 0, 2], {}, None),
    ],
)
def test_the_rule(values: Sequence[float], rule: dict[str, Any], expected: int | None) -> None:
    assert ends_after(values, **rule) == expected


def test_more_patience_goes_on_and_another_metric_begins_anew() -> None:
    progress = Progress()

    def stopping(**rule: Any) -> EarlyStopping:
        return EarlyStopping(EarlyStoppingConfig.model_validate(rule), None, "max")

    two, three = (stopping(metric="a", mode="min", patience=patience) for patience in (2, 3))
    for _ in range(3):
        two.count(progress, {"a": 1.0})
    assert two.has_ended(progress)
    assert not three.has_ended(progress)
    assert not stopping(metric="a", mode="max", patience=2).has_ended(progress)
    other = stopping(metric="b", mode="min", patience=1)
    assert not other.has_ended(progress)
    other.count(progress, {"b": 5.0})
    assert (progress.better_value, progress.num_not_better) == (5.0, 0)
    EarlyStopping(None, None, "max").count(progress, {"b": 1.0})
    assert (progress.better_of, progress.better_value) == (None, None)  # what is old by then does not count later


def test_a_run_ends_early(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    """Up to there it is the run that does not, bit for bit; started again it has nothing to do."""
    run = tmp_path / "run"
    done = train("--config", write_config(**EARLY))
    assert done.code == 0, done.err
    found = summary(run)
    assert (found["status"], found["step"], found["total_steps"], found["epoch"]) == ("finished", END, 30, 3.0)
    first = next(record["eval/loss"] for record in records(run) if "eval/loss" in record)
    reason = f"loss was not better than {first:.6g} in 2 evaluations"
    assert found["stopped_early"] == {"step": END, "metric": "loss", "reason": reason}
    assert f"finished at step {END} of 30, early: {reason}" in done.out
    assert "of 30, stopped early" in (run / "report.html").read_text()

    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    again = train("--config", write_config(**EARLY))
    assert again.code == 0
    assert f"already finished at step {END} of 30, early: {reason}" in again.out
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == files

    kept = {"checkpoint": {"keep": 9}}
    assert train("--config", write_config("whole.yaml", run__dir=str(tmp_path / "whole"), **PLAIN, **kept)).code == 0
    assert summary(tmp_path / "whole")["stopped_early"] is None
    assert identical(tensors(run, END, ""), tensors(tmp_path / "whole", END, ""))
    assert reported(run) == [record for record in reported(tmp_path / "whole") if record["step"] <= END]
    comparison = write_report([run, tmp_path / "whole"], tmp_path / "two.html").read_text()
    assert comparison.count("stopped early") == 1
    assert how_far(None, run) == [f"{run}: finished at step {END} of 30, early"]

    patient = {"train": {**PLAIN["train"], "early_stopping": {**RULE, "patience": 99}}}
    assert train("--config", write_config(**patient)).code == 0
    assert identical(tensors(run, 30, ""), tensors(tmp_path / "whole", 30, ""))
    assert reported(run) == reported(tmp_path / "whole")


@pytest.mark.parametrize(
    "every", [4, pytest.param(5, marks=nightly)], ids=["saved elsewhere", "saved before each evaluation"]
)
def test_the_count_survives(every: int, train: Train, write_config: WriteConfig, tmp_path: Path, inject: Any) -> None:
    """Killed after step 9 and in the middle of the evaluation of step 10, and stopped after step 13."""
    changes = {**EARLY, "checkpoint": {"every": every}}
    assert train("--config", write_config("whole.yaml", run__dir=str(tmp_path / "whole"), **changes)).code == 0
    for event, code in (
        (Event("raise", step=9), 1),
        (Event("raise", step=10, place="evaluation"), 1),
        (Event("stop-at", step=13), 75),
    ):
        inject(event)
        assert train("--config", write_config(**changes)).code == code
    inject()
    assert train("--config", write_config(**changes)).code == 0
    assert summary(tmp_path / "run")["step"] == END
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_rollback_counts_no_evaluation_twice(
    train: Train, write_config: WriteConfig, tmp_path: Path, inject: Any
) -> None:
    """Back to step 8 from step 11: the evaluation of step 10 is made again, and is the first of two all the same."""
    inject(Event("nan", step=11))
    checkpoint_config = {"every": 4, "best": {"metric": "loss", "mode": "max"}}  # none after step 5 is the best
    changes = {**EARLY, "checkpoint": checkpoint_config, "faults": {"non_finite": "rollback"}}
    done = train("--config", write_config(**changes))
    assert done.code == 0, done.err
    assert "going back to step 8" in done.out
    found = summary(tmp_path / "run")
    assert (found["status"], found["step"], found["avoided_steps"]) == ("finished", END, [11])
    assert checkpoint(tmp_path / "run", END).manifest.progress.num_not_better == 2


@pytest.fixture
def inject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    number = itertools.count()

    def plan(*events: Event) -> None:
        file = tmp_path / f"plan-{next(number)}.json"
        write_plan(file, tmp_path / "run", events)
        monkeypatch.setenv(VARIABLE, str(file))

    return plan


def test_the_mode_is_the_tasks(
    train: Train, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(Trackers, "summarise", lambda _, values, step: told.update(values, step=step))
    rule = {"metric": "accuracy", "patience": 1, "min_delta": 2.0}  # more than accuracy can ever gain
    assert train("--config", write_config(train={"epochs": 4, "batch_size": 12, "early_stopping": rule})).code == 0
    assert summary(tmp_path / "run")["step"] == 10
    reason = summary(tmp_path / "run")["stopped_early"]["reason"]
    assert "by more than 2 in 1 evaluation" in reason
    assert (told["step"], told["status"], told["stopped_early"]) == (10, "finished", reason)
    assert checkpoint(tmp_path / "run", 10).manifest.progress.better_of == "max accuracy"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"early_stopping": {**RULE, "metric": "acc"}}, "train.early_stopping.metric: evaluation has no metric 'acc'"),
        ({"early_stopping": {"metric": "loss", "patience": 2}}, "train.early_stopping.mode: set it to max or min"),
        ({"early_stopping": {**RULE, "patience": 0}}, "train.early_stopping.patience: must be greater than or equal"),
        ({"early_stopping": {**RULE, "min_delta": -1.0}}, "train.early_stopping.min_delta: must be greater than"),
        ({"early_stopping": {"metric": "loss", "mode": "max"}}, "train.early_stopping.patience: required"),
        ({"early_stopping": {**RULE, "paticence": 1}}, "unknown key; did you mean 'patience'?"),
    ],
)
def test_refused(change: dict[str, Any], message: str, train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    code, _, err = train("--config", write_config(train={**PLAIN["train"], **change}))
    assert code == 2
    assert message in err
    assert not (tmp_path / "run" / "checkpoints").exists()


class Unlisted(Classification):
    """Its metrics are known at the first evaluation only."""


def test_an_unknown_metric_loses_no_step(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    rule = {**PLAIN["train"], "early_stopping": {**RULE, "metric": "acc"}}
    code, _, err = train("--config", write_config(train=rule, task={"name": "test_early_stopping:Unlisted"}))
    assert code == 2
    assert "train.early_stopping.metric: evaluation has no metric 'acc'" in err
    assert (tmp_path / "run" / "checkpoints" / "step-00000005").is_dir()


def test_refused_without_evaluations(train: Train, write_config: WriteConfig) -> None:
    code, _, err = train("--config", write_config(**EARLY, data__eval=None))
    assert code == 2
    assert "train.early_stopping: without data.eval there is nothing that gets better" in err
