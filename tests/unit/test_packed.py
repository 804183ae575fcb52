"""Packed image folders as they are read: the pictures of their source, and whatever is damaged is named."""

from __future__ import annotations

import os
import pickle
import struct
import threading
import zlib
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from packs import flip, make_folder, picture, pixels, settings, wait_until
from PIL import Image

from trainer.data import packed
from trainer.data.datasets import ImageFolder, class_names, is_image_data
from trainer.data.encoding import encode
from trainer.data.packed import MANIFEST, PackedImages
from trainer.data.packing import pack_folder
from trainer.errors import UserError


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("encoding", ["raw", "jpeg", "mixed"])
def test_pictures_that_are_small_enough_come_back_bit_for_bit(tmp_path: Path, encoding: str) -> None:
    source = ImageFolder(str(make_folder(tmp_path / "source", 7)))
    data = PackedImages(pack_folder(source, settings(tmp_path / "cache", encoding=encoding)))
    assert len(data) == len(source) == 7
    assert len(data.manifest.shards) == 4
    for i, (path, label) in enumerate(source.samples):
        image, packed_label = data[i]
        assert (image.mode, packed_label) == ("RGB", label)
        assert torch.equal(pixels(image), pixels(source[i][0]))
        stored, _ = data.encoded(i)
        if encoding == "raw" or (encoding == "mixed" and i % 2 == 1):
            assert isinstance(stored, np.ndarray)
            assert stored.shape == (30, 40, 3)
            assert not stored.flags.writeable
        else:
            assert bytes(stored) == Path(path).read_bytes()
    data.verify()


@pytest.mark.usefixtures("small_shards")
def test_it_looks_like_the_folder_it_was_made_of(tmp_path: Path) -> None:
    source = ImageFolder(str(make_folder(tmp_path / "source")))
    data = PackedImages(pack_folder(source, settings(tmp_path / "cache")))
    assert class_names(data) == source.classes
    assert is_image_data(data)
    assert [data.name(i) for i in range(6)] == [os.path.relpath(path, source.root) for path, _ in source.samples]
    assert data.source_name(3) == "class_1/003.jpg in shard-00001-of-00003.bin"
    assert [data[i][1] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert data[-1][1] == 2
    with pytest.raises(IndexError):
        data[6]
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(pixels(copy[4][0]), pixels(data[4][0]))
    assert len(pickle.dumps(data)) < 5000  # no map, no list of samples


@pytest.mark.parametrize(
    ("size", "max_size", "shrunk"),
    [((90, 60), 30, (45, 30)), ((61, 121), 20, (20, 40)), ((50, 30), 30, (50, 30)), ((50, 31), None, (50, 31))],
)
@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_the_shorter_side_is_shrunk(
    tmp_path: Path, size: tuple[int, int], max_size: int | None, shrunk: tuple[int, int], encoding: str
) -> None:
    source = ImageFolder(str(make_folder(tmp_path / "source", 3, size)))
    data = PackedImages(pack_folder(source, settings(tmp_path / "cache", encoding=encoding, max_size=max_size)))
    for i in range(3):
        image, original = data[i][0], source[i][0]
        assert image.size == shrunk
        wanted = original.resize(shrunk, Image.Resampling.BICUBIC)
        assert (pixels(image).float() - pixels(wanted).float()).abs().mean() < 6  # of 255


def test_large_jpegs_are_decoded_smaller_without_looking_different() -> None:
    large = picture(1, (1600, 1000))
    file = BytesIO()
    large.save(file, "JPEG", quality=95)
    stored = encode(file.getvalue(), True, 100, 90)
    assert (stored.width, stored.height) == (160, 100)
    mine = torch.frombuffer(bytearray(stored.data), dtype=torch.uint8).view(100, 160, 3).float()
    wanted = pixels(Image.open(file).convert("RGB").resize((160, 100), Image.Resampling.BICUBIC)).float()
    assert (mine - wanted).abs().mean() < 1


def test_quality(tmp_path: Path) -> None:
    file = BytesIO()
    picture(1, (200, 200)).save(file, "PNG")
    sizes = [len(encode(file.getvalue(), False, 100, quality).data) for quality in (20, 60, 95)]
    assert sizes[0] < sizes[1] < sizes[2]
    source = ImageFolder(str(make_folder(tmp_path / "source", 3, (90, 60))))
    packs = [PackedImages(pack_folder(source, settings(tmp_path, max_size=30, quality=q))) for q in (20, 60, 95)]
    sizes = [len(pack.encoded(0)[0]) for pack in packs]
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
@pytest.mark.parametrize("max_size", [20, 400])
def test_every_mode_is_converted_as_the_folder_does(tmp_path: Path, encoding: str, max_size: int) -> None:
    folder = tmp_path / "source" / "a"
    folder.mkdir(parents=True)
    picture(0, mode="CMYK").save(folder / "cmyk.jpg", quality=95)
    picture(1, mode="L").save(folder / "gray.jpg", quality=95)
    picture(2, mode="RGBA").save(folder / "alpha.png")
    picture(3, mode="LA").save(folder / "gray_alpha.png")
    picture(4).quantize(200).save(folder / "palette.png")
    picture(5).convert("1").save(folder / "one_bit.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    picture(6).save(folder / "rotated.jpg", exif=exif, quality=95)
    source = ImageFolder(str(tmp_path / "source"))
    data = PackedImages(
        pack_folder(source, settings(tmp_path / "cache", encoding=encoding, max_size=max_size, quality=95))
    )
    kept = {"gray.jpg", "rotated.jpg"} if max_size == 400 else set()
    for i, (path, _) in enumerate(source.samples):
        name, image = Path(path).name, source[i][0]
        if max_size == 20:
            image = image.resize((27, 20), Image.Resampling.BICUBIC)
        mine = data[i][0]
        assert (mine.mode, mine.size) == ("RGB", image.size)
        if encoding == "raw" or name in kept:
            if name.endswith("png") or max_size == 400:
                assert torch.equal(pixels(mine), pixels(image)), name
        else:
            limit = 20 if name == "one_bit.png" else 5
            assert (pixels(mine).float() - pixels(image).float()).abs().mean() < limit, name
        stored, _ = data.encoded(i)
        if encoding == "jpeg":
            assert (bytes(stored) == Path(path).read_bytes()) == (name in kept)
        if encoding == "jpeg" and name not in kept:
            again = Image.open(BytesIO(bytes(stored)))
            assert (again.mode, len(again.getexif()), again.info.get("comment")) == ("RGB", 0, None)


def test_a_picture_too_long_for_a_jpeg_is_stored_raw() -> None:
    file = BytesIO()
    Image.new("RGB", (66000, 1), (1, 2, 3)).save(file, "PNG")
    stored = encode(file.getvalue(), False, 400, 90)
    assert (stored.kind, stored.height, stored.width, len(stored.data)) == (packed.RAW, 1, 66000, 198000)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_damage_is_found(tmp_path: Path, encoding: str) -> None:
    source = ImageFolder(str(make_folder(tmp_path / "source")))
    folder = pack_folder(source, settings(tmp_path / "cache", encoding=encoding))
    flip(folder / "shard-00001-of-00003.bin", 5)
    data = PackedImages(folder)
    data.encoded(3)
    broken = r"is damaged: class_1/002.jpg in shard-00001-of-00003.bin has another checksum; delete the folder"
    with pytest.raises(UserError, match=broken):
        data.verify()
    if encoding == "jpeg":
        with pytest.raises(UserError, match=broken):
            data.encoded(2)
    else:
        data.encoded(2)
    for name in ("texts.bin", "index.bin"):
        flip(folder / name, 0)
        with pytest.raises(UserError, match=rf"{name}' is damaged; delete the folder"):
            PackedImages(folder).verify()


def test_missing_and_cut_files_are_found_when_opening(tmp_path: Path) -> None:
    source = ImageFolder(str(make_folder(tmp_path / "source")))
    folder = pack_folder(source, settings(tmp_path / "cache"))
    shard, manifest = folder / "shard-00000-of-00001.bin", folder / MANIFEST
    data, text = PackedImages(folder), manifest.read_text()
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"shard-00000-of-00001.bin' is damaged: it has [\d,]+ bytes, not .* delete"):
        PackedImages(folder)
    with pytest.raises(UserError, match="is damaged: it has"):  # not SIGBUS
        data.encoded(5)
    shard.unlink()
    with pytest.raises(UserError, match=r"cannot read .*shard-00000-of-00001.bin' .*No such file"):
        PackedImages(folder)
    for broken in (text[:-20], "[]", "{}", text.replace('"crc32"', '"crc33"')):
        manifest.write_text(broken)
        with pytest.raises(UserError, match=r"manifest.json' is damaged .* delete the folder"):
            PackedImages(folder)
    manifest.write_text(text.replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(UserError, match="has format 99, not 1"):
        PackedImages(folder)
    manifest.unlink()
    with pytest.raises(UserError, match="is no complete packed data set"):
        PackedImages(folder)


def test_broken_pictures(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "source")
    whole = (root / "class_0" / "000.jpg").read_bytes()
    (root / "class_0" / "000.jpg").write_bytes(b"no picture")
    (root / "class_1" / "002.jpg").write_bytes(whole[:-20])
    Image.fromarray(np.zeros((30, 40), np.uint16)).save(root / "class_2" / "005.png")
    source, config = ImageFolder(str(root)), settings(tmp_path / "cache")
    with pytest.raises(UserError, match=rf"cannot read '{root}/class_0/000.jpg': cannot identify image file"):
        pack_folder(source, config)
    data = PackedImages(pack_folder(source, config, on_error="skip"))
    assert len(data) == len(source) == 7
    data.verify()
    for i in range(7):
        if i not in (0, 2, 6):
            assert torch.equal(pixels(data[i][0]), pixels(source[i][0]))
            continue
        with pytest.raises(OSError, match=r"."):
            source[i]
        for read in (data.__getitem__, data.encoded):
            with pytest.raises(OSError, match=source.samples[i][0]):
                read(i)
    with pytest.raises(OSError, match="image file is truncated"):
        data[2]
    with pytest.raises(OSError, match="I;16 image: convert it to 8 bits per channel first"):
        data[6]


def is_reading_ahead() -> bool:
    return "read-ahead" in {thread.name for thread in threading.enumerate()}


def test_small_packs_are_read_ahead_and_large_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pack_folder(ImageFolder(str(make_folder(tmp_path / "source"))), settings(tmp_path / "cache"))
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(packed.os, "posix_fadvise", lambda fd, start, size, advice: advised.append((fd, advice)))
    PackedImages(folder)
    wait_until(lambda: len(advised) == 3 and not is_reading_ahead())
    assert {advice for _, advice in advised} == {os.POSIX_FADV_WILLNEED}
    advised.clear()
    PackedImages(folder, read_ahead=False)

    class Memory:
        available = 1000

    monkeypatch.setattr(packed.psutil, "virtual_memory", lambda: Memory)
    PackedImages(folder)
    assert not is_reading_ahead()
    assert advised == []


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "source", 3)
    name = os.fsencode(root / "class_0") + b"/\xff\xe4.jpg"
    picture(5).save(os.fsdecode(name))
    source = ImageFolder(str(root))
    data = PackedImages(pack_folder(source, settings(tmp_path / "cache")))
    assert os.fsencode(os.path.join(root, data.name(1))) == name


def test_a_forked_process_reads_too(tmp_path: Path) -> None:
    data = PackedImages(pack_folder(ImageFolder(str(make_folder(tmp_path / "source"))), settings(tmp_path / "cache")))
    loader = torch.utils.data.DataLoader(Sums(data), num_workers=2, batch_size=1)
    expected = [int(pixels(data[i][0]).long().sum()) for i in range(len(data))]
    assert [int(value) for value in loader] == expected


class Sums(torch.utils.data.Dataset[int]):
    def __init__(self, data: PackedImages) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> int:
        return int(pixels(self.data[index][0]).long().sum())


def test_the_footer_has_the_checksum_of_the_whole_file(tmp_path: Path) -> None:
    folder = pack_folder(ImageFolder(str(make_folder(tmp_path / "source"))), settings(tmp_path / "cache"))
    with open(folder / "shard-00000-of-00001.bin", "rb") as file:
        data, footer = split(file)
    assert zlib.crc32(data[: footer.data_size]) == footer.data_crc32
    assert zlib.crc32(data[footer.data_size :]) == footer.tail_crc32
    assert footer.key.decode() == folder.name


def split(file: BinaryIO) -> tuple[bytes, packed.Footer]:
    data = file.read()
    end = struct.calcsize(packed.FOOTER.format)
    return data[:-end], packed.Footer(*packed.FOOTER.unpack(data[-end:]))
