"""The optimizer, and the learning rate as a pure function of the step.

There is no scheduler object with state: `learning_rate(step)` is all, so a resumed run needs nothing restored
and no rank count changes the curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainer.components import accepts, call, resolve
from trainer.config import Interval, OptimConfig, ScheduleConfig
from trainer.errors import UserError, one_line

_FUSED_ON_GPUS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)

Factor = Callable[[int], float]
"""step -> factor of the peak rate. Schedules are called with `total_steps`, and `steps_per_epoch` where they take
it, and return one; steps are counted from the end of warm-up."""


def build_optimizer(config: OptimConfig, model: nn.Module, device_type: str) -> torch.optim.Optimizer:
    """Builds the optimizer over the model's trainable parameters.

    Args:
        config: the `optim` section.
        model: its parameters need not be on the device yet.
        device_type: where they will be, such as `cuda`.

    Raises:
        UserError: an unknown optimizer, or arguments that do not fit.
    """
    target = resolve("optimizer", config.name, "optim")
    args: dict[str, Any] = {"params": [p for p in model.parameters() if p.requires_grad], "lr": config.lr}
    ours = {"lr": "lr", "weight_decay": "weight_decay", "fused": "implementation", "foreach": "implementation"}
    for key in (*ours, "params"):
        if key in config.args:
            raise UserError(
                f"set it as optim.{ours[key]}" if key in ours else "not yours to set", path=f"optim.args.{key}"
            )
    if accepts(target, "weight_decay"):
        args["weight_decay"] = config.weight_decay
    elif config.weight_decay:
        raise UserError(f"'{config.name}' has no weight decay", path="optim.weight_decay")
    args.update(_implementation(config, target, device_type))
    optimizer = call(target, {**args, **config.args}, config.name, "optim")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"'{config.name}' is not a torch.optim.Optimizer", path="optim.name")
    return optimizer


def _implementation(config: OptimConfig, target: Callable[..., Any], device_type: str) -> dict[str, bool]:
    """Returns the arguments that choose how torch updates parameters; none leaves the choice to torch."""
    asked = config.implementation
    if asked == "auto":
        # On the CPU torch loops over the parameters unless told otherwise.
        return {"fused": True} if device_type == "cuda" and target in _FUSED_ON_GPUS else {}
    argument = "foreach" if asked == "for_loop" else asked
    if not accepts(target, argument):
        raise UserError(f"'{config.name}' has no {asked} implementation", path="optim.implementation")
    return {argument: asked != "for_loop"}


def build_learning_rate(
    optim: OptimConfig, config: ScheduleConfig, total_steps: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """Returns the learning rate of a step: linear warm-up, then the named schedule over what remains.

    Raises:
        UserError: an unknown schedule, arguments that do not fit, or a warm-up longer than the run.
    """
    warmup = config.warmup.steps(steps_per_epoch)
    if warmup >= total_steps:
        raise UserError(f"{warmup} steps of warm-up in a run of {total_steps}", path="schedule.warmup")
    given: dict[str, int] = {"total_steps": total_steps - warmup}
    target = resolve("schedule", config.name, "schedule")
    if accepts(target, "steps_per_epoch"):
        given["steps_per_epoch"] = steps_per_epoch
    factor = call(target, {**given, **config.args}, config.name, "schedule")
    for step in (0, 1, total_steps - warmup - 1):  # tried here, not an hour into the run
        try:
            tried = float(factor(step))
        except Exception as error:
            raise UserError(f"'{config.name}' raised {one_line(error)} for step {step}", path="schedule") from error
        if not math.isfinite(tried):
            raise UserError(f"'{config.name}' gives {tried} for step {step}", path="schedule")

    def learning_rate(step: int) -> float:
        if step < warmup:
            return optim.lr * (config.warmup_start + (1 - config.warmup_start) * step / warmup)
        return optim.lr * float(factor(step - warmup))

    return learning_rate


def constant(total_steps: int) -> Factor:
    """The peak rate throughout."""
    return lambda step: 1.0


def cosine(total_steps: int, min_ratio: float = 0.0) -> Factor:
    """Half a cosine from the peak to `min_ratio` of it."""
    return lambda step: min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def linear(total_steps: int, end_ratio: float = 0.0) -> Factor:
    """A straight line from the peak to `end_ratio` of it."""
    return lambda step: 1 + (end_ratio - 1) * step / total_steps


def stepwise(total_steps: int, steps_per_epoch: int, every: int | str, gamma: float = 0.1) -> Factor:
    """Multiplies the rate by `gamma` after every interval: a number of steps, or like `30 epochs`."""
    interval = Interval.parse(every).steps(steps_per_epoch)
    if interval < 1:
        raise UserError("every must be at least 1")
    return lambda step: gamma ** (step // interval)
