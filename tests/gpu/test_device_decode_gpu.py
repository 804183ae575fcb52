"""JPEGs that the GPU decodes look like those of the host, and broken ones are named or replaced and harm no other."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_feeds import (
    CPU,
    CUDA,
    MILLISECOND,
    NUM_CLASSES,
    batches_of,
    folder_config,
    needs_gpu_decoder,
    opened,
    save_picture,
    start,
    steps,
)
from PIL import Image

from trainer.data.datasets import ImageFolder
from trainer.errors import UserError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def _gpu_decoder() -> None:
    needs_gpu_decoder()


def various_pictures(root: Path) -> Path:
    """Makes a folder of JPEGs of every kind that is common, and of PNGs, which the GPU does not decode."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("420.jpg", {"quality": 92, "subsampling": 2}),
        ("422.jpg", {"quality": 92, "subsampling": 1}),
        ("444.jpg", {"quality": 92, "subsampling": 0}),
        ("progressive.jpg", {"quality": 92, "progressive": True}),
        ("picture.png", {}),
    ]
    for i in range(60):
        name, settings = kinds[i % len(kinds)]
        save_picture(root / f"class_{i % NUM_CLASSES}" / f"{i:03}-{name}", i, **settings)
    for i in range(60, 64):
        file = root / "class_0" / f"{i:03}-grey.jpg"
        save_picture(file, i)
        Image.open(file).convert("L").save(file, quality=92)
    return root


@pytest.mark.usefixtures("_gpu_decoder")
@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_decoded_on_the_gpu_look_like_those_of_the_host(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = various_pictures(tmp_path / "various")
    dataset = ImageFolder(str(root))
    host = batches_of(dataset, folder_config(root), CPU, monkeypatch)
    data = folder_config(root, feed="device_decode", workers=workers)
    there = batches_of(dataset, data, CUDA, monkeypatch)
    differences: dict[str, list[float]] = {}
    for (ids, before, _, targets), (expected_ids, expected, _, expected_targets) in zip(there, host, strict=True):
        assert ids == expected_ids
        assert torch.equal(targets, expected_targets)
        assert before.shape == expected.shape
        per_picture = (before.float() - expected.float()).abs().mean(dim=(1, 2, 3))
        for sample, difference in zip(ids, per_picture.tolist(), strict=True):
            kind = Path(dataset.samples[sample][0]).stem.partition("-")[2]
            differences.setdefault(kind, []).append(difference)
    means = {kind: float(np.mean(values)) for kind, values in differences.items()}
    assert len(means) == 6
    assert max(means.values()) < 2, means  # grey levels: nvJPEG's inverse DCT and upsampling are its own


@pytest.mark.usefixtures("_gpu_decoder")
def test_late_devices_do_not_change_what_the_gpu_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = various_pictures(tmp_path / "various")
    dataset, data = ImageFolder(str(root)), folder_config(tmp_path / "various", feed="device_decode")
    calm = batches_of(dataset, data, CUDA, monkeypatch, num_steps=40)
    with opened(dataset, data) as feed:
        start(feed)
        late = []
        for batch in steps(feed, 0, 40):
            torch.cuda._sleep(5 * MILLISECOND)
            late.append([values.clone() for values in batch.data])
            del batch
            torch.cuda._sleep(5 * MILLISECOND)
    for here, there in zip(late, calm, strict=True):
        assert torch.equal(here[0].cpu(), there[2])
        assert torch.equal(here[1].cpu(), there[3])


def half_of_it(jpeg: bytes) -> bytes:
    return jpeg[: len(jpeg) // 2]


def half_of_it_with_an_end(jpeg: bytes) -> bytes:
    return jpeg[: len(jpeg) // 2] + jpeg[-2:]


def no_picture(jpeg: bytes) -> bytes:
    return b"<html>404 not found</html>"


def noise_after_the_header(jpeg: bytes) -> bytes:
    return jpeg[:700] + random.Random(0).randbytes(len(jpeg) - 700)


def broken_folder(root: Path, spoil: Callable[[bytes], bytes]) -> tuple[Path, int]:
    """Makes 40 JPEGs, one of them spoilt. Returns the folder and the spoilt one's index."""
    for i in range(40):
        save_picture(root / "class_0" / f"{i:03}.jpg", i, quality=92)
    file = root / "class_0" / "017.jpg"
    file.write_bytes(spoil(file.read_bytes()))
    return root, 17


@pytest.mark.usefixtures("_gpu_decoder")
@pytest.mark.parametrize("spoil", [half_of_it, no_picture])
def test_a_broken_picture_ends_decoding_on_the_gpu_and_is_named(
    spoil: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    root, _ = broken_folder(tmp_path, spoil)
    with opened(ImageFolder(str(root)), folder_config(root, feed="device_decode")) as feed:
        start(feed)
        with pytest.raises(UserError, match=r"017\.jpg"):
            list(steps(feed, 0, 3))


def decoded_both_ways(
    spoil: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, Any, Any]:
    """Returns the broken sample, and the batches of the host and of the GPU, which skip what they find broken."""
    root, broken = broken_folder(tmp_path, spoil)
    dataset = ImageFolder(str(root))
    skip = {"on_error": "skip", "max_skipped": 1.0}
    host = batches_of(dataset, folder_config(root, **skip), CPU, monkeypatch)
    there = batches_of(dataset, folder_config(root, feed="device_decode", **skip), CUDA, monkeypatch)
    return broken, host, there


@pytest.mark.usefixtures("_gpu_decoder")
@pytest.mark.parametrize("spoil", [half_of_it, no_picture])
def test_a_broken_picture_is_replaced_as_on_the_host(
    spoil: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, host, there = decoded_both_ways(spoil, tmp_path, monkeypatch)
    assert [ids for ids, *_ in there] == [ids for ids, *_ in host]
    assert broken not in {sample for ids, *_ in there for sample in ids}
    for (_, before, *_), (_, expected, *_) in zip(there, host, strict=True):
        assert (before.float() - expected.float()).abs().mean() < 2


@pytest.mark.usefixtures("_gpu_decoder")
@pytest.mark.parametrize("spoil", [half_of_it_with_an_end, noise_after_the_header])
def test_a_picture_that_no_decoder_finds_broken_harms_no_other(
    spoil: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, host, there = decoded_both_ways(spoil, tmp_path, monkeypatch)
    for (ids, before, *_), (host_ids, expected, *_) in zip(there, host, strict=True):
        for i, (sample, host_sample) in enumerate(zip(ids, host_ids, strict=True)):
            if sample == host_sample != broken:
                assert (before[i].float() - expected[i].float()).abs().mean() < 2
