"""Learning rates against torch's, timm's and transformers' own schedulers, at every step of a run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY, Train, WriteConfig
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from trainer.components import BUILT_INS
from trainer.config_model import OptimConfig, ScheduleConfig
from trainer.errors import UserError
from trainer.schedule import build_learning_rate

pytestmark = pytest.mark.unit

PER_EPOCH, EPOCHS, PEAK = 10, 12, 0.5
TOTAL = PER_EPOCH * EPOCHS

# Both are float64. timm and transformers compute a rate from the step, as we do, in another order of operations: a few
# roundings, and more of 1 - step / total near its zero. torch multiplies from one step to the next: roundings add up,
# and near the end of a cosine 1 + cos(x) cancels, of which the next rate is a multiple.
CLOSED, CHAINED = 1e-13, 1e-11


def curve(total: int = TOTAL, **schedule: Any) -> list[float]:
    optim = OptimConfig(name="sgd", lr=PEAK)
    learning_rate = build_learning_rate(optim, ScheduleConfig.model_validate(schedule), total, PER_EPOCH)
    return [learning_rate(step) for step in range(total)]


def an_optimizer() -> Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)


def stepped(make: Callable[[Optimizer], Any], per_epoch: int = 1) -> list[float]:
    """Returns the rates of a scheduler of torch's kind that steps after so many steps."""
    optimizer = an_optimizer()
    with warnings.catch_warnings():  # SequentialLR itself calls step(epoch), which torch warns of
        warnings.simplefilter("ignore", UserWarning)
        scheduler = make(optimizer)
        rates = []
        for step in range(TOTAL):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if (step + 1) % per_epoch == 0:
                scheduler.step()
    return rates


def timms(**settings: Any) -> list[float]:
    """Returns the rates of timm's factory, called as its train.py does; it must train for as long as we do."""
    scheduler_factory = pytest.importorskip("timm.scheduler")
    optimizer = an_optimizer()
    scheduler, num_epochs = scheduler_factory.create_scheduler_v2(optimizer, updates_per_epoch=PER_EPOCH, **settings)
    assert num_epochs == EPOCHS
    rates = []
    for epoch in range(EPOCHS):
        for batch in range(PER_EPOCH):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step_update(epoch * PER_EPOCH + batch + 1)
        scheduler.step(epoch + 1)
    return rates


def transformers(name: str, num_warmup_steps: int | None = None, **specific: Any) -> list[float]:
    get_scheduler = pytest.importorskip("transformers").get_scheduler
    return stepped(
        lambda o: get_scheduler(
            name,
            o,
            num_warmup_steps=num_warmup_steps,
            num_training_steps=TOTAL,
            scheduler_specific_kwargs=specific,
        )
    )


def warmed_up(count: int, then: Callable[[Optimizer], Any], start: float = 0.01) -> Callable[[Optimizer], Any]:
    """torchvision's recipes: linear warm-up, then another scheduler."""
    return lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, start, total_iters=count), then(o)], milestones=[count]
    )


BY_EPOCH = {"interval": "epoch"}

TORCH: dict[str, tuple[dict[str, Any], Callable[[Optimizer], Any], int]] = {  # the last is the steps of one rate
    "constant": ({}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0), 1),
    "cosine": ({"name": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL), 1),
    "cosine to a floor": (
        {"name": "cosine", "args": {"min_ratio": 0.1}},
        lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.1 * PEAK),
        1,
    ),
    "cosine after warm-up": (
        {"name": "cosine", "warmup": "2 epochs"},
        warmed_up(20, lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL - 20)),
        1,
    ),
    "cosine after warm-up, per epoch": (
        {"name": "cosine", "warmup": "5 epochs", **BY_EPOCH},
        warmed_up(5, lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS - 5)),
        PER_EPOCH,
    ),
    "linear": (
        {"name": "linear", "args": {"end_ratio": 0.2}},
        lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=TOTAL),
        1,
    ),
    "step": (
        {"name": "step", "args": {"every": "2 epochs", "gamma": 0.3}},
        lambda o: lr_scheduler.StepLR(o, 20, 0.3),
        1,
    ),
    "step in steps": ({"name": "step", "args": {"every": 7}}, lambda o: lr_scheduler.StepLR(o, 7, 0.1), 1),
    "step, per epoch": (
        {"name": "step", "args": {"every": "3 epochs"}, **BY_EPOCH},
        lambda o: lr_scheduler.StepLR(o, 3),
        PER_EPOCH,
    ),
    "step after warm-up, per epoch": (
        {"name": "step", "args": {"every": "3 epochs"}, "warmup": "2 epochs", **BY_EPOCH},
        warmed_up(2, lambda o: lr_scheduler.StepLR(o, 3)),
        PER_EPOCH,
    ),
    "multistep": (
        {"name": "multistep", "args": {"milestones": ["8 epochs", 33, "11 epochs"], "gamma": 0.2}},
        lambda o: lr_scheduler.MultiStepLR(o, [80, 33, 110], 0.2),
        1,
    ),
    "multistep, per epoch": (
        {"name": "multistep", "args": {"milestones": ["8 epochs", "11 epochs"]}, **BY_EPOCH},
        lambda o: lr_scheduler.MultiStepLR(o, [8, 11]),
        PER_EPOCH,
    ),
    "exponential": ({"name": "exponential", "args": {"gamma": 0.97}}, lambda o: lr_scheduler.ExponentialLR(o, 0.97), 1),
    "exponential, per epoch": (
        {"name": "exponential", "args": {"gamma": 0.9}, **BY_EPOCH},
        lambda o: lr_scheduler.ExponentialLR(o, 0.9),
        PER_EPOCH,
    ),
    "exponential, evenly over an epoch": (
        {"name": "exponential", "args": {"gamma": 0.9, "every": "1 epoch"}},
        lambda o: lr_scheduler.ExponentialLR(o, 0.9 ** (1 / PER_EPOCH)),
        1,
    ),
    "polynomial": (
        {"name": "polynomial", "args": {"power": 0.9}},
        lambda o: lr_scheduler.PolynomialLR(o, TOTAL, power=0.9),
        1,
    ),
    "polynomial after warm-up": (  # torchvision's segmentation
        {"name": "polynomial", "args": {"power": 0.9}, "warmup": "1 epoch"},
        warmed_up(10, lambda o: lr_scheduler.PolynomialLR(o, TOTAL - 10, power=0.9)),
        1,
    ),
    "one cycle": ({"name": "one_cycle"}, lambda o: lr_scheduler.OneCycleLR(o, PEAK, TOTAL), 1),
    "one cycle in lines": (
        {
            "name": "one_cycle",
            "args": {"shape": "linear", "pct_start": 0.25, "div_factor": 10, "final_div_factor": 50},
        },
        lambda o: lr_scheduler.OneCycleLR(
            o, PEAK, TOTAL, pct_start=0.25, anneal_strategy="linear", div_factor=10, final_div_factor=50
        ),
        1,
    ),
    "one cycle in three phases": (
        {"name": "one_cycle", "args": {"three_phase": True, "pct_start": 0.4}},
        lambda o: lr_scheduler.OneCycleLR(o, PEAK, TOTAL, three_phase=True, pct_start=0.4),
        1,
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_torchs(name: str) -> None:
    schedule, make, per_rate = TORCH[name]
    assert curve(**schedule) == pytest.approx(stepped(make, per_rate), rel=CHAINED, abs=0)


def test_warm_up_of_torchvisions_detection() -> None:
    """Its first epoch multiplies the rate of each step by a warm-up; milestones count from the first epoch."""
    optimizer = an_optimizer()
    by_epoch = lr_scheduler.MultiStepLR(optimizer, [8, 11], 0.1)
    expected = []
    for epoch in range(EPOCHS):
        by_step = lr_scheduler.LinearLR(optimizer, 0.001, total_iters=PER_EPOCH - 1) if epoch == 0 else None
        for _ in range(PER_EPOCH):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if by_step is not None:
                by_step.step()
        by_epoch.step()
    ours = curve(
        name="multistep",
        args={"milestones": ["8 epochs", "11 epochs"]},
        warmup=PER_EPOCH - 1,
        warmup_start=0.001,
        warmup_prefix=False,
    )
    assert ours == pytest.approx(expected, rel=CHAINED, abs=0)


TIMM_WARMUP = {"warmup": "2 epochs", "warmup_start": 1e-4 / PEAK}
TIMMS_WARMUP = {"warmup_epochs": 2, "warmup_lr": 1e-4}
TIMM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cosine": ({"name": "cosine", "args": {"min_ratio": 1e-5 / PEAK}}, {"sched": "cosine", "min_lr": 1e-5}),
    "step": ({"name": "step", "args": {"every": "3 epochs", "gamma": 0.5}}, {"sched": "step", "decay_rate": 0.5}),
    # timm changes the rate one epoch, or one update, earlier than its milestone says.
    "multistep": (
        {"name": "multistep", "args": {"milestones": ["4 epochs", "8 epochs"], "gamma": 0.2}},
        {"sched": "multistep", "decay_milestones": [5, 9], "decay_rate": 0.2},
    ),
    "poly": (
        {"name": "polynomial", "args": {"power": 0.5, "end_ratio": 1e-5 / PEAK}},
        {"sched": "poly", "decay_rate": 0.5, "min_lr": 1e-5},
    ),
}


@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "no prefix"])
@pytest.mark.parametrize("warmup", [True, False], ids=["warm-up", "no warm-up"])
@pytest.mark.parametrize("on_updates", [True, False], ids=["updates", "epochs"])
@pytest.mark.parametrize("name", TIMM)
def test_timms(name: str, on_updates: bool, warmup: bool, prefix: bool) -> None:
    ours, theirs = TIMM[name]
    ours = {**ours, "interval": "step" if on_updates else "epoch"}
    # Where warm-up comes before the schedule, timm trains for so many epochs more.
    num_epochs = EPOCHS - 2 * (warmup and prefix)
    theirs = {"num_epochs": num_epochs, "decay_epochs": 3, **theirs, "step_on_epochs": not on_updates}
    if warmup:
        ours |= {**TIMM_WARMUP, "warmup_prefix": prefix}
        theirs |= {**TIMMS_WARMUP, "warmup_prefix": prefix}
    if name == "multistep" and on_updates:
        ours["args"] = {"milestones": [5 * PER_EPOCH - 1, 9 * PER_EPOCH - 1], "gamma": 0.2}
    assert curve(**ours) == pytest.approx(timms(**theirs), rel=CLOSED, abs=0)


TRANSFORMERS_WARMUP = {"warmup": 15, "warmup_start": 0.0}
TRANSFORMERS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "constant": ({**TRANSFORMERS_WARMUP}, "constant_with_warmup", {}),
    "linear": ({"name": "linear", **TRANSFORMERS_WARMUP}, "linear", {}),
    "cosine": ({"name": "cosine", **TRANSFORMERS_WARMUP}, "cosine", {}),
    "polynomial": (
        {"name": "polynomial", "args": {"power": 2.0, "end_ratio": 1e-4 / PEAK}, **TRANSFORMERS_WARMUP},
        "polynomial",
        {"lr_end": 1e-4, "power": 2.0},
    ),
    **{
        f"wsd, {shape}": (
            {
                "name": "wsd",
                "args": {"decay": 40, "shape": shape, "end_ratio": 0.1},
                "warmup": 15,
                "warmup_start": 0.1,  # transformers starts where it ends
            },
            "warmup_stable_decay",
            {"num_decay_steps": 40, "decay_type": shape, "min_lr_ratio": 0.1},
        )
        for shape in ("cosine", "linear", "1-sqrt")
    },
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    ours, theirs, specific = TRANSFORMERS[name]
    assert curve(**ours) == pytest.approx(transformers(theirs, 15, **specific), rel=CLOSED, abs=0)


def test_every_schedule_is_compared() -> None:
    settings = [case[0] for cases in (TORCH, TIMM, TRANSFORMERS) for case in cases.values()]
    compared = {ours.get("name", "constant") for ours in settings}
    assert compared == set(BUILT_INS["schedule"])


PAGE = (REPOSITORY / "docs" / "recipes.md").read_text().partition("## Schedule")[2].partition("\n## ")[0]


@pytest.mark.parametrize("text", re.findall(r"`(\{name: [^`]*\})`", PAGE))
def test_what_the_page_says_can_be_written(text: str) -> None:
    optim = OptimConfig(name="sgd", lr=1e-3)
    build_learning_rate(optim, ScheduleConfig.model_validate(yaml.safe_load(text)), 10_000, 100)


def counting(total_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    return lambda step: step + 100 * total_steps + 10_000 * steps_per_epoch


def dipping(total_steps: int) -> Callable[[int], float]:
    """Is below 0 in the middle of the run only."""
    return lambda step: -1.0 if step == total_steps // 2 else 1.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, [step + 12_000 + 100_000 for step in range(TOTAL)]),
        (BY_EPOCH, [step // 10 + 1200 + 10_000 for step in range(TOTAL)]),
    ],
    ids=["steps", "epochs"],
)
def test_what_a_users_own_is_told(schedule: dict[str, Any], expected: list[int]) -> None:
    assert curve(name="test_schedule:counting", **schedule) == [PEAK * value for value in expected]


def test_the_last_epoch_may_be_cut_short() -> None:
    rates = curve(25, name="linear", **BY_EPOCH)
    assert rates == pytest.approx([PEAK] * 10 + [PEAK * 2 / 3] * 10 + [PEAK / 3] * 5)
    assert curve(1, name="polynomial", args={"power": 0.5}) == [PEAK]


@pytest.mark.parametrize(
    ("total", "schedule", "is_warned"),
    [
        (120, {"name": "multistep", "args": {"milestones": [120, 150]}}, True),
        (121, {"name": "multistep", "args": {"milestones": [120, 150]}}, False),
        (120, {"name": "step", "args": {"every": "20 epochs"}}, True),
        (10, {"name": "cosine", **BY_EPOCH}, True),
        (11, {"name": "cosine", **BY_EPOCH}, False),
        (120, {"name": "constant"}, False),
    ],
)
def test_a_schedule_that_never_changes_the_rate_is_said(
    total: int, schedule: dict[str, Any], is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    curve(total, **schedule)
    assert ("leaves the rate as it is in a run of" in caplog.text) == is_warned


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"name": "step", "args": {"every": "sometimes"}}, "write a number of steps"),
        ({"name": "step", "args": {"every": 0}}, "every must be at least 1"),
        ({"name": "step", "args": {"every": 3}, **BY_EPOCH}, "the schedule counts epochs: write '3 epochs'"),
        ({"name": "cosine", "warmup": 3, **BY_EPOCH}, "schedule.warmup: .* write '3 epochs'"),
        ({"name": "cosine", "warmup": "12 epochs", **BY_EPOCH}, "12 epochs of warm-up in a run of 12"),
        ({"name": "cosine", "warmup": 120, "warmup_prefix": False}, "120 steps of warm-up in a run of 120"),
        ({"name": "cosine", "args": {"min_rato": 0.1}}, "takes no argument 'min_rato'; did you mean 'min_ratio'"),
        ({"name": "multistep", "args": {"milestones": "8 epochs"}}, "milestones must be a list"),
        ({"name": "multistep"}, "needs the argument 'milestones'"),
        ({"name": "one_cycle", "warmup": 5}, "schedule.warmup: one_cycle begins with a warm-up of its own"),
        ({"name": "one_cycle", "args": {"pct_start": 1.5}}, "pct_start must be between 0 and 1"),
        ({"name": "one_cycle", "args": {"pct_start": 0.5, "three_phase": True}}, "between 0 and 0.5"),
        ({"name": "one_cycle", "args": {"pct_start": 0.005}}, "leaves less than a step"),
        ({"name": "one_cycle", "args": {"shape": "cos"}}, "shape must be one of cosine, linear"),
        ({"name": "wsd", "args": {"decay": 100}, "warmup": 30}, "decay is longer than the 90 steps"),
        ({"name": "wsd", "args": {"decay": 10, "shape": "sqrt"}}, "shape must be one of cosine, linear, 1-sqrt"),
        ({"name": "wsd", "args": {"decay": 10, "end_ratio": 2}}, r"end_ratio must be between 0 and 1 \(got 2\)"),
        ({"name": "cosine", "args": {"min_ratio": -1}}, r"min_ratio must be between 0 and 1 \(got -1\)"),
        ({"name": "linear", "args": {"end_ratio": 1.5}}, "end_ratio must be between 0 and 1"),
        ({"name": "polynomial", "args": {"power": -1}}, "power must be more than 0"),
        ({"name": "step", "args": {"every": 3, "gamma": -0.1}}, "gamma must be between 0 and 1"),
        ({"name": "multistep", "args": {"milestones": [30, 60], "gamma": -1}}, "gamma must be between 0 and 1"),
        ({"name": "exponential", "args": {"gamma": 1.1}}, "gamma must be between 0 and 1"),
        ({"name": "one_cycle", "args": {"div_factor": -25}}, "div_factor must be more than 0"),
        ({"name": "one_cycle", "args": {"final_div_factor": 0}}, "final_div_factor must be more than 0"),
        ({"name": "test_schedule:dipping"}, "'test_schedule:dipping' gives -1.0 for step 60"),
        ({"name": "cosine", "args": {"total_steps": 10}}, "schedule.args.total_steps: the schedule is told this"),
        ({"name": "step", "args": {"every": 3, "length": 3}}, "schedule.args.length: the schedule is told this"),
    ],
)
def test_refused(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        curve(**schedule)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"interval": "epoch"}, "interval has no effect on a constant rate"),
        ({"name": "cosine", "warmup_start": 0.1}, "warmup_start has no effect without warmup"),
        ({"name": "cosine", "warmup_prefix": False}, "warmup_prefix has no effect without warmup"),
        ({"warmup": 3, "warmup_prefix": False}, "warmup_prefix has no effect on a constant rate"),
        ({"name": "cosine", "interval": "epochs"}, "must be 'step' or 'epoch' (got 'epochs'); did you mean 'epoch'?"),
    ],
)
def test_refused_in_a_file(schedule: dict[str, Any], message: str, train: Train, write_config: WriteConfig) -> None:
    code, _, err = train("--config", write_config(schedule=schedule))
    assert code == 2
    assert message in err
