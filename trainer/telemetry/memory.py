"""How much memory a device has, a process takes on it, and loader workers take on the host."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch


class MemoryUse(NamedTuple):
    """Bytes of one process: of torch's allocator on a GPU, and on the CPU the resident size of the process."""

    allocated: int
    reserved: int | None  # by torch's allocator, on GPUs
    peak: int  # most allocated so far


def device_memory(device: torch.device) -> int:
    """Returns a device's whole memory in bytes: like devices then choose alike, whatever else runs there."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def memory_use(device: torch.device) -> MemoryUse:
    """Returns what this process takes on its device now."""
    if device.type == "cuda":
        return MemoryUse(
            torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), peak_memory_bytes(device)
        )
    resident = psutil.Process().memory_info().rss
    return MemoryUse(resident, None, max(resident, peak_memory_bytes(device)))  # of which the kernel updates one later


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory allocated on the device, or on the CPU the peak size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def own_memory_bytes(pid: int) -> int | None:
    """Returns the memory of another process, a page that several share divided among them; None where it is gone.

    Its resident size would count what a forked worker shares with its parent as if it were its own from the start, and
    so would not grow when the worker writes to it. Pages of mapped files, which the system takes back when it needs
    them, do not count.
    """
    with suppress(OSError, ValueError, KeyError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        kib = {line.split()[0]: int(line.split()[1]) for line in lines if line.startswith("Pss")}
        return 1024 * (kib["Pss_Anon:"] + kib["Pss_Shmem:"])
    with suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return None
