"""How many loader workers a run needs, from what loading and training take.

Owns the measurement and the choice; `trainer.data.feed` carries it out.
"""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path

_WARM_UP_BATCHES = 5  # the first steps compile, allocate and fill queues
_MEASURED_BATCHES = 20
_MEASURED_SECONDS = 3.0
_HEADROOM = 1.3
_USUAL_SHARE = 0.9  # of the steps; the others may hold an evaluation or a checkpoint
_UNUSUAL = 20  # times the usual: no step, but something between two of them


class WorkerTuner:
    """Watches the first seconds of training.

    Args:
        most: workers that run while it watches, and the most it chooses.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.reason = ""
        self._num_batches = 0
        self._train_seconds: list[float] = []
        self._load_seconds: list[float] = []
        self._last: float | None = None

    def observe(self, asked_at: float, waited: float, load_seconds: float) -> None:
        """Takes note of a batch: when it was asked for, how long that took, how long a worker had loaded it."""
        self._num_batches += 1
        if self._last is not None and self._num_batches > _WARM_UP_BATCHES:
            self._train_seconds.append(asked_at - self._last)
            self._load_seconds.append(load_seconds)
        self._last = asked_at + waited

    def chosen(self) -> int | None:
        """Returns the number of workers to keep, once it is known."""
        if len(self._train_seconds) < _MEASURED_BATCHES or sum(self._train_seconds) < _MEASURED_SECONDS:
            return None
        load = statistics.median(self._load_seconds)
        train = self._seconds_per_batch()
        self.reason = f"a batch takes a worker {load * 1e3:.0f} ms to load and the step {train * 1e3:.0f} ms"
        if load / train > self.most:
            self.reason += ", so the step will wait for data; a data.cache or data.feed: device_decode loads faster"
        return min(max(math.ceil(_HEADROOM * load / train), 1), self.most)

    def _seconds_per_batch(self) -> float:
        """Returns the mean of what a step takes, without evaluations, checkpoints and reports between two of them.

        The mean and not the median: on a GPU the host runs ahead and then waits in some steps for many.
        """
        usual = sorted(self._train_seconds)[: math.ceil(len(self._train_seconds) * _USUAL_SHARE)]
        longest = _UNUSUAL * max(statistics.fmean(usual), 1e-6)
        return max(statistics.fmean([seconds for seconds in self._train_seconds if seconds <= longest]), 1e-6)


def cores_of_a_rank(num_local_ranks: int, has_its_own: bool = False) -> int:
    """Returns how many cores a process and its workers may keep busy, at least 1.

    Its affinity, within its control group's quota; divided by the processes of this machine that share them.

    Args:
        num_local_ranks: training processes on this machine.
        has_its_own: whether the affinity is this process's alone.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= 1 if has_its_own else num_local_ranks
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period) // num_local_ranks)
    except (OSError, ValueError):
        pass  # no such quota
    return max(cores, 1)
