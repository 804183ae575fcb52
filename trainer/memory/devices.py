"""Devices: memory, peak speeds and bandwidth, from a table, from an amount of memory, or of the device at hand.

Owns the figures that estimates are made from. It neither measures nor allocates, and imports torch only where a
device at hand is asked for.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainer.errors import UserError, nearest
from trainer.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["DEVICES", "Device", "Flops", "find_device", "parse_bytes", "this_device"]

_GIB = 2**30
_TERA = 10**12


@dataclass(frozen=True)
class Flops:
    """Peak dense FLOP/s by type; None where the device has no units for it."""

    float32: float
    tf32: float | None
    bfloat16: float | None
    float16: float | None
    fp8: float | None = None

    def of(self, dtype: str, allow_tf32: bool = False) -> float:
        """Returns the peak FLOP/s of matrix products in a type such as `bfloat16`; others count as float32."""
        if dtype == "float32" and allow_tf32:
            return self.tf32 or self.float32
        if dtype.startswith("float8"):
            return self.fp8 or self.bfloat16 or self.float32
        return {"bfloat16": self.bfloat16, "float16": self.float16}.get(dtype) or self.float32


@dataclass(frozen=True)
class Device:
    """What a step's memory must fit into, and what its time is estimated from.

    Args:
        name: as shown.
        memory_bytes: all that torch can have of it, before the CUDA context's own.
        flops: peak speeds.
        bandwidth: of its memory, bytes per second.
        launch_overhead: seconds that the shortest kernel takes.
    """

    name: str
    memory_bytes: int
    flops: Flops
    bandwidth: float
    launch_overhead: float = 4e-6


def _device(
    name: str,
    memory_gib: float,
    bandwidth_gb: float,
    float32: float,
    tf32: float | None,
    bfloat16: float | None,
    float16: float | None,
    fp8: float | None = None,
) -> Device:
    in_tera = [figure and figure * _TERA for figure in (tf32, bfloat16, float16, fp8)]
    return Device(name, int(memory_gib * _GIB), Flops(float32 * _TERA, *in_tera), bandwidth_gb * 1e9)


# Speeds: NVIDIA's data sheets and architecture white papers, dense (half of what is given "with sparsity"), with
# float32 accumulation. Memory is what torch reports as a card's total, a little under the data sheet's number; cards
# that keep error correction in the same memory (A10, L4, L40S, T4) lose more.
# Columns: GiB, GB/s, then TFLOP/s of float32, tf32, bfloat16, float16, fp8.
DEVICES = {
    device.name: device
    for device in (
        _device("h100-80g", 79.1, 3350, 67, 494.7, 989.4, 989.4, 1978.9),  # H100 data sheet, SXM
        _device("h100-pcie-80g", 79.1, 2000, 51, 378, 756, 756, 1513),  # H100 PCIe product brief
        _device("h100-nvl-94g", 93.0, 3900, 60, 417.5, 835.5, 835.5, 1670.5),  # H100 data sheet, NVL
        _device("h200", 139.7, 4800, 67, 494.7, 989.4, 989.4, 1978.9),  # H200 data sheet, SXM
        _device("gh200-96g", 94.5, 4000, 67, 494.7, 989.4, 989.4, 1978.9),  # GH200 data sheet, HBM3
        _device("b200", 178.3, 8000, 75, 1125, 2250, 2250, 4500),  # HGX B200 data sheet, an eighth of the board
        _device("a100-40g", 39.3, 1555, 19.5, 156, 312, 312),  # A100 data sheet
        _device("a100-80g", 79.1, 2039, 19.5, 156, 312, 312),  # A100 data sheet, SXM
        _device("a10-24g", 22.0, 600, 31.2, 62.5, 125, 125),  # A10 data sheet
        _device("a30-24g", 23.5, 933, 10.3, 82, 165, 165),  # A30 data sheet
        _device("l4-24g", 22.0, 300, 30.3, 60, 121, 121, 242.5),  # L4 data sheet
        _device("l40s-48g", 44.3, 864, 91.6, 183, 362, 362, 733),  # L40S data sheet
        _device("v100-16g", 15.7, 900, 15.7, None, None, 125),  # V100 data sheet, SXM2
        _device("v100-32g", 31.7, 900, 15.7, None, None, 125),  # V100 data sheet, SXM2
        _device("t4-16g", 14.5, 320, 8.1, None, None, 65),  # T4 data sheet
        _device("rtx-3090", 23.6, 936, 35.6, 35.6, 71, 71),  # GA102 white paper
        _device("rtx-4090", 23.6, 1008, 82.6, 82.6, 165.2, 165.2, 330.3),  # Ada white paper
        _device("rtx-5090", 31.3, 1792, 104.8, 104.8, 209.5, 209.5, 419),  # RTX Blackwell white paper
        _device("rtx-a6000", 47.4, 768, 38.7, 77.4, 154.8, 154.8),  # RTX A6000 data sheet, GA102 white paper
    )
}

# The speeds assumed where only an amount of memory is known: of a middling card up to so many GiB.
_MIDDLING = ((20, "t4-16g"), (30, "a10-24g"), (44, "a100-40g"), (60, "l40s-48g"), (100, "a100-80g"), (1e9, "h200"))

# What torch.cuda.get_device_properties calls each; where two match, memory decides.
_CUDA_NAMES = {
    r"\bGH200\b": ("gh200-96g",),
    r"\bB200\b": ("b200",),
    r"\bH200\b": ("h200",),
    r"\bH100 PCIe\b": ("h100-pcie-80g",),
    r"\bH100 NVL\b": ("h100-nvl-94g",),
    r"\bH100\b": ("h100-80g",),
    r"\bA100\b": ("a100-40g", "a100-80g"),
    r"\bA10\b": ("a10-24g",),
    r"\bA30\b": ("a30-24g",),
    r"\bL4\b": ("l4-24g",),
    r"\bL40S\b": ("l40s-48g",),
    r"\bV100\b": ("v100-16g", "v100-32g"),
    r"\bT4\b": ("t4-16g",),
    r"\bRTX 3090\b": ("rtx-3090",),
    r"\bRTX 4090\b": ("rtx-4090",),
    r"\bRTX 5090\b": ("rtx-5090",),
    r"\bRTX A6000\b": ("rtx-a6000",),
}


def find_device(text: str) -> Device:
    """Returns the device of a name such as `a100-40g`, or one with an amount of memory such as `24GiB` or `80g`.

    An amount has the speeds of a middling card of its size, which its name tells.

    Raises:
        UserError: neither a name that we know nor an amount.
    """
    known = DEVICES.get(text.strip().lower())
    if known is not None:
        return known
    try:
        num_bytes = parse_bytes(re.sub(r"(?<=[0-9])\s*[gG]\s*$", "GiB", text))
    except ValueError:
        hint = nearest(text, DEVICES) or f"; it is one of {', '.join(DEVICES)}, or memory such as 24GiB"
        raise UserError(f"unknown device '{text}'{hint}") from None
    if num_bytes <= 0:
        raise UserError(f"a device needs memory (got '{text}')")
    return _of_memory(num_bytes, format_bytes(num_bytes))


def _of_memory(num_bytes: int, name: str) -> Device:
    like = next(key for largest, key in _MIDDLING if num_bytes <= largest * _GIB)
    return replace(DEVICES[like], name=f"{name} with the speed of {like}", memory_bytes=num_bytes)


def this_device(device: torch.device) -> Device:
    """Returns the device at hand: its own memory, and the table's speeds where the table has it."""
    if device.type != "cuda":
        return _this_cpu()
    import torch

    properties = torch.cuda.get_device_properties(device)
    return named_device(properties.name, properties.total_memory)


def named_device(name: str, memory_bytes: int) -> Device:
    """Returns a CUDA device by the name that its driver gives it, such as `NVIDIA A100-SXM4-40GB`."""
    return known_device(name, memory_bytes) or _of_memory(memory_bytes, name)


def known_device(name: str, memory_bytes: int) -> Device | None:
    """Returns a CUDA device by the name that its driver gives it; None where the table does not have it."""
    keys = next((keys for pattern, keys in _CUDA_NAMES.items() if re.search(pattern, name)), ())
    if not keys or re.search(r"\bMIG\b|\bLaptop\b|\bMax-Q\b", name):  # a part of one, or a slower one of that name
        return None
    like = min((DEVICES[key] for key in keys), key=lambda known: abs(known.memory_bytes - memory_bytes))
    return replace(like, memory_bytes=memory_bytes)


def _this_cpu() -> Device:
    import psutil

    speed = 30e9 * (os.cpu_count() or 1)  # what a core does with 8 lanes, about half the time
    return Device("cpu", psutil.virtual_memory().total, Flops(speed, None, speed, speed), 20e9, 2e-6)
