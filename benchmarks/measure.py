"""One measurement of one entry, in a process of its own: `python -m benchmarks.measure NAME FOLDER`.

Owns the list of all entries, and the window that is counted: warm up, take CPU time of this process and all below it,
count pictures, take it again. Prints one JSON object as its last line. Which measurements are taken, and what becomes
of them, is `benchmarks.feed`.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.decoding_limits import LIMITS
from benchmarks.feed_entries import Entry
from benchmarks.our_feed import OURS
from benchmarks.peers import PEERS
from benchmarks.rounds import Clocks

EXIT_NOT_INSTALLED = 3
ENTRIES: dict[str, Entry] = {**PEERS, **OURS, **LIMITS}  # all of them, in the order of the table


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


def measure(name: str, folder: Path, images: int, warm_up: int, batch_size: int, seed: int) -> Measurement:
    """Counts whole batches of an entry until there are `images`, after `warm_up` that do not count."""
    with closing(ENTRIES[name].open(folder, batch_size, seed)) as batches:
        warmed = 0
        while warmed < warm_up:
            warmed += next(batches)
        before = Clocks.read()
        counted = 0
        while counted < images:
            counted += next(batches)
        after = Clocks.read()
    tree, wall = after.tree - before.tree, after.wall - before.wall
    return Measurement(counted, tree, wall, after.foreign_cores(before))


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
