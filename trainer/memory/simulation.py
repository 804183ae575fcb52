"""One training step on fake tensors: what it takes in memory and time, without the device or the numbers.

Owns the steps of the step, and the state that it begins with. What is counted, and how, is `trainer.memory.trace`; fake
tensors are `trainer.memory.fakes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn

from trainer.data.nested import map_tensors
from trainer.memory.devices import Device
from trainer.memory.fakes import fake_batch, fake_copy, fake_step
from trainer.memory.trace import CPU_GRANULARITY, CUDA_GRANULARITY, BlockTrace, LargeTensor, MemoryTrace, Point

PERSISTENT = ("parameters", "buffers", "gradients", "optimizer")  # categories


@dataclass(frozen=True)
class StepMemory:
    """What one training step takes.

    Args:
        peak_bytes: the most that is alive at once.
        peak_by_phase: the same within `forward`, `backward`, `clip` and `optimizer`.
        at_peak: bytes by category at the moment of the peak.
        persistent: bytes by category that stay after the step: parameters, buffers, gradients, optimizer.
        timeline: at most some 2000 points, the peak among them.
        seconds: by phase, where a device was given.
        blocks: by watched name.
        head_peak_bytes: the most that is live between the last block's forward and its backward.
        largest: the largest tensors at the peak.
    """

    peak_bytes: int
    peak_by_phase: Mapping[str, int]
    at_peak: Mapping[str, int]
    persistent: Mapping[str, int]
    timeline: tuple[Point, ...]
    seconds: Mapping[str, float]
    blocks: Mapping[str, BlockTrace]
    head_peak_bytes: int
    largest: tuple[LargeTensor, ...] = field(repr=False)


def simulate_step(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], torch.Tensor],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    batch: Any,
    *,
    device_type: str = "cuda",
    device: Device | None = None,
    allow_tf32: bool = False,
    autocast_dtype: torch.dtype | None = None,
    is_accumulating: bool = False,
    clip_norm: bool = False,
    prepare: Callable[[nn.Module], None] | None = None,
    watch: Mapping[str, str] | None = None,
    granularity: int | None = None,
) -> StepMemory:
    """Simulates a step in the midst of training, so with the optimizer's state there from the start.

    Args:
        model: real or fake; it is neither changed nor are its numbers copied.
        loss: of (model, batch), a scalar; called with fakes of both.
        make_optimizer: with explicit `foreach` or `fused`, as fake tensors hide the device from torch's own choice.
        batch: real or fake tensors in any nesting, the first dimension the micro-batch.
        device_type: whose kernels and rounding are simulated. The fake tensors say that they are on the CPU.
        device: what the seconds are estimated for; None: no seconds.
        allow_tf32: whether float32 products are as fast as tf32.
        autocast_dtype: the model's forward runs under autocast to it and returns float32, as Accelerate has it.
        is_accumulating: the gradients of earlier micro-batches are there when this one begins.
        clip_norm: whether gradients are clipped before the optimizer's step.
        prepare: called with the fake model, to apply gradient checkpointing.
        watch: module names by the name in `StepMemory.blocks`.
        granularity: bytes that storages are rounded up to; None: the device type's.

    Raises:
        CannotSimulate: the step needs the numbers of a tensor.
    """
    if granularity is None:
        granularity = CPU_GRANULARITY if device_type == "cpu" else CUDA_GRANULARITY
    trace = MemoryTrace(granularity, device, allow_tf32)
    with fake_step(device_type), torch.enable_grad():
        fake = fake_copy(model)
        if prepare is not None:
            prepare(fake)
        examples = fake_batch(batch)
        optimizer = make_optimizer(fake)
        _make_state(fake, optimizer, is_accumulating)
        _register(trace, fake, optimizer, examples)
        trace.watch_gradients(fake)
        trace.watch_blocks({name: fake.get_submodule(path) for name, path in (watch or {}).items()})
        if autocast_dtype is not None:
            _autocast(fake, autocast_dtype)
        try:
            with trace:
                _step(trace, fake, loss, optimizer, examples, clip_norm)
            trace.register(_state_tensors(optimizer), "optimizer")
            return _summary(trace)
        finally:
            trace.close()


def _autocast(model: nn.Module, dtype: torch.dtype) -> None:
    forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype)(model.forward))
    model.forward = forward


def _make_state(model: nn.Module, optimizer: torch.optim.Optimizer, keep_gradients: bool) -> None:
    """Takes a step ahead of the one that counts; afterwards there are gradients or there are none."""
    params = [param for param in model.parameters() if param.requires_grad]
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer.step()
    if not keep_gradients:
        for param in params:
            param.grad = None


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(found.append, [*optimizer.state.values()])
    return found


def _register(trace: MemoryTrace, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    trace.register(dict(model.named_parameters()), "parameters")
    trace.register(dict(model.named_buffers()), "buffers")
    grads = {f"{name}.grad": param.grad for name, param in model.named_parameters() if param.grad is not None}
    trace.register(grads, "gradients")
    trace.register(_state_tensors(optimizer), "optimizer")
    inputs: list[torch.Tensor] = []
    map_tensors(inputs.append, batch)
    trace.register(inputs, "inputs")


def _step(
    trace: MemoryTrace,
    model: nn.Module,
    loss: Callable[[nn.Module, Any], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    batch: Any,
    clip_norm: bool,
) -> None:
    with trace.phase("forward"):
        value = loss(model, batch)
    with trace.phase("backward"):
        value.backward()
    if clip_norm:
        with trace.phase("clip"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    with trace.phase("optimizer"):
        optimizer.step()


def _summary(trace: MemoryTrace) -> StepMemory:
    live = trace.live_by_category()
    return StepMemory(
        peak_bytes=trace.peak_bytes,
        peak_by_phase={name: peak for name, peak in trace.peak_by_phase.items() if name != "setup"},
        at_peak=trace.at_peak(),
        persistent={name: live[name] for name in PERSISTENT},
        timeline=trace.timeline(),
        seconds={name: seconds for name, seconds in trace.seconds_by_phase.items() if name != "setup"},
        blocks=trace.blocks,
        head_peak_bytes=trace.head_peak_bytes,
        largest=trace.largest_at_peak(),
    )
