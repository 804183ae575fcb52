"""Writing packed image folders (`trainer.data.packed` is their format and the reading).

The source is listed, and the listing alone decides which samples are in which shard, and under which key the pack
lies. All ranks together write the shards, each of them whole or not at all, so that a pack that was interrupted goes
on where it was; then rank 0 joins the indices and writes the manifest. The same source gives the same bytes on any
number of ranks and workers.

Imports no torch: worker processes start at once.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from trainer.config_data import CacheConfig
from trainer.data.encoding import Corrupt, Stored, encode, shrunk
from trainer.data.listing import FolderSource, Listing, settings_of
from trainer.data.pack_files import appears, remove_leftovers, whole_file, write_error
from trainer.data.packed import (
    BROKEN,
    FOOTER,
    FORMAT_VERSION,
    INDEX,
    MAGIC,
    MANIFEST,
    RECORD,
    TEXTS,
    Footer,
    Manifest,
    PackedFile,
    is_complete,
    read_tail,
)
from trainer.errors import UserError
from trainer.system import die_with_parent
from trainer.units import format_bytes

logger = logging.getLogger("lockstep")


REPORT_SECONDS = 10.0


class OtherRankFailed(UserError):
    """A pack is not complete, for a reason that another rank knows."""


def pack_folder(
    source: FolderSource,
    config: CacheConfig,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    barrier: Callable[[], None] = lambda: None,
    num_workers: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    key: str | None = None,
) -> Path:
    """Packs an image folder, unless that has been done, and returns the folder of the pack.

    All ranks call this together. Each calls `barrier` exactly twice, also where it fails or finds the pack complete:
    a problem of one rank is raised on that rank afterwards, and all others raise that the pack is not complete.

    Args:
        source: the image folder.
        config: where, and how pictures are stored.
        rank: which part of the shards is ours to write: every `num_ranks`-th.
        num_ranks: how many ranks write.
        barrier: returns when all ranks have called it.
        num_workers: processes of this rank that write shards; 0 writes in this process.
        on_error: what to do about a picture that cannot be decoded: `raise`, or `skip` to store its error, which
            reading it then raises. A file that cannot be read at all is always raised.
        key: `cache_key(source, config)`, where the caller knows it: a complete pack is then found without listing
            the source.

    Raises:
        UserError: a picture or file cannot be read, the disk is full or cannot be written, or a rank failed. What is
            finished stays, and the next call goes on from there.
    """
    assert 0 <= rank < num_ranks
    assert on_error in ("raise", "skip")
    failure: Exception | None = None
    listing: Listing | None = None
    folder = Path(config.path).expanduser()
    try:
        if key is None:
            listing = Listing.of(source)
            key = listing.key(config)
        folder = folder / key
        if not (folder / MANIFEST).exists():
            listing = listing or Listing.of(source)
            if listing.key(config) != key:
                raise UserError(f"'{listing.root}' was changed while it was packed; start again")
            job = PackJob(folder, config, listing, key, listing.shard_bounds(config), on_error)
            job.write_shards(range(rank, job.num_shards, num_ranks), num_workers, check_space=rank == 0)
    except Exception as error:
        failure = error
    barrier()
    if rank == 0 and failure is None and not (folder / MANIFEST).exists():
        try:
            job.publish()
        except Exception as error:
            failure = error
    barrier()
    if failure is not None:
        raise failure
    if not appears(folder / MANIFEST):
        raise OtherRankFailed(f"the packed data set '{folder}' is not complete: another rank could not do its part")
    return folder


class ShardTask(NamedTuple):
    """All that a worker needs to know to write one shard."""

    file: Path
    footer: Footer  # what is known before: which shard of which pack
    root: str
    names: tuple[str, ...]
    labels: tuple[int, ...]
    first: int  # number of the first sample
    config: CacheConfig
    on_error: Literal["raise", "skip"]


@dataclass(frozen=True)
class PackJob:
    """One rank's view of a pack in the making."""

    folder: Path
    config: CacheConfig
    listing: Listing
    key: str
    bounds: list[int]
    on_error: Literal["raise", "skip"]

    @property
    def num_shards(self) -> int:
        """How many shards all ranks write together."""
        return len(self.bounds) - 1

    def task(self, shard: int) -> ShardTask:
        """Returns what is to be done for one shard."""
        part = slice(self.bounds[shard], self.bounds[shard + 1])
        names = self.listing.names[part]
        footer = Footer(MAGIC, self.key.encode(), shard, self.num_shards, len(names), 0, 0, 0, 0)
        file = self.folder / f"shard-{shard:05d}-of-{self.num_shards:05d}.bin"
        labels = tuple(self.listing.labels[part].tolist())
        return ShardTask(file, footer, self.listing.root, names, labels, part.start, self.config, self.on_error)

    def write_shards(self, shards: Sequence[int], num_workers: int, check_space: bool) -> None:
        """Writes those of `shards` that are not complete yet.

        Raises:
            UserError: as `pack_folder`.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
        except OSError as error:
            raise write_error(self.folder, error) from error
        if check_space:
            self._check_space()
        tasks = [self.task(shard) for shard in shards]
        progress = Progress(sum(len(task.names) for task in tasks))
        if num_workers == 0 or len(tasks) <= 1:
            for task in tasks:
                write_shard(task, progress.add)
        else:
            _write_in_processes(tasks, min(num_workers, len(tasks)), progress)
        progress.finish(self.folder)

    def _check_space(self) -> None:
        """Raises UserError where the pixels to be stored surely do not fit; how small JPEGs become nobody knows."""
        if self.config.encoding == "jpeg":
            return
        missing = sum(
            self.bounds[shard + 1] - self.bounds[shard]
            for shard in range(self.num_shards)
            if not self.task(shard).file.exists()
        )
        areas = []
        for number in np.linspace(0, len(self.listing) - 1, min(256, len(self.listing)), dtype=int).tolist():
            with (
                contextlib.suppress(Exception),  # a broken picture is none of our concern yet
                Image.open(os.path.join(self.listing.root, self.listing.names[number])) as image,
            ):
                width, height = shrunk(image.size, self.config.max_size)
                areas.append(width * height)
        per_sample = 3 * sum(areas) / max(len(areas), 1) / (2 if self.config.encoding == "mixed" else 1)
        needed, free = int(per_sample * missing), shutil.disk_usage(self.folder).free
        if needed * 0.9 > free:  # it is an estimate
            message = f"'{self.folder}' has {format_bytes(free)} free, but the packed pictures need about"
            advice = "make room, or choose a smaller data.cache.max_size or encoding jpeg"
            raise UserError(f"{message} {format_bytes(needed)}; {advice}")

    def publish(self) -> None:
        """Joins the indices of all shards and writes the manifest, which makes the pack complete.

        Raises:
            UserError: a shard is missing or not whole, or the disk is full.
        """
        tails = []
        for shard in range(self.num_shards):
            task = self.task(shard)
            tail = read_tail(task.file, task.footer) if appears(task.file) else None
            if tail is None:
                raise UserError(f"'{task.file}' was not packed completely; packing again goes on from there")
            tails.append(tail)
        records = np.concatenate([tail.records for tail in tails])
        starts = np.cumsum([0] + [len(tail.texts) for tail in tails])
        records["text_offset"] += np.repeat(starts[:-1], np.diff(self.bounds)).astype(np.uint64)
        parts = {INDEX: records.tobytes(), TEXTS: b"".join(tail.texts for tail in tails)}
        joined = {
            name: PackedFile(name, len(data), zlib.crc32(data), len(self.listing)) for name, data in parts.items()
        }
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            key=self.key,
            source=self.listing.root,
            settings=settings_of(self.config),
            classes=[str(name) for name in self.listing.classes],
            shards=[tail.file for tail in tails],
            index=joined[INDEX],
            texts=joined[TEXTS],
        )
        for name, data in {**parts, MANIFEST: manifest.to_json().encode()}.items():
            with whole_file(self.folder / name) as file:
                file.write(data)
        remove_leftovers(self.folder)


def write_shard(task: ShardTask, advance: Callable[[int, bool], None]) -> None:
    """Writes one shard whole or not at all; a complete one is kept.

    Args:
        task: which.
        advance: is called with (how many samples are done, whether they were packed now); may raise to stop.

    Raises:
        UserError: as `pack_folder`.
    """
    if is_complete(task.file, task.footer):
        advance(len(task.names), False)
        return
    records = np.zeros(len(task.names), RECORD)
    texts = bytearray()
    checksum = position = 0
    with whole_file(task.file) as file:
        for i, (name, label) in enumerate(zip(task.names, task.labels, strict=True)):
            stored = _encode_sample(task, i)
            text = os.fsencode(name)
            records[i] = (
                position,
                len(texts),
                len(stored.data),
                zlib.crc32(stored.data),
                stored.height,
                stored.width,
                label,
                len(text),
                len(stored.error),
                task.footer.shard,
                stored.kind,
            )
            texts += text + stored.error
            checksum = zlib.crc32(stored.data, checksum)
            position += len(stored.data)
            file.write(stored.data)
            advance(1, True)
        index = records.tobytes()
        footer = task.footer._replace(
            data_size=position,
            texts_size=len(texts),
            data_crc32=checksum,
            tail_crc32=zlib.crc32(texts, zlib.crc32(index)),
        )
        for part in (index, texts, FOOTER.pack(*footer)):
            file.write(part)


def _encode_sample(task: ShardTask, i: int) -> Stored:
    path = os.path.join(task.root, task.names[i])
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:  # of the moment, or of the user's rights: nothing to be kept in a cache
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    as_raw = task.config.encoding == "raw" or (task.config.encoding == "mixed" and (task.first + i) % 2 == 1)
    try:
        return encode(data, as_raw, task.config.max_size, task.config.quality)
    except Corrupt as error:
        if task.on_error == "raise":
            raise UserError(f"cannot read '{path}': {error}") from error
        return Stored(BROKEN, b"", error=os.fsencode(str(error)))


class Progress:
    """Counts the samples of one rank and logs about every ten seconds."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.kept = self.packed = 0
        self.start = self.reported = time.monotonic()

    def add(self, samples: int, packed: bool) -> None:
        """Counts samples that were packed now, or were found complete."""
        self.set(self.kept + samples * (not packed), self.packed + samples * packed)

    def set(self, kept: int, packed: int) -> None:
        """Sets the counts; logs when it is time to."""
        self.kept, self.packed = kept, packed
        now = time.monotonic()
        if now - self.reported >= REPORT_SECONDS:
            self.reported = now
            done, rate = kept + packed, packed / (now - self.start)
            left = f", {(self.total - done) / rate / 60:.1f} min left" if rate else ""
            logger.info("packed %s of %s images, %.0f a second%s", f"{done:,}", f"{self.total:,}", rate, left)

    def finish(self, folder: Path) -> None:
        """Logs the end of this rank's part."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        logger.info(
            "packed %s images into '%s' in %.1f s, %.0f a second; %s were there",
            f"{self.packed:,}",
            folder,
            seconds,
            self.packed / seconds,
            f"{self.kept:,}",
        )


class Shared(NamedTuple):
    """What the main process and its workers both see."""

    kept: Any  # numbers of samples, multiprocessing.Value
    packed: Any
    stop: Any  # multiprocessing.Event: give up the current shard


class Stopped(Exception):
    """Another worker has failed, or the user has pressed Ctrl-C."""


_shared: Shared | None = None  # in a worker process


def _write_in_processes(tasks: list[ShardTask], num_workers: int, progress: Progress) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would take over locks of the threads of torch
    shared = Shared(context.Value("q", 0), context.Value("q", 0), context.Event())
    pool = ProcessPoolExecutor(num_workers, context, _init_worker, (shared, os.getpid()))
    try:
        waiting = {pool.submit(_write_in_worker, task) for task in tasks}
        while waiting:
            done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            progress.set(shared.kept.value, shared.packed.value)
    except BrokenProcessPool as error:
        message = "a worker that packs images was killed, perhaps for want of memory; packing again goes on from there"
        raise UserError(message) from error
    finally:
        shared.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _init_worker(shared: Shared, parent: int) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process tells when to stop
    if sys.platform == "linux":
        die_with_parent()
        if os.getppid() != parent:
            os._exit(1)


def _write_in_worker(task: ShardTask) -> None:
    if not _shared.stop.is_set():  # type: ignore[union-attr]  # set by _init_worker
        write_shard(task, _advance_shared)


def _advance_shared(samples: int, packed: bool) -> None:
    assert _shared is not None
    counter = _shared.packed if packed else _shared.kept
    with counter.get_lock():
        counter.value += samples
    if _shared.stop.is_set():
        raise Stopped
