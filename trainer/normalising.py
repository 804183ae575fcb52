"""What the summed loss of a global batch is divided by: its samples, or what a task counts (`Task.loss_count`).

Owns the divisor, and that gradients are exactly those of the global mean however the batch is split over ranks and
micro-batches. The host waits for nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from trainer.data.sampler import BatchPlan
from trainer.errors import UserError
from trainer.memory.sharding import local_part
from trainer.world import World


class Normaliser:
    """Divides the loss of one step; all ranks make one per step.

    The number of samples is known beforehand. What a task counts is known only after the last forward, when all
    backwards but one are done. So a step begins with a guess, which all ranks share: what their first micro-batches
    count, times the number of these, or the number of samples where these count nothing; it keeps gradients in the
    range that fp16 and compressed exchanges need. `settle` then makes up for the difference. With one micro-batch per
    rank the guess is the answer.

    Args:
        world: the processes that train together.
        plan: the batch arithmetic.
        step: which step it is.
        around: what an exchange with other ranks runs inside of.
    """

    def __init__(
        self,
        world: World,
        plan: BatchPlan,
        step: int,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._world = world
        self._num_samples = plan.step_samples(step)
        self._num_turns = plan.num_turns(step, 0)  # the most of any rank
        self._around = around
        self._num_seen = 0
        self._own: torch.Tensor | None = None  # what this rank has counted
        self._guess: torch.Tensor | None = None  # of what all ranks will have counted

    def scale(self, count: torch.Tensor | None) -> float | torch.Tensor:
        """Returns what the summed loss of the next micro-batch is multiplied with before backward.

        Args:
            count: what the task counted in it, a scalar on the device; None where it divides by samples.

        Raises:
            UserError: the count is none, or only some micro-batches have one.
        """
        self._num_seen += 1
        num_ranks = self._world.num_ranks  # over which DDP and FSDP average gradients
        if count is None and self._own is None:
            return num_ranks / self._num_samples
        if not isinstance(count, torch.Tensor) or count.ndim or (self._own is None and self._num_seen > 1):
            message = "loss_count must return a scalar tensor for every batch, or None for every batch"
            raise UserError(message, path="task.name")
        count = self._world.exact(count).to(self._world.device)
        if self._own is None:
            self._own, self._guess = count.clone(), self._total(count) * self._num_turns
            if self._num_turns > 1:
                self._guess = torch.where(self._guess > 0, self._guess, self._num_samples)
        else:
            self._own += count
        assert self._guess is not None
        return (num_ranks * _inverse(self._guess)).float()

    def settle(self, optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
        """Makes the gradients exact, after the last backward of the step; called before anything looks at them.

        Returns:
            What this rank's sum of losses is multiplied with to be one that is divided by samples, as everything that
            reports and judges losses does; None where it is one.
        """
        if self._own is None:
            return None
        assert self._guess is not None
        total = self._guess
        if self._num_turns > 1:
            total = self._total(self._own)
            _multiply(optimizer, self._guess * _inverse(total))
        return self._num_samples * _inverse(total)

    def _total(self, count: torch.Tensor) -> torch.Tensor:
        total = count.clone()
        if self._world.num_ranks > 1:
            with self._around():
                dist.all_reduce(total)
        return total


def _inverse(count: torch.Tensor) -> torch.Tensor:
    return torch.where(count > 0, 1 / count, 0.0)


@torch.no_grad()
def _multiply(optimizer: torch.optim.Optimizer, factor: torch.Tensor) -> None:
    """Multiplies all gradients, whole or in shares, with a scalar."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                gradient = local_part(parameter.grad)
                by_device.setdefault(gradient.device, []).append(gradient)
    for device, gradients in by_device.items():
        torch._foreach_mul_(gradients, factor.float().to(device))
