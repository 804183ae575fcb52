"""Which blocks to recompute so that activations fit a budget, for the least extra time.

A mixed-integer program over a policy per block, solved by SciPy's HiGHS. What a policy keeps and costs comes from
`trainer.memory.planner`; applying policies is `trainer.memory.checkpointing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from trainer.memory.checkpointing import Policy


@dataclass(frozen=True)
class BlockCost:
    """What one block costs under each policy that may be chosen for it.

    Args:
        kept_bytes: policy -> bytes that stay after its forward until its backward.
        backward_bytes: policy -> the most that its backward holds: what it kept, what it computes again, gradients.
        extra_seconds: policy -> time that backward spends on recomputing.
    """

    kept_bytes: Mapping[Policy, float]
    backward_bytes: Mapping[Policy, float]
    extra_seconds: Mapping[Policy, float]


def held_at_most(blocks: Sequence[BlockCost], policies: Sequence[Policy], head_bytes: float = 0.0) -> float:
    """Returns the most bytes of activations that are held at once, with a policy per block, in forward order."""
    peak = before = 0.0
    for block, policy in zip(blocks, policies, strict=True):
        peak = max(peak, before + block.backward_bytes[policy])
        before += block.kept_bytes[policy]
    return max(peak, before + head_bytes)


def least_policies(blocks: Sequence[BlockCost]) -> list[Policy]:
    """Returns the policy of each block that keeps least."""
    return [min(block.kept_bytes, key=lambda policy: block.kept_bytes[policy]) for block in blocks]


def cheapest_policies(blocks: Sequence[BlockCost], budget_bytes: float, head_bytes: float = 0.0) -> list[Policy] | None:
    """Chooses a policy per block, in forward order, that keeps activations within the budget in the least time.

    Backward begins at the last block. When it reaches a block, later ones have given their memory back, earlier ones
    still hold what they kept, and what the block itself did not keep is made again: each of these moments must fit.

    Args:
        blocks: the costs, in the order of forward.
        budget_bytes: for the blocks' activations and working memory, at every moment.
        head_bytes: that what follows the blocks takes, while all of them hold what they kept.

    Returns:
        The policies, or None where no choice fits.
    """
    choices = [(i, policy) for i, block in enumerate(blocks) for policy in block.kept_bytes]
    if not choices:
        return []
    # Bytes in units of the budget, and seconds of the most expensive choice: solvers compare with absolute tolerances.
    unit = max(budget_bytes, 1.0)
    seconds = np.array([blocks[i].extra_seconds[policy] for i, policy in choices])
    one_each = np.zeros((len(blocks), len(choices)))
    # A row per moment: backward is in that block, and last, in what follows the blocks.
    held = np.zeros((len(blocks) + 1, len(choices)))
    most = np.ones(len(blocks) + 1)
    most[-1] -= head_bytes / unit
    for column, (i, policy) in enumerate(choices):
        kept = blocks[i].kept_bytes
        one_each[i, column] = 1
        held[i, column] = blocks[i].backward_bytes[policy] / unit
        held[i + 1 :, column] = kept[policy] / unit
    # Among choices that cost the same time, the one that keeps least.
    cost = seconds / max(float(seconds.max()), 1e-12)
    cost += 1e-6 * np.array([blocks[i].kept_bytes[policy] for i, policy in choices]) / unit
    solution = milp(
        cost,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(held, -np.inf, most)],
        options={"mip_rel_gap": 1e-4, "time_limit": 5.0},
    )
    if solution.x is None:
        return None
    chosen: dict[int, Policy] = {i: policy for (i, policy), x in zip(choices, solution.x, strict=True) if x > 0.5}
    return [chosen[i] for i in range(len(blocks))]
