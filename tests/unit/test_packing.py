"""Packing an image folder: when it is done anew, by several at once, and after kills, damage and full disks."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from packs import flip, make_folder, picture, pixels, settings, wait_until
from PIL import Image

from trainer.data import listing, pack_files, packing
from trainer.data.datasets import ImageFolder
from trainer.data.listing import Listing, cache_key
from trainer.data.packed import MANIFEST, PackedImages
from trainer.data.packing import pack_folder
from trainer.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


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
