"""A model that looks at what pages the kernel gives large tensors."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

KERNEL_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Probe(nn.Module):
    """Vectors (B, 8) -> logits (B, 3).

    Args:
        file: for the bytes of this process that are on huge pages, once it also holds a tensor of 64 MiB.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.file = file

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        large = torch.ones(2**24)
        (kilobytes,) = re.findall(r"^AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)
        Path(self.file).write_text(str(1024 * int(kilobytes)))
        assert large[-1] == 1
        logits: torch.Tensor = self.layer(x)
        return logits
