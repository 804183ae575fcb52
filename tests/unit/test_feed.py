"""The feed's promises: the bytes of every batch are functions of (seed, step), in every mode, on any world."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from trainer.config_data import DataConfig
from trainer.data.arrays import as_array_pictures
from trainer.data.datasets import ImageFolder, TorchFile
from trainer.data.feed import DeviceFeed
from trainer.data.packing import pack_folder
from trainer.data.resident import Share
from trainer.data.sampler import BatchPlan, StepSampler
from trainer.errors import UserError
from trainer.tasks.classification import Classification

CPU = torch.device("cpu")
NUM_SAMPLES, BATCH, STEPS = 26, 12, 5  # two full batches and one of two samples make an epoch
NORMALIZE = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
CROPS = [{"name": "RandomResizedCrop", "args": {"size": 24}}, {"name": "RandomHorizontalFlip"}]
MIXES = {"mixup": 0.4, "cutmix": 1.0, "erase": 0.5, "erase_with": "noise"}


class Noisy:
    """A user's own transform, which draws from all three global generators."""

    def __call__(self, image: Image.Image) -> Image.Image:
        import random

        shift = int(torch.randint(0, 50, ())) + np.random.randint(50) + random.randrange(50)
        return Image.fromarray((np.asarray(image).astype(int) + shift).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(NUM_SAMPLES):
        label = root / f"class_{i % 3}"
        label.mkdir(exist_ok=True)
        low = rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(low).resize((60 + i, 40 + i % 7), Image.Resampling.BICUBIC)
        picture.save(label / f"{i:03}.{'png' if i % 5 == 0 else 'jpg'}", quality=90)
    return root


def config(folder: Path, **settings: Any) -> DataConfig:
    train = {"name": "image_folder", "args": {"root": str(folder)}}
    base = {"train": train, "normalize": NORMALIZE, "transforms": {"train": CROPS}, "workers": 0}
    return DataConfig.model_validate({**base, **settings})


def open_feed(dataset: Any, data: DataConfig, **settings: Any) -> DeviceFeed:
    return DeviceFeed(dataset, data, "train", CPU, 3, Classification(num_classes=3), **settings)


def steps(
    dataset: Any, data: DataConfig, ranks: int = 1, rank: int = 0, start: int = 0, micro: int | None = None
) -> list[dict[int, tuple[bytes, bytes]]]:
    """Returns, for every step, the bytes of input and target of each sample of this rank."""
    plan = BatchPlan.split(len(dataset), BATCH, micro, ranks, False, group_size=2 if data.augment.mixes else 1)
    feed = open_feed(dataset, data)
    feed.start(StepSampler(plan, rank, 3), start, STEPS)
    found: list[dict[int, tuple[bytes, bytes]]] = []
    for step in range(start, STEPS):
        samples = {}
        for batch in feed.step_batches(step):
            for i, image, target in zip(batch.sample_ids.tolist(), *batch.data, strict=True):
                if batch.num_samples:
                    samples[i] = (image.contiguous().numpy().tobytes(), target.numpy().tobytes())
        found.append(samples)
    feed.close()
    return found


def on_ranks(dataset: Any, data: DataConfig, ranks: int, **settings: Any) -> list[dict[int, tuple[bytes, bytes]]]:
    shares = [steps(dataset, data, ranks, rank, **settings) for rank in range(ranks)]
    assert all(sum(len(s) for s in step) == len(set().union(*step)) for step in zip(*shares, strict=True))
    return [{k: v for share in step for k, v in share.items()} for step in zip(*shares, strict=True)]


WAYS: dict[str, dict[str, Any]] = {
    "crops": {},
    "crops, mixed and erased": {"augment": MIXES},
    "a user's random transform": {"transforms": {"train": [CROPS[0], {"name": "test_feed:Noisy"}, CROPS[1]]}},
    "only a user's random transform": {
        "transforms": {"train": [{"name": "test_feed:Noisy"}, {"name": "Resize", "args": {"size": [8, 8]}}]}
    },
    "resident": {"feed": "resident", "augment": MIXES},
    "device_decode": {"feed": "device_decode", "augment": MIXES},
}


@pytest.mark.parametrize("way", WAYS)
def test_batches_are_functions_of_seed_and_step(way: str, folder: Path) -> None:
    dataset = ImageFolder(str(folder))
    data = config(folder, **WAYS[way])
    reference = steps(dataset, data)
    assert [len(step) for step in reference] == [12, 12, 2, 12, 12]
    assert not any(reference[0][i] == reference[3][i] for i in reference[0].keys() & reference[3].keys())
    for workers in (1, 4):
        if data.feed != "resident":  # which has no workers
            assert steps(dataset, data.model_copy(update={"workers": workers})) == reference, workers
    for ranks in (2, 3):
        assert on_ranks(dataset, data, ranks) == reference, ranks
    assert steps(dataset, data, micro=4) == reference
    assert on_ranks(dataset, data, 2, micro=2) == reference
    for start in (1, 2, 4):
        assert steps(dataset, data, start=start) == reference[start:], start


def test_each_split_has_its_own_transforms(folder: Path) -> None:
    sizes: dict[Literal["train", "eval"], int] = {"train": 12, "eval": 20}
    transforms = {split: [{"name": "CenterCrop", "args": {"size": size}}] for split, size in sizes.items()}
    data = config(folder, transforms=transforms)
    for split, size in sizes.items():
        feed = DeviceFeed(ImageFolder(str(folder)), data, split, CPU, 3, Classification(num_classes=3))
        assert next(iter(feed.eval_batches(4, 0, 1))).data[0].shape == (4, 3, size, size)


@pytest.mark.parametrize("workers", [0, 2])
def test_so_many_processes_load(workers: int, folder: Path) -> None:
    feed = open_feed(ImageFolder(str(folder)), config(folder, workers=workers))
    feed.start(StepSampler(BatchPlan.split(NUM_SAMPLES, 2, None, 1, False), 0, 3), 0, 2)
    with closing(feed):
        next(iter(feed.step_batches(0)))
        assert feed.num_workers == workers


@pytest.mark.parametrize(("prefetch", "prefetch_factor"), [(1, 1), (4, 3)])
def test_so_much_is_loaded_ahead(prefetch: int, prefetch_factor: int, tmp_path: Path) -> None:
    """A batch that was taken, those that wait on the device, and those of the worker."""
    torch.save((torch.arange(400, dtype=torch.uint8).view(100, 1, 2, 2), torch.zeros(100)), tmp_path / "data.pt")
    asked: list[int] = []

    class Plan(StepSampler):
        def keys(self, step: int) -> NDArray[np.int64]:
            asked.append(step)
            return super().keys(step)

    data = config(
        tmp_path, transforms={}, normalize=None, workers=1, prefetch=prefetch, prefetch_factor=prefetch_factor
    )
    feed = open_feed(TorchFile(str(tmp_path / "data.pt")), data)
    feed.start(Plan(BatchPlan.split(100, 2, None, 1, False), 0, 3), 0, 40)
    with closing(feed):
        next(iter(feed.step_batches(0)))
        most, until = 1 + prefetch + prefetch_factor, time.monotonic() + 20
        while len(asked) < most and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2)  # more would come now
        assert len(asked) == most


def test_ways_to_the_device_agree(folder: Path, tmp_path: Path) -> None:
    """Crops and augmentation are the same draws in every mode; resizing differs by rounding."""
    dataset = ImageFolder(str(folder))

    def images(data: DataConfig) -> torch.Tensor:
        rows = steps(dataset, data)[0]
        return torch.stack([torch.frombuffer(bytearray(rows[i][0]), dtype=torch.float32) for i in sorted(rows)])

    host = images(config(folder))
    step = 1 / 255 / min(NORMALIZE["std"])  # of one grey level
    for feed in ("resident", "device_decode"):
        difference = (images(config(folder, feed=feed)) - host).abs()
        assert difference.max() < 5 * step
        assert difference.mean() < 0.5 * step


@pytest.mark.parametrize("encoding", ["jpeg", "raw", "mixed"])
def test_a_packed_copy_gives_the_same_pixels(encoding: str, folder: Path, tmp_path: Path) -> None:
    from trainer.data.packed import PackedImages

    dataset = ImageFolder(str(folder))
    data = config(folder, cache={"path": str(tmp_path), "encoding": encoding, "max_size": None, "quality": 100})
    assert data.cache is not None
    packed = PackedImages(pack_folder(dataset, data.cache))
    here, there = steps(dataset, data), steps(packed, data)
    pngs = {i for i, (path, _) in enumerate(dataset.samples) if path.endswith("png")}
    for a, b in zip(here, there, strict=True):
        exact = a.keys() if encoding == "raw" else a.keys() - pngs  # a PNG becomes a JPEG
        assert exact
        assert all(a[i] == b[i] for i in exact)


def test_arrays_are_cropped_alike_on_host_and_device(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (NUM_SAMPLES, 3, 16, 16), dtype=torch.uint8)
    torch.save((images, torch.arange(NUM_SAMPLES) % 3), tmp_path / "data.pt")
    dataset = TorchFile(str(tmp_path / "data.pt"))
    assert as_array_pictures(dataset) is not None
    crop = [{"name": "RandomCrop", "args": {"size": 16, "padding": 4}}, CROPS[1]]
    for transforms in (crop, [], [{"name": "CenterCrop", "args": {"size": 20}}]):
        data = config(tmp_path, transforms={"train": transforms}, augment=MIXES)
        host = steps(dataset, data)
        assert host == steps(dataset, data.model_copy(update={"feed": "resident"}))
        assert on_ranks(dataset, data, 3) == host


def test_a_padded_random_crop_moves_and_pads(tmp_path: Path) -> None:
    images = torch.full((NUM_SAMPLES, 1, 8, 8), 255, dtype=torch.uint8)
    torch.save((images, torch.zeros(NUM_SAMPLES, dtype=torch.int64)), tmp_path / "data.pt")
    data = config(
        tmp_path, normalize=None, transforms={"train": [{"name": "RandomCrop", "args": {"size": 8, "padding": 2}}]}
    )
    rows = [v for step in steps(TorchFile(str(tmp_path / "data.pt")), data) for v in step.values()]
    covered = torch.stack([torch.frombuffer(bytearray(image), dtype=torch.float32).view(8, 8) for image, _ in rows])
    assert set(covered.unique().tolist()) == {0.0, 1.0}
    corners = {(bool(c[0, 3]), bool(c[3, 0]), bool(c[7, 3]), bool(c[3, 7])) for c in covered}
    assert len(corners) > 4


@pytest.mark.parametrize(
    ("feed", "settings", "message"),
    [
        ("resident", {"transforms": {"train": [{"name": "ColorJitter"}]}}, "ColorJitter .* runs on the host only"),
        ("resident", {"transforms": {"train": []}}, "equal in size"),
        ("device_decode", {"transforms": {"train": [*CROPS, {"name": "ColorJitter"}]}}, "runs on the host only"),
        ("resident", {"train": {"name": "digits", "args": {"split": "train"}}, "normalize": None}, "no pictures|which"),
    ],
)
def test_a_way_that_does_not_exist_is_refused(feed: str, settings: dict[str, Any], message: str, folder: Path) -> None:
    from trainer.data.datasets import Digits

    data = config(folder, feed=feed, **settings)
    dataset: Any = Digits("train") if data.train.name == "digits" else ImageFolder(str(folder))
    with pytest.raises(UserError, match=message) as caught:
        open_feed(dataset, data)
    assert caught.value.problems[0].path == "data.feed"


def test_a_data_set_that_does_not_fit_is_refused_or_shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ImageFolder(str(folder))
    monkeypatch.setattr("trainer.data.feed.device_memory", lambda device: 300_000)  # the pixels take about 260,000
    with pytest.raises(UserError, match="does not fit"):
        open_feed(dataset, config(folder, feed="resident"))
    with pytest.raises(UserError, match="does not fit"):
        open_feed(dataset, config(folder, feed="resident", resident_placement="replicated"), ranks=Share(0, 2))
    feed = open_feed(dataset, config(folder, feed="resident"), ranks=Share(1, 2))
    assert feed._resident is not None
    assert len(feed._resident.sizes) == NUM_SAMPLES // 2


def test_a_broken_picture_ends_resident_loading_and_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for path in sorted(folder.glob("*/*.jpg"))[:3]:
        (tmp_path / "a" / path.name).write_bytes(path.read_bytes())
    broken = sorted((tmp_path / "a").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(UserError, match="cannot read sample 1"):
        open_feed(ImageFolder(str(tmp_path)), config(tmp_path, feed="resident"))
