"""Blocks that are computed again in backward under torch.compile: buffers change once, or there is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nightly
from torch import nn

from trainer.errors import UserError
from trainer.memory.blocks import repeated_blocks
from trainer.memory.checkpointing import (
    Policy,
    Setting,
    apply_checkpointing,
    check_compiled_buffers,
    explain_checkpointing_error,
    uniform_policies,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class ConvBlock(nn.Module):
    scale: torch.Tensor

    def __init__(self, changes_a_buffer: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.changes_a_buffer = changes_a_buffer
        self.register_buffer("scale", torch.ones(4, 1, 1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.norm(self.conv(inputs)))
        if self.changes_a_buffer:
            with torch.no_grad():
                self.scale.mul_(0.9).add_(hidden.mean())
        return inputs + self.conv2(hidden) * self.scale


def compiled_step(plan: Setting, whole: bool, backend: str) -> tuple[nn.Sequential, list[torch.Tensor | None]]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(ConvBlock(), ConvBlock(), ConvBlock())
    blocks = repeated_blocks(model)
    assert list(blocks) == ["0", "1", "2"]
    if plan != "none":
        apply_checkpointing(blocks, uniform_policies(list(blocks), plan), for_compile=True)
    run: Any = torch.compile(model, backend=backend, fullgraph=True) if whole else model
    for block in [] if whole else blocks.values():
        block.compile(backend=backend, fullgraph=True)
    for step in range(2):
        images = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        run(images).square().mean().backward()
    check_compiled_buffers(blocks)
    check_compiled_buffers(blocks)
    return model, [p.grad for p in model.parameters()]


# Some of torch's compiler uses what torch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("backend", "whole"),
    [
        pytest.param("aot_eager", True, marks=nightly),
        pytest.param("aot_eager", False, marks=nightly),
        ("inductor", True),
    ],
)
def test_compiled_blocks_update_batch_norm_once(backend: str, whole: bool) -> None:
    expected, gradients = compiled_step("none", whole, "aot_eager")
    plans: tuple[Setting, ...] = ("full", "selective") if backend == "aot_eager" else ("selective",)
    for plan in plans:
        model, got = compiled_step(plan, whole, backend)
        for a, b in zip([*model.buffers(), *got], [*expected.buffers(), *gradients], strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b) if backend == "aot_eager" else torch.allclose(a, b, atol=1e-6)
        assert dict(model.named_buffers())["0.norm.num_batches_tracked"] == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_blocks_that_change_other_buffers_are_refused() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(ConvBlock(True), ConvBlock(True))
    blocks = repeated_blocks(model)
    apply_checkpointing(blocks, uniform_policies(list(blocks), "full"), for_compile=True)
    torch.compile(model, backend="aot_eager")(torch.randn(2, 4, 8, 8)).sum().backward()
    with pytest.raises(UserError, match="block 0 changes its buffer scale in forward"):
        check_compiled_buffers(blocks)


class BreakingBlock(ConvBlock):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_compiled_block_must_be_one_piece(policy: Policy) -> None:
    """In pieces it would update BatchNorm twice."""
    torch._dynamo.reset()
    block = BreakingBlock()
    apply_checkpointing({"block": block}, {"block": policy}, for_compile=True)
    with pytest.raises(torch._dynamo.exc.Unsupported) as info:
        torch.compile(block, backend="aot_eager")(torch.randn(2, 4, 8, 8))
    assert "cannot take a checkpointed block in one piece" in str(explain_checkpointing_error(info.value))
    block(torch.randn(2, 4, 8, 8)).sum().backward()  # not compiled
    assert block.norm.num_batches_tracked == 1
