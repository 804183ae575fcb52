"""Crops and resizes on a GPU: the bits of the CPU, and no waiting."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import no_waiting
from drawn import random_boxes
from sklearn.datasets import load_sample_images

from trainer.data.device_crop import crop_resize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(params=[False, True], ids=["float32", "tf32"])
def _allow_tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_float32_matmul_precision("high" if request.param else "highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("_allow_tf32")
@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("size", [(224, 224), (33, 25), (500, 700)])
def test_bits_are_those_of_the_cpu(size: tuple[int, int], as_list: bool) -> None:
    photos = torch.from_numpy(np.stack([load_sample_images().images[i % 2] for i in range(16)]))
    boxes = random_boxes(16, 427, 640)
    boxes[3] = [-30.25, 500.0, 200.0, 200.5]  # reaches outside
    expected = crop_resize(photos, boxes, size)
    on_device = photos.cuda()
    images = list(on_device) if as_list else on_device
    for budget in (2**28, 2**23):
        crop_resize(images, boxes, size, workspace_bytes=budget)  # warm-up: cuBLAS, allocator
        with no_waiting():
            result = crop_resize(images, boxes, size, workspace_bytes=budget)
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("as_list", [True, False])
def test_padded_crops_are_those_of_the_cpu(as_list: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (128, 32, 32, 3), dtype=torch.uint8, generator=generator)
    corners = np.random.default_rng(0).integers(-4, 5, (128, 2))
    boxes = np.concatenate([corners, np.full((128, 2), 32)], axis=1).astype(float)
    expected = crop_resize(stored, boxes, (32, 32))
    on_device = stored.cuda()
    images = list(on_device) if as_list else on_device
    with no_waiting():
        result = crop_resize(images, boxes, (32, 32))
    assert torch.equal(result.cpu(), expected)
