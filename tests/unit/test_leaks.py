"""Thousands of epochs, hundreds of early exits: nothing is left behind, and memory stays flat."""

from __future__ import annotations

import gc
import os
import statistics
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from conftest import nightly
from vectors import MissingFile, Vectors

from trainer.config import load_config
from trainer.data.feed import DeviceFeed
from trainer.data.sampler import BatchPlan, StepSampler
from trainer.errors import UserError
from trainer.tasks.classification import Classification

NUM_SAMPLES, BATCH = 20, 8
PLAN = BatchPlan.split(NUM_SAMPLES, BATCH, None, 1, False)
FLAT_MIB = 8.0  # what RSS may differ by: an allocator's arena, not something kept per epoch

OpenFeed = Callable[..., DeviceFeed]


class Belongings(NamedTuple):
    """What a process holds."""

    threads: set[str]
    processes: set[int]
    files: Counter[str]
    shm: set[str]
    mapped_slots: int


def belongings() -> Belongings:
    gc.collect()
    files: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            files[os.readlink(f"/proc/self/fd/{number}").split(":")[0]] += 1
    return Belongings(
        {thread.name for thread in threading.enumerate()},
        {child.pid for child in psutil.Process().children(recursive=True)},
        files,
        set(os.listdir("/dev/shm")),
        Path("/proc/self/maps").read_text().count("lockstep-slot"),
    )


def nothing_more(after: Belongings, before: Belongings) -> bool:
    """Tells whether nothing was added; prints what was."""
    more: list[Any] = [after.threads - before.threads, after.processes - before.processes]
    more += [after.files - before.files, after.shm - before.shm]
    print("left behind:", more, after.mapped_slots - before.mapped_slots)
    return not any(more) and after.mapped_slots <= before.mapped_slots


class MemoryLog:
    """Resident memory of this process and its workers, over time."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.mib: dict[int, list[float]] = {}

    def note(self) -> None:
        """Takes down how much there is now."""
        for process in [self.process, *self.process.children()]:
            self.mib.setdefault(process.pid, []).append(process.memory_info().rss / 2**20)

    def growths(self) -> list[float]:
        """Returns MiB by which the last quarter's median is above the first's, per process seen throughout."""
        most = max(map(len, self.mib.values()))
        full = [values for values in self.mib.values() if len(values) == most]
        assert len(full) >= 3, "the training process and two workers"
        quarter = most // 4
        return [statistics.median(v[-quarter:]) - statistics.median(v[:quarter]) for v in full]


@pytest.fixture
def open_feed(request: pytest.FixtureRequest) -> OpenFeed:
    file = str(request.config.rootpath / "configs/digits.yaml")
    config = load_config(file, ["data.workers=2", "data.transforms.train=[]"]).data

    def open_(dataset: Any = None, split: Any = "train") -> DeviceFeed:
        return DeviceFeed(dataset or Vectors(NUM_SAMPLES), config, split, torch.device("cpu"), 0, Classification())

    return open_


def start(feed: DeviceFeed, epochs: int) -> None:
    feed.start(StepSampler(PLAN, 0, 0), 0, epochs * PLAN.steps_per_epoch)


def train(feed: DeviceFeed, steps: int) -> None:
    for step in range(steps):
        for batch in feed.step_batches(step):
            assert batch.num_samples == PLAN.step_samples(step)


@nightly
def test_two_thousand_epochs(open_feed: OpenFeed) -> None:
    open_feed().close()
    before, memory = belongings(), MemoryLog()
    training, evaluation = open_feed(), open_feed(split="eval")
    start(training, 2000)
    assert sum(batch.num_samples for batch in evaluation.eval_batches(BATCH, 0, 1)) == NUM_SAMPLES
    seen = 0
    for step in range(2000 * PLAN.steps_per_epoch):
        seen += sum(batch.num_samples for batch in training.step_batches(step))
        if step % PLAN.steps_per_epoch == 0 and step % 10 == 0:
            assert sum(batch.num_samples for batch in evaluation.eval_batches(BATCH, 0, 1)) == NUM_SAMPLES
        if step % 50 == 0 and step >= 300:
            memory.note()
    assert seen == 2000 * NUM_SAMPLES
    training.close()
    evaluation.close()
    assert max(memory.growths()) < FLAT_MIB, memory.growths()
    assert nothing_more(belongings(), before)


@nightly
def test_two_hundred_early_exits(open_feed: OpenFeed) -> None:
    open_feed().close()
    before, memory = belongings(), MemoryLog()
    training, failing = open_feed(), open_feed(MissingFile(NUM_SAMPLES), "eval")
    for exit_number in range(200):
        start(training, 3)
        train(training, exit_number % 5)
        batches = failing.eval_batches(4, 0, 1)
        assert next(batches).sample_ids.tolist() == [0, 1, 2, 3]
        if exit_number % 3 == 0:
            batches.close()
        elif exit_number % 3 == 1:
            del batches
        else:
            with pytest.raises(UserError, match=r"seven\.npy"):
                list(batches)
        if exit_number >= 20:
            memory.note()
    for feed in (training, failing):
        assert feed._pool is not None
        feed.close()
    assert max(memory.growths()) < FLAT_MIB, memory.growths()
    assert nothing_more(belongings(), before)


def test_many_feeds_opened_and_closed(open_feed: OpenFeed) -> None:
    open_feed().close()
    before = belongings()
    for number in range(9):
        feed = open_feed(MissingFile(NUM_SAMPLES) if number % 3 == 0 else None)
        start(feed, 2)
        if number % 3 == 0:
            with pytest.raises(UserError, match=r"seven\.npy"):
                train(feed, PLAN.steps_per_epoch)
        elif number % 3 == 1:
            train(feed, 1)
        feed.close()
    assert nothing_more(belongings(), before)
