"""Feeds for tests on a GPU: their configs and pictures, and what they deliver, on the GPU and on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.config_data import DataConfig
from trainer.data.decode import codec, decodes_on_gpu
from trainer.data.feed import DeviceFeed, MicroBatch
from trainer.data.sampler import BatchPlan, StepSampler
from trainer.tasks.classification import Classification

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SEED, BATCH, NUM_CLASSES = 3, 32, 7
ENDLESS = 10**6  # steps
MILLISECOND = 2_000_000  # cycles of a GPU's clock, about
NORMALIZE = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
CROPS: list[dict[str, Any]] = [{"name": "RandomResizedCrop", "args": {"size": 48}}, {"name": "RandomHorizontalFlip"}]


def config(train: dict[str, Any], crops: list[dict[str, Any]], **settings: Any) -> DataConfig:
    base: dict[str, Any] = {"train": train, "feed": "host", "workers": 2, "prefetch": 2}
    base["transforms"] = {"train": crops}
    return DataConfig.model_validate({**base, **settings})


def folder_config(folder: Path, **settings: Any) -> DataConfig:
    return config(
        {"name": "image_folder", "args": {"root": str(folder)}}, CROPS, **{"normalize": NORMALIZE, **settings}
    )


def needs_gpu_decoder() -> None:
    """Skips a test where the GPU decodes no pictures."""
    if not (codec() and decodes_on_gpu()):
        pytest.skip("needs nvImageCodec (nvidia-nvimgcodec-cu13) and nvJPEG (nvidia-nvjpeg)")


@contextmanager
def opened(dataset: Any, data: DataConfig, device: torch.device = CUDA) -> Iterator[DeviceFeed]:
    """Opens a feed that its user still has to start."""
    feed = DeviceFeed(dataset, data, "train", device, SEED, Classification(num_classes=NUM_CLASSES))
    try:
        yield feed
    finally:
        feed.close()


def start(feed: DeviceFeed, batch_size: int = BATCH) -> None:
    """Starts a feed at step 0, without an end."""
    mixes = feed.config.augment.mixes
    plan = BatchPlan.split(len(feed.dataset), batch_size, None, 1, False, group_size=2 if mixes else 1)
    feed.start(StepSampler(plan, 0, SEED), 0, ENDLESS)


def steps(feed: DeviceFeed, first: int, last: int) -> Iterator[MicroBatch]:
    for step in range(first, last):
        yield from feed.step_batches(step)


def save_picture(path: Path, index: int, **settings: Any) -> None:
    """Saves a smooth picture, whose size differs from its neighbours'."""
    low = np.random.default_rng(index).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(low).resize((90 + index % 31, 70 + index % 17), Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **settings)


def record_bytes(feed: DeviceFeed, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Returns a list that will hold the images of each batch as they are before the device half."""
    seen: list[torch.Tensor] = []
    finish = feed._device_half.finish

    def record(data: Any, plan: Any) -> Any:
        seen.append(feed._device_half._images(data).cpu())
        return finish(data, plan)

    monkeypatch.setattr(feed._device_half, "finish", record)
    return seen


def batches_of(
    dataset: Any, data: DataConfig, device: torch.device, monkeypatch: pytest.MonkeyPatch, num_steps: int = 7
) -> list[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Returns of each batch the ids, and on the host the bytes before the device half, images and targets after it."""
    with opened(dataset, data, device) as feed:
        seen = record_bytes(feed, monkeypatch)
        start(feed)
        batches = list(steps(feed, 0, num_steps))
        return [
            (batch.sample_ids.tolist(), before, batch.data[0].cpu(), batch.data[1].cpu())
            for batch, before in zip(batches, seen, strict=True)
        ]
