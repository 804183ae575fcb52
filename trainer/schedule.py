"""The learning rate as a pure function of the step: warm-up, then a named schedule.

There is no scheduler object with state: `learning_rate(step)` is all, so a resumed run needs nothing restored
and no rank count changes the curve. Each formula is that of the schedulers of torch, timm and transformers, which
`tests/unit/test_schedule.py` compares with. What is not a function of the step is not here: a rate that waits for a
metric, or OneCycleLR's momentum.
"""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from trainer.components import accepts, call, resolve
from trainer.config_model import OptimConfig, ScheduleConfig
from trainer.config_values import Interval
from trainer.errors import UserError, one_line, place_at

logger = logging.getLogger("lockstep")

Factor = Callable[[int], float]
"""step -> factor of the peak rate. Schedules are called with `total_steps`, and `steps_per_epoch` where they take
it, and return one. Steps are counted from the end of warm-up, or from 0 with `warmup_prefix: false`. With `interval:
epoch` all of it counts epochs: `total_steps` is their number, and `steps_per_epoch` is 1."""

Length = Callable[[object], int]
"""Reads a length such as `30 epochs` or a number of steps, and returns it in what the schedule counts. Schedules get
one as `length` where they take it."""


def build_learning_rate(
    optim: OptimConfig, config: ScheduleConfig, total_steps: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """Returns the learning rate of a step: linear warm-up, then the named schedule.

    Raises:
        UserError: an unknown schedule, arguments that do not fit, or a warm-up longer than the run.
    """
    by_epoch = config.interval == "epoch"
    per_count = steps_per_epoch if by_epoch else 1  # steps of one rate
    total = math.ceil(total_steps / per_count)

    def length(value: object) -> int:
        interval = Interval.parse(value)
        if by_epoch and interval.unit == "steps" and interval.count:
            raise UserError(f"with interval: epoch the schedule counts epochs: write '{interval.count} epochs'")
        return interval.steps(1 if by_epoch else steps_per_epoch)

    try:
        warmup = length(config.warmup)
    except UserError as error:
        raise place_at("schedule.warmup", error) from None
    if warmup >= total:
        unit = "epochs" if by_epoch else "steps"
        raise UserError(f"{warmup} {unit} of warm-up in a run of {total}", path="schedule.warmup")
    target = resolve("schedule", config.name, "schedule")
    if warmup and target is one_cycle:
        raise UserError("one_cycle begins with a warm-up of its own: args.pct_start", path="schedule.warmup")
    before = warmup if config.warmup_prefix else 0  # what the schedule does not count
    given: dict[str, Any] = {
        "total_steps": total - before,
        "steps_per_epoch": 1 if by_epoch else steps_per_epoch,
        "length": length,
    }
    for key in given.keys() & config.args.keys():
        raise UserError("the schedule is told this by the run", path=f"schedule.args.{key}")
    given = {key: value for key, value in given.items() if key == "total_steps" or accepts(target, key)}
    factor = call(target, {**given, **config.args}, config.name, "schedule")
    some = range(warmup, total, max((total - warmup) // 100, 1))
    found = set()
    for count in (*some, total - 1):  # tried here, not an hour into the run
        try:
            tried = float(factor(count - before))
        except Exception as error:
            message = f"'{config.name}' raised {one_line(error)} for step {count - before}"
            raise UserError(message, path="schedule") from error
        if not (math.isfinite(tried) and tried >= 0):
            raise UserError(f"'{config.name}' gives {tried} for step {count - before}", path="schedule")
        found.add(tried)
    if len(found) == 1 and target is not constant:
        unit = "epochs" if by_epoch else "steps"
        logger.warning("schedule: '%s' leaves the rate as it is in a run of %d %s", config.name, total, unit)

    def learning_rate(step: int) -> float:
        count = step // per_count
        if count < warmup:
            return optim.lr * (config.warmup_start + (1 - config.warmup_start) * count / warmup)
        return optim.lr * float(factor(count - before))

    return learning_rate


def constant(total_steps: int) -> Factor:
    """The peak rate throughout."""
    return lambda step: 1.0


def cosine(total_steps: int, min_ratio: float = 0.0) -> Factor:
    """Half a cosine from the peak to `min_ratio` of it."""
    _share("min_ratio", min_ratio)
    return lambda step: min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def linear(total_steps: int, end_ratio: float = 0.0) -> Factor:
    """A straight line from the peak to `end_ratio` of it."""
    return polynomial(total_steps, 1.0, end_ratio)


def polynomial(total_steps: int, power: float = 1.0, end_ratio: float = 0.0) -> Factor:
    """What is left of the run, to the power of `power`, from the peak to `end_ratio` of it."""
    _share("end_ratio", end_ratio)
    _more_than_zero("power", power)
    return lambda step: end_ratio + (1 - end_ratio) * (1 - step / total_steps) ** power


def stepwise(total_steps: int, length: Length, every: int | str, gamma: float = 0.1) -> Factor:
    """Multiplies the rate by `gamma` after every interval: a number of steps, or like `30 epochs`."""
    interval = _at_least_one("every", length(every))
    _share("gamma", gamma)
    return lambda step: gamma ** (step // interval)


def multistep(total_steps: int, length: Length, milestones: Sequence[int | str], gamma: float = 0.1) -> Factor:
    """Multiplies the rate by `gamma` at each milestone: a number of steps, or like `30 epochs`."""
    if isinstance(milestones, str) or not isinstance(milestones, Sequence) or not milestones:
        raise UserError(f"milestones must be a list such as [30 epochs, 60 epochs] (got {milestones!r})")
    at = sorted(length(milestone) for milestone in milestones)
    _share("gamma", gamma)
    return lambda step: gamma ** bisect.bisect_right(at, step)


def exponential(total_steps: int, length: Length, gamma: float, every: int | str | None = None) -> Factor:
    """Multiplies the rate by `gamma` per interval, evenly: per step by default, or per epoch with `interval: epoch`."""
    interval = 1 if every is None else _at_least_one("every", length(every))
    _share("gamma", gamma)
    return lambda step: gamma ** (step / interval)


def one_cycle(
    total_steps: int,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    shape: Literal["cosine", "linear"] = "cosine",
    three_phase: bool = False,
) -> Factor:
    """Smith's one-cycle policy as torch.optim.lr_scheduler.OneCycleLR has it, without its momentum.

    Args:
        total_steps: of the cycle.
        pct_start: share of the run in which the rate rises.
        div_factor: the rate begins at the peak divided by this.
        final_div_factor: it ends at where it began, divided by this.
        shape: of each part, OneCycleLR's `anneal_strategy`.
        three_phase: falls to where it began as fast as it rose, and only then to its end.
    """
    if not 0 < pct_start < (0.5 if three_phase else 1):
        raise UserError(f"pct_start must be between 0 and {0.5 if three_phase else 1} (got {pct_start})")
    between = _shape("shape", shape, ("cosine", "linear"))
    _more_than_zero("div_factor", div_factor)
    _more_than_zero("final_div_factor", final_div_factor)
    begin, end = 1 / div_factor, 1 / div_factor / final_div_factor
    rise = pct_start * total_steps - 1
    corners = [(0.0, begin), (rise, 1.0)]
    if three_phase:
        corners.append((2 * rise, begin))
    corners.append((total_steps - 1, end))
    if rise <= 0 or total_steps - 1 <= corners[-2][0]:
        raise UserError(f"pct_start: {pct_start} leaves less than a step to a part of {total_steps}")

    def factor(step: int) -> float:
        part = next((i for i, (at, _) in enumerate(corners[1:]) if step <= at), len(corners) - 2)
        (from_step, high), (to_step, low) = corners[part], corners[part + 1]
        return low + (high - low) * between((step - from_step) / (to_step - from_step))

    return factor


def wsd(
    total_steps: int,
    length: Length,
    decay: int | str,
    shape: Literal["cosine", "linear", "1-sqrt"] = "cosine",
    end_ratio: float = 0.0,
) -> Factor:
    """The peak rate (stable), then a decay to `end_ratio` of it over the last steps of the run.

    Args:
        total_steps: of both.
        length: reads `decay`.
        decay: how long: a number of steps, or like `10 epochs`.
        shape: of the decay, `decay_type` of transformers.get_wsd_schedule.
        end_ratio: share of the peak at the end.
    """
    num_decay = _at_least_one("decay", length(decay))
    stable = total_steps - num_decay
    if stable < 0:
        raise UserError(f"decay is longer than the {total_steps} steps that warm-up leaves")
    between = _shape("shape", shape, ("cosine", "linear", "1-sqrt"))
    _share("end_ratio", end_ratio)

    def factor(step: int) -> float:
        return 1.0 if step < stable else end_ratio + (1 - end_ratio) * between((step - stable) / num_decay)

    return factor


_SHAPES: dict[str, Callable[[float], float]] = {  # from 1 to 0
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def _shape(key: str, name: str, allowed: Sequence[str]) -> Callable[[float], float]:
    if name not in allowed:
        raise UserError(f"{key} must be one of {', '.join(allowed)} (got {name!r})")
    return _SHAPES[name]


def _at_least_one(key: str, count: int) -> int:
    if count < 1:
        raise UserError(f"{key} must be at least 1")
    return count


def _share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{key} must be between 0 and 1 (got {value})")


def _more_than_zero(key: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{key} must be more than 0 (got {value})")
