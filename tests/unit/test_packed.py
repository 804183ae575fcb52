"""Packed image folders: what is stored, when it is packed anew, interruptions, damage."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.config_data import CacheConfig
from trainer.data import listing, pack_files, packed, packing
from trainer.data.datasets import ImageFolder, class_names, is_image_data
from trainer.data.encoding import encode
from trainer.data.listing import Listing, cache_key
from trainer.data.packed import MANIFEST, PackedImages
from trainer.data.packing import pack_folder
from trainer.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def picture(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """A smooth picture, which a JPEG keeps about as it is."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(80, 176, (3, 4, 4), np.uint8), "RGBA")
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def make_folder(root: Path, count: int = 6, size: tuple[int, int] = (40, 30)) -> Path:
    for i in range(count):
        folder = root / f"class_{i * 3 // count}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(i, size).save(folder / f"{i:03d}.jpg", quality=95)
    return root


def settings(path: Path, **changes: Any) -> CacheConfig:
    return CacheConfig.model_validate({"path": str(path), **changes})


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "SHARD_SAMPLES", 2)


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


def test_large_jpegs_are_decoded_smaller_without_looking_different(tmp_path: Path) -> None:
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


def test_the_key_is_of_the_source_and_the_settings(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "source")
    config = settings(tmp_path / "cache")
    file = root / "class_0" / "000.jpg"

    def key(**changes: Any) -> str:
        return cache_key(ImageFolder(str(root)), settings(tmp_path / "cache", **changes))

    first = key()
    assert len(first) == 16
    assert first == key() == cache_key(ImageFolder(f"{root}/"), settings(tmp_path / "elsewhere"))
    assert first == key(max_size=400, encoding="jpeg", quality=90)
    by_setting = [key(max_size=300), key(max_size=None), key(encoding="raw"), key(encoding="mixed"), key(quality=80)]
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns

    os.utime(file, ns=(times[0], times[1] + 1))
    touched = key()
    os.utime(file, ns=times)
    assert key() == first

    data = file.read_bytes()
    file.write_bytes(data + b"x")
    os.utime(file, ns=times)
    longer = key()
    file.write_bytes(data)
    os.utime(file, ns=times)
    assert key() == first

    more_classes = cache_key(ImageFolder(str(root), classes=["class_0", "class_1", "class_2", "d"]), config)
    other_labels = cache_key(ImageFolder(str(root), classes=["class_1", "class_0", "class_2"]), config)
    file.rename(file.with_name("0000.jpg"))
    renamed = key()
    file.with_name("0000.jpg").unlink()
    keys = [first, *by_setting, touched, longer, more_classes, other_labels, renamed, key()]
    assert len(set(keys)) == len(keys)


def test_a_changed_source_is_packed_anew_and_an_unchanged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, config = make_folder(tmp_path / "source"), settings(tmp_path / "cache")
    first = pack_folder(ImageFolder(str(root)), config)
    before = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    assert pack_folder(ImageFolder(str(root)), config) == first
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == before
    picture(99).save(root / "class_1" / "002.jpg")
    source = ImageFolder(str(root))
    again = pack_folder(source, config)
    assert again != first
    assert torch.equal(pixels(PackedImages(again)[2][0]), pixels(picture_file(root / "class_1" / "002.jpg")))
    with monkeypatch.context() as patch:  # with the key known, nothing is listed
        patch.setattr(Listing, "of", lambda source: pytest.fail("listed"))
        assert pack_folder(source, config, key=again.name) == again
    with pytest.raises(UserError, match="was changed while it was packed"):
        pack_folder(source, config, key="0" * 16)


def picture_file(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def test_which_samples_are_in_which_shard() -> None:
    def bounds(sizes: list[int], **changes: Any) -> list[int]:
        n = len(sizes)
        empty = np.zeros(n, np.int64)
        listing = Listing("r", ("a",), tuple(map(str, range(n))), empty, np.array(sizes, np.int64), empty)
        return listing.shard_bounds(settings(Path("c"), **changes))

    assert bounds([10_000] * 5000) == [0, 2048, 4096, 5000]
    assert bounds([100 * 2**20] * 5, max_size=None) == [0, 2, 4, 5]
    assert bounds([2**30] * 2, max_size=None) == [0, 1, 2]
    assert bounds([10**6] * 1024, encoding="raw")[:2] == [0, 419]  # 640,000 bytes each
    assert len(bounds([110_000] * 1_281_167)) <= 2 * listing.MOST_SHARDS + 2


@pytest.mark.usefixtures("small_shards")
def test_ranks_and_workers_write_the_same_bytes_together(tmp_path: Path) -> None:
    source = ImageFolder(str(make_folder(tmp_path / "source", 13, (90, 60))))
    alone = contents(pack_folder(source, settings(tmp_path / "alone", max_size=40, encoding="mixed")))
    config = settings(tmp_path / "together", max_size=40, encoding="mixed")
    barrier = threading.Barrier(2)
    folders: list[Path] = []

    def pack(rank: int) -> None:
        folders.append(pack_folder(source, config, rank=rank, num_ranks=2, barrier=lambda: waited(barrier)))

    ranks = [threading.Thread(target=pack, args=(rank,)) for rank in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert contents(folders[0]) == contents(folders[1]) == alone
    workers = pack_folder(source, settings(tmp_path / "workers", max_size=40, encoding="mixed"), num_workers=2)
    assert contents(workers) == alone
    assert set(alone) == {"manifest.json", "index.bin", "texts.bin"} | {f"shard-0000{i}-of-00007.bin" for i in range(7)}


@pytest.mark.usefixtures("small_shards")
def test_two_jobs_may_pack_the_same_at_once(tmp_path: Path) -> None:
    source = ImageFolder(str(make_folder(tmp_path / "source", 24, (90, 60))))
    alone = contents(pack_folder(source, settings(tmp_path / "alone", max_size=40)))
    folders: list[Path] = []

    def pack() -> None:
        folders.append(pack_folder(source, settings(tmp_path / "shared", max_size=40)))

    jobs = [threading.Thread(target=pack) for _ in range(3)]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join()
    assert len(folders) == 3
    assert contents(folders[0]) == alone


def waited(barrier: threading.Barrier) -> None:
    barrier.wait(60)


@pytest.mark.usefixtures("small_shards")
def test_a_problem_of_one_rank_ends_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_files, "VISIBLE_SECONDS", 0.3)
    root = make_folder(tmp_path / "source")
    (root / "class_1" / "002.jpg").write_bytes(b"no picture")  # in shard 1, of rank 1
    source = ImageFolder(str(root))
    barrier = threading.Barrier(2)
    messages = {}

    def pack(rank: int) -> None:
        with pytest.raises(UserError) as caught:
            pack_folder(source, settings(tmp_path / "c"), rank=rank, num_ranks=2, barrier=lambda: waited(barrier))
        messages[rank] = str(caught.value)

    ranks = [threading.Thread(target=pack, args=(rank,)) for rank in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert "shard-00001-of-00003.bin' was not packed completely" in messages[0]
    assert "002.jpg': cannot identify image file" in messages[1]


# An ImageFolder without torch, which takes seconds to import in the script and in every worker.
SCRIPT = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from trainer.config_data import CacheConfig
from trainer.data import listing, packing
from trainer.errors import UserError
root, cache = sys.argv[1:]
classes = sorted(folder.name for folder in Path(root).iterdir())
samples = [(str(file), classes.index(file.parent.name)) for file in sorted(Path(root).rglob("*.jpg"))]
source = SimpleNamespace(root=root, classes=classes, samples=samples)
listing.SHARD_SAMPLES = 2
"""

KILLED = """
encode, calls = packing.encode, []
def slow(*args):
    calls.append(args)
    if len(calls) == 6:
        print("two shards, and half of one", flush=True)
        time.sleep(60)
    return encode(*args)
packing.encode = slow
assert "torch" not in sys.modules
packing.pack_folder(source, CacheConfig(path=cache, max_size=40))
"""


@contextmanager
def script(folder: Path, text: str, root: Path, cache: Path) -> Iterator[subprocess.Popen[str]]:
    file = folder / "script.py"
    file.write_text(SCRIPT + text)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(file), str(root), str(cache)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        yield process


@pytest.mark.usefixtures("small_shards")
def test_a_kill_in_the_middle_costs_the_shard_at_work_and_nothing_else(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "source", 12, (90, 60))
    source, config = ImageFolder(str(root)), settings(tmp_path / "cache", max_size=40)
    fresh = contents(pack_folder(source, settings(tmp_path / "fresh", max_size=40)))
    with script(tmp_path, KILLED, root, tmp_path / "cache") as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    folder = Path(config.path) / cache_key(source, config)
    done = {file: file.stat().st_mtime_ns for file in folder.glob("shard-*")}
    assert len(done) == 2
    assert len(temporaries(folder)) == 1
    with pytest.raises(UserError, match="no complete packed data set"):
        PackedImages(folder)
    assert pack_folder(source, config) == folder
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert contents(folder) == fresh


KILLED_WITH_WORKERS = """
listing.SHARD_SAMPLES = 20
if __name__ == "__main__":
    source.samples *= 200
    packing.pack_folder(source, CacheConfig(path=cache, max_size=40), num_workers=2)
"""


def test_workers_die_with_the_process_that_was_killed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "source", 6, (900, 600))
    with script(tmp_path, KILLED_WITH_WORKERS, root, tmp_path / "cache") as process:
        wait_until(lambda: len(temporaries(tmp_path / "cache")) == 2)
        workers = [int(file.name.split(".")[-3]) for file in temporaries(tmp_path / "cache")]
        process.send_signal(signal.SIGKILL)
    assert len(set(workers)) == 2
    wait_until(lambda: not any(is_running(pid) for pid in workers))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_leftovers_are_removed_and_files_at_work_are_not(tmp_path: Path) -> None:
    source, config = ImageFolder(str(make_folder(tmp_path / "source"))), settings(tmp_path / "cache")
    folder = Path(config.path) / cache_key(source, config)
    folder.mkdir(parents=True)
    foreign = [folder / f".shard-0.bin.other-host.{pid}.aa.tmp" for pid in (1, 2)]
    for file in foreign:
        file.write_bytes(b"x")
    os.utime(foreign[0], (0, 0))
    with pack_files.whole_file(folder / "at-work") as file_at_work:
        file_at_work.write(b"y")
        pack_folder(source, config)
    assert (folder / "at-work").read_bytes() == b"y"
    assert temporaries(folder) == [foreign[1]]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_a_damaged_shard_is_written_again_while_the_pack_is_not_complete(tmp_path: Path, damage: str) -> None:
    source, config = ImageFolder(str(make_folder(tmp_path / "source"))), settings(tmp_path / "cache")
    folder = pack_folder(source, config)
    whole = contents(folder)
    (folder / MANIFEST).unlink()
    shard = folder / "shard-00001-of-00003.bin"
    if damage == "cut":
        shard.write_bytes(whole[shard.name][:-7])
    elif damage == "flipped":
        flip(shard, 50)
    else:
        shard.write_bytes(whole["shard-00000-of-00003.bin"])
    assert contents(pack_folder(source, config)) == whole


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 255
    file.write_bytes(data)


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


def test_a_file_that_cannot_be_read_is_not_taken_for_a_broken_picture(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "source")
    source, config = ImageFolder(str(root)), settings(tmp_path / "cache")
    key = cache_key(source, config)
    (root / "class_1" / "002.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot read .*002.jpg': No such file"):
        pack_folder(source, config, on_error="skip", key=key)


NO_SPACE = """
import resource
listing.MOST_SHARDS = 1000
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
if __name__ == "__main__":
    try:
        packing.pack_folder(source, CacheConfig(path=cache, encoding="raw"), num_workers=NUM_WORKERS)
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_full_disk_leaves_no_temporary_files_and_what_was_complete(tmp_path: Path, num_workers: int) -> None:
    root = make_folder(tmp_path / "source", 6)  # two pictures of 3,600 bytes fit
    picture(0, (80, 60)).save(root / "class_2" / "006.jpg")  # 14,400 do not
    text = NO_SPACE.replace("NUM_WORKERS", str(num_workers))
    with script(tmp_path, text, root, tmp_path / "cache") as process:
        out, err = process.communicate(timeout=60)
    assert f"no space left in '{tmp_path}/cache/" in out
    assert "complete shards are kept" in out
    assert err == ""
    assert temporaries(tmp_path / "cache") == []
    if num_workers == 0:
        assert len(list((tmp_path / "cache").rglob("shard-*"))) == 3


def test_a_disk_that_is_full_only_when_files_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = ImageFolder(str(make_folder(tmp_path / "source")))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"no space left in .* free\): No space left"):
            pack_folder(source, settings(tmp_path / "cache"))
    assert list((tmp_path / "cache").rglob("*.*")) == []
    pack_folder(source, settings(tmp_path / "cache"))


def test_pixels_that_do_not_fit_are_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 15_000

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage)
    source = ImageFolder(str(make_folder(tmp_path / "source")))  # six times 3,600 bytes
    with pytest.raises(UserError, match=r"has 15 KiB free, but the packed pictures need about 21 KiB; make room"):
        pack_folder(source, settings(tmp_path / "cache", encoding="raw"))
    assert list((tmp_path / "cache").rglob("shard*")) == []
    pack_folder(source, settings(tmp_path / "cache", encoding="mixed"))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = ImageFolder(str(make_folder(tmp_path / "source")))
    with pytest.raises(UserError, match=r"cannot write to '.*file.*': Not a directory"):
        pack_folder(source, settings(tmp_path / "file"))


def test_progress_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "REPORT_SECONDS", 0.0)
    source = ImageFolder(str(make_folder(tmp_path / "source")))
    with caplog.at_level(logging.INFO, logger="lockstep"):
        pack_folder(source, settings(tmp_path / "cache"))
    assert "packed 3 of 6 images" in caplog.text
    assert "min left" in caplog.text
    assert "packed 6 images into" in caplog.text


def test_small_packs_are_read_ahead_and_large_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pack_folder(ImageFolder(str(make_folder(tmp_path / "source"))), settings(tmp_path / "cache"))
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(packed.os, "posix_fadvise", lambda fd, start, size, advice: advised.append((fd, advice)))
    PackedImages(folder)
    wait_until(lambda: len(advised) == 3)
    assert {advice for _, advice in advised} == {os.POSIX_FADV_WILLNEED}
    advised.clear()
    PackedImages(folder, read_ahead=False)

    class Memory:
        available = 1000

    monkeypatch.setattr(packed.psutil, "virtual_memory", lambda: Memory)
    PackedImages(folder)
    assert "read-ahead" not in {thread.name for thread in threading.enumerate()}
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
