"""Runs that find their own micro-batch and checkpointing: what they choose, and that it changes no result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, Train, WriteConfig, forget_accelerate, nightly
from run_results import identical, losses, records, summary, weights

from trainer.cli import main
from trainer.config import load_config
from trainer.loop import Trainer
from trainer.memory import fitting
from trainer.memory.budget import held_at_most
from trainer.memory.measure import measure_cpu_peak
from trainer.memory.planner import Planner, Prediction
from trainer.memory.shrink import Shrink, write_shrink

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 128
AUTO = "train.micro_batch_size=auto"


def stack(
    write_config: WriteConfig, name: str = "tiny.yaml", args: dict[str, Any] | None = None, **changes: Any
) -> str:
    """Two epochs of two steps with the stack of blocks."""
    known: dict[str, Any] = {
        "model": {"name": "fitted_model:Stack", "args": args or {}},
        "data__train__args__length": 2 * BATCH,
        "data__eval__args__length": 16,
        "train": {"epochs": 2, "batch_size": BATCH},
        "optim": {"name": "sgd", "lr": 0.05, "args": {"momentum": 0.9}},
    }
    return str(write_config(**(known | changes)))


def built(file: str, *overrides: str) -> Trainer:
    forget_accelerate()
    return Trainer(load_config(file, overrides))


def predicted(file: str, size: int, policy: str = "none", *overrides: str) -> int:
    """Returns the peak that the planner expects of a plain run of this file."""
    trainer = built(file, *overrides)
    found = trainer._planner().uniform(size, policy)
    trainer.close()
    return found.peak_bytes


def between(file: str, size: int) -> str:
    """A target that a micro-batch of this size fits and the next larger one does not."""
    trainer = built(file)
    planner = trainer._planner()
    target = (planner.uniform(size, "none").peak_bytes + planner.uniform(2 * size, "none").peak_bytes) // 2
    trainer.close()
    return f"memory.target={target / 2**10:.1f}KiB"


def chosen(outcome: Outcome) -> int:
    """The micro-batch that the run says it tried last."""
    line = next(line for line in outcome.out.splitlines() if "memory     tried: micro-batch " in line)
    return int(line.split("micro-batch ")[1].split()[0])


# ---- the micro-batch -------------------------------------------------------------------------------------------


@nightly
def test_a_quarter_of_the_batch_fits(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    file = stack(write_config)
    target = between(file, BATCH // 4)
    outcome = train("--config", file, AUTO, target, f"run.dir={tmp_path / 'auto'}")
    assert outcome.code == 0, outcome.err
    assert f"memory     micro-batch {BATCH // 4}, 0 of 6 blocks recomputed: " in outcome.out
    assert chosen(outcome) == BATCH // 4
    assert f"batch      {BATCH} = 1 processes x {BATCH // 4} x 4 micro-batches" in outcome.out
    assert train("--config", file).code == 0
    whole, parts = losses(tmp_path / "run"), losses(tmp_path / "auto")
    assert parts.keys() == whole.keys()
    assert all(parts[step] == pytest.approx(whole[step], rel=1e-5) for step in whole)
    assert summary(tmp_path / "auto")["status"] == "finished"


def test_the_largest_that_fits_by_the_planner(write_config: WriteConfig) -> None:
    file = stack(write_config)
    limit = between(file, 8)
    trainer = built(file, AUTO, limit)
    assert trainer.planned is not None
    peaks = {size: trainer.fitting.planner.uniform(size, "none").peak_bytes for size in trainer.plan.micro_batch_sizes}
    fit = [size for size, peak in peaks.items() if peak <= trainer.fitting.limit_bytes]
    assert trainer.plan.micro_batch_size == max(fit) == 8
    trainer.close()


def test_with_plenty_of_memory_nothing_accumulates(train: Train, write_config: WriteConfig) -> None:
    outcome = train("--config", stack(write_config), AUTO)
    assert outcome.code == 0, outcome.err
    assert chosen(outcome) == BATCH
    assert f"batch      {BATCH} = 1 processes x {BATCH}\n" in outcome.out


def test_pairs_that_are_mixed_stay_whole(write_config: WriteConfig) -> None:
    digits = {"train": {"name": "digits", "args": {"split": "train"}}, "workers": 0, "augment": {"mixup": 0.4}}
    digits["normalize"] = {"mean": [0.5], "std": [0.5]}
    args = {"features": 64, "num_classes": 10}
    file = stack(write_config, args=args, data=digits, train={"steps": 1, "batch_size": 90})
    trainer = built(file)
    peaks = [trainer._planner().uniform(size, "none").peak_bytes for size in (10, 18)]
    trainer.close()
    # 15 would fit, and splits 90: but not into pairs.
    trainer = built(file, AUTO, f"memory.target={(0.1 * peaks[0] + 0.9 * peaks[1]) / 2**10:.1f}KiB")
    assert trainer.plan.micro_batch_size == 10
    assert trainer.plan.micro_batch_sizes == (2, 6, 10, 18, 30, 90)
    trainer.close()


def test_a_device_too_small_for_one_sample(train: Train, write_config: WriteConfig) -> None:
    outcome = train("--config", stack(write_config), AUTO, "memory.target=1KiB")
    assert outcome.code == 2
    assert "memory.target" in outcome.err
    assert "a micro-batch of 1 takes" in outcome.err
    assert "set memory.checkpointing: auto" in outcome.err


# ---- tried on the device ---------------------------------------------------------------------------------------


def test_a_plan_that_hopes_for_too_much_is_corrected(
    train: Train, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = stack(write_config)
    target = between(file, BATCH // 4)
    predict = Planner.predict

    def hopeful(self: Planner, *arguments: Any) -> Prediction:
        found = predict(self, *arguments)
        return replace(found, parts={name: size // 2 for name, size in found.parts.items()})

    monkeypatch.setattr(Planner, "predict", hopeful)
    outcome = train("--config", file, AUTO, target)
    assert outcome.code == 0, outcome.err
    assert f"memory     micro-batch {BATCH // 4}, " not in outcome.out
    assert chosen(outcome) == BATCH // 4


def test_a_micro_batch_of_the_users_that_does_not_fit(
    train: Train, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the checkpointing was left open, so nothing smaller may be taken: it runs as long as the device has room."""
    monkeypatch.setattr(fitting, "measure", lambda *arguments: 2**60)
    outcome = train("--config", stack(write_config), "memory.checkpointing=auto")
    assert outcome.code == 0
    assert "that is more than memory.target" in outcome.out
    monkeypatch.setattr(fitting, "measure", lambda *arguments: None)
    outcome = train("--config", stack(write_config, "other.yaml"), "memory.checkpointing=auto")
    assert outcome.code == 2
    assert f"memory.target: a micro-batch of {BATCH} takes more than" in outcome.err


@nightly
def test_a_budget_in_bytes_finds_its_micro_batch(train: Train, write_config: WriteConfig) -> None:
    """A budget that the whole share cannot meet, and a quarter of it can."""
    file = stack(write_config)
    trainer = built(file, "memory.checkpointing=auto", "memory.budget=100%")
    quarter, _ = trainer.fitting.planner.block_costs(BATCH // 4)
    trainer.close()
    budget = int(held_at_most(quarter, ["none"] * len(quarter)))
    outcome = train("--config", file, AUTO, "memory.checkpointing=auto", f"memory.budget={budget}B")
    assert outcome.code == 0, outcome.err
    assert BATCH // 4 <= chosen(outcome) <= BATCH


def test_a_policy_that_the_model_cannot_have_is_left_out(train: Train, write_config: WriteConfig) -> None:
    """`selective` keeps what this model overwrites; `auto` does without it."""
    model = {"name": "fitted_model:Overwriting"}
    file = stack(write_config, model=model)
    outcome = train("--config", file, "memory.checkpointing=auto", "memory.budget=75%")
    assert outcome.code == 0, outcome.err
    assert "not with selective" in outcome.out


def test_what_was_planned_is_told_of_a_checkpointed_model(write_config: WriteConfig) -> None:
    trainer = built(stack(write_config), "memory.checkpointing=full")
    known = trainer.situation()
    assert known.memory_plan is not None
    assert "activations" in str(known.memory_plan())
    trainer.close()


def test_running_out_of_memory_while_trying(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    model = {"name": "fitted_model:Surprising", "args": {"limit": 7}}
    outcome = train("--config", write_config(model=model), AUTO)
    assert outcome.code == 0, outcome.err
    assert "memory     micro-batch 12: " in outcome.out  # as planned
    assert chosen(outcome) == 6
    assert summary(tmp_path / "run")["status"] == "finished"


def test_trying_leaves_no_trace(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    file = stack(write_config, args={"dropout": 0.3, "normed": True, "depth": 2})
    auto = train("--config", file, AUTO, between(file, 32), f"run.dir={tmp_path / 'auto'}")
    assert auto.code == 0, auto.err
    assert chosen(auto) == 32
    assert train("--config", file, "train.micro_batch_size=32").code == 0
    found = weights(tmp_path / "auto", 4)
    assert any("running_mean" in name for name in found)
    assert identical(found, weights(tmp_path / "run", 4))
    assert losses(tmp_path / "auto") == losses(tmp_path / "run")


# ---- checkpointing ---------------------------------------------------------------------------------------------


def peak_of_a_step(file: str, *overrides: str) -> int:
    trainer = built(file, *overrides)
    trainer.start()
    trainer.train_step()  # so that the optimizer's state is there

    def step() -> None:
        trainer.train_step()

    peak = measure_cpu_peak(step)
    trainer.close()
    return peak


DROPPING = {"dropout": 0.3}
WITHIN_BUDGET = ("memory.checkpointing=auto", "memory.budget=75%")


def test_within_a_budget_the_same_bits_in_less_memory(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    file = stack(write_config, args=DROPPING)
    assert train("--config", file).code == 0
    outcome = train("--config", file, *WITHIN_BUDGET, f"run.dir={tmp_path / 'auto'}")
    assert outcome.code == 0, outcome.err
    assert " of 6 blocks recomputed: " in outcome.out
    assert identical(weights(tmp_path / "auto", 4), weights(tmp_path / "run", 4))
    assert losses(tmp_path / "auto") == losses(tmp_path / "run")
    assert peak_of_a_step(file, *WITHIN_BUDGET) < 0.85 * peak_of_a_step(file, f"run.dir={tmp_path / 'other'}")


@nightly
def test_within_a_target_the_same_bits(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    file = stack(write_config, args=DROPPING)
    none, full = predicted(file, BATCH), predicted(file, BATCH, "full")
    target = (none + full) // 2
    assert train("--config", file).code == 0
    overrides = ("memory.checkpointing=auto", f"memory.target={target / 2**10:.1f}KiB")
    outcome = train("--config", file, *overrides, f"run.dir={tmp_path / 'auto'}")
    assert outcome.code == 0, outcome.err
    assert chosen(outcome) == BATCH
    assert " of 6 blocks recomputed: " in outcome.out
    assert identical(weights(tmp_path / "auto", 4), weights(tmp_path / "run", 4))
    trainer = built(file, *overrides, f"run.dir={tmp_path / 'other'}")
    assert trainer.planned is not None
    assert trainer.planned.num_recomputed > 0
    assert trainer.planned.peak_bytes <= target < none
    trainer.close()


@nightly
def test_both_are_found_together(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    file = stack(write_config)
    target = (predicted(file, 1, "full") + predicted(file, 1)) / 2
    outcome = train("--config", file, AUTO, "memory.checkpointing=auto", f"memory.target={target / 2**10:.2f}KiB")
    if outcome.code == 0:
        assert "blocks recomputed: " in outcome.out
    else:  # a single sample keeps too little for recomputing to help
        assert "memory.target" in outcome.err
    plenty = train("--config", file, AUTO, "memory.checkpointing=auto", f"run.dir={tmp_path / 'plenty'}")
    assert plenty.code == 0, plenty.err
    assert f"memory     micro-batch {BATCH}, 0 of 6 blocks recomputed: " in plenty.out


@nightly
def test_a_budget_that_cannot_be_kept(train: Train, write_config: WriteConfig) -> None:
    outcome = train("--config", stack(write_config), "memory.checkpointing=auto", "memory.budget=1%")
    assert outcome.code == 2
    assert "memory.budget: with every block recomputed activations still take" in outcome.err
    assert "%), the budget is 1%" in outcome.err


def test_a_target_that_cannot_be_kept(train: Train, write_config: WriteConfig) -> None:
    outcome = train("--config", stack(write_config), "memory.checkpointing=auto", "memory.target=2KiB")
    assert outcome.code == 2
    assert "memory.target: " in outcome.err
    assert "set train.micro_batch_size: auto" in outcome.err


# ---- going on ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_as_if_never_stopped(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    file = stack(write_config, args=DROPPING)
    fitted = (AUTO, between(file, 32))
    assert train("--config", file, *fitted, f"run.dir={tmp_path / 'parts'}", "train.epochs=1").code == 0
    outcome = train("--config", file, *fitted, f"run.dir={tmp_path / 'parts'}")
    assert outcome.code == 0, outcome.err
    assert "continuing from step 2 " in outcome.out
    assert train("--config", file, *fitted).code == 0
    assert identical(weights(tmp_path / "parts", 4), weights(tmp_path / "run", 4))
    assert losses(tmp_path / "parts") == losses(tmp_path / "run")


def test_a_micro_batch_that_ran_out_of_memory_is_not_tried_again(
    train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    record = Shrink(micro_batch_size=16, was=32, configured="auto", step=1, rank=0, attempt=1, time=0.0)
    write_shrink(tmp_path / "run", record)
    file = stack(write_config)
    outcome = train("--config", file, AUTO, "memory.on_oom=shrink")
    assert outcome.code == 0, outcome.err
    assert chosen(outcome) == 16
    write_shrink(tmp_path / "small", record)
    outcome = train("--config", file, AUTO, "memory.on_oom=shrink", between(file, 4), f"run.dir={tmp_path / 'small'}")
    assert outcome.code == 0, outcome.err
    assert chosen(outcome) == 4  # an upper bound, not what to take


@nightly
def test_such_a_run_can_be_evaluated(
    train: Train, write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = stack(write_config)
    budget = ("memory.checkpointing=auto", "memory.budget=75%")
    assert train("--config", file, AUTO, *budget).code == 0
    forget_accelerate()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    metrics = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert metrics["step"] == 4
    assert metrics["accuracy"] == pytest.approx(records(tmp_path / "run")[-1]["eval/accuracy"])
