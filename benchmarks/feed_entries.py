"""What an entry of the feed's benchmark is: a way from a folder of JPEGs to batches, by name.

Owns what all of them do alike: one decoding worker or thread, random resized crops of 224x224 (8 to 100% of the area,
3/4 to 4/3), random flips, shuffled, batch after batch without end. The entries are in `benchmarks.peers`,
`benchmarks.our_feed` and `benchmarks.decoding_limits`; how they are measured is `benchmarks.measure`.
"""

from __future__ import annotations

import importlib.metadata
import math
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

SIZE = 224  # pixels, of both sides of what a feed delivers
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)

FLOATS = "float32 CHW, normalised"
BYTES = "uint8 CHW"
BYTES_UNFLIPPED = "uint8 CHW, flips left to the device"

Kind = Literal["ours", "peer", "limit"]
Batches = Generator[int, None, None]  # the number of pictures in each batch; closing it ends workers and threads
Open = Callable[[Path, int, int], Batches]  # (folder of class folders, batch size, seed)
Variables = Callable[[], AbstractContextManager[dict[str, str]]]


def _no_variables() -> AbstractContextManager[dict[str, str]]:
    return nullcontext({})


@dataclass(frozen=True)
class Entry:
    """One way from JPEGs to batches."""

    name: str
    kind: Kind
    output: str  # what a batch holds when it is counted
    packages: tuple[str, ...]  # what does the work, as installed; a pattern where the name says which CUDA
    open: Open
    variables: Variables = _no_variables  # environment variables that its process must be started with

    def versions(self) -> dict[str, str]:
        """Returns the installed versions of `packages`, without those that are missing."""
        installed = {
            str(found.metadata["Name"]).lower().replace("_", "-"): found.version
            for found in importlib.metadata.distributions()
        }
        return {n: installed[n] for p in self.packages for n in sorted(installed) if fnmatchcase(n, p)}


class Entries(dict[str, Entry]):
    """Entries of one kind by name, in the order of the table."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self._kind = kind

    def add(
        self, name: str, output: str, *packages: str, variables: Variables = _no_variables
    ) -> Callable[[Open], Open]:
        """Adds a function to what is measured, under this name."""

        def added(open_batches: Open) -> Open:
            self[name] = Entry(name, self._kind, output, packages, open_batches, variables)
            return open_batches

        return added


def shuffled_forever(paths: Sequence[str], seed: int) -> Iterator[str]:
    """Yields all paths in random order, again and again."""
    draws = random.Random(seed)
    while True:
        yield from draws.sample(paths, len(paths))


def random_crop(draws: random.Random, width: int, height: int) -> tuple[int, int, int, int]:
    """Returns (left, top, width, height) in pixels as torchvision's `RandomResizedCrop` draws them."""
    for _ in range(10):
        area = width * height * draws.uniform(*AREA)
        aspect = math.exp(draws.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = draws.randint(0, width - crop_width), draws.randint(0, height - crop_height)
            return left, top, crop_width, crop_height
    side = min(width, height)  # within every aspect ratio allowed
    return (width - side) // 2, (height - side) // 2, side, side
