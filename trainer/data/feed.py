"""DeviceFeed: the micro-batches of each step, on the device before the step asks for them.

Puts the parts together: the sampler's requests, the loader's workers, the copies to the device, and the device half
of the transforms; and measures how long the step waited. Data sets that live on the device (`device_batch`) need
neither workers nor copies.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch

from trainer.config_data import AugmentConfig, DataConfig
from trainer.data.datasets import SizedDataset, is_image_data
from trainer.data.device_decode import DeviceDecoder
from trainer.data.device_half import DeviceHalf, ImageMeaning
from trainer.data.joint import JointTransform, check_joint_transforms, with_typed_samples
from trainer.data.loader import LoadedBatch, LoadFailure, SampleLoader, preserved_generators
from trainer.data.modes import Route, choose_route, why_host_only, without_effect
from trainer.data.nested import map_tensors, num_bytes
from trainer.data.prefetch import DeviceBatch, Prefetcher
from trainer.data.resident import ResidentPictures, Share
from trainer.data.sampler import EvalSampler, KeyRows, MicroBatchSampler, SampleKey, StepSampler, key_array
from trainer.data.slots import Slot
from trainer.data.transforms import HostTransform, build_transforms, check_pictures
from trainer.data.tuning import WorkerTuner
from trainer.data.unreadable import Unreadable
from trainer.data.workers import WorkerPool
from trainer.errors import BadSample, UserError, place_at
from trainer.telemetry.memory import device_memory
from trainer.units import counted

logger = logging.getLogger("lockstep")


@dataclass(frozen=True)
class MicroBatch:
    """One forward's worth of samples on this rank's device."""

    data: Any
    num_samples: int  # 0: a stand-in that keeps this rank in step and must have no weight
    sample_ids: torch.Tensor  # int64 (B,), in host memory
    is_last: bool  # of its step: gradients are exchanged now


class BatchMeaning(ImageMeaning, Protocol):
    """What the feed must know of a batch; a task knows it."""

    target_key: str
    target_keys: tuple[str, ...] | None

    def check(self, data: Any, sample_ids: torch.Tensor) -> None:
        """Raises UserError where a batch in host memory cannot be used."""


class DeviceFeed:
    """Feeds one data set, training or evaluation, to this rank's device.

    Args:
        dataset: the samples.
        config: the `data` section.
        split: which transforms to apply and how errors name the data.
        device: where batches go.
        seed: seed of the samples' random state.
        task: what a batch means.
        dtype: of the images that the device half makes: that of the step.
        max_workers: most worker processes that `workers: auto` starts.
        ranks: which of how many processes this is, for a resident data set that they share.
        memory: bytes of device memory from which to judge whether the data fits; the same on every rank.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        config: DataConfig,
        split: Literal["train", "eval"],
        device: torch.device,
        seed: int,
        task: BatchMeaning,
        dtype: torch.dtype = torch.float32,
        max_workers: int = 1,
        ranks: Share | None = None,
        memory: int | None = None,
    ) -> None:
        self.config = config
        self.name = f"data.{split}"
        self.dataset = self._typed(dataset, task) if task.transforms_targets else dataset
        self.device = device
        self.seed = seed
        self.task = task
        self.data_wait_seconds = 0.0
        self.copy_wait_seconds = 0.0
        """A part of `data_wait_seconds`: while a batch was copied to the device, and decoded there."""
        self.load_seconds = 0.0
        """That loading took, of one process after the other, for `num_loaded` batches."""
        self.load_cpu_seconds = 0.0
        """A part of `load_seconds`: on a core."""
        self.num_loaded = 0
        self.on_arrival: Callable[[], None] | None = None
        """Called when a batch of a step is on the device, before the device half of the transforms."""
        self._reading: tuple[int, float] | None = None  # which sample this process reads, and since when
        self._unreadable = Unreadable(self.name, len(self.dataset), config.max_skipped)
        self._is_train = split == "train"
        transforms = build_transforms(getattr(config.transforms, split), f"data.transforms.{split}")
        if is_image_data(self.dataset):
            check_pictures(transforms, f"data.transforms.{split}")
        if task.transforms_targets:
            check_joint_transforms(transforms, f"data.transforms.{split}")
        memory = device_memory(device) if memory is None else memory
        num_ranks = (ranks or Share()).num_ranks
        route = choose_route(self.dataset, config, split, transforms, device, num_ranks, memory, why_host_only(task))
        logger.info("%s: feed %s: %s", self.name, route.mode, route.reason)
        if self._is_train and (unused := without_effect(config, route)):
            logger.info("without effect here: %s", ", ".join(f"data.{key}" for key in unused))
        self.mode = route.mode
        self._build(route, dtype, ranks or Share(), max_workers)
        self._pool: WorkerPool | None = None
        self._prefetcher: Prefetcher | None = None
        self._tuner: WorkerTuner | None = None
        self._num_workers = max_workers if config.workers == "auto" else config.workers
        if config.workers == "auto" and self._is_train and max_workers > 1:
            self._tuner = WorkerTuner(max_workers)
        self._batches: Iterator[DeviceBatch] | None = None
        self._micro_batches: MicroBatchSampler | None = None

    @property
    def num_workers(self) -> int:
        """Worker processes that load now; 0 where this one loads, or nobody has to."""
        return self._pool.num_workers if self._pool is not None else 0

    @property
    def num_skipped(self) -> int:
        """How often a sample could not be read."""
        return self._unreadable.num_skipped

    @property
    def workers_text(self) -> str:
        """Who loads, in words."""
        if self._loader is None:
            return "no workers needed"
        if self._num_workers == 0:
            return "loaded in the training process"
        return f"up to {counted(self._num_workers, 'worker')} per process, {self.config.prefetch} batches ahead"

    @property
    def resident_bytes(self) -> int:
        """Device memory that the data set itself takes."""
        return 0 if self._resident is None else self._resident.num_bytes

    def _typed(self, dataset: SizedDataset, task: BatchMeaning) -> SizedDataset:
        try:
            return with_typed_samples(dataset, task.target_keys)
        except UserError as error:
            raise place_at(self.name, error) from None

    def _build(self, route: Route, dtype: torch.dtype, ranks: Share, num_threads: int) -> None:
        config, task = self.config, self.task
        augment = config.augment if self._is_train else AugmentConfig()
        self._device_half = DeviceHalf(route, config.normalize, augment, task, self.device, self.seed, dtype)
        skip: Literal["replace", "drop"] = "replace" if self._is_train else "drop"
        loader = SampleLoader(
            route.dataset,
            JointTransform(route.on_host, task.input_key, task.target_key, as_bytes=route.is_image_data)
            if task.transforms_targets
            else HostTransform(route.on_host, task.input_key, as_bytes=route.is_image_data),
            route.geometry,
            self.seed,
            self.name,
            on_error="raise" if config.on_error == "raise" else skip,
            stacks=task.stacks,
        )
        self._reader = loader
        self._loader = loader if route.mode in ("host", "device_decode") else None
        self._decoder = DeviceDecoder(self.device) if route.mode == "device_decode" else None
        self._resident: ResidentPictures | None = None
        if route.mode == "resident":
            assert route.geometry is not None
            try:
                self._resident = ResidentPictures(
                    route.dataset,
                    route.geometry,
                    self.device,
                    self.seed,
                    loader.describe,
                    lambda targets, ids: self.task.check([None, targets], ids),
                    num_threads,
                    ranks if route.is_sharded else None,
                )
            except UserError as error:
                raise place_at(self.name, error) from None

    # ---- batches ---------------------------------------------------------------------------------------------

    def start(self, sampler: StepSampler, step: int, total_steps: int) -> None:
        """Seeks to `step`: the next `step_batches` call must be for it."""
        self._stop()
        self._micro_batches = MicroBatchSampler(sampler, step, total_steps)
        if self._resident is not None and self._resident.share.num_ranks > 1:
            batches = self._resident.exchanged_batches(sampler, step, total_steps)
            self._batches = map(self._drawn, batches)
        else:
            self._batches = self._iterate(self._micro_batches)

    def step_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yields the micro-batches of one training step; steps must follow one another."""
        assert self._batches is not None
        assert self._micro_batches is not None
        sizes = self._micro_batches.micro_batch_sizes(step)
        for i, num_samples in enumerate(sizes):
            item = self._next(self._batches)
            assert item is not None
            if self.on_arrival is not None:
                self.on_arrival()
            data = self._device_half.finish(item.batch.data, item.plan)
            yield MicroBatch(data, num_samples, item.batch.sample_ids, is_last=i == len(sizes) - 1)
        self._settle_workers()

    def eval_batches(self, batch_size: int, rank: int, num_ranks: int) -> Generator[MicroBatch, None, None]:
        """Yields this rank's share of the data set, each sample once over all ranks."""
        sampler = EvalSampler(len(self.dataset), batch_size, rank, num_ranks)
        self._stop()
        batches = self._iterate(sampler)
        prefetcher = self._prefetcher
        try:
            while (item := self._next(batches)) is not None:
                if len(item.batch.keys):  # else all its samples were unreadable
                    data, ids = self._device_half.finish(item.batch.data, item.plan), item.batch.sample_ids
                    yield MicroBatch(data, len(ids), ids, is_last=True)
        finally:
            if self._prefetcher is prefetcher:  # else this evaluation was left early, and another has begun
                self._stop()

    def example(self, num_samples: int) -> tuple[Any, int]:
        """Returns a batch of the first samples as the step gets it, and the bytes per sample that travel to the device.

        Reads them in this process; nothing else is begun or moved on.
        """
        keys = [SampleKey(0, i % len(self.dataset)) for i in range(num_samples)]
        makes_batches = self._resident is None and self._loader is None
        made = self._made_on_device([keys]) if makes_batches else self._loaded_here(self._reader, [keys])
        item = next(made)
        sent_bytes = 0 if makes_batches else num_bytes(item.batch.data) // num_samples
        return self._device_half.finish(item.batch.data, item.plan), sent_bytes

    def readings(self) -> list[str]:
        """Returns what is being read at this moment, a line per reader; for other threads."""
        if self._pool is not None:
            return [
                f"{self.name}: worker {worker} has been reading {self._reader.describe(sample)} for {seconds:.1f} s"
                for worker, sample, seconds in self._pool.readings()
            ]
        if self._reading is None:
            return []
        sample, since = self._reading
        return [f"{self.name}: has been reading {self._reader.describe(sample)} for {time.monotonic() - since:.1f} s"]

    def worker_pids(self) -> list[int]:
        """Returns the process ids of the loader workers."""
        return self._pool.pids() if self._pool is not None else []

    def batch_bytes(self) -> int:
        """Returns the shared memory that a micro-batch of the workers takes; 0 where there are none."""
        return max(slot.num_bytes for slot in self._pool.slots) if self._pool is not None else 0

    def close(self) -> None:
        """Ends the thread and the workers, and gives shared memory back."""
        self._stop()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _stop(self) -> None:
        """Ends the batches under way; the workers stay."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        self._batches = None

    def _next(self, batches: Iterator[DeviceBatch]) -> DeviceBatch | None:
        started = time.perf_counter()
        item = next(batches, None)
        waited = time.perf_counter() - started
        self.data_wait_seconds += waited
        if item is not None:
            if item.copying is not None:  # of which the step has waited for the last part, or for none
                self.copy_wait_seconds += max(min(item.copying[1], started + waited) - max(item.copying[0], started), 0)
            # In evaluation what is skipped has no replacement.
            num_read = len(item.batch.keys) + (0 if self._is_train else len(item.batch.skipped))
            self._unreadable.count(num_read, item.batch.skipped)
            self.load_seconds += item.load_seconds
            self.load_cpu_seconds += item.load_cpu_seconds
            self.num_loaded += 1
            if self._tuner is not None:
                self._tuner.observe(started, waited, item.load_seconds)
        return item

    # ---- where batches come from -----------------------------------------------------------------------------

    def _iterate(self, requests: Iterable[KeyRows]) -> Iterator[DeviceBatch]:
        if self._loader is None:
            return self._made_on_device(requests)
        if self._num_workers == 0:
            return self._loaded_here(self._loader, requests)
        self._prefetcher = Prefetcher(
            self._started_pool(self._loader),
            requests,
            self.device,
            self.config.prefetch,
            self._check,
            self._move,
            self._device_half.draw,
        )
        return iter(self._prefetcher.get, None)

    def _made_on_device(self, requests: Iterable[KeyRows]) -> Iterator[DeviceBatch]:
        dataset: Any = self.dataset
        for request in requests:
            batch = LoadedBatch(key_array(request), None)
            if self._resident is not None:
                data = self._resident.batch(batch.keys)
            else:
                data = dataset.device_batch(batch.sample_ids, self.device)
            yield self._drawn(batch._replace(data=data))

    def _loaded_here(self, loader: SampleLoader, requests: Iterable[KeyRows]) -> Iterator[DeviceBatch]:
        """Loads in this process, on this thread: users' transforms draw from its global generators."""
        for keys in requests:
            started, cpu_started = time.perf_counter(), time.thread_time()
            with preserved_generators() if loader.is_random else nullcontext():
                load = loader.load if self._decoder is None else loader.load_encoded
                batch = load(keys, _in_own_memory, self._begin_reading)
            self._reading = None
            if isinstance(batch, LoadFailure):
                raise UserError(*batch.problems)
            if len(batch.keys):
                self._check(batch)
            began, cpu_seconds = time.perf_counter(), time.thread_time() - cpu_started
            if self._decoder is not None:
                batch = self._decoder.finish(batch, loader, self.seed)
            else:
                batch = batch._replace(data=map_tensors(self._moved, batch.data))
            item = self._drawn(batch)._replace(copying=(began, time.perf_counter()))
            yield item._replace(load_seconds=began - started, load_cpu_seconds=cpu_seconds)

    def _begin_reading(self, sample: int) -> None:
        self._reading = sample, time.monotonic()

    def _started_pool(self, loader: SampleLoader) -> WorkerPool:
        if self._pool is None:
            self._pool = WorkerPool(
                partial(_load_into_slot, loader.load if self._decoder is None else loader.load_encoded),
                loader.describe,
                num_workers=self._num_workers,
                max_workers=self._num_workers,
                prefetch_factor=self.config.prefetch_factor,
                held=1,
                pin=self.device.type == "cuda",
            )
        return self._pool

    def _move(self, batch: LoadedBatch) -> LoadedBatch:
        """Moves a worker's batch to the device, on the thread and the stream of the copies."""
        if self._decoder is not None:
            assert self._loader is not None
            return self._decoder.finish(batch, self._loader, self.seed)
        if self.device.type != "cuda":
            return batch._replace(data=map_tensors(torch.clone, batch.data))
        # From pinned memory these return at once and the copies overlap with the step.
        data = map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), batch.data)
        return batch._replace(data=data)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _drawn(self, batch: LoadedBatch) -> DeviceBatch:
        """Returns a batch that is on the device with its augmentation, there, too."""
        plan = self._device_half.draw(batch)
        return DeviceBatch(batch, None if plan is None else map_tensors(self._moved, plan))

    def _settle_workers(self) -> None:
        if self._tuner is None or self._pool is None:
            return
        chosen = self._tuner.chosen()
        if chosen is not None:
            logger.info("data.workers: %d, of at most %d: %s", chosen, self._num_workers, self._tuner.reason)
            self._pool.resize(chosen)
            self._tuner = None

    def _check(self, batch: LoadedBatch) -> None:
        try:
            self.task.check(batch.data, batch.sample_ids)
        except BadSample as error:
            if error.sample is None:
                raise place_at(self.name, error) from None
            raise error.named(self._reader.describe(error.sample), self.name) from None
        except UserError as error:
            raise place_at(self.name, error) from None


def _load_into_slot(load: Callable[..., Any], keys: Any, slot: Slot, reading: Callable[[int], None]) -> Any:
    return load(keys, slot.allocate, reading)


def _in_own_memory(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)
