"""A data set that lives on the device: moved there once, as bytes; indexing, crops and augmentation happen there.

Owns the store and its exchange between ranks. What is done with a batch after its crop is `trainer.data.augment`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from trainer.data.arrays import ArrayPictures
from trainer.data.decode import UNREADABLE, decode, read_size
from trainer.data.device_crop import crop_resize
from trainer.data.draws import sample_keys
from trainer.data.geometry import Geometry
from trainer.data.loader import LoadedBatch
from trainer.data.nested import collate
from trainer.data.sampler import MicroBatchSampler, SampleKey, StepSampler
from trainer.errors import UserError, one_line_text

logger = logging.getLogger("lockstep")

_CHUNK = 512  # pictures
_REPORT_SECONDS = 10.0
_ESTIMATED_FROM = 64  # pictures whose size stands for all of a folder's


def estimate_bytes(dataset: Any) -> int:
    """Returns about how much memory the pixels of a data set take; exact where they are an array."""
    if isinstance(dataset, ArrayPictures):
        return int(dataset.images.nbytes)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, _ESTIMATED_FROM).astype(int))
    sizes = []
    for i in chosen:
        with suppress(*UNREADABLE):  # reading all of them will say which is broken
            height, width = read_size(dataset.encoded(int(i))[0])
            sizes.append(height * width * 3)
    return int(np.mean(sizes or [0]) * len(dataset))


@dataclass(frozen=True)
class Share:
    """Which samples a rank keeps: `index % num_ranks == rank`."""

    rank: int = 0
    num_ranks: int = 1

    def owned(self, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tells for each index whether it is ours."""
        owned: NDArray[np.bool_] = indices % self.num_ranks == self.rank
        return owned


class ResidentPictures:
    """The pictures of a data set, or a rank's share of them, as bytes on the device.

    Args:
        dataset: has `encoded(index) -> (file's bytes or pixels, target)`.
        geometry: crops of a batch.
        device: where the pixels are kept.
        seed: seed of the samples' random state.
        describe: names a sample, for messages.
        check: called with the targets and their samples' indices; raises UserError on bad ones.
        num_threads: how many read and decode.
        share: which samples this rank keeps, at least one; all by default.

    Raises:
        UserError: a picture cannot be read, targets are no numbers or bad ones, or crops differ in size.
    """

    def __init__(
        self,
        dataset: Any,
        geometry: Geometry,
        device: torch.device,
        seed: int,
        describe: Callable[[int], str],
        check: Callable[[torch.Tensor, torch.Tensor], None],
        num_threads: int = 1,
        share: Share | None = None,
    ) -> None:
        self.geometry = geometry
        self.device = device
        self.seed = seed
        self.share = share or Share()
        started = time.perf_counter()
        indices = np.arange(self.share.rank, len(dataset), self.share.num_ranks)
        assert len(indices) > 0
        source = dataset if isinstance(dataset, ArrayPictures) else _Files(dataset, describe, num_threads)
        self.sizes, self.channels = source.sizes(indices)
        self._offsets = np.concatenate([[0], np.cumsum(self.sizes.prod(1) * self.channels)])
        self._pixels = torch.empty(int(self._offsets[-1]), dtype=torch.uint8, device=device)
        labels: list[Any] = []
        reported = started
        # A few at a time: the host never holds the whole.
        for first in range(0, len(indices), _CHUNK):
            pixels, targets = source.read(indices[first : first + _CHUNK])
            start = int(self._offsets[first])
            self._pixels[start : start + len(pixels)] = torch.from_numpy(pixels).to(device)
            labels += targets
            if time.perf_counter() - reported > _REPORT_SECONDS:
                reported = time.perf_counter()
                logger.info("%d of %d pictures are on %s", len(labels), len(indices), device)
        self.targets = _collated(labels)
        check(self.targets, torch.from_numpy(indices))
        self.targets = self.targets.to(device)
        # Pictures of one size are indexed by one gather.
        self._is_uniform = bool((self.sizes == self.sizes[0]).all())
        keys = np.zeros((len(indices), len(SampleKey._fields)), dtype=np.int64)
        keys[:, 1] = indices
        crops = geometry(self.sizes, sample_keys(seed, keys))
        if (crops.sizes != crops.sizes[0]).any():
            message = "its pictures differ in size; make them equal with a resize or crop"
            raise UserError(message, path="data.transforms")
        self._size = int(crops.sizes[0, 0]), int(crops.sizes[0, 1])
        seconds = time.perf_counter() - started
        size = self._offsets[-1] / 2**20
        logger.info("%d pictures, %.0f MiB, moved to %s in %.1f s", len(indices), size, device, seconds)

    @property
    def num_bytes(self) -> int:
        """Device memory of the pixels."""
        return self._pixels.numel()

    def batch(self, keys: NDArray[np.int64]) -> list[Any]:
        """Returns [images (B, C, height, width) uint8 in channels_last, targets] for sample keys (B, 3), all ours."""
        rows = keys[:, 1] // self.share.num_ranks
        index = self._uploaded(rows)
        targets = self.targets[index]
        if not len(rows):  # nobody asks this rank for anything in this step
            shape = (0, self.channels, *self._size)
            return [torch.empty(shape, dtype=torch.uint8, device=self.device), targets]
        crops = self.geometry(self.sizes[rows], sample_keys(self.seed, keys))
        return [crop_resize(self._pictures(rows, index), crops.boxes, self._size), targets]

    def exchanged_batches(self, sampler: StepSampler, start: int, stop: int) -> Iterator[LoadedBatch]:
        """Yields this rank's micro-batches of some steps; all ranks exchange what the others ask of them.

        Every rank knows the whole order, so each crops its own samples for whoever needs them in a step, and one
        exchange per step brings them there. Call it on the thread of the step: it communicates.
        """
        plan = sampler.plan
        samplers = [StepSampler(plan, rank, sampler.seed) for rank in range(plan.num_ranks)]
        for step in range(start, stop):
            by_rank = [list(MicroBatchSampler(s, step, step + 1)) for s in samplers]
            images, targets = self._exchange([np.concatenate(batches) for batches in by_rank])
            first = 0
            for keys in by_rank[self.share.rank]:
                last = first + len(keys)
                yield LoadedBatch(keys, [images[first:last], targets[first:last]])
                first = last

    def _exchange(self, wanted: list[NDArray[np.int64]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the images and targets of our samples, given the keys (n, 3) that each rank wants."""
        num_ranks, mine = self.share.num_ranks, wanted[self.share.rank]
        sent = [keys[self.share.owned(keys[:, 1])] for keys in wanted]
        owners = mine[:, 1] % num_ranks
        num_received = [int((owners == rank).sum()) for rank in range(num_ranks)]
        # Rows come ordered by owner; each owner keeps our order.
        place = self._uploaded(np.argsort(np.argsort(owners, kind="stable"), kind="stable"))
        images, targets = self.batch(np.concatenate(sent))
        result = []
        for rows in (images.permute(0, 2, 3, 1).contiguous(), targets):
            received = rows.new_empty((len(mine), *rows.shape[1:]))
            dist.all_to_all_single(received, rows, num_received, [len(keys) for keys in sent])
            result.append(received[place])
        return result[0].permute(0, 3, 1, 2), result[1]

    def _pictures(self, rows: NDArray[np.int64], index: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        if self._is_uniform:
            height, width = self.sizes[0]
            return self._pixels.view(-1, int(height), int(width), self.channels)[index]
        return [
            self._pixels[self._offsets[row] : self._offsets[row + 1]].view(*map(int, self.sizes[row]), self.channels)
            for row in rows
        ]

    def _uploaded(self, rows: NDArray[np.int64]) -> torch.Tensor:
        index = torch.from_numpy(rows)
        if self.device.type == "cuda":
            return index.pin_memory().to(self.device, non_blocking=True)
        return index.to(self.device)


class _Files:
    """Reads and decodes pictures on several threads: decoding lets other threads run."""

    def __init__(self, dataset: Any, describe: Callable[[int], str], num_threads: int) -> None:
        self.dataset = dataset
        self.describe = describe
        self.num_threads = num_threads

    def sizes(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Returns heights and widths (n, 2), and the number of channels."""
        sizes = self._map(lambda index: read_size(self.dataset.encoded(index)[0]), indices)
        return np.array(sizes, dtype=np.int64).reshape(-1, 2), 3

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], list[Any]]:
        """Returns the pixels of pictures, one after the other, and their targets."""

        def read(index: int) -> tuple[NDArray[np.uint8], Any]:
            encoded, target = self.dataset.encoded(index)
            pixels = encoded if isinstance(encoded, np.ndarray) else np.asarray(decode(encoded))
            return pixels.reshape(-1), target

        items = self._map(read, indices)
        return np.concatenate([pixels for pixels, _ in items]), [target for _, target in items]

    def _map(self, function: Callable[[int], Any], indices: NDArray[np.int64]) -> list[Any]:
        def called(index: int) -> Any:
            try:
                return function(index)
            except UNREADABLE as error:
                # There is no replacing here: what is on the device would depend on the number of ranks.
                message = f"cannot read {self.describe(index)}: {one_line_text(error)}"
                raise UserError(f"{message}; with data.feed: host, data.on_error may skip it") from error

        with ThreadPoolExecutor(self.num_threads) as threads:
            return list(threads.map(called, indices.tolist()))


def _collated(labels: list[Any]) -> Any:
    targets = collate(labels, lambda shape, dtype: torch.empty(shape, dtype=dtype))
    if not isinstance(targets, torch.Tensor):
        raise UserError("targets of a resident data set must be numbers or tensors of one shape")
    return targets
