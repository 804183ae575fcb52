"""One measurement of one entry, in a process of its own: `python -m benchmarks.measure NAME FOLDER`.

Owns the window that is counted: warm up, take CPU time of this process and all below it, count pictures, take it
again. Prints one JSON object as its last line. Which measurements are taken, and what becomes of them, is
`benchmarks.feed`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks.peers import ENTRIES

EXIT_NOT_INSTALLED = 3


@dataclass(frozen=True)
class Measurement:
    """What one window cost."""

    images: int
    cpu_seconds: float  # user and system, of the process and all below it
    wall_seconds: float
    foreign_cores: float  # that others kept busy meanwhile, on average

    @property
    def images_per_core_second(self) -> float:
        """Pictures per second of CPU time."""
        return self.images / self.cpu_seconds

    @property
    def images_per_second(self) -> float:
        """Pictures per second on the clock."""
        return self.images / self.wall_seconds


@dataclass(frozen=True)
class _Clocks:
    wall: float
    tree: float
    machine: float

    @classmethod
    def read(cls) -> _Clocks:
        return cls(time.perf_counter(), _tree_cpu_seconds(), _machine_cpu_seconds())


def measure(name: str, folder: Path, images: int, warm_up: int, batch_size: int, seed: int) -> Measurement:
    """Counts whole batches of an entry until there are `images`, after `warm_up` that do not count."""
    with closing(ENTRIES[name].open(folder, batch_size, seed)) as batches:
        warmed = 0
        while warmed < warm_up:
            warmed += next(batches)
        before = _Clocks.read()
        counted = 0
        while counted < images:
            counted += next(batches)
        after = _Clocks.read()
    wall, tree = after.wall - before.wall, after.tree - before.tree
    foreign = max(0.0, after.machine - before.machine - tree)
    return Measurement(counted, tree, wall, foreign / wall)


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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure", description="Measures one entry once.")
    parser.add_argument("name", choices=ENTRIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--warm-up", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    return parser.parse_args()


def main() -> int:
    """Returns the exit code: 0, or 3 where the entry's library is not installed."""
    arguments = _arguments()
    try:
        measurement = measure(**vars(arguments))
    except ImportError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_NOT_INSTALLED
    sys.stdout.write(json.dumps(asdict(measurement)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
