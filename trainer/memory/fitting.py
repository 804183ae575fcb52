"""What a run asks the planner before its first step: a micro-batch and a checkpointing that fit this device.

Owns `train.micro_batch_size: auto`, `memory.checkpointing: auto`, `memory.budget` and `memory.target`. The answer is
tried on the device by `trainer.memory.probe`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trainer.config import Config
from trainer.data.nested import map_tensors
from trainer.errors import UserError
from trainer.memory.budget import cheapest_policies, held_at_most, least_policies
from trainer.memory.checkpointing import Policy
from trainer.memory.planner import Planner, Prediction
from trainer.memory.probe import largest_that_fits, measure
from trainer.runtime import Runtime
from trainer.units import format_bytes

logger = logging.getLogger("lockstep")


class Fitting:
    """Fits one run into its devices: a plan, then a trial. All ranks call its methods together.

    Args:
        config: the whole run; it leaves something open.
        runtime: for the device, and for agreeing.
        make_planner: the planner of the run's step on this device.

    Raises:
        UserError: the step cannot be planned; on all ranks alike.
    """

    def __init__(self, config: Config, runtime: Runtime, make_planner: Callable[[], Planner]) -> None:
        self.config = config
        self.runtime = runtime
        self.limit_bytes = config.memory.target.of(min(runtime.gather(runtime.device_memory)))
        self.planner = runtime.agree(make_planner)

    def choose(self, micro_batch_size: int) -> Prediction:
        """Chooses the micro-batch and what is recomputed.

        Args:
            micro_batch_size: the one to take, or with `auto` the most to take.

        Raises:
            UserError: nothing fits.
        """
        runtime = self.runtime
        # Rank 0 chooses for all: other GPUs may be of another kind.
        found = runtime.agree(
            lambda: choose(self.config, self.planner, micro_batch_size, self.limit_bytes) if runtime.is_main else None
        )
        shared = runtime.from_main(lambda: found)
        assert shared is not None
        logger.info("memory     %s of %s", shared.describe(), format_bytes(self.limit_bytes))
        return shared

    def confirm(self, model: nn.Module, loss: Callable[[nn.Module, Any], torch.Tensor], planned: Prediction) -> int:
        """Tries the choice on the device, and returns the micro-batch that really fits: this, or a smaller one.

        Args:
            model: as it will train, but for DDP.
            loss: of (model, batch), the summed loss.
            planned: what was chosen.

        Raises:
            UserError: none fits.
        """
        job = self.planner.job
        sizes, limit = [planned.micro_batch_size], None  # a micro-batch that is asked for may exceed the target
        if self.config.train.micro_batch_size == "auto":
            limit = self.limit_bytes
            sizes = [size for size in job.micro_batch_sizes if size <= planned.micro_batch_size]
        example = map_tensors(lambda tensor: tensor.to(self.runtime.device), job.example)
        fitting = largest_that_fits(
            self.runtime,
            sizes,
            limit,
            lambda size: measure(self.runtime, model, loss, job, example, size, planned.missing_bytes(job, size)),
        )
        if fitting is None:
            message = f"a micro-batch of {sizes[0]} takes more than {format_bytes(self.limit_bytes)} on the device"
            raise UserError(message, path="memory.target", agreed=True)
        size, peak = fitting
        logger.info("memory     tried: micro-batch %d takes %s", size, format_bytes(peak))
        if peak > self.limit_bytes:
            logger.warning("memory     that is more than memory.target, %s", format_bytes(self.limit_bytes))
        return size


def choose(config: Config, planner: Planner, micro_batch_size: int, limit: int) -> Prediction:
    """Chooses what the config leaves open.

    Args:
        config: the whole run.
        planner: of its step on this device.
        micro_batch_size: the one to take, or with `auto` the most to take.
        limit: bytes that a step may take, from `memory.target`.

    Raises:
        UserError: nothing fits.
    """
    memory = config.memory
    is_auto = config.train.micro_batch_size == "auto"
    given = None if is_auto else micro_batch_size
    sizes = [size for size in planner.job.micro_batch_sizes if size <= micro_batch_size]
    planner = planner.restricted_to(sizes)
    found: Prediction | None
    if memory.checkpointing != "auto":
        found = planner.largest_micro_batch(memory.checkpointing, limit)
    elif memory.budget is not None:
        found = _largest_within_budget(config, planner, sizes if is_auto else [micro_batch_size], limit)
    else:
        found = planner.fastest(limit, given)
    if found is None:
        raise _nothing_fits(config, planner, sizes[0] if is_auto else micro_batch_size, limit)
    return found


def _largest_within_budget(config: Config, planner: Planner, sizes: Sequence[int], limit: int) -> Prediction | None:
    for size in reversed(sizes):
        try:
            found = planner.predict(size, "auto", _within_budget(config, planner, size))
        except UserError:
            if size == sizes[0]:
                raise
            continue  # a budget in bytes may do for a smaller micro-batch
        if found.peak_bytes <= limit or len(sizes) == 1:
            return found
    return None


def _within_budget(config: Config, planner: Planner, micro_batch_size: int) -> Mapping[str, Policy]:
    """Returns policies that keep what the blocks keep for backward within `memory.budget`."""
    assert config.memory.budget is not None
    if not planner.blocks:
        return {}
    costs, head = planner.block_costs(micro_batch_size)
    everything = held_at_most(costs, ["none"] * len(costs), head)
    policies = cheapest_policies(costs, config.memory.budget.of(int(everything)), head)
    if policies is not None:
        return dict(zip(planner.blocks, policies, strict=True))
    least = held_at_most(costs, least_policies(costs), head)
    message = f"with every block recomputed activations still take {format_bytes(least)}"
    message += f" of {format_bytes(everything)} ({100 * least / everything:.0f}%), the budget is {config.memory.budget}"
    raise UserError(message, path="memory.budget")


def _nothing_fits(config: Config, planner: Planner, micro_batch_size: int, limit_bytes: int) -> UserError:
    checkpointing = "full" if config.memory.checkpointing == "auto" and planner.blocks else config.memory.checkpointing
    least = planner.uniform(micro_batch_size, "none" if checkpointing == "auto" else checkpointing)
    message = (
        f"{format_bytes(limit_bytes)} ({config.memory.target} of the device) are too little: a micro-batch of "
        f"{micro_batch_size} takes {format_bytes(least.peak_bytes)}"
    )
    if config.train.micro_batch_size != "auto":
        return UserError(f"{message}; set train.micro_batch_size: auto", path="memory.target")
    hint = "; set memory.checkpointing: auto" if config.memory.checkpointing == "none" and planner.blocks else ""
    return UserError(message + hint, path="memory.target")
