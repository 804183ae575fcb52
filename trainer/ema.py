"""An exponential moving average of the weights (EMA), which is what is evaluated and exported.

Owns `optim.ema`. Averages are sharded as the parameters are, and never leave their device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from trainer.config import EmaConfig


class Ema:
    """The averages of a model's trainable parameters.

    Args:
        model: on its device and sharded, under its own names.
        config: the `optim.ema` section.
    """

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self._config = config
        parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        self._average_of = {p: p.detach().clone() for p in parameters.values()}  # one of tied weights
        self.averages = {name: self._average_of[p] for name, p in parameters.items()}
        """By parameter name, tied ones under all of theirs; a checkpoint keeps them, and is loaded into them."""

    def decay(self, step: int) -> float:
        """Returns the share that the average keeps in the update after `step` steps: a pure function of the step.

        Warm-up is TensorFlow's: min(decay, (1 + n) / (10 + n)) for the n-th update.
        """
        if not self._config.warmup:
            return self._config.decay
        num_updates = step // self._config.every
        return min(self._config.decay, (1 + num_updates) / (10 + num_updates))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages towards the weights, where an update is due.

        Args:
            step: optimizer steps taken so far, this one included.
        """
        if step % self._config.every == 0:
            averages, weights = self._locals()
            torch._foreach_lerp_(averages, weights, 1 - self.decay(step))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Has the model hold the averages instead of its weights, and afterwards its weights again, bit for bit.

        Buffers, such as BatchNorm's statistics, are the model's own throughout.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(*self._locals(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def _locals(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Returns this rank's averages and weights; an average is elementwise, so shares need no exchange."""
        return [_local(a) for a in self._average_of.values()], [_local(p) for p in self._average_of]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
