"""Losses and gradients that are not finite, and losses that jump: what is found, and what each policy does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train, WriteConfig
from run_results import identical, losses, optimizer_state, records, summary, tensors, weights
from torch import nn

from trainer.buffers import BufferCopy
from trainer.checkpoint.folder import open_folder
from trainer.config import load_config, read_section
from trainer.config_run import FaultsConfig
from trainer.faults.numbers import NumberGuard
from trainer.faults.plan import VARIABLE, Event, write_plan
from trainer.two_optimizers import TwoOptimizers
from trainer.update import leaves_out_on_device, step_unless

ZERO = torch.zeros((), dtype=torch.float64)


def guard(**settings: Any) -> NumberGuard:
    return NumberGuard(read_section(FaultsConfig, **settings), 1, ZERO)


def judge(numbers: NumberGuard, step: int, loss: float, norm: float | None = 1.0) -> bool | None:
    """Judges a step of 4 samples with this mean loss."""
    loss_sum = torch.tensor(4 * loss, dtype=torch.float64)
    verdict = numbers.judge(step, loss_sum, 4, 4, None if norm is None else torch.tensor(norm))
    return None if verdict is None else bool(verdict)


def bad_steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "faults" / "bad-steps.jsonl").read_text().splitlines()]


# ---- the judgement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["stop", "rollback", "skip"])
@pytest.mark.parametrize(
    ("loss", "norm", "what"),
    [(math.nan, 1.0, "loss"), (math.inf, 1.0, "loss"), (1.0, math.nan, "gradient"), (1.0, math.inf, "gradient")],
)
def test_what_is_not_finite_is_found(policy: str, loss: float, norm: float, what: str) -> None:
    numbers = guard(non_finite=policy)
    assert judge(numbers, 0, 1.0) is (False if policy == "skip" else None)
    assert numbers.found == []
    assert judge(numbers, 1, loss, norm) is (True if policy == "skip" else None)
    assert [(bad.step, bad.what, bad.is_mine) for bad in numbers.found] == [(1, what, what == "loss")]
    assert numbers.is_alarmed is (policy != "skip")
    numbers.forget()
    assert numbers.found == []


def test_gradients_that_carry_a_loss_scale_may_overflow() -> None:
    numbers = NumberGuard(read_section(FaultsConfig, non_finite="skip"), 1, ZERO, is_scaled=True)
    assert judge(numbers, 0, 1.0, math.inf) is False
    assert judge(numbers, 1, math.inf, math.inf) is True
    assert not numbers.wants_gradient_norm


def test_a_loss_scaler_is_given_time() -> None:
    numbers = NumberGuard(read_section(FaultsConfig), 1, ZERO, is_scaled=True)
    for step in range(60):
        judge(numbers, step, 1.0 if step == 30 else math.nan)
        assert numbers.is_alarmed is (20 <= step + 1 < 31 or step >= 50), step
        numbers.forget()


def test_spikes_are_measured_with_the_losses_before_them() -> None:
    numbers = guard(non_finite="skip", spike_factor=3.0)
    assert judge(numbers, 0, 100.0) is False  # nothing to compare with
    assert judge(numbers, 1, 1000.0) is False  # too little
    numbers = guard(non_finite="skip", spike_factor=3.0)
    verdicts = [judge(numbers, step, 1.0) for step in range(20)]
    assert verdicts == [False] * 20
    assert judge(numbers, 20, 2.9) is False
    mean = float(numbers.mean_loss)
    assert mean == pytest.approx(1 + 0.0476 * 1.9, rel=1e-3)  # one in 21
    assert judge(numbers, 21, 3.4) is True
    assert judge(numbers, 22, math.nan) is True
    assert float(numbers.mean_loss) == mean  # neither is remembered
    assert [bad.what for bad in numbers.found] == ["spike", "loss"]


def test_steps_without_a_loss_are_nothing_to_compare_with() -> None:
    numbers = guard(spike_factor=3.0)
    for step in range(60):
        is_empty = step % 3 > 0
        loss_sum = torch.tensor(0.0 if is_empty else 4 * 2.0, dtype=torch.float64)
        numbers.judge(step, loss_sum, 4, 4, None, torch.tensor(is_empty))
    assert (float(numbers.mean_loss), int(numbers.num_losses)) == (2.0, 20)


def test_spikes_go_on_where_a_checkpoint_left_off() -> None:
    numbers, again = (guard(non_finite="stop", spike_factor=3.0) for _ in range(2))
    for step in range(30):
        judge(numbers, step, 2.0)
    again.load({name: value.clone() for name, value in numbers.state().items()})
    judge(again, 30, 7.0)
    assert [bad.what for bad in again.found] == ["spike"]


# ---- leaving a step out on the device --------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["SGD"], ["Adam"], ["AdamW"], ["SGD", "AdamW"]])
def test_a_fused_optimizer_leaves_a_step_out(names: list[str]) -> None:
    """By what GradScaler uses on GPUs; torch has it for the CPU, too."""

    def trained(skips: bool) -> list[torch.Tensor]:
        parameters = [nn.Parameter(torch.linspace(0, 1, 7)) for _ in names]
        parts = []
        for name, parameter in zip(names, parameters, strict=True):
            options = {"momentum": 0.9} if name == "SGD" else {}
            parts.append(getattr(torch.optim, name)([parameter], lr=0.1, fused=True, weight_decay=0.1, **options))
        optimizer = TwoOptimizers(*parts) if len(parts) == 2 else parts[0]
        for step in range(4):
            is_bad = torch.tensor(step == 2)
            if not skips and is_bad:
                continue
            for parameter in parameters:
                parameter.grad = torch.full((7,), math.nan if is_bad else step + 1.0)
            step_unless(optimizer, is_bad)
        assert leaves_out_on_device(optimizer)
        assert not any(hasattr(one, "found_inf") for one in (optimizer, *parts))
        state = [value for p in parameters for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)]
        return [*(parameter.detach() for parameter in parameters), *state]

    for skipped, never_made in zip(trained(True), trained(False), strict=True):
        assert torch.equal(skipped, never_made)


def test_two_optimizers_of_which_one_is_fused_do_not() -> None:
    parameters = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    muon, adamw = torch.optim.Muon(parameters[:1]), torch.optim.AdamW(parameters[1:], fused=True)
    assert leaves_out_on_device(adamw)
    assert not leaves_out_on_device(TwoOptimizers(muon, adamw))


def test_buffers_come_back_where_they_are_to() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(2))
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    copy = BufferCopy(model)
    copy.keep()
    changed = [buffer.add_(1).clone() for buffer in buffers]
    copy.put_back(torch.tensor(False))
    assert all(map(torch.equal, buffers, changed))
    copy.put_back(torch.tensor(True))
    assert all(map(torch.equal, buffers, before))
    assert [buffer.dtype for buffer in buffers].count(torch.int64) == 2
    model[0].running_mean.fill_(math.nan)  # type: ignore[operator]
    copy.put_back()
    assert all(map(torch.equal, buffers, before))


# ---- runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def inject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def plan(*events: Event, run: Path = tmp_path / "run") -> None:
        write_plan(tmp_path / "plan.json", run, events)
        monkeypatch.setenv(VARIABLE, str(tmp_path / "plan.json"))

    return plan


MODEL = {"name": "vectors_model:Normed", "args": {"dropout": 0.2}}
PLAIN = {"model": MODEL, "data__train__args__length": 60, "log": {"every": 1}, "checkpoint": {"every": 4}}
BY_HAND = {
    "model": {"name": "vectors_model:NormedByHand", "args": {"dropout": 0.2, "step_left_out": 6}},
    "optim": {"name": "vectors_model:LeavingOut", "lr": 0.01, "args": {"step_left_out": 6}},
}


@pytest.mark.parametrize("action", ["nan", "inf-gradient"])
def test_skip_equals_a_step_skipped_by_hand(
    action: str, train: Train, write_config: WriteConfig, tmp_path: Path, inject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, BatchNorm's statistics and the optimizer's state, to the last bit, with dropout in every forward."""
    faults = {"non_finite": "skip"}
    inject(Event(action, step=6))
    bad = write_config(**PLAIN, faults=faults)
    done = train("--config", bad)
    assert done.code == 0, done.err
    monkeypatch.delenv(VARIABLE)
    by_hand = write_config("by_hand.yaml", run__dir=str(tmp_path / "hand"), **{**PLAIN, **BY_HAND})
    assert train("--config", by_hand).code == 0
    assert identical(weights(tmp_path / "run", 10), weights(tmp_path / "hand", 10))
    assert identical(optimizer_state(tmp_path / "run", 10), optimizer_state(tmp_path / "hand", 10))
    found = summary(tmp_path / "run")
    assert found["bad_steps"] == 1
    assert [event["action"] for event in found["injected_faults"]] == [action]
    (record,) = bad_steps(tmp_path / "run")
    assert record["step"] == 6
    assert record["what"] == ("loss" if action == "nan" else "gradient")
    assert len(record["samples"]) == 12
    assert losses(tmp_path / "run")[6] is None  # no sample of that step counts
    assert all(losses(tmp_path / "run")[step] is not None for step in (5, 7))


def test_skip_leaves_out_spikes_and_counts_over_restarts(
    train: Train, write_config: WriteConfig, tmp_path: Path, inject: Any
) -> None:
    inject(Event("spike", step=30), Event("signal:SIGTERM", step=34), Event("nan", step=40))
    changes = {"train": {"epochs": 10, "batch_size": 12}, "faults": {"non_finite": "skip", "spike_factor": 4.0}}
    config = write_config(**{**PLAIN, **changes})
    assert train("--config", config).code == 75
    assert summary(tmp_path / "run")["bad_steps"] == 1
    assert train("--config", config).code == 0
    assert summary(tmp_path / "run")["bad_steps"] == 2
    assert [record["what"] for record in bad_steps(tmp_path / "run")] == ["spike", "loss"]


def test_skip_under_fp16_is_the_scalers(train: Train, write_config: WriteConfig, tmp_path: Path, inject: Any) -> None:
    """A spike is no overflow, and is left out all the same."""
    inject(Event("spike", step=32))
    changes = {"train": {"epochs": 8, "batch_size": 12}, "faults": {"non_finite": "skip", "spike_factor": 4.0}}
    assert train("--config", write_config(**{**PLAIN, **changes}, precision="fp16")).code == 0
    found = summary(tmp_path / "run")
    assert (found["bad_steps"], found["skipped_steps"]) == (1, 1)


@pytest.mark.parametrize("action", ["nan", "inf-gradient"])
def test_stop_saves_nothing_of_it(
    action: str, train: Train, write_config: WriteConfig, tmp_path: Path, inject: Any
) -> None:
    inject(Event(action, step=8))  # after which a checkpoint is due
    done = train("--config", write_config(**PLAIN, optim={"name": "adamw", "lr": 0.01, "clip_norm": 1.0}))
    assert done.code == 1
    what = "the loss is nan" if action == "nan" else "the norm of the gradients is nan"
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert f"step 8: {what}; the checkpoint of step 5 stands; samples " in line
    assert "Traceback" not in done.err
    assert summary(tmp_path / "run")["status"] == "failed"
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert sorted(saved) == ["step-00000004", "step-00000005"]  # not that of step 8
    (record,) = bad_steps(tmp_path / "run")
    assert record["step"] == 8
    (first,) = (tmp_path / "run" / "faults").glob("attempt-*/first.json")
    fault = json.loads(first.read_text())
    assert (fault["restart"], fault["step"], fault["kind"]) == (False, 8, "numbers")
    assert fault["samples"] == record["samples"]


def test_stop_without_gradients_says_what_it_does_not_know(
    train: Train, write_config: WriteConfig, tmp_path: Path, inject: Any
) -> None:
    inject(Event("inf-gradient", step=6))
    done = train("--config", write_config(**PLAIN))
    assert done.code == 1
    assert "step 7: the loss is nan, or of the step before: gradients were not looked at" in done.err


def test_rollback_goes_back_and_leaves_the_batch_out(
    train: Train, write_config: WriteConfig, tmp_path: Path, inject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as a run without NaN that is told at its last checkpoint to avoid that step."""
    rollback = {**PLAIN, "faults": {"non_finite": "rollback"}, "data__workers": 1}
    inject(Event("nan", step=7, repeats=True))
    done = train("--config", write_config(**rollback))
    assert done.code == 0, done.err
    found = summary(tmp_path / "run")
    assert (found["num_rollbacks"], found["avoided_steps"], found["step"]) == (1, [7], 10)
    assert found["goodput_seconds"]["lost"] > 0
    assert [record["step"] for record in records(tmp_path / "run") if "train/lr" in record] == list(range(1, 11))
    assert losses(tmp_path / "run")[7] is None
    told = write_config("told.yaml", run__dir=str(tmp_path / "told"), **rollback)
    inject(Event("stop-at", step=5), run=tmp_path / "told")
    assert train("--config", told).code == 75
    monkeypatch.delenv(VARIABLE)
    checkpoints = open_folder(load_config(str(told)))
    progress = checkpoints.open(5).manifest.progress
    checkpoints.replace_progress(replace(progress, avoided_steps=[6]))
    assert train("--config", told).code == 0
    assert identical(tensors(tmp_path / "run", 10, ""), tensors(tmp_path / "told", 10, ""))


def test_rollback_before_the_first_checkpoint_goes_to_the_beginning(
    train: Train, write_config: WriteConfig, tmp_path: Path, inject: Any
) -> None:
    inject(Event("nan", step=2))
    changes = {**PLAIN, "checkpoint": {"every": "9999 epochs"}, "faults": {"non_finite": "rollback"}}
    assert train("--config", write_config(**changes)).code == 0
    assert summary(tmp_path / "run")["avoided_steps"] == [2]


def test_too_many_rollbacks_end_the_run(train: Train, write_config: WriteConfig, tmp_path: Path, inject: Any) -> None:
    inject(*(Event("nan", step=step) for step in (3, 6, 9)))
    done = train("--config", write_config(**PLAIN, faults={"non_finite": "rollback", "max_rollbacks": 2}))
    assert done.code == 1
    assert "faults.max_rollbacks (2) are used up" in done.err
    assert summary(tmp_path / "run")["num_rollbacks"] == 2


def test_a_rollback_is_remembered_by_the_next_attempt(
    train: Train, write_config: WriteConfig, tmp_path: Path, inject: Any
) -> None:
    inject(Event("nan", step=7), Event("raise", step=8))
    config = write_config(**PLAIN, faults={"non_finite": "rollback"})
    assert train("--config", config).code == 1
    assert train("--config", config).code == 0
    assert summary(tmp_path / "run")["avoided_steps"] == [7]
    assert losses(tmp_path / "run")[7] is None


def test_data_that_is_not_finite_is_left_alone_by_default_policies(train: Train, write_config: WriteConfig) -> None:
    """A quiet run is judged, too, and nothing is found in it."""
    for policy in ("stop", "skip", "rollback"):
        done = train("--config", write_config(**PLAIN, faults={"non_finite": policy, "spike_factor": 50.0}))
        assert done.code == 0, done.err
        assert "bad" not in done.out
