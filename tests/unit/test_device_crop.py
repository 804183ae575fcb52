"""Crops and resizes of batches: as good as PIL's, and the same bits whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import few
from drawn import random_boxes
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from trainer.data.device_crop import crop_resize

PHOTOS = [np.array(photo) for photo in load_sample_images().images]  # two of 427 x 640


def with_pil(photo: NDArray[np.uint8], box: Sequence[float], size: tuple[int, int]) -> NDArray[np.int64]:
    top, left, height, width = box
    corners = (left, top, left + width, top + height)
    resized = Image.fromarray(photo).resize(size[::-1], Image.Resampling.BILINEAR, box=corners)
    return np.asarray(resized).astype(np.int64)


def differences(photo: NDArray[np.uint8], boxes: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.int64]:
    images = torch.from_numpy(photo).expand(len(boxes), *photo.shape)
    ours = crop_resize(images, boxes, size).permute(0, 2, 3, 1).numpy().astype(np.int64)
    theirs = np.stack([with_pil(photo, box, size) for box in boxes.tolist()])
    return np.abs(ours - theirs)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("size", few([(224, 224), (40, 25), (8, 8), (600, 700)], (224, 224), (40, 25)))
@pytest.mark.parametrize("photo", PHOTOS)
def test_close_to_pil(photo: NDArray[np.uint8], size: tuple[int, int], whole: bool) -> None:
    difference = differences(photo, random_boxes(6, 427, 640, whole=whole), size)
    assert difference.mean() < 0.05
    assert difference.max() <= 2


def test_whole_photos_are_close_to_pil() -> None:
    for size in ((224, 224), (427, 320), (1, 1), (3, 640)):
        assert differences(PHOTOS[0], np.array([[0.0, 0.0, 427.0, 640.0]]), size).max() <= 2


def test_result_is_bytes_in_channels_last() -> None:
    images = torch.from_numpy(PHOTOS[0])[None].expand(2, -1, -1, -1)
    for size in ((30, 20), (100, 100)):  # the second box is a copy
        result = crop_resize(images, np.array([[5.0, 7.0, 100.0, 100.0]] * 2), size)
        assert result.shape == (2, 3, *size)
        assert result.dtype == torch.uint8
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", few([(32, 48), (224, 224)], (32, 48)))
def test_bits_do_not_depend_on_the_batch(size: tuple[int, int]) -> None:
    images = torch.from_numpy(np.stack([PHOTOS[i % 2] for i in range(24)]))
    boxes = random_boxes(24, 427, 640)
    boxes[5] = [-20.5, 600.0, 100.0, 80.0]  # reaches outside
    boxes[6] = [10.0, 20.0, *size]  # a copy, in a batch with others
    whole = crop_resize(images, boxes, size)
    assert torch.equal(crop_resize(list(images), boxes, size), whole)
    for budget in (1, 2**24):
        assert torch.equal(crop_resize(images, boxes, size, workspace_bytes=budget), whole)
        assert torch.equal(crop_resize(list(images), boxes, size, workspace_bytes=budget), whole)
    for i in range(24):
        assert torch.equal(crop_resize(images[i : i + 1], boxes[i : i + 1], size), whole[i : i + 1])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(crop_resize(images[order], boxes[order.numpy()], size), whole[order])


def test_bits_do_not_depend_on_the_precision_of_products() -> None:
    images, boxes = torch.from_numpy(PHOTOS[0])[None], random_boxes(1, 427, 640)
    expected = crop_resize(images, boxes, (60, 60))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(crop_resize(images, boxes, (60, 60)), expected)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(crop_resize(images, boxes, (60, 60)), expected)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_weights_and_pixels_survive_half_precision() -> None:
    """What CUDA's tensor cores are given: float16 and TF32 have 11 significant bits, sums at most 19."""
    weights = torch.arange(2049, dtype=torch.float64) / 2048
    pixels = torch.arange(256, dtype=torch.float64)
    assert torch.equal(weights.half().double(), weights)
    assert torch.equal(pixels.half().double(), pixels)
    for values in (weights, pixels):
        bits = values.float().view(torch.int32)
        assert (bits & 0x1FFF == 0).all()  # TF32 cuts off the last 13 of float32's 23
    sums = torch.arange(255 * 2048 + 1, dtype=torch.float64) / 2048
    assert torch.equal((sums.float() + 0.5).double(), sums + 0.5)


def test_lists_of_images_of_different_sizes() -> None:
    images = [torch.from_numpy(PHOTOS[i % 2][: 427 - 9 * i, : 100 + 11 * i].copy()) for i in range(20)]
    boxes = np.concatenate([random_boxes(1, image.shape[0], image.shape[1], i) for i, image in enumerate(images)])
    result = crop_resize(images, boxes, (64, 56), workspace_bytes=2**22)
    for image, box, ours in zip(images, boxes, result, strict=True):
        assert torch.equal(crop_resize(image[None], box[None], (64, 56))[0], ours)


def test_boxes_of_the_size_of_the_output_are_copied() -> None:
    images = torch.from_numpy(np.stack(PHOTOS))
    corners = np.array([[17.0, 30.0], [427 - 96.0, 640 - 80.0]])
    boxes = np.concatenate([corners, [[96.0, 80.0]] * 2], axis=1)
    expected = torch.stack([images[0, 17:113, 30:110], images[1, -96:, -80:]]).permute(0, 3, 1, 2)
    assert torch.equal(crop_resize(images, boxes, (96, 80)), expected)
    assert torch.equal(crop_resize(list(images), boxes, (96, 80)), expected)
    resampled = crop_resize(
        torch.cat([images, images[:1]]), np.concatenate([boxes, [[0.5, 0.5, 9.0, 9.0]]]), (96, 80)
    )  # another box that is not a copy leads all of them through the filter
    assert torch.equal(resampled[:2], expected)


@pytest.mark.parametrize("as_list", [True, False])
def test_padded_random_crops(as_list: bool) -> None:
    images = torch.from_numpy(PHOTOS[1][:320, :320].reshape(10, 32, 10, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3))
    corners = np.random.default_rng(0).integers(-4, 5, (100, 2))
    corners[:3] = [[-32, 0], [40, 0], [0, -31]]  # beside the image, and almost
    boxes = np.concatenate([corners, np.full((100, 2), 32)], axis=1).astype(float)
    padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2), (40, 40, 40, 40))
    expected = torch.stack(
        [image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(padded, (corners + 40).tolist(), strict=True)]
    )
    result = crop_resize(list(images) if as_list else images, boxes, (32, 32))
    assert torch.equal(result, expected)
    one_more = np.concatenate([boxes, [[0.0, 0.0, 16.0, 16.0]]])
    more = torch.cat([images, images[:1]])
    resampled = crop_resize(list(more) if as_list else more, one_more, (32, 32))
    assert torch.equal(resampled[:100], expected)


def test_outside_is_zero_when_resized() -> None:
    photo = PHOTOS[0]
    boxes = np.array([[-50.0, -70.0, 300.0, 400.0], [300.0, 500.0, 200.0, 300.0], [-100.0, -100.0, 700.0, 900.0]])
    padded = np.pad(photo, ((300, 300), (300, 300), (0, 0)))
    images = torch.from_numpy(photo).expand(3, *photo.shape)
    result = crop_resize(images, boxes, (90, 120)).permute(0, 2, 3, 1).numpy().astype(np.int64)
    for ours, box in zip(result, boxes, strict=True):
        theirs = with_pil(padded, (box + np.array([300, 300, 0, 0])).tolist(), (90, 120))
        inner = np.abs(ours - theirs)[2:-2, 2:-2]  # at the edge of a box, PIL sees more of the padding than we do
        assert inner.max() <= 2


def test_a_box_that_sticks_out_by_rounding_alone_has_no_dark_edge() -> None:
    image = torch.full((1, 60, 60, 1), 200, dtype=torch.uint8)
    boxes = np.array([[-1e-12, -1e-12, 60 + 2e-12, 60 + 2e-12]])
    assert (crop_resize(image, boxes, (20, 33)) == 200).all()


@pytest.mark.parametrize("size", [(7, 9), (50, 40), (3, 200)])
def test_flat_colours_stay(size: tuple[int, int]) -> None:
    colours = torch.randint(0, 256, (16, 1, 1, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = colours.expand(16, 61, 83, 3)
    result = crop_resize(images, random_boxes(16, 61, 83), size)
    assert torch.equal(result, colours.permute(0, 3, 1, 2).expand(16, 3, *size))


def test_channels_first_storage_and_other_channel_counts() -> None:
    stored = torch.randint(0, 256, (4, 5, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = random_boxes(4, 40, 50)
    result = crop_resize(stored.permute(0, 2, 3, 1), boxes, (17, 19))
    for channel in range(5):
        alone = crop_resize(stored[:, channel, :, :, None], boxes, (17, 19))
        assert torch.equal(alone[:, 0], result[:, channel])
