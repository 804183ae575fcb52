"""Numbers that go wrong: losses and gradients that are not finite, losses that jump.

Judges every step without having the host wait for the device: what a step came to is copied behind it and looked at
when it has arrived, a step or two later. Where the optimizer's step itself depends on the answer
(`faults.non_finite: skip`) it is worked out on the device, by all ranks together. Owns the judgement; what is done
about it is the loop's business.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainer.config_run import FaultsConfig
from trainer.faults.fault import Fault

_MOST_PENDING = 32  # steps that may be judged late
_MEMORY = 0.02  # share of a loss in the moving average that spikes are measured with
_IN_A_ROW = 20  # bad losses under fp16, which is more often than the loss scale can be halved to any avail
_FEWEST = 20  # losses that an average needs before anything is a spike


class BadNumbers(RuntimeError):
    """A loss or a gradient is not what it must be, and the run must not go on with it; the same on all ranks.

    Args:
        fault: which step it was, and with which samples.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


@dataclass(frozen=True)
class BadStep:
    """A step whose numbers are wrong, as one rank sees it.

    Args:
        step: completed optimizer steps before it.
        what: `loss`, `gradient` or `spike`.
        value: of this rank's mean loss, the gradients' norm, or the mean loss of all ranks.
        is_mine: the loss of this rank's own samples is not finite.
    """

    step: int
    what: str
    value: float
    is_mine: bool


class NumberGuard:
    """Judges the numbers of each step.

    Args:
        config: the `faults` section.
        num_ranks: of all processes, which judge together where that is needed.
        like: a scalar of the type and on the device of the loss sums.
        is_scaled: gradients carry fp16's loss scale, whose scaler leaves out steps that overflow, forward or backward,
            as some should: gradients are not judged, and the run goes on unless losses are bad many times in a row.
    """

    def __init__(self, config: FaultsConfig, num_ranks: int, like: torch.Tensor, is_scaled: bool = False) -> None:
        self.policy = config.non_finite
        self.wants_gradient_norm = config.non_finite != "stop" and not is_scaled
        self._is_scaled = is_scaled
        self._spike_factor = config.spike_factor
        self._num_ranks = num_ranks
        # Else each rank judges its own loss, and the ranks compare notes a step later.
        self._together = self.policy == "skip" or config.spike_factor is not None
        self._zero = torch.zeros_like(like)
        self.mean_loss = torch.zeros_like(like)
        """Moving average of the losses of all ranks; of use where `spike_factor` is set."""
        self.num_losses = torch.zeros_like(like)
        """Losses in that average."""
        self._bad_in_a_row = 0
        self._pending: deque[tuple[int, int, torch.Tensor, torch.cuda.Event]] = deque()
        self._memory: list[torch.Tensor] = []
        self.found: list[BadStep] = []
        """What is known to be wrong since `forget`."""

    def judge(
        self,
        step: int,
        loss_sum: torch.Tensor,
        num_own: int,
        num_all: int,
        gradient_norm: torch.Tensor | None,
        has_no_loss: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Judges a step. Where ranks judge together all call it.

        Args:
            step: completed optimizer steps before it.
            loss_sum: of this rank's samples.
            num_own: this rank's samples.
            num_all: samples of all ranks.
            gradient_norm: of the gradients that all ranks agree on, or None where nobody needs it.
            has_no_loss: a boolean scalar on the device: nothing in the batch counts, so that its loss is none to
                compare others with. None where all batches have one.

        Returns:
            A boolean scalar on the device, the same on all ranks: whether the step must be left out. None where the
            policy leaves none out.
        """
        norm = self._zero if gradient_norm is None or self._is_scaled else gradient_norm.detach().to(loss_sum)
        if not self._together:
            self._look_later(step, num_own, torch.stack([loss_sum, norm]))
            return None
        total = loss_sum.clone()
        if self._num_ranks > 1:
            dist.all_reduce(total)  # one sum: what is not finite on any rank is not finite in it
        loss = total / num_all
        is_bad = ~(loss.isfinite() & norm.isfinite())
        is_spike = torch.zeros_like(is_bad)
        if self._spike_factor is not None:
            is_spike = ~is_bad & (self.num_losses >= _FEWEST) & (loss > self._spike_factor * self.mean_loss)
            is_bad = is_bad | is_spike
            self._remember(loss, is_bad if has_no_loss is None else is_bad | has_no_loss)
        values = [loss_sum, norm, loss, is_spike.to(loss_sum.dtype), is_bad.to(loss_sum.dtype)]
        self._look_later(step, num_own, torch.stack(values))
        return is_bad if self.policy == "skip" else None

    def _remember(self, loss: torch.Tensor, is_none: torch.Tensor) -> None:
        # The first ones weigh more: the mean of n numbers while n is small.
        share = torch.clamp(1 / (self.num_losses + 1), min=_MEMORY)
        self.mean_loss.copy_(torch.where(is_none, self.mean_loss, self.mean_loss + share * (loss - self.mean_loss)))
        self.num_losses += (~is_none).to(self.num_losses.dtype)

    def _look_later(self, step: int, num_own: int, values: torch.Tensor) -> None:
        if values.device.type != "cuda":
            self._read(step, num_own, values)
            return
        self._look()
        if len(self._pending) == _MOST_PENDING:
            self.settle()
        if not self._memory:
            self._memory = [torch.empty(5, dtype=values.dtype, pin_memory=True) for _ in range(_MOST_PENDING + 1)]
        place = self._memory[step % len(self._memory)][: len(values)]
        place.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((step, num_own, place, event))

    def _look(self) -> None:
        """Reads what has arrived."""
        while self._pending:
            step, num_own, values, event = self._pending[0]
            if not event.query():
                return
            self._pending.popleft()
            self._read(step, num_own, values)

    def settle(self) -> None:
        """Waits until the last step is judged: for moments at which the host waits for the device anyway."""
        for _, _, _, event in self._pending:
            event.synchronize()
        self._look()

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what a checkpoint keeps; the same on all ranks."""
        return {"mean_loss": self.mean_loss, "num_losses": self.num_losses}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes over what `state` returned."""
        self.mean_loss.copy_(state["mean_loss"])
        self.num_losses.copy_(state["num_losses"])

    @property
    def is_alarmed(self) -> bool:
        """Whether this rank knows of numbers that the run must not go on with."""
        return self.policy != "skip" and bool(self.found)

    def forget(self) -> None:
        """Forgets what was found, and what is still on its way."""
        self.settle()
        self.found.clear()

    def _read(self, step: int, num_own: int, values: torch.Tensor) -> None:
        loss_sum, norm, *together = values.tolist()
        self._bad_in_a_row = 0 if math.isfinite(together[0] if together else loss_sum) else self._bad_in_a_row + 1
        if self._is_scaled and self.policy != "skip" and 0 < self._bad_in_a_row < _IN_A_ROW:
            return
        own_loss = loss_sum / num_own if num_own else 0.0
        is_mine = not math.isfinite(loss_sum)
        if together:
            loss, is_spike, is_bad = together
            if is_spike:
                self.found.append(BadStep(step, "spike", loss, False))
            elif is_bad:
                value = own_loss if is_mine else norm
                is_loss = not math.isfinite(loss)
                self.found.append(BadStep(step, "loss" if is_loss else "gradient", value, is_mine))
        elif is_mine:
            self.found.append(BadStep(step, "loss", own_loss, True))
        elif not math.isfinite(norm):
            self.found.append(BadStep(step, "gradient", norm, False))


def bad_step_report(seen: Sequence[tuple[BadStep, list[int]] | None]) -> tuple[Fault, dict[str, Any]]:
    """Returns what is wrong with a step as a fault of the first rank to blame, and as a record for the run folder.

    Args:
        seen: by rank, what it saw of the step and its samples there; None where it saw nothing.
    """
    by_rank = {rank: found for rank, found in enumerate(seen) if found is not None}
    blamed = [rank for rank, (bad, _) in by_rank.items() if bad.is_mine] or list(by_rank)
    first = by_rank[blamed[0]][0]
    if first.what == "spike":
        message = f"the loss jumped to {first.value:.4g}"
    elif first.what == "gradient":
        message = f"the norm of the gradients is {first.value:g}"
    else:
        values = " and ".join(sorted({f"{by_rank[rank][0].value:g}" for rank in blamed}))
        ranks = "" if len(blamed) == len(seen) else f" of rank {', '.join(map(str, blamed))}"
        message = f"the loss{ranks} is {values}"
    samples = [sample for rank in blamed for sample in by_rank[rank][1]]
    fault = Fault(blamed[0], "numbers", message, first.step + 1, samples=tuple(samples), restart=False)
    record = {
        "step": first.step + 1,
        "what": first.what,
        "value": str(first.value),  # JSON has no NaN
        "ranks": blamed,
        "samples": samples,
        "message": message,
    }
    return fault, record
