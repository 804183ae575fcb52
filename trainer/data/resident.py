"""A data set that lives on the device: moved there once, as bytes; indexing, crops and augmentation happen there.

Owns the store and its exchange between ranks. What is done with a batch after its crop is `trainer.data.augment`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from trainer.data.arrays import ArrayPictures
from trainer.data.decode import decode, read_size
from trainer.data.device_crop import crop_resize
from trainer.data.draws import sample_keys
from trainer.data.geometry import Geometry
from trainer.data.loader import LoadedBatch
from trainer.data.nested import collate, map_tensors
from trainer.data.sampler import MicroBatchSampler, StepSampler
from trainer.data.tuning import cores_of_a_rank
from trainer.errors import UserError

logger = logging.getLogger("lockstep")

_ESTIMATED_FROM = 64  # pictures whose size stands for all of a folder's


def estimate_bytes(dataset: Any) -> int:
    """Returns about how much memory the pixels of a data set take; exact where they are an array."""
    if isinstance(dataset, ArrayPictures):
        return int(dataset.images.nbytes)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, _ESTIMATED_FROM).astype(int))
    sizes = []
    for i in chosen:
        with suppress(OSError, SyntaxError):  # reading all of them will say which is broken
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
        share: which samples this rank keeps; all by default.

    Raises:
        UserError: the pictures cannot be read, or targets are no numbers.
    """

    def __init__(
        self, dataset: Any, geometry: Geometry, device: torch.device, seed: int, share: Share | None = None
    ) -> None:
        self.geometry = geometry
        self.device = device
        self.seed = seed
        self.share = share or Share()
        started = time.perf_counter()
        indices = np.arange(self.share.rank, len(dataset), self.share.num_ranks)
        pictures, targets = _read(dataset, indices)
        self.sizes = np.array([picture.shape[:2] for picture in pictures], dtype=np.int64).reshape(-1, 2)
        self.channels = pictures[0].shape[2]
        self._offsets = np.concatenate([[0], np.cumsum(self.sizes.prod(1) * self.channels)])
        self._pixels = _moved(pictures, int(self._offsets[-1]), device)
        self.targets = map_tensors(lambda tensor: tensor.to(device), targets)
        # Pictures of one size are indexed by one gather.
        self._is_uniform = bool((self.sizes == self.sizes[0]).all())
        seconds = time.perf_counter() - started
        size = self._offsets[-1] / 2**20
        logger.info("%d pictures, %.0f MiB, moved to %s in %.1f s", len(pictures), size, device, seconds)

    def batch(self, keys: NDArray[np.int64]) -> list[Any]:
        """Returns [images (B, C, height, width) uint8 in channels_last, targets] for sample keys (B, 2), all ours."""
        rows = keys[:, 1] // self.share.num_ranks
        crops = self.geometry(self.sizes[rows], sample_keys(self.seed, keys))
        size = int(crops.sizes[0, 0]), int(crops.sizes[0, 1])
        if (crops.sizes != crops.sizes[0]).any():
            raise UserError("pictures differ in size; make them equal with a resize or crop in data.transforms")
        index = self._uploaded(rows)
        targets = map_tensors(lambda tensor: tensor[index], self.targets)
        return [crop_resize(self._pictures(rows, index), crops.boxes, size), targets]

    def exchanged_batches(self, sampler: StepSampler, start: int, stop: int) -> Iterator[LoadedBatch]:
        """Yields this rank's micro-batches of some steps; all ranks exchange what the others ask of them.

        Every rank knows the whole order, so each crops its own samples for whoever needs them in a step, and one
        exchange per step brings them there. Call it on the thread of the step: it communicates.
        """
        plan = sampler.plan
        samplers = [StepSampler(plan, rank, sampler.seed) for rank in range(plan.num_ranks)]
        for step in range(start, stop):
            by_rank = [
                [np.array(keys, dtype=np.int64) for keys in MicroBatchSampler(s, step, step + 1)] for s in samplers
            ]
            images, targets = self._exchange([np.concatenate(batches) for batches in by_rank])
            first = 0
            for keys in by_rank[self.share.rank]:
                last = first + len(keys)
                yield LoadedBatch(keys, [images[first:last], targets[first:last]])
                first = last

    def _exchange(self, wanted: list[NDArray[np.int64]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the images and targets of our samples, given the keys (n, 2) that each rank wants."""
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


def _read(dataset: Any, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8] | list[NDArray[np.uint8]], Any]:
    if isinstance(dataset, ArrayPictures):
        labels = [dataset.encoded(int(i))[1] for i in indices]
        return dataset.images[indices], _collated(labels)

    def read(index: int) -> tuple[NDArray[np.uint8], Any]:
        try:
            encoded, target = dataset.encoded(index)
            return encoded if isinstance(encoded, np.ndarray) else np.asarray(decode(encoded)), target
        except (OSError, SyntaxError) as error:
            problem = " ".join(str(error).split())
            raise UserError(f"cannot read sample {index}: {problem}; a resident data set has no holes") from error

    with ThreadPoolExecutor(cores_of_a_rank(1)) as threads:  # decoding lets other threads run
        items = list(threads.map(read, indices.tolist()))
    return [pixels for pixels, _ in items], _collated([target for _, target in items])


def _collated(labels: list[Any]) -> Any:
    targets = collate(labels, lambda shape, dtype: torch.empty(shape, dtype=dtype))
    if not isinstance(targets, torch.Tensor):
        raise UserError("targets of a resident data set must be numbers or tensors of one shape")
    return targets


def _moved(pictures: NDArray[np.uint8] | list[NDArray[np.uint8]], size: int, device: torch.device) -> torch.Tensor:
    """Copies pictures one after the other into one tensor on the device, through a small buffer."""
    if isinstance(pictures, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(pictures).reshape(-1)).to(device, copy=True)
    pixels = torch.empty(size, dtype=torch.uint8, device=device)
    start = 0
    for picture in pictures:
        part = torch.from_numpy(np.array(picture).reshape(-1))
        pixels[start : start + len(part)] = part.to(device)
        start += len(part)
    return pixels
