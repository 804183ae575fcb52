"""DeviceFeed: the micro-batches of each step, on the device.

Owns the way from the loader to the device and the time that the step waited for it. Data sets that live on
the device (`device_batch`) skip the loader.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import Sampler

from trainer.config import DataConfig
from trainer.data.datasets import SizedDataset, is_image_data
from trainer.data.loader import LoadedBatch, LoadFailure, SeededSamples, build_loader
from trainer.data.sampler import EvalSampler, MicroBatchSampler, SampleKey, StepSampler
from trainer.data.transforms import Normalize, build_host_transform
from trainer.errors import UserError, place_at


@dataclass(frozen=True)
class MicroBatch:
    """One forward's worth of samples on this rank's device."""

    data: Any
    num_samples: int  # 0: a stand-in that keeps this rank in step and must have no weight
    sample_ids: torch.Tensor  # int64 (B,), in host memory
    is_last: bool  # of its step: gradients are exchanged now


class OnDeviceBatches:
    """Batches of a data set that makes them on the device; stands where the loader otherwise stands."""

    def __init__(self, dataset: Any, batches: Iterable[list[SampleKey]], device: torch.device) -> None:
        self.dataset = dataset
        self.batches = batches
        self.device = device

    def __iter__(self) -> Iterator[LoadedBatch]:
        for keys in self.batches:
            ids = torch.tensor([key.sample for key in keys])
            yield LoadedBatch(ids, self.dataset.device_batch(ids, self.device))


class DeviceFeed:
    """Feeds one data set, training or evaluation, to this rank's device.

    Args:
        dataset: the samples.
        config: the `data` section.
        split: `train` or `eval`, which transforms to apply and how errors name the data.
        device: where batches go.
        seed: seed of the samples' random state.
        input_key: where the input is in a sample that is a dict.
        check: called with each batch while it is in host memory; raises UserError on bad data.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        config: DataConfig,
        split: str,
        device: torch.device,
        seed: int,
        input_key: str,
        check: Callable[[Any, torch.Tensor], None],
    ) -> None:
        components = config.transforms.train if split == "train" else config.transforms.eval
        if components and hasattr(dataset, "device_batch"):
            raise UserError("data that is made on the device has no host transforms", path=f"data.transforms.{split}")
        convert = config.normalize is not None or is_image_data(dataset)
        transform = build_host_transform(components, f"data.transforms.{split}", input_key, as_bytes=convert)
        self.samples = SeededSamples(dataset, transform, seed, f"data.{split}")
        self.config = config
        self.device = device
        self.input_key = input_key
        self.check = check
        self.data_wait_seconds = 0.0
        self._device_transform = Normalize(config.normalize) if convert else None
        self._batches: Iterator[LoadedBatch] | None = None
        self._micro_batches: MicroBatchSampler | None = None

    def start(self, sampler: StepSampler, step: int, total_steps: int) -> None:
        """Seeks to `step`: the next `step_batches` call must be for it."""
        self.close()
        self._micro_batches = MicroBatchSampler(sampler, step, total_steps)
        self._batches = self._iterate(self._micro_batches)

    def step_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yields the micro-batches of one training step; steps must follow one another."""
        assert self._batches is not None
        assert self._micro_batches is not None
        sizes = self._micro_batches.micro_batch_sizes(step)
        for i, num_samples in enumerate(sizes):
            batch = next(self._batches)
            yield MicroBatch(batch.data, num_samples, batch.sample_ids, is_last=i == len(sizes) - 1)

    def eval_batches(self, batch_size: int, rank: int, num_ranks: int) -> Iterator[MicroBatch]:
        """Yields this rank's share of the data set, each sample once over all ranks."""
        sampler = EvalSampler(len(self.samples.dataset), batch_size, rank, num_ranks)
        for batch in self._iterate(sampler):
            yield MicroBatch(batch.data, len(batch.sample_ids), batch.sample_ids, is_last=True)

    def close(self) -> None:
        """Ends the loader's workers."""
        # The iterator holds the DataLoader's; closing a generator runs its clean-up, which ends the workers.
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]
            self._batches = None

    def _iterate(self, sampler: Sampler[list[SampleKey]]) -> Iterator[LoadedBatch]:
        on_device = hasattr(self.samples.dataset, "device_batch")
        source: Iterable[LoadedBatch | LoadFailure]
        if on_device:
            source = OnDeviceBatches(self.samples.dataset, sampler, self.device)
        else:
            source = build_loader(
                self.samples,
                sampler,
                num_workers=self.config.workers,
                prefetch_factor=self.config.prefetch_factor,
                pin_memory=self.device.type == "cuda",
            )
        batches = iter(source)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.data_wait_seconds += time.perf_counter() - started
            if batch is None:
                return
            if isinstance(batch, LoadFailure):
                raise UserError(*batch.problems)
            if not on_device:
                self._check(batch)
            data = send_to_device(batch.data, self.device, non_blocking=True)
            yield LoadedBatch(batch.sample_ids, self._transform_on_device(data))

    def _check(self, batch: LoadedBatch) -> None:
        try:
            self.check(batch.data, batch.sample_ids)
        except UserError as error:
            raise place_at(self.samples.name, error) from None

    def _transform_on_device(self, data: Any) -> Any:
        if self._device_transform is None:
            return data
        if isinstance(data, torch.Tensor):
            return self._device_transform(data)
        if isinstance(data, Mapping):
            if self.input_key not in data:
                raise UserError(f"samples have no key '{self.input_key}' to normalise", path="data.normalize")
            return {**data, self.input_key: self._device_transform(data[self.input_key])}
        return [self._device_transform(data[0]), *data[1:]]
