"""A forward and backward on the device itself, before the first step: what was planned, confirmed or corrected.

Leaves no trace: no gradient, the same buffers, the same generator states. Choosing what to try is
`trainer.memory.fitting`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from trainer.data.nested import map_tensors
from trainer.memory.out_of_memory import is_out_of_memory
from trainer.memory.planner import Job
from trainer.memory.trace import CPU_GRANULARITY, MemoryTrace
from trainer.random_state import generator_states, restore_generators
from trainer.telemetry.memory import peak_memory_bytes
from trainer.world import World


def largest_that_fits(
    world: World, sizes: Sequence[int], limit_bytes: int | None, peak_of: Callable[[int], int | None]
) -> tuple[int, int] | None:
    """Tries micro-batches, the largest first, until one fits on every rank; all ranks call it together.

    Args:
        world: for agreeing.
        sizes: to try, ascending.
        limit_bytes: that a step may take; None: what the device has.
        peak_of: measures one; None where the device ran out of memory.

    Returns:
        The size and the most that it took on any rank, or None where none fits.
    """
    for size in reversed(sizes):
        peaks = world.gather(peak_of(size))
        measured = [peak for peak in peaks if peak is not None]
        if len(measured) == len(peaks) and (limit_bytes is None or max(measured) <= limit_bytes):
            return size, max(measured)
    return None


def measure(
    world: World,
    model: nn.Module,
    loss: Callable[[nn.Module, Any], torch.Tensor],
    job: Job,
    example: Any,
    micro_batch_size: int,
    reserved_bytes: int,
) -> int | None:
    """Runs one micro-batch and returns the most memory that was allocated, with what is not there yet.

    Args:
        world: for the device and its generators.
        model: on the device, as it will train but for DDP, whose exchange of gradients must not begin here.
        loss: of (model, batch), the summed loss.
        job: what a step is.
        example: a batch on the device, repeated to the size of the micro-batch.
        micro_batch_size: samples to try.
        reserved_bytes: of optimizer state and waiting batches, which do not exist yet.

    Returns:
        Bytes, or None where the device ran out of memory.
    """
    states = generator_states(world.device)
    buffers = [buffer.detach().clone() for buffer in model.buffers()]
    try:
        # On a GPU DDP's buckets count as they are; on the host only what this trial makes is counted.
        has_buckets = world.device.type == "cuda" and world.num_ranks > 1
        keeps = job.keeps_gradients_beside_buckets if has_buckets else job.keeps_gradients
        if keeps(micro_batch_size):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        batch = map_tensors(lambda t: t[torch.arange(micro_batch_size, device=t.device) % len(t)], example)
        if world.device.type == "cuda":
            return _on_cuda(world.device, model, loss, batch, reserved_bytes)
        return _on_host(model, loss, batch) + reserved_bytes
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        restore_generators(states, world.device)
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def _on_cuda(
    device: torch.device, model: nn.Module, loss: Callable[[nn.Module, Any], torch.Tensor], batch: Any, reserved: int
) -> int:
    ballast = torch.empty(reserved, dtype=torch.uint8, device=device)  # so that the allocator meets the real limit
    torch.cuda.reset_peak_memory_stats(device)
    with torch.compiler.set_stance("force_eager"):  # or every size that is tried would be compiled
        loss(model, batch).backward()
    del ballast
    return peak_memory_bytes(device)


def _on_host(model: nn.Module, loss: Callable[[nn.Module, Any], torch.Tensor], batch: Any) -> int:
    trace = MemoryTrace(CPU_GRANULARITY)
    trace.register(dict(model.named_parameters()), "parameters")
    trace.register(dict(model.named_buffers()), "buffers")
    inputs: list[torch.Tensor] = []
    map_tensors(inputs.append, batch)
    trace.register(inputs, "inputs")
    trace.register([p.grad for p in model.parameters() if p.grad is not None], "gradients")
    try:
        with trace, torch.compiler.set_stance("force_eager"):  # compiled code does not tell what it allocates
            loss(model, batch).backward()
        return trace.peak_bytes
    finally:
        trace.close()
