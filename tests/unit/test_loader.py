"""Loading: a sample's randomness depends on (seed, epoch, index) alone, and loading disturbs nothing else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_trees import make_class_folders
from torch.utils.data import TensorDataset
from torchvision.transforms import v2
from vectors import Vectors

from trainer.config import load_config
from trainer.config_data import DataConfig
from trainer.data.datasets import ImageFolder, Synthetic, draws_nothing
from trainer.data.feed import DeviceFeed
from trainer.data.loader import (
    LoadedBatch,
    SampleLoader,
    preserved_generators,
    sample_seed,
    seed_global_generators,
)
from trainer.data.sampler import BatchPlan, SampleKey, StepSampler
from trainer.data.transforms import HostTransform
from trainer.errors import UserError
from trainer.tasks.classification import Classification

CPU = torch.device("cpu")


def feed(workers: int, seed: int = 0, **data: Any) -> DeviceFeed:
    config = load_config("configs/digits.yaml", [f"data.workers={workers}", "data.transforms.train=[]"]).data
    return DeviceFeed(Vectors(20), config, "train", CPU, seed, Classification())


def batches(workers: int, start: int, stop: int, seed: int = 0, ranks: int = 1, rank: int = 0) -> list[Any]:
    f = feed(workers, seed)
    plan = BatchPlan.split(20, 6, None, ranks, False)
    f.start(StepSampler(plan, rank, seed), start, stop)
    found = [(b.sample_ids.tolist(), b.data[0].clone()) for s in range(start, stop) for b in f.step_batches(s)]
    f.close()
    return found


def equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x[0] == y[0] and torch.equal(x[1], y[1]) for x, y in zip(a, b, strict=True))


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(request.config.rootpath)


def test_batches_do_not_depend_on_workers_or_start() -> None:
    reference = batches(0, 0, 9)
    assert equal(batches(1, 0, 9), reference)
    assert equal(batches(2, 0, 9), reference)
    for start in (1, 4, 8):
        assert equal(batches(2, start, 9), reference[start:])
    assert not equal(batches(0, 0, 9, seed=1), reference)


def test_samples_do_not_depend_on_ranks() -> None:
    def by_sample(ranks: int, step: int) -> dict[int, torch.Tensor]:
        shares = [batches(0, step, step + 1, ranks=ranks, rank=r)[0] for r in range(ranks)]
        return {i: row for ids, rows in shares for i, row in zip(ids, rows, strict=True)}

    for step in (0, 2, 5):
        one, two, three = (by_sample(ranks, step) for ranks in (1, 2, 3))
        assert one.keys() == two.keys() == three.keys()
        assert all(torch.equal(one[i], two[i]) and torch.equal(one[i], three[i]) for i in one)


def test_a_sample_differs_between_epochs() -> None:
    epochs = [dict(zip(ids, rows, strict=True)) for ids, rows in [_epoch(0), _epoch(1)]]
    assert epochs[0].keys() == epochs[1].keys()
    assert not any(torch.equal(epochs[0][i], epochs[1][i]) for i in epochs[0])


def _epoch(epoch: int) -> tuple[list[int], list[torch.Tensor]]:
    found = batches(0, epoch * 4, epoch * 4 + 4)
    return [i for ids, _ in found for i in ids], [row for _, rows in found for row in rows]


def test_evaluation_samples_are_the_same_every_time_but_not_those_of_training() -> None:
    f = feed(0)
    first, second = ([b.data[0].clone() for b in f.eval_batches(20, 0, 1)] for _ in range(2))
    assert torch.equal(first[0], second[0])
    ids, rows = _epoch(0)
    training = torch.stack([rows[ids.index(i)] for i in range(20)])
    assert not (training == first[0]).all(1).any()


def test_seeds_differ() -> None:
    keys = [(seed, SampleKey(epoch, sample)) for seed in (0, 1) for epoch in (-1, 0, 1) for sample in range(300)]
    assert len({sample_seed(*key) for key in keys}) == len(keys)


def test_loading_leaves_the_global_generators_alone() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    seed_global_generators(7)
    expected = draw()
    for workers in (0, 2):
        seed_global_generators(7)
        batches(workers, 0, 5)
        assert draw() == expected
    seed_global_generators(7)
    with preserved_generators():
        draw()
    assert draw() == expected


class _Drawing(TensorDataset):
    """Vectors that differ each time that they are looked at."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return torch.rand(3), torch.tensor(0)


def test_generators_are_seeded_for_samples_that_may_draw_from_them() -> None:
    """The others are loaded without: that takes longer than to load a small one."""
    data = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    drawn = []
    for dataset in (TensorDataset(*data), _Drawing(*data)):
        loader = SampleLoader(dataset, HostTransform([], "input"), None, 0, "data.train", "raise")
        torch.manual_seed(5)
        batch = loader.load([SampleKey(0, i) for i in (2, 1)], _allocate, lambda sample: None)
        assert isinstance(batch, LoadedBatch)
        drawn.append((torch.initial_seed() == 5, batch.data[0]))
    (is_untouched, zeros), (is_unseeded, random_numbers) = drawn
    assert is_untouched
    assert not zeros.any()
    assert not is_unseeded
    torch.manual_seed(sample_seed(0, SampleKey(0, 2)))
    assert torch.equal(random_numbers[0], torch.rand(3))


def test_data_sets_with_a_transform_of_their_own_may_draw() -> None:
    data = TensorDataset(torch.zeros(4, 3))
    assert draws_nothing(data)
    data.transform = v2.RandomHorizontalFlip()  # type: ignore[attr-defined]
    assert not draws_nothing(data)
    assert not draws_nothing(Vectors(4))


def _allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def test_synthetic_data_needs_no_loader_and_is_the_same_for_any_share() -> None:
    data = Synthetic(num_samples=1000, shape=[3, 4, 4], num_classes=10, pool=16)
    images, labels = data.device_batch(torch.tensor([3, 19, 999]), CPU)
    assert images.shape == (3, 3, 4, 4)
    assert torch.equal(images[0], images[1])
    assert labels.tolist() == [3, 9, 9]
    assert torch.equal(data[19][0], images[1])
    config = load_config("configs/digits.yaml").data
    f = DeviceFeed(data, config, "eval", CPU, 0, _Unchecked())
    assert sum(b.num_samples for b in f.eval_batches(64, 0, 1)) == 1000


class _Unchecked(Classification):
    def check(self, data: Any, sample_ids: torch.Tensor) -> None:
        raise AssertionError("data on the device is not checked on the host")


def test_transforms_apply_to_the_input_alone() -> None:
    double = HostTransform([lambda x: 2 * x], "image")
    assert double((1, 5)) == (2, 5)
    assert double({"image": 1, "label": 5}) == {"image": 2, "label": 5}
    assert double({"other": 1}) == {"other": 1}
    assert double(3) == 6


def test_pil_images_travel_as_bytes() -> None:
    from PIL import Image

    image, label = HostTransform([v2.Resize((4, 6))], "input")((Image.new("RGB", (20, 10), (9, 8, 7)), 1))
    assert (image.dtype, tuple(image.shape), label) == (torch.uint8, (3, 4, 6), 1)
    assert image[:, 0, 0].tolist() == [9, 8, 7]


def test_an_image_that_does_not_go_through_a_transform_is_named(tmp_path: Path) -> None:
    make_class_folders(tmp_path, {"train": 1})
    crop = {"name": "RandomCrop", "args": {"size": 99}}
    for transforms in ([crop], [{"name": "Resize", "args": {"size": 20}}, crop]):  # as the data set gives it, and cut
        section = {"train": {"name": "x:y"}, "workers": 0, "transforms": {"train": transforms}}
        data = ImageFolder(str(tmp_path / "train"))
        f = DeviceFeed(data, DataConfig.model_validate(section), "train", CPU, 0, Classification())
        f.start(StepSampler(BatchPlan.split(len(data), 2, None, 1, False), 0, 0), 0, 1)
        with pytest.raises(
            UserError, match=r"^data\.train: sample \d \('.*JPEG'\) does not go through RandomCrop: Req"
        ):
            list(f.step_batches(0))
