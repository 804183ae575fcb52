"""W&B's own files in a run folder: how far their history goes, and what `wandb sync` is to make of them.

wandb ships no Python reader of `.wandb` files. They are LevelDB's log format (32 KiB blocks; records with checksum,
length and type) around protobuf records; a cut tail, as a killed run leaves it, ends the reading.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger("lockstep")

_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, 7
_MAGIC = b":W&B"
_FULL, _FIRST, _LAST = 1, 2, 4


def newest_id(folder: Path) -> str | None:
    """Returns the id of the run that W&B's folder was last used for, by the names in it."""
    files = sorted(folder.glob("*run-*-*/run-*.wandb"), key=lambda file: file.parent.name.partition("run-")[2])
    return files[-1].stem.partition("-")[2] if files else None


def last_step(folder: Path, run_id: str, other_than: Path) -> int:
    """Returns the last step that the files of attempts have, -1 for none.

    Files of offline attempts lose what killed ones left half written at their ends: `wandb sync` stumbles over it.

    Args:
        folder: W&B's in the run folder.
        run_id: of the run.
        other_than: a file that is being written to.
    """
    last = -1
    for file in sorted(folder.glob(f"*run-*-{run_id}*/run-{run_id}.wandb")):
        if file.resolve() == other_than.resolve():
            continue
        try:
            log = _Log(file.read_bytes())
            candidates = [record for record in log if b"_step" in record]
            if file.parent.name.startswith("offline-"):
                _mend(file, log)
            steps = (step for record in reversed(candidates) if (step := _step(record)) is not None)
            last = max(last, next(steps, -1))
        except Exception as error:  # another version's file, a lost mount: then its steps are sent once more
            logger.warning("wandb: cannot read '%s': %s", file, " ".join(str(error).split()))
    return last


def mark_as_synced(folder: Path, run_id: str) -> None:
    """Has `wandb sync` pass over offline attempts so far, as all of their history is uploaded.

    Not over files without a history, such as those of an export: these hold other things.
    """
    for file in folder.glob(f"offline-run-*-{run_id}*/run-{run_id}.wandb"):
        mark = file.with_name(f"{file.name}.synced")
        with suppress(Exception):
            if not mark.exists() and any(
                _step(record) is not None for record in _Log(file.read_bytes()) if b"_step" in record
            ):
                mark.touch()


def _mend(file: Path, log: _Log) -> None:
    if log.is_damaged or not log.end:
        what = "has a record in the middle that is broken" if log.end else "has nothing in it that can be read"
        logger.warning("wandb: '%s' %s; it is left as it is", file, what)
    elif log.size > log.end:
        os.truncate(file, log.end)


def _step(data: bytes) -> int | None:
    """Returns the step of a record of the history, None for all others."""
    from wandb.proto import wandb_internal_pb2

    make: Any = wandb_internal_pb2
    record = make.Record()
    record.ParseFromString(data)
    if record.WhichOneof("record_type") == "history":
        for item in record.history.item:
            if (item.key or ".".join(item.nested_key)) == "_step":
                return int(json.loads(item.value_json))
    return None


class _Log:
    """The records of a file, up to the first one that is not whole."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size = len(content)
        self.end = 0  # of the last whole record, once they are read
        self.is_damaged = False  # there is more behind a broken record

    def __iter__(self) -> Iterator[bytes]:
        content = self._content
        if content[: len(_MAGIC)] != _MAGIC:
            return
        position, pending = _FILE_HEADER, b""
        while position + _HEADER <= len(content):
            left = _BLOCK - position % _BLOCK
            checksum, length, kind = struct.unpack_from("<IHB", content, position)
            if left < _HEADER or (kind == 0 and length == 0):  # padding
                position += left
                continue
            data = content[position + _HEADER : position + _HEADER + length]
            position += _HEADER + length
            if position > len(content) or checksum != zlib.crc32(data, zlib.crc32(bytes([kind]))):
                self.is_damaged = position < len(content)
                return
            pending = data if kind in (_FULL, _FIRST) else pending + data
            if kind in (_FULL, _LAST):
                self.end = position
                yield pending
