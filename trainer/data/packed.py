"""Packed image folders: their format on disk, and reading them memory-mapped.

A pack is a folder `<data.cache.path>/<key>/` of few large files, written by `trainer.data.packing`:

    shard-00000-of-00004.bin    the pictures of consecutive samples, then their `RECORD`s and texts, then a `FOOTER`
    index.bin                   the `RECORD`s of all samples, in the order of the source
    texts.bin                   UTF-8-ish bytes (`os.fsencode`): every sample's relative path, then its error, if any
    manifest.json               `Manifest`; written last, so that a folder that has it is complete

A picture is stored as RGB pixels (height, width, 3) uint8, or as a JPEG (gray or RGB), which may be the source's own
file. A picture that could not be read when it was packed is a record without bytes: indices are the source's.
EXIF orientation is not applied here, as it is nowhere in this project; a JPEG kept as it was still has its tag.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import threading
import zlib
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from PIL import Image

from trainer.errors import UserError

FORMAT_VERSION = 1  # to be raised with every change of the format, of the encoding or of what goes into which shard
MANIFEST = "manifest.json"
INDEX = "index.bin"
TEXTS = "texts.bin"
RAW, JPEG, BROKEN = 0, 1, 2  # RECORD["kind"]

RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the picture in its shard
        ("text_offset", "<u8"),  # of the name in texts.bin, or in the texts of the shard
        ("length", "<u4"),
        ("crc32", "<u4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("label", "<i4"),
        ("name_length", "<u4"),
        ("error_length", "<u4"),
        ("shard", "<u2"),
        ("kind", "<u2"),
    ]
)


class Record(NamedTuple):
    """One sample's `RECORD`."""

    offset: int
    text_offset: int
    length: int
    crc32: int
    height: int
    width: int
    label: int
    name_length: int
    error_length: int
    shard: int
    kind: int


class Footer(NamedTuple):
    """The last bytes of a shard: what it is of, where its parts lie, and their checksums."""

    magic: bytes
    key: bytes  # of the pack, so that a shard cannot be taken for another source's
    shard: int
    num_shards: int
    num_samples: int
    data_size: int
    texts_size: int
    data_crc32: int
    tail_crc32: int  # of the records and texts


_CHUNK = 8 * 2**20  # bytes, of a file that is read through

FOOTER = struct.Struct("<8s16sIIIQQII")
MAGIC = b"LSPACK01"


@dataclass(frozen=True)
class PackedFile:
    """A file of a pack, relative to its folder. `crc32` is of the whole file, in a shard of the pictures only."""

    name: str
    size: int
    crc32: int
    num_samples: int


@dataclass(frozen=True)
class Manifest:
    """What a complete pack holds, and of what it was made."""

    format_version: int
    key: str
    source: str  # the root of the image folder
    settings: dict[str, Any]  # `data.cache` without its path
    classes: list[str]
    shards: list[PackedFile]
    index: PackedFile
    texts: PackedFile

    @property
    def files(self) -> list[PackedFile]:
        """Every file but the manifest."""
        return [*self.shards, self.index, self.texts]

    def to_json(self) -> str:
        """Returns the text of manifest.json."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises UserError where there is none, or one that this version cannot read."""
        file = folder / MANIFEST
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if record["format_version"] != FORMAT_VERSION:
                raise UserError(f"'{folder}' has format {record['format_version']}, not {FORMAT_VERSION}; {_MEND}")
            parts: dict[str, Any] = {name: PackedFile(**record.pop(name)) for name in ("index", "texts")}
            parts["shards"] = [PackedFile(**shard) for shard in record.pop("shards")]
            return cls(**record, **parts)
        except FileNotFoundError:
            message = f"'{folder}' is no complete packed data set: it has no {MANIFEST}; packing it again finishes it"
            raise UserError(message) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"'{file}' is damaged ({type(error).__name__}: {error}); {_MEND}") from error


_MEND = "delete the folder to have it packed anew"


class Tail(NamedTuple):
    """What a shard says of itself behind its pictures."""

    file: PackedFile
    records: np.ndarray  # RECORD (N,)
    texts: bytes


def read_tail(file: Path, expected: Footer) -> Tail | None:
    """Returns the end of a shard, without reading a picture.

    Args:
        file: the shard.
        expected: its footer, with zeros for sizes and checksums.

    Returns:
        None where there is no such shard, or another one, or its end is damaged.
    """
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            opened.seek(max(size - FOOTER.size, 0))
            footer = Footer(*FOOTER.unpack(opened.read()))
            index_size = footer.num_samples * RECORD.itemsize
            written = footer._replace(data_size=0, texts_size=0, data_crc32=0, tail_crc32=0)
            if written != expected or size != footer.data_size + index_size + footer.texts_size + FOOTER.size:
                return None
            opened.seek(footer.data_size)
            index, texts = opened.read(index_size), opened.read(footer.texts_size)
    except (OSError, struct.error):
        return None
    if zlib.crc32(texts, zlib.crc32(index)) != footer.tail_crc32:
        return None
    part = PackedFile(file.name, size, footer.data_crc32, footer.num_samples)
    return Tail(part, np.frombuffer(index, RECORD), texts)


def is_complete(file: Path, expected: Footer) -> bool:
    """Tells whether a shard is there with every byte as it was written; reads all of it. See `read_tail`."""
    tail = read_tail(file, expected)
    if tail is None:
        return False
    remaining, checksum = tail.file.size - FOOTER.size - tail.records.nbytes - len(tail.texts), 0
    try:
        with open(file, "rb") as opened:
            while chunk := opened.read(min(remaining, _CHUNK)):
                checksum = zlib.crc32(chunk, checksum)
                remaining -= len(chunk)
    except OSError:
        return False
    return checksum == tail.file.crc32


class PackedImages:
    """A packed image folder; items are (RGB PIL image, label), as those of the `ImageFolder` it was made of.

    Opening reads the manifest and the sizes of the files. Everything else is mapped into memory when it is first
    needed, by each process for itself, so that a process holds no list of samples. May be pickled and inherited
    by a fork.

    Args:
        folder: the pack, `<data.cache.path>/<key>`.
        read_ahead: where the pack takes less than half of the available memory, ask the kernel to read it into
            the page cache, in order, from now on; with several processes on a host, one is enough.

    Raises:
        UserError: the pack is incomplete, or a file is missing or has not the size it was written with.
    """

    is_image_data = True

    def __init__(self, folder: str | Path, read_ahead: bool = True) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest = Manifest.read(self.folder)
        self.classes = self.manifest.classes
        self._files = self.manifest.files  # by number: shards in their order, then index.bin and texts.bin
        self._maps: dict[int, mmap.mmap] = {}
        self._records: np.ndarray | None = None
        for part in self._files:
            _check_size(self.folder, part)
        if read_ahead:
            _read_ahead([self.folder / part.name for part in self._files], sum(part.size for part in self._files))

    def __len__(self) -> int:
        return self.manifest.index.num_samples

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Returns (RGB PIL image, label).

        Raises:
            OSError: the picture could not be read when it was packed.
            UserError: the pack is damaged.
        """
        stored, label = self.encoded(index)
        if isinstance(stored, np.ndarray):
            return Image.fromarray(stored), label  # copies
        return Image.open(BytesIO(stored)).convert("RGB"), label

    def encoded(self, index: int) -> tuple[memoryview | np.ndarray, int]:
        """Returns (the bytes of a JPEG, gray or RGB, or read-only pixels (H, W, 3) uint8; label), without copying.

        The checksum of a JPEG is compared each time, which takes about a hundredth of the time to decode it.
        That of raw pixels is not, as it would take longer than reading them: `verify` does it.

        Raises:
            OSError: the picture could not be read when it was packed, with the message of that time.
            UserError: the pack is damaged.
        """
        record = self._record(index)
        if record.kind == BROKEN:
            raise OSError(f"{self._text(record).error} ('{os.path.join(self.manifest.source, self.name(index))}')")
        stored = memoryview(self._map(record.shard))[record.offset : record.offset + record.length]
        if record.kind == RAW:
            return np.frombuffer(stored, np.uint8).reshape(record.height, record.width, 3), record.label
        if zlib.crc32(stored) != record.crc32:
            raise self._damaged(index)
        return stored, record.label

    def name(self, index: int) -> str:
        """Returns the path of a sample's file, relative to the root of the source."""
        return self._text(self._record(index)).name

    def source_name(self, index: int) -> str:
        """Names a sample for messages: `n01440764/x.JPEG in shard-00000-of-00004.bin`."""
        return f"{self.name(index)} in {self._files[self._record(index).shard].name}"

    def verify(self) -> None:
        """Reads every byte and compares every checksum.

        Raises:
            UserError: names the first sample that is not as it was written.
        """
        shards = len(self.manifest.shards)
        for number in (shards, shards + 1):
            if zlib.crc32(self._map(number)) != self._files[number].crc32:
                raise UserError(f"'{self.folder / self._files[number].name}' is damaged; {_MEND}")
        for index in range(len(self)):
            record = self._record(index)
            stored = memoryview(self._map(record.shard))[record.offset : record.offset + record.length]
            if zlib.crc32(stored) != record.crc32:
                raise self._damaged(index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_records": None}  # a map cannot be pickled

    def _record(self, index: int) -> Record:
        if self._records is None:
            self._records = np.frombuffer(self._map(len(self.manifest.shards)), RECORD)
        # A range knows negative indices, and IndexError ends an iteration.
        return Record(*self._records[range(len(self))[index]].item())

    def _text(self, record: Record) -> _Text:
        start, middle = record.text_offset, record.text_offset + record.name_length
        texts = self._map(len(self.manifest.shards) + 1)
        return _Text(os.fsdecode(texts[start:middle]), os.fsdecode(texts[middle : middle + record.error_length]))

    def _map(self, number: int) -> mmap.mmap:
        """Returns file `number` of the pack, mapped by this process."""
        mapped = self._maps.get(number)
        if mapped is None:
            part = self._files[number]
            _check_size(self.folder, part)  # beyond the end of a file that became shorter lies SIGBUS
            with open(self.folder / part.name, "rb") as file:
                mapped = mmap.mmap(file.fileno(), part.size, access=mmap.ACCESS_READ)
            self._maps[number] = mapped
        return mapped

    def _damaged(self, index: int) -> UserError:
        return UserError(f"'{self.folder}' is damaged: {self.source_name(index)} has another checksum; {_MEND}")


class _Text(NamedTuple):
    name: str
    error: str


def _check_size(folder: Path, part: PackedFile) -> None:
    file = folder / part.name
    try:
        size = file.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read '{file}' of a packed data set: {error.strerror}; {_MEND}") from error
    if size != part.size:
        raise UserError(f"'{file}' is damaged: it has {size:,} bytes, not {part.size:,}; {_MEND}")


def _read_ahead(files: list[Path], size: int) -> None:
    if not hasattr(os, "posix_fadvise") or size > psutil.virtual_memory().available // 2:
        return
    # In a thread, as the kernel makes the caller wait where the disk's queue is full.
    threading.Thread(target=_advise, args=(files,), name="read-ahead", daemon=True).start()


def _advise(files: list[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError), open(file, "rb") as opened:  # only advice
            for start in range(0, os.fstat(opened.fileno()).st_size, _CHUNK):
                os.posix_fadvise(opened.fileno(), start, _CHUNK, os.POSIX_FADV_WILLNEED)
