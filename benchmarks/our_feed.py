"""Our ways from a folder of JPEGs to batches: the feed's host half, all of it on the CPU, and from packed copies."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.feed_entries import BYTES_UNFLIPPED, FLOATS, MEAN, SIZE, STD, Batches, Entries
from benchmarks.pictures import NUM_CLASSES

OURS = Entries("ours")

_OUR_PACKAGES = ("lockstep-trainer", "nvidia-nvimgcodec-cu*", "torch", "pillow")
_ENDLESS = 10**9  # steps


@OURS.add("ours", BYTES_UNFLIPPED, *_OUR_PACKAGES)
def _ours(folder: Path, batch_size: int, seed: int) -> Batches:
    """What our host does; the device half (flip, normalise) is the GPU's on a real run."""
    return _host_half(open_our_feed(folder, batch_size, seed))


@OURS.add("ours-all-on-cpu", FLOATS, *_OUR_PACKAGES)
def _ours_all_on_cpu(folder: Path, batch_size: int, seed: int) -> Batches:
    """With the device half, on the CPU: what a run without a GPU does."""
    feed = open_our_feed(folder, batch_size, seed)
    try:
        for step in itertools.count():
            for batch in feed.step_batches(step):
                yield len(batch.sample_ids)
    finally:
        feed.close()


@OURS.add("ours-packed-jpeg", BYTES_UNFLIPPED, *_OUR_PACKAGES)
def _ours_packed_jpeg(folder: Path, batch_size: int, seed: int) -> Batches:
    """From the packed cache, as its defaults are: JPEGs, the shorter side at most 400 pixels."""
    return _host_half(open_our_feed(folder, batch_size, seed, pack={}))


@OURS.add("ours-packed-jpeg-256", BYTES_UNFLIPPED, *_OUR_PACKAGES)
def _ours_packed_jpeg_256(folder: Path, batch_size: int, seed: int) -> Batches:
    """From the packed cache, pictures shrunk to 256 pixels."""
    return _host_half(open_our_feed(folder, batch_size, seed, pack={"max_size": 256}))


@OURS.add("ours-packed-mixed-256", BYTES_UNFLIPPED, *_OUR_PACKAGES)
def _ours_packed_mixed_256(folder: Path, batch_size: int, seed: int) -> Batches:
    """From the packed cache, shrunk to 256 pixels, every second picture stored raw."""
    return _host_half(open_our_feed(folder, batch_size, seed, pack={"max_size": 256, "encoding": "mixed"}))


@OURS.add("ours-packed-raw", BYTES_UNFLIPPED, *_OUR_PACKAGES)
def _ours_packed_raw(folder: Path, batch_size: int, seed: int) -> Batches:
    """From the packed cache, stored raw, the shorter side at most 400 pixels."""
    return _host_half(open_our_feed(folder, batch_size, seed, pack={"encoding": "raw"}))


@OURS.add("ours-packed-raw-256", BYTES_UNFLIPPED, *_OUR_PACKAGES)
def _ours_packed_raw_256(folder: Path, batch_size: int, seed: int) -> Batches:
    """From the packed cache, stored raw, shrunk to 256 pixels."""
    return _host_half(open_our_feed(folder, batch_size, seed, pack={"max_size": 256, "encoding": "raw"}))


def _host_half(feed: Any) -> Batches:
    try:
        while True:  # not `step_batches`, which runs the device half
            yield len(feed._next(feed._batches).batch.sample_ids)
    finally:
        feed.close()


def open_our_feed(folder: Path, batch_size: int, seed: int, pack: dict[str, Any] | None = None, **settings: Any) -> Any:
    """Returns our `DeviceFeed` on the CPU with one worker, started at step 0.

    Args:
        folder: class folders of JPEGs.
        batch_size: pictures per batch.
        seed: seed of order and augmentation.
        pack: settings of the packed cache that is read instead, and made first.
        **settings: further keys of the config's `data` section.
    """
    import torch

    from trainer.config_data import CacheConfig, DataConfig
    from trainer.data.datasets import build_dataset
    from trainer.data.feed import DeviceFeed
    from trainer.data.packed import PackedImages
    from trainer.data.packing import pack_folder
    from trainer.data.sampler import BatchPlan, StepSampler

    section = {
        "train": {"name": "image_folder", "args": {"root": str(folder)}},
        "transforms": {
            "train": [{"name": "RandomResizedCrop", "args": {"size": SIZE}}, {"name": "RandomHorizontalFlip"}]
        },
        "normalize": {"mean": list(MEAN), "std": list(STD)},
        "workers": 1,
        **settings,
    }
    config = DataConfig.model_validate(section)
    dataset: Any = build_dataset(config.train, "data.train", _OnlyRank())
    if pack is not None:
        cache = CacheConfig(path=str(folder.with_name(f"{folder.name}-packed")), **pack)
        dataset = PackedImages(pack_folder(dataset, cache))
    feed = DeviceFeed(dataset, config, "train", torch.device("cpu"), seed, _Pairs())
    plan = BatchPlan.split(len(dataset), batch_size, None, num_ranks=1, drop_last=False)
    feed.start(StepSampler(plan, rank=0, seed=seed), step=0, total_steps=_ENDLESS)
    return feed


class _Pairs:
    """What a task would say of batches that are (images, labels)."""

    input_key, target_key = "image", "label"
    num_classes: int | None = NUM_CLASSES
    transforms_targets, stacks = False, True
    target_keys: tuple[str, ...] | None = None

    def check(self, data: Any, sample_ids: Any) -> None:
        """Finds nothing wrong."""

    def targets(self, data: Any) -> Any:
        """Returns the labels."""
        return data[1]

    def with_targets(self, data: Any, targets: Any) -> Any:
        """Returns the batch with other labels."""
        return [data[0], targets]


class _OnlyRank:
    """A job of one process: nobody goes first."""

    def main_first(self) -> AbstractContextManager[None]:
        return nullcontext()
