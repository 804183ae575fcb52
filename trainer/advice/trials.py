"""How fast this machine is at what the rules have to know: an operation of a small model, a copy to host memory.

Owns the trials, which take milliseconds. When there is time for them is `trainer.advice.survey`.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import psutil
import torch
from torch import nn

from trainer.data.loader import preserved_generators
from trainer.telemetry.efficiency import OperationCounter

_COPIED_BYTES = 256 * 2**20  # more than caches hold
_COPIED_PIECE = 32 * 2**20
_ROOM = 4  # times what a trial takes must be free
_TRIED_LAYERS = 8
_TRIALS = 3


class OperationTimes:
    """What one operation takes on a CPU that has next to nothing to compute, in forward and backward."""

    def __init__(self) -> None:
        with preserved_generators():
            parts = (part for _ in range(_TRIED_LAYERS) for part in (nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()))
            self._model = nn.Sequential(*parts)
            with OperationCounter() as counter:
                self._pass()
        self._num_operations = counter.num_operations
        self._times: list[float] = []
        self._before = _run_and_waited()
        self.seconds = 0.0
        """Of an operation, from the trials so far."""

    def try_again(self) -> None:
        """Makes another trial where there were few.

        A trial is over too soon to see what else the machine does. So its time on the core counts, and what this thread
        has waited for a core since the beginning is added in proportion.
        """
        if len(self._times) < _TRIALS:
            self._pass()  # a step, too, finds its code in the caches
            started = time.thread_time()
            self._pass()
            self._times.append((time.thread_time() - started) / self._num_operations)
        run, waited = (now - before for now, before in zip(_run_and_waited(), self._before, strict=True))
        self.seconds = statistics.median(self._times) * (1 + waited / max(run, 1e-6))

    def _pass(self) -> None:
        with torch.enable_grad():
            self._model(torch.ones(1, 4)).sum().backward()


def _run_and_waited() -> tuple[float, float]:
    """Returns the seconds that this thread has been on a core, and those that it could have been and had to wait."""
    try:
        run, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    except (OSError, ValueError):  # not on Linux
        return time.thread_time(), 0.0
    return int(run) / 1e9, int(waited) / 1e9


def copied_per_second(device: torch.device) -> float | None:
    """Returns how many bytes of a state are copied to host memory in a second; None where there is no room to try."""
    if psutil.virtual_memory().available < _ROOM * _COPIED_BYTES:
        return None
    is_cuda = device.type == "cuda"
    if is_cuda and torch.cuda.mem_get_info(device)[0] < _ROOM * _COPIED_PIECE:
        return None
    half = _COPIED_BYTES // 2
    if is_cuda:
        source = torch.ones(_COPIED_PIECE, dtype=torch.uint8, device=device)
        pieces = list(torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True).split(_COPIED_PIECE))
        pairs = [(piece, source) for piece in pieces]
        torch.cuda.synchronize(device)
    else:
        source = torch.ones(_COPIED_BYTES, dtype=torch.uint8)
        pairs = [(source[:half], source[half:])] * 2
    started = time.perf_counter()
    for target, piece in pairs:
        target.copy_(piece, non_blocking=True)
    if is_cuda:
        torch.cuda.synchronize(device)
    return _COPIED_BYTES / max(time.perf_counter() - started, 1e-9)
