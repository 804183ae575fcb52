"""How everything is measured: in rounds, each entry once a round in random order, so that a slow machine slows all.

Owns the order, the clocks (with what others did to the machine meanwhile), which rounds are quiet enough to count, and
how entries of the same round are compared. What is measured is each benchmark's own.
"""

from __future__ import annotations

import math
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from benchmarks.telling import range_text, spread

if TYPE_CHECKING:
    import torch

Name = TypeVar("Name", str, tuple[str, str])

MOST_FOREIGN_CORES = 0.15  # that others may keep busy on average; rounds with more are dropped


class Problem(Exception):
    """Why an entry could not be measured; `is_absence` where its library is merely not installed."""

    def __init__(self, message: str, is_absence: bool) -> None:
        super().__init__(message)
        self.is_absence = is_absence


def in_rounds(names: Iterable[Name], rounds: int, seed: int) -> Iterator[tuple[int, Name]]:
    """Yields (round, counted from 0, and name): every name once a round, in random order.

    Names that are taken out of a collection meanwhile are no part of the rounds that follow.
    """
    for number in range(rounds):
        order = list(names)
        random.Random(seed + number).shuffle(order)
        for name in order:
            yield number, name


@dataclass(frozen=True)
class Clocks:
    """An instant: on the clock, and in CPU time."""

    wall: float
    tree: float  # seconds of CPU, of this process and all below it
    machine: float  # seconds of CPU, of everybody

    @classmethod
    def read(cls) -> Clocks:
        """Returns this instant."""
        return cls(time.perf_counter(), _tree_cpu_seconds(), _machine_cpu_seconds())

    def foreign_cores(self, before: Clocks) -> float:
        """Returns how many cores others have kept busy since, on average."""
        busy = self.machine - before.machine - (self.tree - before.tree)
        return max(0.0, busy) / (self.wall - before.wall)


def _tree_cpu_seconds() -> float:
    """Returns the CPU time of this process, of those below it, and of those below it that have ended."""
    this = psutil.Process()
    ended = this.cpu_times()
    alive = [this, *this.children(recursive=True)]
    return sum(map(_cpu_seconds, alive)) + ended.children_user + ended.children_system


def _cpu_seconds(process: psutil.Process) -> float:
    if sys.platform == "linux":
        # What clock_getcpuclockid(3) returns for it: nanoseconds, where /proc counts in ticks of 10 ms.
        return time.clock_gettime((~process.pid << 3) | 2)
    times = process.cpu_times()
    return times.user + times.system


def _machine_cpu_seconds() -> float:
    """Returns how long the machine's cores were busy, with whatever."""
    times = psutil.cpu_times()
    parts = ("user", "nice", "system", "irq", "softirq")  # guests are in user
    return float(sum(getattr(times, part, 0.0) for part in parts))


@dataclass(frozen=True)
class Timing:
    """What one measurement of time gave."""

    seconds: float  # of one run
    own_cores: float  # that this process and those below it kept busy meanwhile, on average
    foreign_cores: float  # that others kept busy


def measure_time(run: Callable[[], object], num_runs: int, wait: Callable[[], object]) -> Timing:
    """Runs several times between two waits for the device."""
    wait()
    before = Clocks.read()
    for _ in range(num_runs):
        run()
    wait()
    after = Clocks.read()
    wall = after.wall - before.wall
    return Timing(wall / num_runs, (after.tree - before.tree) / wall, after.foreign_cores(before))


def alternate(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    num_runs: int,
    wait: Callable[[], object],
    seed: int,
    what: str,
) -> dict[str, list[Timing]]:
    """Measures each of `runs` once a round, in random order."""
    taken: dict[str, list[Timing]] = {name: [] for name in runs}
    for number, name in in_rounds(runs, rounds, seed):
        timing = measure_time(runs[name], num_runs, wait)
        taken[name].append(timing)
        sys.stderr.write(
            f"round {number + 1}: {what}: {name}: {1000 * timing.seconds:.2f} ms, "
            f"others kept {timing.foreign_cores:.2f} cores busy\n"
        )
    return taken


def is_quiet(taken: Any, keep_loaded: bool) -> bool:
    """Returns whether a measurement with `foreign_cores` counts."""
    return keep_loaded or bool(taken.foreign_cores <= MOST_FOREIGN_CORES)


def compare(taken: Sequence[Timing], yardstick: Sequence[Timing], keep_loaded: bool) -> dict[str, Any]:
    """Returns what the JSON says of the times of one entry and of how they compare with those of another.

    The ratios are of measurements of the same round, so that a machine that slows down slows both.
    """
    kept = [is_quiet(t, keep_loaded) for t in taken]
    comparable = [is_quiet(t, keep_loaded) for t in yardstick]
    pairs = [(t, y) for t, y, k, c in zip(taken, yardstick, kept, comparable, strict=False) if k and c]
    return {
        "seconds": spread([t.seconds for t, k in zip(taken, kept, strict=True) if k]),
        "time_ratio": spread([t.seconds / y.seconds for t, y in pairs]),
        "dropped_rounds": kept.count(False),
        "rounds": [{**asdict(t), "kept": k} for t, k in zip(taken, kept, strict=True)],
    }


def paired_ratios(entry: Mapping[str, Any], yardstick: Mapping[str, Any]) -> list[float]:
    """Returns the ratios of two entries of a JSON, as `compare` made them, round by round."""
    pairs = zip(entry["rounds"], yardstick["rounds"], strict=False)
    return [one["seconds"] / other["seconds"] for one, other in pairs if one["kept"] and other["kept"]]


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Returns two of the values, between which the median of what they are drawn from lies with at least `confidence`.

    By order statistics, which assume of the values only that they are independent; None where they are too few.
    """
    ordered = sorted(values)
    below, rank = 0.0, 0  # the chance that at most `rank` values, counted from 0, lie below the median
    while True:
        below += math.comb(len(ordered), rank) / 2 ** len(ordered)
        if 2 * below > 1 - confidence:
            break
        rank += 1
    return (ordered[rank - 1], ordered[-rank]) if rank else None


def load_note(entries: Sequence[Mapping[str, Any]], keep_loaded: bool) -> str:
    """Returns what a table says of the measurements that were dropped."""
    if keep_loaded:
        return "measurements: kept whatever else ran"
    dropped = sum(entry["dropped_rounds"] for entry in entries)
    measured = sum(len(entry["rounds"]) for entry in entries)
    return f"measurements: {dropped} of {measured} dropped for other load"


def show_times(entry: Mapping[str, Any]) -> list[str]:
    """Returns four cells of what `compare` gave: milliseconds with their spread, and the ratio with its spread."""
    seconds, ratio = entry["seconds"], entry["time_ratio"]
    if seconds is None:
        return ["-", entry["problem"] or "no quiet round", "", ""]
    digits = sum(1000 * seconds["median"] < limit for limit in (1, 10, 100))
    in_ms = {name: 1000 * value for name, value in seconds.items()}
    cells = [f"{in_ms['median']:.{digits}f}", range_text(in_ms, digits)]
    return [*cells, "", ""] if ratio is None else [*cells, f"{ratio['median']:.2f}", range_text(ratio, 2)]


def in_fresh_process() -> Executor:
    """Returns an executor whose one process starts from nothing."""
    return ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))


def waiting_for(device: torch.device) -> Callable[[], object]:
    """Returns what waits until a device has done all its work."""
    import torch

    return torch.cuda.synchronize if device.type == "cuda" else lambda: None
