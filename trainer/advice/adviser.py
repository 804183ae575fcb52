"""When advice is given: which rules there are, what has been said, and what matters most at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from trainer.advice import computing, loading, pauses, ranks
from trainer.advice.measured import Advice, Measured

Rule = Callable[[Measured], Advice | None]

RULES: tuple[Rule, ...] = (
    loading.data_wait,
    loading.copies,
    computing.host_bound,
    computing.micro_batch,
    computing.recomputation,
    ranks.communication,
    ranks.straggler,
    pauses.checkpoints,
    pauses.evaluations,
    loading.loader_memory,
)

MOST_SHOWN = 3  # whoever reads more does none of it
LEAST_STEPS = 8  # of a stretch that says something of a run
LEAST_SECONDS = 1.0


class Adviser:
    """Says each thing once in an attempt, and only when it was so twice in a row."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._seen_before: set[str] = set()

    def ask(self, measured: Measured) -> list[Advice]:
        """Returns what is new, given the figures since the last call."""
        found = advice(measured)
        new = [a for a in found if a.rule in self._seen_before and a.rule not in self._said]
        self._seen_before = {a.rule for a in found}
        self._said |= {a.rule for a in new}
        return new


def advice(measured: Measured) -> list[Advice]:
    """Returns what the rules say of a stretch of training, the most useful first."""
    if not (measured.num_steps >= LEAST_STEPS and measured.seconds >= LEAST_SECONDS):
        return []
    found = [said for rule in RULES if (said := rule(measured)) is not None]
    return list(_without_repetition(sorted(found, key=lambda a: -a.rank)))[:MOST_SHOWN]


def _without_repetition(found: Iterable[Advice]) -> Iterable[Advice]:
    """Leaves out advice about a setting that more useful advice has changed already."""
    changed: set[str] = set()
    for said in found:
        if not changed & said.settings.keys():
            yield said
        changed |= said.settings.keys()
