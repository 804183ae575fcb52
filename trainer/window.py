"""What happened since the last report; sums stay on the device until then."""

from __future__ import annotations

import torch

from trainer.telemetry.clock import Clock
from trainer.world import World


class Window:
    """The steps since the last report.

    Args:
        world: for the device, and a type that is wide enough to add up.
        clock: of this attempt.
    """

    def __init__(self, world: World, clock: Clock) -> None:
        self.loss_sum = world.zero()
        self.num_samples = 0
        self.grad_norm: torch.Tensor | None = None
        self._num_left_out = torch.zeros((), dtype=torch.int64, device=world.device)
        self.restart(clock)

    def restart(self, clock: Clock) -> None:
        """Measures time from now on."""
        self.num_timed_steps = 0
        self._num_samples_before = self.num_samples  # of an earlier attempt, whose time is not ours
        self._train_seconds = clock.split()["train"]

    def add(self, loss_sum: torch.Tensor, num_samples: int, is_left_out: torch.Tensor | None) -> None:
        """Adds a step of this rank.

        Args:
            loss_sum: of its samples.
            num_samples: how many.
            is_left_out: a boolean scalar on the device: the step does not count, such as one that has no loss. None
                where all do.
        """
        self.num_samples += num_samples
        self.num_timed_steps += 1
        if is_left_out is None:
            self.loss_sum += loss_sum
        else:
            self.loss_sum += loss_sum.masked_fill(is_left_out, 0.0)
            self._num_left_out += num_samples * is_left_out

    @property
    def num_timed_samples(self) -> int:
        """Samples since `restart`."""
        return self.num_samples - self._num_samples_before

    @property
    def num_counted(self) -> torch.Tensor:
        """Samples in the sum of losses, on the device."""
        return self.num_samples - self._num_left_out

    def totals(self) -> dict[str, torch.Tensor]:
        """Returns what a checkpoint keeps, so that a report tells the same wherever the run was interrupted."""
        return {"loss_sum": self.loss_sum, "num_samples": self.num_counted}

    def load(self, loss_sum: torch.Tensor, num_samples: torch.Tensor) -> None:
        """Takes over what `totals` returned."""
        self.loss_sum.copy_(loss_sum)
        self.num_samples = int(num_samples)
        self._num_left_out.zero_()

    def train_seconds(self, clock: Clock) -> float:
        """Returns the time since `restart` that was spent in steps."""
        return clock.split()["train"] - self._train_seconds


def either(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """Returns where one of two booleans is true; None is false."""
    return (b if a is None else a) if a is None or b is None else a | b
