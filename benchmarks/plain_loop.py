"""The plain loop that every feed trains in: the same model, precision and optimizer, so that only the feed differs.

Owns what is counted, and what a trace of a few steps says of copies beside compute.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.feed_entries import AREA, ASPECT, MEAN, STD
from trainer.config_model import ModelConfig
from trainer.model import build_model

NUM_OUTPUTS = 1000  # of the models, as on ImageNet; the pictures' labels are the first of them
PRECISION = torch.bfloat16
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
TRACED_STEPS = 8
TINY_MODEL = "small_cnn"

_FIRST_STEPS = 3  # these compile, choose kernels and allocate; then the seconds of the warm-up begin


@dataclass(frozen=True)
class Setup:
    """What the measurements of one model have in common."""

    model: str
    folder: Path  # class folders of JPEGs
    batch_size: int
    image_size: int  # pixels, of both sides
    workers: int
    device: torch.device
    compile: bool
    seconds: float  # that are counted
    warm_up_seconds: float  # before them


@dataclass(frozen=True)
class Measurement:
    """What one window gave."""

    images: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Pictures trained on per second on the clock."""
        return self.images / self.seconds


def data_section(setup: Setup, mode: str) -> dict[str, Any]:
    """Returns the `data` section of our config."""
    crop = {"name": "RandomResizedCrop", "args": {"size": setup.image_size, "scale": list(AREA), "ratio": list(ASPECT)}}
    return {
        "train": {"name": "image_folder", "args": {"root": str(setup.folder)}},
        "transforms": {"train": [crop, {"name": "RandomHorizontalFlip"}]},
        "normalize": {"mean": list(MEAN), "std": list(STD)},
        "feed": mode,
        "workers": setup.workers,
        "drop_last": True,
    }


def model_section(setup: Setup) -> dict[str, Any]:
    """Returns the `model` section of our config."""
    channels = {"in_channels": 3} if setup.model == TINY_MODEL else {}
    compiled = "model" if setup.compile else "none"
    return {"name": setup.model, "args": {"num_classes": NUM_OUTPUTS, **channels}, "compile": compiled}


class PlainLoop:
    """A model in training: forward and backward in bfloat16 autocast, channels_last, SGD with momentum."""

    def __init__(self, setup: Setup) -> None:
        self.device = setup.device
        model = build_model(ModelConfig.model_validate(model_section(setup)), NUM_OUTPUTS)
        model = model.to(setup.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = torch.optim.SGD(
            model.parameters(),
            lr=LEARNING_RATE,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            fused=setup.device.type == "cuda",  # as our trainer chooses
        )
        self._model: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model) if setup.compile else model

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> int:
        """Trains on a batch, without waiting for the device; returns the number of its images."""
        with torch.autocast(self.device.type, PRECISION):
            outputs = self._model(images.contiguous(memory_format=torch.channels_last))
            loss = torch.nn.functional.cross_entropy(outputs, labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return len(images)

    def measure(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], setup: Setup) -> Measurement:
        """Trains through a warm-up that does not count, then counts images for `setup.seconds`."""
        for _ in range(_FIRST_STEPS):
            self.step(*next(batches))
        self._train_for(setup.warm_up_seconds, batches)
        return self._train_for(setup.seconds, batches)

    def trace(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], file: Path) -> tuple[int, int]:
        """Writes a Chrome trace of some steps; returns its copies, and how many of them overlap with kernels."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        for _ in range(TRACED_STEPS):
            self.step(*next(batches))
        self._wait()
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(TRACED_STEPS):
                self.step(*next(batches))
            self._wait()
        file.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(file))
        return count_overlapping_copies(json.loads(file.read_text(encoding="utf-8")))

    def _train_for(self, seconds: float, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> Measurement:
        self._wait()
        images = 0
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            images += self.step(*next(batches))
        self._wait()
        return Measurement(images, time.perf_counter() - started)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def count_overlapping_copies(trace: Mapping[str, Any]) -> tuple[int, int]:
    """Counts a Chrome trace's copies to the device, and those during which a kernel of another stream ran.

    Args:
        trace: what `torch.profiler` exports.
    """
    events = [event for event in trace["traceEvents"] if event.get("cat") in ("kernel", "gpu_memcpy")]
    kernels = [event for event in events if event["cat"] == "kernel"]
    copies = [event for event in events if event["cat"] == "gpu_memcpy" and "HtoD" in event["name"]]

    def overlap(copy: Mapping[str, Any], kernel: Mapping[str, Any]) -> bool:
        is_elsewhere = copy["args"]["stream"] != kernel["args"]["stream"]
        starts_before_end = kernel["ts"] < copy["ts"] + copy["dur"] and copy["ts"] < kernel["ts"] + kernel["dur"]
        return is_elsewhere and bool(starts_before_end)

    return len(copies), sum(any(overlap(copy, kernel) for kernel in kernels) for copy in copies)
