"""The pinned loader: samples -> batches in host memory, with per-sample seeding.

Owns reading single samples (their random state, their errors) and the DataLoader's settings. Which samples,
and in what order, is `trainer.data.sampler`; getting batches onto the device is `trainer.data.feed`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import signal
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from trainer.data.datasets import SizedDataset
from trainer.data.sampler import SampleKey
from trainer.errors import Problem, UserError, one_line, place_at

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class LoadedBatch(NamedTuple):
    """A collated batch in host memory, and which samples are in it."""

    sample_ids: torch.Tensor  # int64 (B,)
    data: Any


class LoadFailure(NamedTuple):
    """What a worker hands over instead of a batch that could not be loaded; raised in the training process.

    An exception raised in a worker would arrive as a page of traceback text.
    """

    problems: tuple[Problem, ...]


def sample_seed(seed: int, key: SampleKey) -> int:
    """Returns the 64-bit seed of one sample: a function of (seed, epoch, index) and of nothing else."""
    digest = hashlib.blake2b(struct.pack("<Qqq", seed, key.epoch, key.sample), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def seed_global_generators(seed: int) -> None:
    """Seeds the global CPU generators of torch, numpy and random, from which users' transforms draw."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Leaves the global generators as they were: loading in the training process must not disturb dropout."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class SeededSamples(Dataset[Any]):
    """A data set and its host transform, read by `SampleKey`: every sample under its own random state."""

    def __init__(self, dataset: SizedDataset, transform: Callable[[Any], Any], seed: int, name: str) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.name = name  # its place in the config, such as `data.train`

    def __getitems__(self, keys: Sequence[SampleKey]) -> LoadedBatch | LoadFailure:
        """Loads one batch. The DataLoader calls this with a whole batch of keys."""
        try:
            if get_worker_info() is not None:
                return self._load(keys)
            with preserved_generators():
                return self._load(keys)
        except UserError as error:
            return LoadFailure(place_at(self.name, error).problems)

    def _load(self, keys: Sequence[SampleKey]) -> LoadedBatch:
        items = []
        for key in keys:
            seed_global_generators(sample_seed(self.seed, key))
            items.append(self._read(key))
        try:
            data = default_collate(items)
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise UserError(self._explain_collate(items, keys, error), path=self.name) from error
        return LoadedBatch(torch.tensor([key.sample for key in keys]), data)

    def _read(self, key: SampleKey) -> Any:
        try:
            return self.transform(self.dataset[key.sample])
        except (OSError, SyntaxError) as error:  # PIL's errors for a broken file
            message = f"cannot read {self.describe(key.sample)}: {' '.join(str(error).split())}"
            raise UserError(message, path=self.name) from error
        except Exception as error:
            error.add_note(f"while reading {self.describe(key.sample)} of {self.name}")
            raise

    def describe(self, index: int) -> str:
        """Names a sample by its number and, where the data set knows it, its file."""
        samples = getattr(self.dataset, "samples", None)  # as torchvision's folder data sets keep them
        file = samples[index][0] if isinstance(samples, list) and isinstance(samples[index], tuple) else None
        return f"sample {index}" + (f" ('{file}')" if file else "")

    def _explain_collate(self, items: list[Any], keys: Sequence[SampleKey], error: Exception) -> str:
        inputs = [item[0] if isinstance(item, tuple | list) and item else item for item in items]
        for key, value in zip(keys, inputs, strict=True):
            first = inputs[0]
            if isinstance(value, torch.Tensor) and isinstance(first, torch.Tensor) and value.shape != first.shape:
                return (
                    f"samples {keys[0].sample} and {key.sample} differ in shape ({list(first.shape)} and "
                    f"{list(value.shape)}); make them equal, for images with a resize or crop in data.transforms"
                )
        return f"samples {[key.sample for key in keys][:4]}... do not make a batch: {one_line(error)}"


def build_loader(
    samples: SeededSamples,
    batches: Sampler[list[SampleKey]],
    *,
    num_workers: int,
    prefetch_factor: int,
    pin_memory: bool,
) -> DataLoader[LoadedBatch | LoadFailure]:
    """Builds a DataLoader whose batches are `LoadedBatch` (or `LoadFailure`), in pinned memory where asked."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        collate_fn=_already_collated,  # type: ignore[arg-type]  # what __getitems__ returned, not a list
        worker_init_fn=_init_worker,
        # Its own generator: drawing the workers' base seed from the global one would make dropout depend on
        # how often a loader was started, and so a resumed run differ from an uninterrupted one.
        generator=torch.Generator(),
    )


def _already_collated(batch: LoadedBatch | LoadFailure) -> LoadedBatch | LoadFailure:
    return batch


def _init_worker(worker_id: int) -> None:
    # A group of its own: Ctrl-C and a launcher's SIGTERM go to the whole group of the training process, which
    # alone decides when to stop and needs its workers until then.
    os.setpgid(0, 0)
    # Inherited by fork, the training process's handler would only set a flag here, and never end the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # Nobody ends the workers of a training process that was killed: the kernel does, with its SIGKILL.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
