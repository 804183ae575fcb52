"""The feed on a GPU: every byte right however late the device is, no waiting, the batches of the CPU, overlap."""

from __future__ import annotations

import collections
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import no_waiting
from gpu_feeds import (
    BATCH,
    CPU,
    CROPS,
    CUDA,
    MILLISECOND,
    NORMALIZE,
    NUM_CLASSES,
    SEED,
    batches_of,
    config,
    folder_config,
    needs_gpu_decoder,
    opened,
    save_picture,
    start,
    steps,
)

from benchmarks.plain_loop import count_overlapping_copies
from trainer.data.arrays import ArrayPictures, as_array_pictures
from trainer.data.datasets import ImageFolder, TorchFile
from trainer.data.feed import DeviceFeed
from trainer.data.nested import map_tensors
from trainer.data.slots import Slot
from trainer.tasks.classification import Classification

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


AUGMENT = {"mixup": 0.4, "cutmix": 1.0, "mix_probability": 0.8, "erase": 0.5, "erase_with": "noise"}


class Numbers:
    """Samples that are no pictures: (int32 (256,), label), whose numbers follow from the index."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.arange(256, dtype=torch.int32) * 7919 + index * 104_729, index % NUM_CLASSES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for i in range(80):
        save_picture(root / f"class_{i % NUM_CLASSES}" / f"{i:03}.jpg", i, quality=90)
    return root


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> TorchFile:
    """1000 pictures of noise, as pixels."""
    file = tmp_path_factory.mktemp("arrays") / "data.pt"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    torch.save((images, torch.arange(1000) % NUM_CLASSES), file)
    return TorchFile(str(file))


# ---- every byte, however late the device is ------------------------------------------------------------------


def sources_of(dataset: Any, is_image_data: bool) -> list[torch.Tensor]:
    """Returns what the samples of a data set must be on the device, inputs and targets, in the order of indices."""
    if not is_image_data:
        inputs, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
        return [torch.stack(inputs).to(CUDA), torch.tensor(labels, device=CUDA)]
    pictures = as_array_pictures(dataset)
    assert isinstance(pictures, ArrayPictures)
    bytes_there = torch.from_numpy(np.array(pictures.images)).to(CUDA)
    # All that the device half does without normalisation: exact to the bit, and different for every byte.
    images = bytes_there.permute(0, 3, 1, 2).to(torch.float32).mul_(1.0 / 255)
    return [images, torch.arange(len(dataset), device=CUDA) % NUM_CLASSES]


def count_wrong_values(
    feed: DeviceFeed,
    sources: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    num_steps: int,
    compute_milliseconds: float,
    copy_milliseconds: float,
) -> int:
    """Takes batches as fast as the feed gives them while the device is far behind; counts what is not the source's.

    Args:
        feed: to be started here.
        sources: inputs and targets of all samples, on the device.
        monkeypatch: what makes the copies late.
        num_steps: batches to take.
        compute_milliseconds: mean delay of the step's stream before a batch is asked for, and again before its use.
        copy_milliseconds: mean delay of the copy stream before every batch's copy.
    """
    rng = random.Random(0)
    move = feed._move

    def move_late(batch: Any) -> Any:
        torch.cuda._sleep(int(2 * rng.random() * copy_milliseconds * MILLISECOND))
        return move(batch)

    monkeypatch.setattr(feed, "_move", move_late)
    delays = random.Random(1)
    wrong = torch.zeros((), dtype=torch.int64, device=CUDA)
    kept: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def compare(index: torch.Tensor, data: list[torch.Tensor]) -> None:
        for values, source in zip(data, sources, strict=True):
            assert values.dtype == source.dtype
            wrong.add_((values != source[index]).sum())

    start(feed)
    for batch in steps(feed, 0, num_steps):
        index = batch.sample_ids.pin_memory().to(CUDA, non_blocking=True)
        torch.cuda._sleep(int(2 * delays.random() * compute_milliseconds * MILLISECOND))
        compare(index, batch.data)
        kept.append((index, batch.data))
        if len(kept) > 12:  # long after its slot was given back
            compare(*kept.pop(delays.randrange(len(kept))))
        del batch
        torch.cuda._sleep(int(2 * delays.random() * compute_milliseconds * MILLISECOND))
    for index, data in kept:
        compare(index, data)
    return int(wrong)


@pytest.mark.parametrize(("compute_ms", "copy_ms"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("kind", ["pictures", "numbers"])
def test_every_byte_is_right_however_late_the_device_is(
    kind: str, compute_ms: float, copy_ms: float, arrays: TorchFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_image_data = kind == "pictures"
    dataset: Any = arrays if is_image_data else Numbers()
    with opened(dataset, config({"name": "unused"}, [])) as feed:
        assert feed._loader is not None  # in host mode
        sources = sources_of(dataset, is_image_data)
        assert count_wrong_values(feed, sources, monkeypatch, 400, compute_ms, copy_ms) == 0


def test_the_check_above_notices_memory_that_is_reused_too_early(
    arrays: TorchFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    with opened(arrays, config({"name": "unused"}, [])) as feed:
        assert count_wrong_values(feed, sources_of(arrays, True), monkeypatch, 200, 4.0, 0.0) > 0


def test_feeds_on_a_stream_of_the_users_own(arrays: TorchFile, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = sources_of(arrays, True)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(CUDA)), opened(arrays, config({"name": "unused"}, [])) as feed:
        assert count_wrong_values(feed, sources, monkeypatch, 200, 1.0, 1.0) == 0


def test_batches_survive_the_feed(arrays: TorchFile) -> None:
    sources = sources_of(arrays, True)
    for num_taken in (1, 3, 7):
        with opened(arrays, config({"name": "unused"}, [])) as feed:
            start(feed)
            torch.cuda._sleep(100 * MILLISECOND)
            batches = list(steps(feed, 0, num_taken))
        for batch in batches:
            for values, source in zip(batch.data, sources, strict=True):
                assert torch.equal(values, source[batch.sample_ids.to(CUDA)])


# ---- pinned memory and no waiting ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pictures", "numbers", "files"])
def test_copies_leave_pinned_memory(
    kind: str, arrays: TorchFile, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset: Any = {"pictures": arrays, "numbers": Numbers()}.get(kind) or ImageFolder(str(folder))
    data = folder_config(folder) if kind == "files" else config({"name": "unused"}, [])
    pinned: list[bool] = []
    with opened(dataset, data) as feed:
        move = feed._move

        def move_and_look(batch: Any) -> Any:
            map_tensors(lambda tensor: pinned.append(tensor.is_pinned()), batch.data)
            return move(batch)

        monkeypatch.setattr(feed, "_move", move_and_look)
        start(feed)
        assert len(list(steps(feed, 0, 70))) == 70  # small batches too, and slots that have grown
    assert len(pinned) >= 140
    assert all(pinned)


def test_slots_are_pinned_while_they_grow_and_no_longer_than_they_live() -> None:
    slot = Slot(pin=True)
    for size in (1000, 3 << 20, 9 << 20):
        slot.clear()
        tensor = slot.allocate((size,), torch.uint8)
        assert tensor.is_pinned()
        tensor.random_()
        there = tensor.to(CUDA, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(there.cpu(), tensor)
    slot.close()
    assert not tensor.is_pinned()


def test_memory_that_cannot_be_pinned_costs_speed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pin = Slot._pin

    def pin_twice(slot: Slot, memory: torch.Tensor) -> None:
        pin(slot, memory)
        pin(slot, memory)  # CUDA refuses this: it is registered already

    monkeypatch.setattr(Slot, "_pin", pin_twice)
    slot = Slot(pin=True)
    values = slot.allocate((1000,), torch.uint8).fill_(3)
    there = values.to(CUDA, non_blocking=True)
    assert int((there + 1).sum()) == 4000  # not an error that this process caused earlier
    slot.close()


WAYS: dict[str, dict[str, Any]] = {
    "host": {},
    "host, in this process": {"workers": 0},
    "host, augmented": {"augment": AUGMENT},
    "resident": {"feed": "resident"},
    "resident, augmented": {"feed": "resident", "augment": AUGMENT},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_does_not_wait_for_the_device(way: str, folder: Path) -> None:
    with opened(ImageFolder(str(folder)), folder_config(folder, **WAYS[way])) as feed:
        start(feed)
        collections.deque(steps(feed, 0, 12), maxlen=0)  # warm-up: allocators, cuBLAS, slots of every size
        with no_waiting():
            collections.deque(steps(feed, 12, 24), maxlen=0)


def test_resident_arrays_do_not_wait_for_the_device(arrays: TorchFile) -> None:
    transforms = [{"name": "RandomCrop", "args": {"size": 32, "padding": 4}}, CROPS[1]]
    data = config({"name": "unused"}, transforms, feed="resident", augment=AUGMENT)
    with opened(arrays, data) as feed:
        start(feed)
        collections.deque(steps(feed, 0, 40), maxlen=0)
        with no_waiting():
            collections.deque(steps(feed, 40, 80), maxlen=0)


@pytest.mark.parametrize("way", [*WAYS, "device_decode"])
def test_batches_come_while_the_device_is_busy(way: str, folder: Path) -> None:
    """Finds waiting that the debug mode does not know of, such as that of allocations and of other libraries."""
    if way == "device_decode":
        needs_gpu_decoder()
    settings = WAYS.get(way, {"feed": "device_decode"})
    with opened(ImageFolder(str(folder)), folder_config(folder, **settings)) as feed:
        start(feed)
        collections.deque(steps(feed, 0, 24), maxlen=0)
        torch.cuda.synchronize()
        is_done = torch.cuda.Event()
        torch.cuda._sleep(1500 * MILLISECOND)
        is_done.record()
        # More than wait on the device already; a queue of 1024 kernels, with which the driver waits, is not reached.
        taken = list(steps(feed, 24, 26 if feed._loader is None else 30))
        assert not is_done.query()
        torch.cuda.synchronize()
        assert taken


def test_evaluating_again_and_again_takes_no_more_memory(folder: Path) -> None:
    """Cached memory belongs to the stream that it was allocated on, which should be the same every time."""
    data = folder_config(folder, transforms={"eval": [{"name": "Resize", "args": {"size": [256, 256]}}]})
    feed = DeviceFeed(ImageFolder(str(folder)), data, "eval", CUDA, SEED, Classification(num_classes=NUM_CLASSES))
    reserved = []
    for _ in range(12):
        for batch in feed.eval_batches(BATCH, 0, 1):
            assert batch.num_samples
        del batch
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved(CUDA))
    feed.close()
    assert reserved[-1] == reserved[3]


# ---- the batches of the CPU ----------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [{}, AUGMENT], ids=["plain", "augmented"])
@pytest.mark.parametrize("feed", ["host", "resident"])
@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_batches_are_those_of_the_cpu(
    kind: str, feed: str, augment: dict[str, Any], folder: Path, arrays: TorchFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "files":
        dataset: Any = ImageFolder(str(folder))
        data = folder_config(folder, feed=feed, augment=augment)
    else:
        transforms = [{"name": "RandomCrop", "args": {"size": 32, "padding": 4}}, CROPS[1]]
        dataset = arrays
        data = config({"name": "unused"}, transforms, feed=feed, augment=augment, normalize=NORMALIZE)
    expected = batches_of(dataset, data, CPU, monkeypatch)
    found = batches_of(dataset, data, CUDA, monkeypatch)
    assert len(found) == len(expected) == 7
    for here, there in zip(found, expected, strict=True):
        assert here[0] == there[0]
        assert here[1].dtype == torch.uint8
        assert torch.equal(here[1], there[1])
        torch.testing.assert_close(here[2], there[2], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(here[3], there[3], rtol=1e-6, atol=1e-6)


# ---- overlap -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_copies_overlap_with_kernels_of_the_step(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save((torch.zeros(512, 3, 128, 128, dtype=torch.uint8), torch.zeros(512, dtype=torch.int64)), buffer)
    (tmp_path / "data.pt").write_bytes(buffer.getvalue())
    left = torch.randn(2048, 2048, device=CUDA)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with opened(TorchFile(str(tmp_path / "data.pt")), config({"name": "unused"}, [])) as feed:
        start(feed, batch_size=128)
        collections.deque(steps(feed, 0, 8), maxlen=0)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            for batch in steps(feed, 8, 48):
                for _ in range(20):
                    left = torch.tanh(left @ left)
                left[0, 0] += batch.data[0].mean()
            torch.cuda.synchronize()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    copies, overlapping = count_overlapping_copies(json.loads((tmp_path / "trace.json").read_text()))
    assert copies >= 40
    assert overlapping >= 1
