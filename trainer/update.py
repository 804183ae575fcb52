"""The update of a step: its gradients made ready, and the optimizer's step taken, or left out where numbers are bad.

Owns all that happens between the last backward of a step and the first forward of the next one. Whether numbers are bad
is judged by `trainer.faults.numbers`; what a loss is divided by is `trainer.normalising`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from trainer.buffers import BufferCopy
from trainer.config_model import OptimConfig
from trainer.faults.numbers import NumberGuard
from trainer.memory.sharding import local_part
from trainer.parallel import explained_optimizer_errors, gradient_norm
from trainer.runtime import Runtime


class Update:
    """Updates the parameters of one optimizer, step by step.

    Args:
        runtime: this process among its peers.
        optimizer: the prepared one.
        config: the `optim` section: what is clipped.
        numbers: judges losses and gradients.
        buffers: of the model; kept at the beginning of each step where steps may be left out.
    """

    def __init__(
        self,
        runtime: Runtime,
        optimizer: torch.optim.Optimizer,
        config: OptimConfig,
        numbers: NumberGuard,
        buffers: BufferCopy,
    ) -> None:
        self._runtime = runtime
        self._optimizer = optimizer
        self._max_norm, self._max_value = config.clip_norm, config.clip_value
        self._numbers = numbers
        self._buffers = buffers
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradient_norm: torch.Tensor | None = None
        """Of all gradients of the last step together, before it was clipped; None where nobody wants it."""

    def judge_and_clip(
        self,
        step: int,
        loss_sum: torch.Tensor,
        num_own: int,
        num_all: int,
        has_no_loss: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Judges the numbers of a step, and clips its gradients.

        Args:
            step: completed optimizer steps before it.
            loss_sum: of this rank's samples.
            num_own: this rank's samples.
            num_all: samples of all ranks.
            has_no_loss: a boolean scalar on the device: nothing in the batch counts. None where all count.

        Returns:
            A boolean scalar on the device, the same on all ranks: whether the step is left out. None where none is.
        """
        numbers, scaler = self._numbers, self._runtime.scaler
        is_left_out = None
        if scaler is not None:  # which skips the step itself, where it then finds that the gradients overflow
            is_left_out = numbers.judge(step, loss_sum, num_own, num_all, None, has_no_loss)
            if is_left_out is not None:
                self._overflow(is_left_out)
        self._clip()
        if scaler is None:
            is_left_out = numbers.judge(step, loss_sum, num_own, num_all, self.gradient_norm, has_no_loss)
        if is_left_out is not None:  # the forward has changed BatchNorm's statistics
            self._buffers.put_back(is_left_out)
        return is_left_out

    def step(self, unless: torch.Tensor | None = None) -> bool:
        """Takes the optimizer's step, and tells whether the loss scaler skipped it because of an overflow.

        Args:
            unless: a boolean scalar on the device, the same on all ranks: no step is taken where it is true. The host
                waits for it only where the optimizer cannot leave a step out on the device, as fused ones can.
        """
        with explained_optimizer_errors() if self._runtime.is_sharded else nullcontext():
            return self._step(unless)

    def _step(self, unless: torch.Tensor | None) -> bool:
        optimizer, scaler = self._optimizer, self._runtime.scaler
        inner = _inner(optimizer)
        if scaler is not None:
            # accelerate looks whether `step` was called, which a fused optimizer's always is: it skips on the device.
            scale, is_new = scaler.get_scale(), not inner.state
            optimizer.step()
            is_skipped = scaler.get_scale() < scale
            if is_skipped and is_new:  # fused SGD has taken memory for its momentum, and filled none of it
                inner.state.clear()
            return is_skipped
        is_whole_on_gpu = self._runtime.device.type == "cuda" and not self._runtime.is_sharded
        if unless is not None and is_whole_on_gpu and leaves_out_on_device(optimizer):
            step_unless(optimizer, unless)
        elif unless is None or not unless.item():
            inner.step(None)  # as Accelerate's calls it
        return False

    def zero_grad(self) -> None:
        """Drops the gradients."""
        inner = _inner(self._optimizer)
        is_plain = type(inner).zero_grad is torch.optim.Optimizer.zero_grad
        (inner if is_plain else self._optimizer).zero_grad()

    def _clip(self) -> None:
        """Takes the loss scale out of the gradients, and clips them: all together, or each number to a range."""
        if self._runtime.scaler is not None and (self._max_norm is not None or self._max_value is not None):
            self._runtime.accelerator.unscale_gradients(self._optimizer)
        if self._max_norm is not None or self._numbers.wants_gradient_norm:
            self.gradient_norm = gradient_norm(self._parameters)
            if self._max_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_norm, self.gradient_norm)
        if self._max_value is not None:
            torch.nn.utils.clip_grad_value_(self._parameters, self._max_value)  # where NaN stays

    def _overflow(self, where: torch.Tensor) -> None:
        """Has the loss scaler skip this step where a boolean scalar is true: it then finds an infinite gradient."""
        gradients = (local_part(p.grad) for p in self._parameters if p.grad is not None)
        first = next((gradient for gradient in gradients if gradient.numel()), None)
        if first is not None:
            first.view(-1)[:1].masked_fill_(where, torch.inf)


def leaves_out_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Tells whether an optimizer can leave a step out without the host knowing."""
    inner = _inner(optimizer)
    # At the first step SGD takes memory for its momentum that it then does not fill.
    is_filled = bool(inner.state) or not any(group.get("momentum") for group in inner.param_groups)
    return is_filled and bool(getattr(inner, "_step_supports_amp_scaling", False))


def step_unless(optimizer: torch.optim.Optimizer, unless: torch.Tensor) -> None:
    """Takes a fused optimizer's step where a boolean scalar is false, by the way in which GradScaler skips steps."""
    inner = _inner(optimizer)
    inner.grad_scale, inner.found_inf = None, unless.to(torch.float32)
    try:
        optimizer.step()
    finally:
        del inner.grad_scale, inner.found_inf


def _inner(optimizer: torch.optim.Optimizer) -> Any:
    """Returns the optimizer inside Accelerate's, whose every call looks up signatures and installed packages."""
    return getattr(optimizer, "optimizer", optimizer)
