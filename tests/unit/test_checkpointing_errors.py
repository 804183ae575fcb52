"""Blocks that cannot be computed again as they were: the error says what to do, and others are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpointed_models import build
from torch import nn
from torch.nn import functional as F

from trainer.errors import UserError
from trainer.memory.blocks import repeated_blocks
from trainer.memory.checkpointing import Policy, apply_checkpointing, explain_checkpointing_error, uniform_policies


def test_policies_that_do_not_fit() -> None:
    blocks = repeated_blocks(build("users"))
    with pytest.raises(ValueError, match="no such block: 'other'"):
        apply_checkpointing(blocks, {"other": "full"})
    with pytest.raises(ValueError, match="no such policy: 'some'"):
        apply_checkpointing(blocks, dict.fromkeys(blocks, "some"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no such setting: 'half'"):
        uniform_policies(list(blocks), "half")  # type: ignore[arg-type]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.relu_(self.conv(inputs)).exp()


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(inputs[: 5 - self.calls].exp()).exp().sum(0) + inputs.sum(0)


def error_of(block: nn.Module, policy: Policy, after: Callable[[torch.Tensor], Any] = lambda x: None) -> UserError:
    apply_checkpointing({"block": block}, {"block": policy})
    inputs = torch.ones(4, 4, requires_grad=True) * 1
    loss = block(inputs).sum()
    after(inputs)
    with pytest.raises(RuntimeError) as info:
        loss.backward()
    explained = explain_checkpointing_error(info.value)
    assert explained is not None
    assert [p.path for p in explained.problems] == ["memory.checkpointing"]
    return explained


def test_a_product_changed_in_place() -> None:
    assert "F.relu_(x) or x += y), which 'selective' keeps for backward; use 'full'" in str(
        error_of(InPlace(), "selective")
    )
    block = InPlace()
    apply_checkpointing({"block": block}, {"block": "full"})
    block(torch.ones(4, 4)).sum().backward()


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_forward_that_is_not_repeatable(policy: Policy) -> None:
    text = str(error_of(Forgetful(), policy))
    assert "a block's forward did something else when it was computed again" in text
    assert "\n" not in text


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_an_input_changed_in_place(policy: Policy) -> None:
    explained = error_of(nn.Sequential(nn.Identity(), nn.Linear(4, 4)), policy, after=lambda x: x.add_(1))
    assert "the input of a block is changed in place" in str(explained)


def test_a_second_backward_of_selective() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    apply_checkpointing({"block": block}, {"block": "selective"})
    loss = block(torch.ones(4, 4)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError) as info:
        loss.backward()
    assert "differentiated twice, which 'selective' cannot; use 'full'" in str(explain_checkpointing_error(info.value))


def test_other_errors_are_left_alone() -> None:
    assert explain_checkpointing_error(RuntimeError("CUDA out of memory")) is None
    value = torch.ones(2, requires_grad=True) * 1
    loss = value.exp().mul_(2).exp().sum() + value.square().sum()
    value.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as info:
        loss.backward()
    assert explain_checkpointing_error(info.value) is None
