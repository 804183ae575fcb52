"""Host decoding: only what a crop keeps, and yet the pixels of PIL's full decode, crop and resize."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from trainer.data import decode
from trainer.data.draws import sample_keys
from trainer.data.geometry import split_transforms
from trainer.data.sampler import SampleKey

PHOTOS = load_sample_images().images  # 427 x 640
KEYS = sample_keys(0, [SampleKey(0, i) for i in range(12)])


def jpeg(size: tuple[int, int] = (640, 427), mode: str = "RGB", photo: int = 0, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PHOTOS[photo]).resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def full(data: bytes, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """PIL's way, as torchvision goes it: decode all, crop, resize."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    corners = (box[1], box[0], box[1] + box[3], box[0] + box[2])
    if (box == np.floor(box)).all():
        return np.asarray(image.crop(corners).resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR, box=corners)).astype(int)


needs_codec = pytest.mark.skipif(decode.codec() is None, reason="nvImageCodec is not installed")


@needs_codec
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK", "progressive"])
def test_a_decoded_region_is_bitwise_that_of_the_full_decode(kind: str, subsampling: int) -> None:
    mode = kind if kind != "progressive" else "RGB"
    data = jpeg(mode=mode, subsampling=subsampling, progressive=kind == "progressive", quality=85)
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for top, left, height, width in [(0, 0, 427, 640), (13, 7, 101, 55), (200, 301, 227, 339), (5, 600, 1, 40)]:
        box = np.array([top, left, height, width], dtype=float)
        region = decode._decode_region(data, box, np.zeros(2))
        assert region is not None
        assert np.array_equal(region[0], whole[top : top + height, left : left + width])


@pytest.mark.parametrize("with_codec", [pytest.param(True, marks=needs_codec), False])
@pytest.mark.parametrize("photo", [0, 1])
def test_random_crops_are_as_pils(photo: int, with_codec: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_codec:
        monkeypatch.setattr(decode, "codec", lambda: None)
    data = jpeg(photo=photo, quality=92)
    geometry = split_transforms([v2.RandomResizedCrop(224)]).geometry
    assert geometry is not None
    crops = geometry(np.array([decode.read_size(data)] * len(KEYS)), KEYS)
    for box in crops.boxes:
        difference = np.abs(decode.crop_and_resize(data, box, (224, 224)) - full(data, box, (224, 224)))
        assert difference.mean() < 0.1
        assert difference.max() <= 4


@pytest.mark.parametrize("with_codec", [pytest.param(True, marks=needs_codec), False])
@pytest.mark.parametrize("size", [(640, 427), (427, 640), (2000, 1400), (300, 900)])
def test_evaluation_is_as_torchvisions(
    size: tuple[int, int], with_codec: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_codec:
        monkeypatch.setattr(decode, "codec", lambda: None)
    data = jpeg(size, quality=92)
    transforms = [v2.Resize(256), v2.CenterCrop(224)]
    geometry = split_transforms(transforms).geometry
    assert geometry is not None
    crops = geometry(np.array([decode.read_size(data)]), KEYS[:1])
    assert crops.sizes.tolist() == [[224, 224]]
    found = decode.crop_and_resize(data, crops.boxes[0], (224, 224))
    expected = np.asarray(v2.Compose(transforms)(Image.open(io.BytesIO(data)).convert("RGB"))).astype(int)
    difference = np.abs(found - expected)
    assert difference.mean() < (0.6 if max(size) > 1000 else 0.2)  # the large one is decoded at a half


def test_crops_that_shrink_are_decoded_at_reduced_size(monkeypatch: pytest.MonkeyPatch) -> None:
    data = jpeg((2560, 1708), quality=90)
    asked: list[tuple[int, int]] = []
    draft = JpegImagePlugin.JpegImageFile.draft

    def recorded(image: JpegImagePlugin.JpegImageFile, mode: str, size: tuple[int, int]) -> object:
        result = draft(image, mode, size)
        asked.append(image.size)
        return result

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", recorded)
    for box in ([0, 0, 1708, 2560], [100.5, 200.25, 1000, 1100], [300, 0, 860, 900]):
        decoded = decode.crop_and_resize(data, np.array(box, dtype=float), (224, 224))
        difference = np.abs(decoded - full(data, np.array(box, dtype=float), (224, 224)))
        assert difference.mean() < 0.6
    assert asked == [(1280, 854), (1280, 854)]  # the last shrinks less than fourfold


@pytest.mark.parametrize(("name", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_other_formats(name: str, options: dict[str, object]) -> None:
    file = io.BytesIO()
    Image.fromarray(PHOTOS[0]).save(file, name, **options)
    assert decode.read_size(file.getvalue()) == (427, 640)
    box = np.array([10, 20, 224, 224], dtype=float)
    assert np.array_equal(decode.crop_and_resize(file.getvalue(), box, (224, 224)), PHOTOS[0][10:234, 20:244])


@pytest.mark.parametrize("broken", ["empty", "garbage", "cut in the header", "cut in the middle"])
def test_broken_files_raise_pils_errors(broken: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = {"empty": b"", "garbage": b"\xff\xd8 no picture" * 9, "cut in the header": jpeg()[:300]}.get(
        broken, jpeg()[:20_000]
    )
    box = np.array([0, 0, 427, 640], dtype=float)
    with pytest.raises((OSError, SyntaxError)):
        decode.read_size(data), decode.crop_and_resize(data, box, (224, 224))
    assert capfd.readouterr().err == ""


def test_deep_pixels_are_refused() -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((20, 20), dtype=np.uint16)).save(file, "PNG")
    with pytest.raises(OSError, match="8 bits per channel"):
        decode.crop_and_resize(file.getvalue(), np.array([0, 0, 10, 10], dtype=float), (5, 5))


def test_a_processs_own_decoder_after_a_fork() -> None:
    import multiprocessing

    data = jpeg()
    box = np.array([3, 5, 300, 400], dtype=float)
    expected = decode.crop_and_resize(data, box, (224, 224))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert np.array_equal(pool.apply(decode.crop_and_resize, (data, box, (224, 224))), expected)
