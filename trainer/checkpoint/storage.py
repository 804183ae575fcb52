"""Where checkpoints live: a folder, local or shared, or anything that fsspec has a URL for.

Owns that a checkpoint is there whole or not at all. A folder is staged under a temporary name, synced and renamed. An
object store has no rename: files are written in place, and the manifest, last, is what makes them a checkpoint. What
the files say is `trainer.checkpoint.manifest`; nothing here knows a tensor. All problems are `OSError`s.
"""

from __future__ import annotations

import errno
import mmap
import os
import posixpath
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy

from trainer.checkpoint.requests import REQUEST_BYTES, Span, batches_of
from trainer.system import sync_folder

MANIFEST = "manifest.json"
STAGING = ".tmp-"
_DAMAGED = "damaged-"
_PIECE = 64 * 2**20  # bytes per read or write
_DIRECT_PIECE = 32 * 2**20  # bytes per direct write: with 1 MiB it is half as fast
_READS_AT_ONCE = 8  # of a folder
_READ_PIECE = 4 * 2**20  # bytes per read where a file of a folder is read from its beginning to its end


class Storage(Protocol):
    """A folder of checkpoints. `folder` is the name of a checkpoint or of one that is being written."""

    location: str

    def names(self) -> list[str]:
        """Returns the names of all folders that were published, good or damaged; none where nothing is there yet."""
        ...

    def begin(self, name: str) -> str:
        """Returns the folder to write a new checkpoint's files to. Call on one rank."""
        ...

    def write(self, folder: str, file: str, parts: Iterable[memoryview]) -> None:
        """Writes one file so that it survives a power failure."""
        ...

    def publish(self, staged: str, name: str, manifest: bytes) -> None:
        """Adds the manifest to what `begin` began: from here on it is a checkpoint. Call on one rank."""
        ...

    def replace_manifest(self, name: str, manifest: bytes) -> None:
        """Replaces the manifest of a checkpoint, whole or not at all."""
        ...

    def size(self, folder: str, file: str) -> int | None:
        """Returns the bytes of a file, or None where there is none."""
        ...

    def read(self, folder: str, spans: Sequence[Span]) -> Iterator[memoryview]:
        """Yields the bytes of each span in turn, fewer where its file ends before; several are on their way together.

        What was yielded is good until the next one is asked for.

        Raises:
            OSError: it names the file that cannot be read.
        """
        ...

    def pieces(self, folder: str, file: str) -> Iterator[memoryview]:
        """Yields a file from its beginning to its end. What was yielded is good until the next one is asked for."""
        ...

    def remove(self, name: str) -> None:
        """Removes a checkpoint: for a reader it is there whole, or not at all."""
        ...

    def set_aside(self, name: str) -> str:
        """Takes a damaged checkpoint out of the way without deleting it, and returns where it is now."""
        ...

    def clean(self) -> None:
        """Removes what interrupted writes and removals left. Call on one rank, while nothing is being written."""
        ...

    def point(self, name: str, target: str) -> None:
        """Points a name at a checkpoint, where the storage has links."""
        ...


class LocalStorage:
    """A folder of this machine or of a file system that all ranks share."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)

    def names(self) -> list[str]:
        try:
            return [entry.name for entry in os.scandir(self.root) if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []

    def begin(self, name: str) -> str:
        staged = f"{STAGING}{name}-{uuid.uuid4().hex[:8]}"
        os.makedirs(self.root / staged)
        return staged

    def write(self, folder: str, file: str, parts: Iterable[memoryview]) -> None:
        # Another host may not see yet that rank 0 made the folder.
        os.makedirs(self.root / folder, exist_ok=True)
        with open(self.root / folder / file, "wb", buffering=0) as raw:
            _write_past_the_cache(raw.fileno(), parts)
            os.fsync(raw.fileno())

    def publish(self, staged: str, name: str, manifest: bytes) -> None:
        self.write(staged, MANIFEST, [memoryview(manifest)])
        sync_folder(self.root / staged)
        if (self.root / name).exists():
            self.set_aside(name)
        os.rename(self.root / staged, self.root / name)
        sync_folder(self.root)

    def replace_manifest(self, name: str, manifest: bytes) -> None:
        new = f".{MANIFEST}.new"
        self.write(name, new, [memoryview(manifest)])
        os.replace(self.root / name / new, self.root / name / MANIFEST)
        sync_folder(self.root / name)

    def size(self, folder: str, file: str) -> int | None:
        try:
            return (self.root / folder / file).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, folder: str, spans: Sequence[Span]) -> Iterator[memoryview]:
        # Memory that is new takes longer than to read from the page cache: each block is used again and again.
        blocks = [numpy.empty(0, dtype=numpy.uint8)] * min(_READS_AT_ONCE, len(spans))

        def read(number: int) -> memoryview:
            size, block = spans[number].size, number % len(blocks)
            if len(blocks[block]) < size:
                blocks[block] = numpy.empty(size, dtype=numpy.uint8)
            return self._read_one(folder, spans[number], blocks[block].data[:size])

        if len(spans) == 1:
            yield read(0)
            return
        with ThreadPoolExecutor(_READS_AT_ONCE, thread_name_prefix="checkpoint-read") as pool:
            under_way = deque(pool.submit(read, number) for number in range(len(blocks)))
            for number in range(len(blocks), len(spans) + len(blocks)):
                yield under_way.popleft().result()
                if number < len(spans):  # into the block of what was yielded, which is not needed any more
                    under_way.append(pool.submit(read, number))

    def _read_one(self, folder: str, span: Span, buffer: memoryview) -> memoryview:
        # Not a memory map: where a file is cut short or its disk goes away, that would be SIGBUS, not an error.
        path, done = self.root / folder / span.file, 0
        with _naming(path), open(path, "rb", buffering=0) as raw:
            raw.seek(span.begin)
            while done < len(buffer) and (count := raw.readinto(buffer[done : done + _PIECE])):
                done += count
        return buffer[:done]

    def pieces(self, folder: str, file: str) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(_READ_PIECE))  # one: new memory for each piece takes longer than reading it
        with open(self.root / folder / file, "rb", buffering=0) as raw:
            while count := raw.readinto(buffer):
                yield buffer[:count]

    def remove(self, name: str) -> None:
        # Renamed first: a kill in between leaves a leftover for `clean`, and never half a checkpoint.
        going = f"{STAGING}old-{name}-{uuid.uuid4().hex[:8]}" if not name.startswith(STAGING) else name
        if going != name:
            os.rename(self.root / name, self.root / going)
        shutil.rmtree(self.root / going)

    def set_aside(self, name: str) -> str:
        aside = f"{_DAMAGED}{name}"
        if (self.root / aside).exists():
            shutil.rmtree(self.root / aside)
        os.rename(self.root / name, self.root / aside)
        return str(self.root / aside)

    def clean(self) -> None:
        for name in self.names():
            if name.startswith(STAGING):
                shutil.rmtree(self.root / name, ignore_errors=True)

    def point(self, name: str, target: str) -> None:
        link = self.root / f".{name}-new"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        os.replace(link, self.root / name)


class ObjectStorage:
    """A folder of an object store, or of any other file system that fsspec knows.

    Args:
        url: such as `s3://bucket/run` or `memory://run`.

    Raises:
        OSError: the package behind the URL is missing, or its settings are wrong.
    """

    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/")
        with _as_os_errors(url):
            from fsspec.core import url_to_fs  # torch brings it; importing it takes a while

            self._fs, self._root = url_to_fs(self.location)

    def _path(self, *parts: str) -> str:
        return posixpath.join(self._root, *parts)

    def names(self) -> list[str]:
        return [name for name in self._folders() if self.size(name, MANIFEST) is not None]

    def _folders(self) -> list[str]:
        with _as_os_errors(self.location):
            self._fs.invalidate_cache()  # others write here, too
            try:
                found = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
        return [posixpath.basename(entry["name"].rstrip("/")) for entry in found if entry["type"] == "directory"]

    def begin(self, name: str) -> str:
        self._remove_files(name)  # of an attempt that was interrupted
        return name

    def write(self, folder: str, file: str, parts: Iterable[memoryview]) -> None:
        with _as_os_errors(self.location), self._fs.open(self._path(folder, file), "wb") as stream:
            for part in parts:
                _write_whole(stream.write, part)

    def publish(self, staged: str, name: str, manifest: bytes) -> None:
        assert staged == name
        self.replace_manifest(name, manifest)

    def replace_manifest(self, name: str, manifest: bytes) -> None:
        with _as_os_errors(self.location):
            self._fs.pipe_file(self._path(name, MANIFEST), manifest)

    def size(self, folder: str, file: str) -> int | None:
        with _as_os_errors(self.location):
            self._fs.invalidate_cache()
            try:
                size = self._fs.size(self._path(folder, file))
            except FileNotFoundError:
                return None
        return None if size is None else int(size)

    def read(self, folder: str, spans: Sequence[Span]) -> Iterator[memoryview]:
        for batch in batches_of(spans):
            yield from (memoryview(data) for data in self._read_together(folder, batch))

    def pieces(self, folder: str, file: str) -> Iterator[memoryview]:
        if not getattr(self._fs, "async_impl", False):  # it would open the file anew for each piece, and read ahead
            with _as_os_errors(self.location), self._fs.open(self._path(folder, file), "rb") as stream:
                while piece := stream.read(_PIECE):
                    yield memoryview(piece)
            return
        size = self.size(folder, file)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._path(folder, file))
        begins = range(0, size, REQUEST_BYTES)
        yield from self.read(folder, [Span(file, begin, min(REQUEST_BYTES, size - begin)) for begin in begins])

    def _read_together(self, folder: str, spans: Sequence[Span]) -> list[bytes]:
        """Returns bytes of files; they are asked for together where the package behind the URL can, as S3's does."""
        paths = [self._path(folder, span.file) for span in spans]
        begins, ends = [span.begin for span in spans], [span.begin + span.size for span in spans]
        with _as_os_errors(self.location):
            found: list[Any] = self._fs.cat_ranges(paths, begins, ends, on_error="return")
        for path, data in zip(paths, found, strict=True):
            if isinstance(data, BaseException):
                with _naming(path), _as_os_errors(path):
                    raise data
        return found

    def remove(self, name: str) -> None:
        # Without its manifest it is no checkpoint any more.
        with _as_os_errors(self.location), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name, MANIFEST))
        self._remove_files(name)

    def set_aside(self, name: str) -> str:
        with _as_os_errors(self.location), suppress(FileNotFoundError):
            aside = self._path(name, f"{_DAMAGED}{MANIFEST}")
            self._fs.pipe_file(aside, self._fs.cat_file(self._path(name, MANIFEST)))
            self._fs.rm_file(self._path(name, MANIFEST))
        return f"{self.location}/{name}"

    def clean(self) -> None:
        for name in self._folders():
            if self.size(name, MANIFEST) is None and self.size(name, f"{_DAMAGED}{MANIFEST}") is None:
                self._remove_files(name)

    def point(self, name: str, target: str) -> None:
        """An object store has no links; the manifests say which checkpoint is the best."""

    def _remove_files(self, name: str) -> None:
        with _as_os_errors(self.location):
            self._fs.invalidate_cache()
            with suppress(FileNotFoundError):
                self._fs.rm(self._path(name), recursive=True)


def open_storage(location: str) -> Storage:
    """Returns the storage behind a path or a URL.

    Raises:
        OSError: nothing here can open such a URL.
    """
    if "://" not in location:
        return LocalStorage(Path(location).expanduser())
    return ObjectStorage(location)


def _write_past_the_cache(fd: int, parts: Iterable[memoryview]) -> None:
    """Writes an empty file, all but its end by direct I/O where its file system has that.

    Through the page cache a large file takes CPU time and memory, and how long depends on what else wants them: 3.65 GB
    took 1.5 to 43 s on a virtual machine, and directly 2 to 5 s. It also pushes training data out of the cache.
    """
    buffer = mmap.mmap(-1, _DIRECT_PIECE)  # direct I/O wants whole pages
    pages = numpy.frombuffer(buffer, dtype=numpy.uint8)
    filled = 0
    is_direct = _set_direct(fd, True)
    for part in parts:
        data = numpy.frombuffer(part, dtype=numpy.uint8)
        while len(data):
            count = min(len(data), len(pages) - filled)
            numpy.copyto(pages[filled : filled + count], data[:count])  # unlike a memoryview's, it lets others run
            data, filled = data[count:], filled + count
            if filled == len(pages):
                is_direct = _write_piece(fd, memoryview(buffer), is_direct)
                filled = 0
    if is_direct:
        _set_direct(fd, False)  # what is left need not be whole blocks
    _write_whole(lambda piece: os.write(fd, piece), memoryview(buffer)[:filled])


def _write_piece(fd: int, piece: memoryview, is_direct: bool) -> bool:
    """Writes a whole piece, and returns whether the next one may be written directly, too."""
    while piece:
        try:
            piece = piece[os.write(fd, piece) :]
        except OSError as error:
            # Some file systems say only now that they cannot, others after a write that took less than it was given.
            if not is_direct or error.errno != errno.EINVAL or not _set_direct(fd, False):
                raise
            is_direct = False
    return is_direct


def _set_direct(fd: int, on: bool) -> bool:
    """Switches direct I/O of an open file on or off, and returns whether that was possible."""
    direct = getattr(os, "O_DIRECT", 0)  # Linux
    if not direct:
        return False
    import fcntl  # not on Windows

    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | direct if on else flags & ~direct)
    except OSError:
        return False
    return True


def _write_whole(write: Callable[[memoryview], int | None], part: memoryview) -> None:
    """Writes all of a buffer: one call may take less than it is given, and at most 2 GiB."""
    part = part.cast("B")
    while part:
        piece = part[:_PIECE]
        part = part[write(piece) or len(piece) :]


@contextmanager
def _as_os_errors(location: str) -> Iterator[None]:
    """Turns what the packages behind fsspec raise into OSError: each of them has exceptions of its own."""
    try:
        yield
    except OSError:
        raise
    except ImportError as error:
        raise OSError(f"'{location}' needs another package: {error}") from error
    except Exception as error:
        raise OSError(f"'{location}': {_first_line(error)}") from error


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Adds to an OSError which file it is about, where it does not say."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _first_line(error: Any) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
