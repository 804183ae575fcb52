"""Learning-rate curves against torch's own schedulers, and optimizers by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from trainer.components import _library_names
from trainer.config import OptimConfig, ScheduleConfig
from trainer.errors import UserError
from trainer.optim import build_optimizer
from trainer.schedule import build_learning_rate

TOTAL, PER_EPOCH, PEAK = 60, 10, 0.5


def curve(**schedule: Any) -> list[float]:
    optim = OptimConfig(name="sgd", lr=PEAK)
    learning_rate = build_learning_rate(optim, ScheduleConfig.model_validate(schedule), TOTAL, PER_EPOCH)
    return [learning_rate(step) for step in range(TOTAL)]


def torchs(make: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer)
    rates = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


CURVES: dict[str, tuple[dict[str, Any], Any]] = {
    "constant": ({}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    "cosine": ({"name": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL)),
    "cosine to a floor": (
        {"name": "cosine", "args": {"min_ratio": 0.1}},
        lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.1 * PEAK),
    ),
    "linear": (
        {"name": "linear", "args": {"end_ratio": 0.2}},
        lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=TOTAL),
    ),
    "step": (
        {"name": "step", "args": {"every": "2 epochs", "gamma": 0.3}},
        lambda o: lr_scheduler.StepLR(o, 20, 0.3),
    ),
    "step in steps": ({"name": "step", "args": {"every": 7}}, lambda o: lr_scheduler.StepLR(o, 7, 0.1)),
    "warm-up, then cosine": (
        {"name": "cosine", "warmup": "2 epochs"},
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o, 0.01, total_iters=20), lr_scheduler.CosineAnnealingLR(o, TOTAL - 20)],
            milestones=[20],
        ),
    ),
    "a user's own": (
        {"name": "test_optim:halving", "args": {"base": 3.0}},
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 3.0**-step),
    ),
}


def halving(total_steps: int, base: float) -> Any:
    assert total_steps == TOTAL
    return lambda step: base**-step


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("name", CURVES)
def test_curve_is_torchs(name: str) -> None:
    schedule, make = CURVES[name]
    assert curve(**schedule) == pytest.approx(torchs(make), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "name", ["sgd", "adamw", *(n for n in _library_names("optimizer") if n != "Muon"), "torch.optim:SGD"]
)
def test_every_optimizer_steps(name: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.1), model, "cpu")
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_optimizer_gets_its_settings() -> None:
    args = {"momentum": 0.9, "nesterov": True}
    optimizer = build_optimizer(OptimConfig(name="sgd", lr=0.1, weight_decay=0.01, args=args), nn.Linear(3, 2), "cpu")
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"], group["lr"]) == (0.9, True, 0.01, 0.1)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=0.1), model, "cpu")
    assert [p is model.weight for p in optimizer.param_groups[0]["params"]] == [True]


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Optimizer", "lr_scheduler"])
def test_what_cannot_run_in_this_loop_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="unknown optimizer"):
        build_optimizer(OptimConfig(name=name, lr=0.1), nn.Linear(3, 2), "cpu")


def test_schedules_refuse() -> None:
    with pytest.raises(UserError, match="write a number of steps"):
        curve(name="step", args={"every": "sometimes"})
    with pytest.raises(UserError, match="at least 1"):
        curve(name="step", args={"every": 0})
    with pytest.raises(UserError, match="takes no argument 'min_rato'; did you mean 'min_ratio'"):
        curve(name="cosine", args={"min_rato": 0.1})
