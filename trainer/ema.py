"""An exponential moving average of the weights (EMA), which is what is evaluated and exported.

Owns `optim.ema`. Averages are sharded as the parameters are, never leave their device, and have the bits to move a
little at a time: float32 where the parameters have fewer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from trainer.config_model import EmaConfig
from trainer.memory.sharding import local_part


class Ema:
    """The averages of a model's trainable parameters.

    Args:
        model: on its device and sharded, under its own names.
        config: the `optim.ema` section.
    """

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self._config = config
        parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        self._average_of = {  # one of tied weights
            p: p.detach().to(average_dtype(p), copy=True) for p in parameters.values()
        }
        self.averages = {name: self._average_of[p] for name, p in parameters.items()}
        """By parameter name, tied ones under all of theirs; a checkpoint keeps them, and is loaded into them."""

    def decay(self, step: int) -> float:
        """Returns the share that the average keeps in the update after `step` steps: a pure function of the step.

        For the n-th update TensorFlow's warm-up lets it be at most (1 + n) / (10 + n), and timm's 1 - n^(-2/3), of
        which the first is 0. So it is without warm-up, as in torch's AveragedModel and timm: the first update takes
        the weights as they are.
        """
        decay, warmup = self._config.decay, self._config.warmup
        num_updates = step // self._config.every
        if warmup is True:
            return min(decay, (1 + num_updates) / (10 + num_updates))
        if warmup == "timm":
            return min(decay, 1 - num_updates ** (-2 / 3))
        return decay if num_updates > 1 else 0.0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages towards the weights, where an update is due.

        Args:
            step: optimizer steps taken so far, this one included.
        """
        if step % self._config.every != 0:
            return
        share = 1 - self.decay(step)
        alike: list[tuple[torch.Tensor, torch.Tensor]] = []
        for average, weight in zip(*self._locals(), strict=True):
            if average.dtype == weight.dtype:
                alike.append((average, weight))
            else:  # one by one: together they would take as much memory as the averages
                average.lerp_(weight.to(average.dtype), share)
        if alike:
            torch._foreach_lerp_([a for a, _ in alike], [w for _, w in alike], share)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Has the model hold the averages instead of its weights, and afterwards its weights again, bit for bit.

        Buffers, such as BatchNorm's statistics, are the model's own throughout.
        """
        averages, weights = self._locals()
        # Tensors of one type change places, which takes no memory. An average with more bits stays where it is.
        places = [a if a.dtype == w.dtype else torch.empty_like(w) for a, w in zip(averages, weights, strict=True)]
        _put(averages, weights, places)
        try:
            yield
        finally:
            _put(places, weights, places)

    def _locals(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Returns this rank's averages and weights; an average is elementwise, so shares need no exchange."""
        return [local_part(a) for a in self._average_of.values()], [local_part(p) for p in self._average_of]


def average_dtype(parameter: torch.Tensor) -> torch.dtype:
    """Returns the type of a parameter's average: small steps towards it would be lost in bfloat16."""
    return torch.promote_types(parameter.dtype, torch.float32)


@torch.no_grad()
def _put(values: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], places: Sequence[torch.Tensor]) -> None:
    """Gives weights these values, and places what the weights were: one tensor at a time, as places may be values."""
    for value, weight, place in zip(values, weights, places, strict=True):
        before = weight.clone()
        weight.copy_(value)
        place.copy_(before)
