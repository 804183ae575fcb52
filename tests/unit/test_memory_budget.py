"""The solver against every possible choice."""

from __future__ import annotations

import itertools
import random
from typing import get_args

import pytest

from trainer.memory.budget import BlockCost, cheapest_policies, held_at_most
from trainer.memory.checkpointing import Policy


def seconds(blocks: list[BlockCost], policies: tuple[Policy, ...]) -> float:
    return sum(block.extra_seconds[policy] for block, policy in zip(blocks, policies, strict=True))


def random_blocks(seed: int, count: int) -> list[BlockCost]:
    draw = random.Random(seed)
    blocks = []
    again = draw.uniform(1.0, 1.3)
    for _ in range(count):
        none, time = draw.uniform(50, 200), draw.uniform(1, 5)
        kept: dict[Policy, float] = {"none": none, "selective": none * 0.6, "full": none * draw.uniform(0.1, 0.4)}
        backward: dict[Policy, float] = {"none": none * 1.05, "selective": none * again, "full": none * again}
        blocks.append(BlockCost(kept, backward, {"none": 0.0, "selective": time * 0.2, "full": time}))
    return blocks


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.45, 0.6, 0.9])
def test_it_finds_the_best_of_all_choices(seed: int, share: float) -> None:
    blocks = random_blocks(seed, 7)
    everything = itertools.product(get_args(Policy), repeat=len(blocks))
    budget = share * held_at_most(blocks, ["none"] * len(blocks))
    fitting = [choice for choice in everything if held_at_most(blocks, choice) <= budget]
    chosen = cheapest_policies(blocks, budget)
    if not fitting:
        assert chosen is None
        return
    assert chosen is not None
    assert held_at_most(blocks, chosen) <= budget * (1 + 1e-6)
    assert seconds(blocks, tuple(chosen)) <= min(seconds(blocks, choice) for choice in fitting) * 1.001 + 1e-6


def test_nothing_is_recomputed_where_all_fits() -> None:
    blocks = random_blocks(0, 5)
    assert cheapest_policies(blocks, 1e9) == ["none"] * 5


def test_the_last_block_is_kept_where_recomputing_it_would_free_nothing() -> None:
    """It would be made again at once, at the very peak."""
    block = BlockCost({"none": 100, "full": 10}, {"none": 100, "full": 100}, {"none": 0, "full": 1})
    assert cheapest_policies([block] * 4, 130) == ["full", "full", "full", "none"]


def test_what_is_held() -> None:
    block = BlockCost({"none": 100, "full": 10}, {"none": 100, "full": 100}, {"none": 0, "full": 1})
    assert held_at_most([block] * 3, ["none"] * 3) == 300
    assert held_at_most([block] * 3, ["full"] * 3) == 120
    assert held_at_most([block] * 3, ["full", "none", "none"]) == 210
    assert held_at_most([block] * 3, ["full"] * 3, head_bytes=95) == 125
    assert held_at_most([], []) == 0


def test_what_follows_the_blocks_must_fit_too() -> None:
    block = BlockCost({"none": 100, "full": 10}, {"none": 100, "full": 100}, {"none": 0, "full": 1})
    assert cheapest_policies([block] * 4, 130, head_bytes=80) == ["full"] * 4


def test_no_choice_fits() -> None:
    assert cheapest_policies(random_blocks(0, 3), 10) is None


def test_no_blocks() -> None:
    assert cheapest_policies([], 10) == []


def test_a_large_model_is_solved_at_once() -> None:
    blocks = random_blocks(1, 120)
    chosen = cheapest_policies(blocks, 0.5 * held_at_most(blocks, ["none"] * 120))
    assert chosen is not None
    assert held_at_most(blocks, chosen) <= 0.5 * held_at_most(blocks, ["none"] * 120) * (1 + 1e-6)
