"""Crops drawn before decoding are torchvision's: the same distribution, the same fixed boxes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from drawn import keys
from torchvision.transforms import InterpolationMode, v2

from trainer.data.draws import Stream, uniforms
from trainer.data.geometry import split_transforms
from trainer.errors import UserError


def test_draws_are_uniform_and_independent() -> None:
    draws = np.concatenate([uniforms(keys(20_000, epoch), Stream.CROP, 3) for epoch in (-1, 0)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.allclose(draws.mean(0), 0.5, atol=0.01)
    assert np.allclose(np.histogram(draws, 20)[0] / draws.size, 0.05, atol=0.003)
    other = uniforms(keys(20_000), Stream.FLIP, 1)[:, 0]
    assert np.abs(np.corrcoef([*draws[20_000:].T, other, draws[:20_000, 0]]) - np.eye(5)).max() < 0.03


def test_draws_do_not_depend_on_the_batch() -> None:
    whole = uniforms(keys(64), Stream.CROP, 40)
    assert np.array_equal(whole[10:13], uniforms(keys(64)[10:13], Stream.CROP, 40))
    assert np.array_equal(whole[:, :5], uniforms(keys(64), Stream.CROP, 5))


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (60, 900)])
def test_random_resized_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(224)
    geometry = split_transforms([transform]).geometry
    assert geometry is not None
    count = 4000
    ours = geometry(np.array([size] * count), keys(count))
    assert (ours.sizes == 224).all()
    image = torch.empty(3, *size)
    drawn = [transform.make_params([image]) for _ in range(count)]
    theirs = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn], dtype=float)
    assert (ours.boxes == np.floor(ours.boxes)).all()
    assert (ours.boxes[:, :2] >= 0).all()
    assert (ours.boxes[:, :2] + ours.boxes[:, 2:] <= size).all()
    scale = theirs.std(0) + 1
    for quantile in (0.1, 0.5, 0.9):
        difference = np.abs(np.quantile(ours.boxes, quantile, axis=0) - np.quantile(theirs, quantile, axis=0))
        assert (difference < 0.12 * scale).all(), quantile


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (300, 300), (257, 1000)])
@pytest.mark.parametrize("resize", [256, [250, 280]])
def test_resize_and_center_crop_keep_what_torchvision_keeps(size: tuple[int, int], resize: Any) -> None:
    transforms = [v2.Resize(resize), v2.CenterCrop(224)]
    geometry = split_transforms(transforms).geometry
    assert geometry is not None
    crops = geometry(np.array([size]), keys(1))
    # Every pixel says where it was, so the crop's corners say which box was kept.
    rows = torch.arange(size[0], dtype=torch.float32).view(1, -1, 1).expand(1, *size)
    columns = torch.arange(size[1], dtype=torch.float32).view(1, 1, -1).expand(1, *size)
    kept = [v2.Compose(transforms)(values.contiguous())[0] for values in (rows, columns)]
    top, left, height, width = crops.boxes[0]
    step = height / 224, width / 224
    assert float(kept[0][112, 0]) == pytest.approx(top + 112.5 * step[0] - 0.5, abs=0.06)
    assert float(kept[1][0, 100]) == pytest.approx(left + 100.5 * step[1] - 0.5, abs=0.06)


def test_what_is_taken_off_a_list() -> None:
    crop, flip, jitter = v2.RandomResizedCrop(8), v2.RandomHorizontalFlip(0.3), v2.ColorJitter()
    parts = split_transforms([crop, jitter, flip, v2.RandomVerticalFlip()])
    assert parts.geometric == (crop,)
    assert parts.rest == (jitter,)
    assert (parts.horizontal_flip, parts.vertical_flip) == (0.3, 0.5)
    assert split_transforms([flip, jitter]).rest == (flip, jitter)  # a flip before others stays before them
    assert split_transforms([flip, flip]).rest == (flip,)


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomResizedCrop(8, interpolation=InterpolationMode.BICUBIC),
        v2.RandomResizedCrop(8, antialias=False),
        v2.Resize(8, max_size=20),
        v2.CenterCrop(8),  # of pictures that may be smaller, which torchvision pads
        v2.RandomCrop(8, padding=2),
    ],
)
def test_what_torchvision_must_do_is_left_to_it(transform: Any) -> None:
    parts = split_transforms([transform])
    assert parts.geometry is None
    assert parts.rest == (transform,)


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomCrop(8, padding=2, fill=9),
        v2.RandomCrop(8, padding=2, padding_mode="reflect"),
        v2.RandomCrop(8, pad_if_needed=True),
    ],
)
def test_padding_that_is_not_zeros_is_left_to_torchvision(transform: Any) -> None:
    assert split_transforms([transform], pads=True).geometry is None


def test_padded_random_crops_are_distributed_as_torchvisions() -> None:
    geometry = split_transforms([v2.RandomCrop(32, padding=[4, 2])], pads=True).geometry
    assert geometry is not None
    corners = geometry(np.array([(32, 32)] * 5000), keys(5000)).boxes[:, :2]
    assert sorted(set(corners[:, 0])) == list(range(-2, 3))
    assert sorted(set(corners[:, 1])) == list(range(-4, 5))
    assert np.allclose(np.unique(corners[:, 1], return_counts=True)[1] / 5000, 1 / 9, atol=0.02)


def test_a_crop_larger_than_the_picture_is_refused() -> None:
    geometry = split_transforms([v2.RandomCrop(32)], pads=True).geometry
    assert geometry is not None
    with pytest.raises(UserError, match=r"a crop of \[32, 32\] is larger than a picture of \[28, 40\]"):
        geometry(np.array([(32, 32), (28, 40)]), keys(2))
