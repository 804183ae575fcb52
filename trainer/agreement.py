"""Questions that all ranks answer together after every step, without waiting for each other or for the device.

Owns the exchange, and what has been decided about the end of the run. What to do about it is the loop's business.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from trainer.faults.stopping import StopRequests
from trainer.world import World

logger = logging.getLogger("lockstep")


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


class Questions(NamedTuple):
    """What ranks ask each other; a rank's yes is a yes of all."""

    stop: bool = False
    save_by_clock: bool = False
    save_has_failed: bool = False
    is_alarmed: bool = False  # by numbers that are not what they must be


class Decisions:
    """What all ranks decide together while they train.

    Args:
        world: the processes that train together.
        stop_requests: of this process.
    """

    def __init__(self, world: World, stop_requests: StopRequests) -> None:
        self._world = world
        self._stop_requests = stop_requests
        self._votes = StepVotes(world.host_group, num_questions=len(Questions()))
        self._heard = Questions()
        self.stopping = ""
        """What asked for the end, once all ranks know of it."""

    def after_step(self, save_by_clock: bool, save_has_failed: bool, is_alarmed: bool) -> Questions:
        """Asks, and returns what was decided since the last call; every rank calls it after every step."""
        self._exchange(Questions(self._stop_requests.requested, save_by_clock, save_has_failed, is_alarmed))
        heard, self._heard = self._heard, Questions()
        return heard

    def stops_here(self) -> bool:
        """Tells whether to stop in the middle of a step or an evaluation; every rank calls it equally often."""
        if self.stopping:  # already before this evaluation began
            return True
        self._exchange(Questions(self._stop_requests.requested))
        return bool(self.stopping)

    def forget(self) -> None:
        """Drops what was asked and not yet answered, such as by a rank that saw bad numbers later than the others."""
        self._votes.drain()
        self._heard = Questions()

    def _exchange(self, questions: Questions) -> None:
        answers = self._votes.exchange(questions)
        # What is answered within a step or an evaluation waits for the end of the step.
        self._heard = Questions(*(old or new for old, new in zip(self._heard, answers, strict=True)))
        if self._heard.stop and not self.stopping:
            reasons = enumerate(self._world.gather(self._stop_requests.reason))
            self.stopping = " and ".join(f"{reason} on rank {rank}" for rank, reason in reasons if reason)
            logger.info("stopping   because of %s", self.stopping)
