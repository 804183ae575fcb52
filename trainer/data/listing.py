"""The files of an image folder that is packed: which shard each goes to, and the key of the whole.

Owns what a pack depends on; `trainer.data.packing` writes it. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trainer.config_data import CacheConfig
from trainer.data.packed import FORMAT_VERSION
from trainer.errors import UserError

# The size of a shard is part of the format: raise FORMAT_VERSION when changing it.
SHARD_SAMPLES = 2048
SHARD_BYTES = 256 * 2**20
MOST_SHARDS = 256  # of each limit: larger sources have larger shards, as every shard is an open file in each reader

STAT_THREADS = 32  # they wait for a network file system, not for a core
STAT_CHUNK = 1024


class FolderSource(Protocol):
    """What is packed: `trainer.data.datasets.ImageFolder`, or anything else with its attributes."""

    root: str | Path
    samples: list[tuple[str, int]]
    classes: list[str]


@dataclass(frozen=True)
class Listing:
    """The files of a source, in its order, as they were when it was listed."""

    root: str
    classes: tuple[str, ...]
    names: tuple[str, ...]  # paths relative to the root
    labels: np.ndarray  # int64 (N,)
    sizes: np.ndarray  # int64 (N,), bytes
    mtimes: np.ndarray  # int64 (N,), nanoseconds

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, source: FolderSource) -> Listing:
        """Asks the file system for size and time of every file, many at a time.

        Raises:
            UserError: a file is gone or may not be looked at.
        """
        paths = [path for path, _ in source.samples]
        chunks = [paths[start : start + STAT_CHUNK] for start in range(0, len(paths), STAT_CHUNK)]
        with ThreadPoolExecutor(STAT_THREADS) as threads:
            stats = np.concatenate(list(threads.map(_stat, chunks)))
        prefix = os.path.join(str(source.root), "")
        names = tuple(path.removeprefix(prefix) for path in paths)
        labels = np.array([label for _, label in source.samples], dtype=np.int64)
        return cls(str(source.root), tuple(source.classes), names, labels, stats[:, 0], stats[:, 1])

    def key(self, config: CacheConfig) -> str:
        """Returns 16 hex digits that another source, or another setting, would not have."""
        head = {"version": FORMAT_VERSION, "settings": settings_of(config), "classes": self.classes}
        digest = hashlib.blake2b(json.dumps(head, sort_keys=True).encode(), digest_size=8)
        for name, *numbers in zip(
            self.names, self.labels.tolist(), self.sizes.tolist(), self.mtimes.tolist(), strict=True
        ):
            digest.update(os.fsencode(name) + b"\0" + struct.pack("<qqq", *numbers))
        return digest.hexdigest()

    def shard_bounds(self, config: CacheConfig) -> list[int]:
        """Returns B + 1 sample numbers: shard i holds the samples from `bounds[i]` up to `bounds[i + 1]`."""
        guess = _guess_bytes(self.sizes, config)
        most_samples = max(SHARD_SAMPLES, len(self) // MOST_SHARDS)
        most_bytes = max(SHARD_BYTES, int(guess.sum()) // MOST_SHARDS)
        bounds, filled = [0], 0
        for number, size in enumerate(guess.tolist()):
            if number > bounds[-1] and (number - bounds[-1] >= most_samples or filled + size > most_bytes):
                bounds.append(number)
                filled = 0
            filled += size
        return [*bounds, len(self)]


def _stat(paths: Sequence[str]) -> np.ndarray:
    try:
        return np.array([(s.st_size, s.st_mtime_ns) for s in map(os.stat, paths)], dtype=np.int64)
    except OSError as error:
        raise UserError(f"cannot read '{error.filename}': {error.strerror}") from None


def settings_of(config: CacheConfig) -> dict[str, Any]:
    """Returns the settings that a pack depends on."""
    return config.model_dump(mode="json", exclude={"path"})


def _guess_bytes(sizes: np.ndarray, config: CacheConfig) -> np.ndarray:
    """Returns about how many bytes each sample takes, int64 (N,), for files of `sizes` bytes (N,)."""
    raw, jpeg = sizes * 20, sizes
    if config.max_size is not None:
        pixels = config.max_size**2 * 4 // 3
        raw, jpeg = np.minimum(raw, pixels * 3), np.minimum(jpeg, pixels // 2)
    if config.encoding == "mixed":
        return np.where(np.arange(len(sizes)) % 2 == 1, raw, jpeg)
    return raw if config.encoding == "raw" else jpeg


def cache_key(source: FolderSource, config: CacheConfig) -> str:
    """Returns the name of a source's folder in `config.path`: 16 hex digits of a hash of everything that matters.

    That is the relative path, size, modification time and label of every file, the class names, the settings and
    the version of the format. It costs one `stat` per file.

    Raises:
        UserError: a file cannot be looked at.
    """
    return Listing.of(source).key(config)
