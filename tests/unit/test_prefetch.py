"""The prefetcher: what is handed over is right and stays so, closing never waits for a worker, slowness is named."""

from __future__ import annotations

import logging
import pickle
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import loads
import numpy as np
import pytest
import torch
from vectors import Buggy, Vectors

from trainer.config import load_config
from trainer.data import prefetch
from trainer.data.feed import DeviceFeed
from trainer.data.loader import LoadedBatch, LoadFailure
from trainer.data.nested import map_tensors
from trainer.data.prefetch import Prefetcher
from trainer.data.sampler import BatchPlan, SampleKey, StepSampler
from trainer.data.workers import WorkerDied, WorkerPool
from trainer.errors import Problem, UserError
from trainer.tasks.classification import Classification

logger = logging.getLogger("lockstep")
CPU = torch.device("cpu")
HOUR_MS = 3_600_000

Requests = list[list[SampleKey]]
Make = Callable[..., Prefetcher]


def load_batch(keys: Any, slot: Any, reading: Callable[[int], None]) -> LoadedBatch | LoadFailure:
    """Sample n: n % 50 + 1 KiB of bytes that depend on n; sample 404 is bad data."""
    if 404 in keys[:, 1]:
        return LoadFailure((Problem("no sample 404", "data.train"),))
    delays = [key for key in keys.tolist() if key[0] > 0]
    if delays:
        loads.rows(np.array(delays), slot, reading)
        slot.clear()
    sizes = [1024 * (int(sample) % 50 + 1) for sample in keys[:, 1]]
    images = slot.allocate((sum(sizes),), torch.uint8)
    for part, sample in zip(images.split(sizes), keys[:, 1], strict=True):
        part.copy_(content(int(sample)))
    return LoadedBatch(keys, [images, torch.from_numpy(keys[:, 1])])


def content(sample: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sample)
    return torch.randint(256, (1024 * (sample % 50 + 1),), dtype=torch.uint8, generator=generator)


def expected(request: list[SampleKey]) -> torch.Tensor:
    return torch.cat([content(key.sample) for key in request])


def _nothing(batch: LoadedBatch) -> None:
    """No check; no augmentation."""


def _copied(batch: LoadedBatch) -> LoadedBatch:
    return batch._replace(data=map_tensors(torch.clone, batch.data))


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes prefetchers on one pool, each of which closes the one before."""
    made: list[Prefetcher] = []
    pools: list[WorkerPool] = []

    def prefetcher(requests: Requests, load: Any = load_batch, depth: int = 2, check: Any = None) -> Prefetcher:
        if made:
            made[-1].close()
        if not pools or pools[-1]._load is not load:
            describe = "sample {0} ('/data/{0}.jpg')".format
            pools.append(WorkerPool(load, describe, 2, 2, 2, held=1, pin=False))
        made.append(Prefetcher(pools[-1], requests, CPU, depth, check or _nothing, _copied, _nothing))
        return made[-1]

    yield prefetcher
    for one in made:
        one.close()
    for pool in pools:
        pool.close()


def test_every_byte_is_right_and_stays_so(make: Make) -> None:
    rng = random.Random(0)
    requests = [[SampleKey(rng.choice([0, 0, 1, 3]), rng.randrange(400)) for _ in range(4)] for _ in range(300)]
    feed = make(requests, depth=3)
    kept: list[tuple[int, torch.Tensor]] = []
    for i, request in enumerate(requests):
        item = feed.get()
        assert item is not None
        assert torch.equal(item.batch.data[0], expected(request))
        assert item.batch.data[1].tolist() == item.batch.sample_ids.tolist() == [key.sample for key in request]
        kept.append((i, item.batch.data[0]))
        if len(kept) > 40:  # long after its slot was given back
            old, images = kept.pop(rng.randrange(len(kept)))
            assert torch.equal(images, expected(requests[old]))
        if rng.random() < 0.3:
            time.sleep(rng.random() / 100)
    assert feed.get() is None
    assert feed.get() is None
    assert all(torch.equal(images, expected(requests[old])) for old, images in kept)


def test_batches_of_a_feed_stay_as_they_are(request: pytest.FixtureRequest) -> None:
    def kept(workers: int) -> list[Any]:
        file = str(request.config.rootpath / "configs/digits.yaml")
        config = load_config(file, [f"data.workers={workers}", "data.transforms.train=[]"]).data
        feed = DeviceFeed(Vectors(20), config, "train", CPU, 0, Classification())
        feed.start(StepSampler(BatchPlan.split(20, 6, None, 1, False), 0, 0), 0, 60)
        batches = [batch.data for step in range(60) for batch in feed.step_batches(step)]
        feed.close()
        return batches

    for here, there in zip(kept(0), kept(2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_left_early_again_and_again(make: Make) -> None:
    rng = random.Random(1)
    for _ in range(40):
        requests = [[SampleKey(rng.choice([0, 1]), rng.randrange(400)) for _ in range(3)] for _ in range(20)]
        feed = make(requests, depth=rng.randint(1, 4))
        for request in requests[: rng.randrange(12)]:
            item = feed.get()
            assert item is not None
            assert torch.equal(item.batch.data[0], expected(request))
    feed.close()
    feed.close()
    assert feed.get() is None


def test_nothing_is_asked_for_beyond_the_depth(make: Make) -> None:
    asked = []

    def requests() -> Iterator[list[SampleKey]]:
        for i in range(50):
            asked.append(i)
            yield [SampleKey(0, i)]

    def settles_at(number: int) -> bool:
        end = time.monotonic() + 60
        while len(asked) < number and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.3)
        return len(asked) == number

    feed = make(requests(), depth=3)
    assert settles_at(3 + 4)  # on the device; at the workers, or copied without room on the device
    feed.get()
    assert settles_at(3 + 4 + 1)


@pytest.mark.parametrize("taken", [0, 3])
def test_closing_does_not_wait_for_a_worker(taken: int, make: Make) -> None:
    feed = make([*[[SampleKey(0, i)] for i in range(taken)], *[[SampleKey(HOUR_MS, i)] for i in range(9)]])
    for _ in range(taken):
        feed.get()
    time.sleep(0.3)
    started = time.monotonic()
    feed.close()
    assert not feed._thread.is_alive()
    feed._pool.close()
    assert time.monotonic() - started < 30


def test_closing_ends_whoever_waits_for_a_batch(make: Make) -> None:
    feed, got = make([[SampleKey(HOUR_MS, 0)]]), []
    consumer = threading.Thread(target=lambda: got.append(feed.get()))
    consumer.start()
    time.sleep(0.2)
    feed.close()
    consumer.join(30)
    assert got == [None]


def test_closing_a_feed_in_the_middle_of_everything(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Neither an exception of a thread (pytest would say so), nor one of the batches that come after."""
    caplog.set_level(logging.WARNING, logger.name)
    config = load_config(
        str(request.config.rootpath / "configs/digits.yaml"), ["data.workers=2", "data.transforms.train=[]"]
    ).data
    for dataset in (Vectors(20), Buggy(20)):
        for _ in range(5):
            feed = DeviceFeed(dataset, config, "train", CPU, 0, Classification())
            feed.start(StepSampler(BatchPlan.split(20, 6, None, 1, False), 0, 0), 0, 100)
            if isinstance(dataset, Buggy):
                with pytest.raises(ZeroDivisionError):
                    next(feed.step_batches(0))
            else:
                next(feed.step_batches(0))
            feed.close()
            feed.close()
    assert not caplog.records


def test_what_workers_load_can_be_sent_to_workers_that_are_not_forked(request: pytest.FixtureRequest) -> None:
    config = load_config(str(request.config.rootpath / "configs/digits.yaml"), ["data.workers=1"]).data
    feed = DeviceFeed(Vectors(20), config, "train", CPU, 0, Classification())
    try:
        feed.start(StepSampler(BatchPlan.split(20, 6, None, 1, False), 0, 0), 0, 1)
        assert feed._pool is not None
        pickle.loads(pickle.dumps(feed._pool._load))
    finally:
        feed.close()


# ---- errors ------------------------------------------------------------------------------------------------------


def test_an_error_comes_in_its_turn_and_whenever_it_is_asked_for(make: Make) -> None:
    feed = make([[SampleKey(5, 1)], [SampleKey(0, 404)], [SampleKey(0, 2)]])
    item = feed.get()
    assert item is not None
    assert item.batch.sample_ids.tolist() == [1]
    depths = []
    for _ in range(3):
        with pytest.raises(UserError, match=r"data\.train: no sample 404") as raised:
            feed.get()
        depths.append(len(traceback.extract_tb(raised.value.__traceback__)))
    assert len(set(depths)) == 1
    assert "_copied" in "".join(traceback.format_exception(raised.value))


def test_a_failed_check_is_raised_in_the_step(make: Make) -> None:
    def check(batch: LoadedBatch) -> None:
        if 2 in batch.keys[:, 1]:
            raise UserError("sample 2 has label 9", path="data.train")

    feed = make([[SampleKey(0, i)] for i in range(5)], check=check)
    feed.get()
    feed.get()
    with pytest.raises(UserError, match="label 9"):
        feed.get()
    feed = make([[SampleKey(0, i)] for i in range(20)])  # on the same pool: no slot was lost
    for i in range(20):
        item = feed.get()
        assert item is not None
        assert item.batch.sample_ids.tolist() == [i]


def test_a_death_is_raised_in_the_step(make: Make) -> None:
    feed = make([[SampleKey(0, 13)], [SampleKey(HOUR_MS, 1)]], load=loads.Unlucky("SIGKILL"))
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(WorkerDied, match=r"\(pid \d+\) was killed by SIGKILL while it read .*'/data/13.jpg'"):
            feed.get()
    assert time.monotonic() - started < 30


# ---- slowness ----------------------------------------------------------------------------------------------------


def test_slow_data_is_named(make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(prefetch, "SLOW_SECONDS", 0.3)
    caplog.set_level(logging.WARNING, logger.name)
    feed = make([[SampleKey(2000, 7)], [SampleKey(1, 8)], [SampleKey(1, 9)], [SampleKey(1, 10)]])
    started = time.monotonic()
    assert feed.get() is not None
    assert time.monotonic() - started > 1.9
    assert feed.get() is not None
    messages = [record.getMessage() for record in caplog.records]
    assert 3 <= len(messages) <= 4  # after 0.3, 0.6, 1.2 and 2.4 s of waiting: its worker may have begun late
    assert "worker 0 has been reading sample 7 ('/data/7.jpg') for " in messages[2]


def test_slowness_that_no_sample_is_to_blame_for(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefetch, "SLOW_SECONDS", 0.2)
    caplog.set_level(logging.WARNING, logger.name)
    feed = make([[SampleKey(0, 1)]], check=lambda batch: time.sleep(0.5))
    assert feed.get() is not None
    assert "no worker is reading" in caplog.records[0].getMessage()
