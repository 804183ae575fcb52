"""How long an operation takes at least: its arithmetic or its memory traffic, by a device's data sheet.

Owns the estimate for one operation. Which operations a step makes is `trainer.memory.simulation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from trainer.memory.devices import Device

_ATEN = torch.ops.aten
# They only allocate; or read a property.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_local_scalar_dense"}


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# torch counts the kernels of GPUs alone.
_MORE: dict[Any, Callable[..., int]] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


def op_seconds(
    device: Device,
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    tensors: Iterable[torch.Tensor],
    allow_tf32: bool,
) -> float:
    """Estimates one operation that computes something (no view).

    Args:
        device: where it would run.
        function: the operator.
        args, kwargs, result: of the call.
        tensors: every tensor among arguments and results, read or written once each.
        allow_tf32: whether float32 products may round to tf32.

    Returns:
        seconds: the longest of arithmetic, traffic and launch.
    """
    packet = function._overloadpacket
    if packet.__name__ in _FREE:
        return 0.0
    traffic = 0
    dtype = None
    for tensor in tensors:
        traffic += tensor.numel() * tensor.itemsize
        if dtype is None and tensor.is_floating_point():
            dtype = tensor.dtype
    seconds = max(traffic / device.bandwidth, device.launch_overhead)
    formula = _MORE.get(packet) or flop_registry.get(packet)
    if formula is None or dtype is None:
        return seconds
    name = str(dtype).removeprefix("torch.")
    return max(seconds, formula(*args, **kwargs, out_val=result) / device.flops.of(name, allow_tf32))
