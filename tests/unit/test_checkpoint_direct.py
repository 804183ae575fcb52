"""Checkpoints are written past the page cache: what is in a file is the same, whatever its file system can do."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint import storage
from trainer.checkpoint.storage import LocalStorage

PIECE = 2**16
SIZES = [0, 1, 4095, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 4096, 3 * PIECE + 4097]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_DIRECT_PIECE", PIECE)


def parts(content: bytes, size: int) -> Iterator[memoryview]:
    yield memoryview(b"")
    for begin in range(0, len(content), size):
        yield memoryview(content)[begin : begin + size]


def written(folder: Path, content: bytes, size: int) -> bytes:
    LocalStorage(folder).write("step", "file", parts(content, size))
    return (folder / "step" / "file").read_bytes()


@pytest.mark.parametrize("part", [1000, PIECE, 5 * PIECE])
@pytest.mark.parametrize("size", SIZES)
def test_a_file_is_what_its_parts_are(size: int, part: int, tmp_path: Path) -> None:
    content = os.urandom(size)
    assert written(tmp_path, content, part) == content
    assert written(tmp_path, content[: size // 2], part) == content[: size // 2]  # over an existing one


def test_whole_pieces_go_past_the_cache_and_the_end_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, seen = os.write, []

    def watched(fd: int, data: Any) -> int:
        seen.append((len(data), bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)))
        return write(fd, data)

    with open(tmp_path / "probe", "wb") as file:
        can = storage._set_direct(file.fileno(), True)
    monkeypatch.setattr(os, "write", watched)
    written(tmp_path, os.urandom(2 * PIECE + 5), 1000)
    assert seen == [(PIECE, can), (PIECE, can), (5, False)]


def test_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(3 * PIECE + 5)
    monkeypatch.delattr(os, "O_DIRECT")
    assert written(tmp_path, content, 1000) == content


def test_a_file_system_that_refuses_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control = fcntl.fcntl

    def refuses(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return control(fd, command, flags)

    content = os.urandom(3 * PIECE + 5)
    monkeypatch.setattr(fcntl, "fcntl", refuses)
    assert written(tmp_path, content, 1000) == content


def test_a_file_system_that_refuses_it_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second piece is cut at a byte that direct writes cannot go on from."""
    write, calls = os.write, 0

    def cuts(fd: int, data: Any) -> int:
        nonlocal calls
        if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            return write(fd, data)
        calls += 1
        if calls == 2:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            count = write(fd, data[:999])
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
            return count
        if calls == 3:
            raise OSError(errno.EINVAL, "not aligned")
        return write(fd, data)

    content = os.urandom(5 * PIECE + 5)
    monkeypatch.setattr(os, "write", cuts)
    assert written(tmp_path, content, 1000) == content
    assert calls == 3


def test_another_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path, os.urandom(2 * PIECE), 1000)
