"""Questions that all ranks answer together after every step, without waiting for each other or for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


class StepVotes:
    """Turns what any rank says into what all ranks do, at the same step.

    Args:
        group: a gloo group of all ranks, or None for a single process.
        num_questions: yes-or-no questions that are put after every step.
    """

    def __init__(self, group: dist.ProcessGroup | None, num_questions: int) -> None:
        self._group = group
        self._num_questions = num_questions
        self._in_flight: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, says_yes: Sequence[bool]) -> list[bool]:
        """Returns for each question whether any rank said yes: the same on every rank, called by all after every step.

        With several processes the questions put after this step are answered after the next: the exchange runs beside
        the step and nobody waits for it.
        """
        assert len(says_yes) == self._num_questions
        if self._group is None:
            return list(says_yes)
        previous = self._in_flight
        flags = torch.tensor(says_yes, dtype=torch.int32)
        work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._in_flight = work, flags
        return self._answers(previous)

    def drain(self) -> None:
        """Finishes the last exchange, which every rank has begun."""
        self._answers(self._in_flight)
        self._in_flight = None

    def _answers(self, in_flight: tuple[dist.Work, torch.Tensor] | None) -> list[bool]:
        if in_flight is None:
            return [False] * self._num_questions
        work, flags = in_flight
        work.wait()
        return [bool(flag) for flag in flags.tolist()]
