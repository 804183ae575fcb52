"""W&B's own files in a run folder: how far their history goes, mending them, and which need no upload any more.

wandb ships no Python reader of `.wandb` files. They are LevelDB's log format (32 KiB blocks; records with checksum,
length and type) around protobuf records; a cut tail, as a killed run leaves it, ends the reading.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger("lockstep")

_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, 7
_FULL, _FIRST, _LAST = 1, 2, 4


def files_of(folder: Path, run_id: str) -> list[Path]:
    """Returns the files of all attempts at a run, oldest first."""
    return sorted(folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"))


def last_step(folder: Path, run_id: str) -> int:
    """Returns the last step that any attempt's file has, -1 for none."""
    return max((step for file in files_of(folder, run_id) for step in _steps(file)), default=-1)


def mend(folder: Path, run_id: str) -> None:
    """Cuts off what killed attempts left half written, and removes files with nothing in them: `wandb sync` stumbles.

    Nobody may be writing to them any more.
    """
    for file in files_of(folder, run_id):
        with suppress(OSError):
            end = max((end for _, end in _records(file)), default=0)
            if not end:
                shutil.rmtree(file.parent)
            elif file.stat().st_size > end:
                os.truncate(file, end)


def mark_as_synced(folder: Path, run_id: str) -> None:
    """Has `wandb sync` pass over all attempts so far: what is in their files is on its way in another one."""
    for file in files_of(folder, run_id):
        with suppress(OSError):
            file.with_name(f"{file.name}.synced").touch()


def _steps(file: Path) -> Iterator[int]:
    from wandb.proto import wandb_internal_pb2

    make: Any = wandb_internal_pb2
    try:
        for data, _ in _records(file):
            record = make.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") != "history":
                continue
            for item in record.history.item:
                if (item.key or ".".join(item.nested_key)) == "_step":
                    yield int(json.loads(item.value_json))
    except Exception as error:  # another version's file, a lost mount: then its steps are sent once more
        logger.warning("wandb: cannot read '%s': %s", file, " ".join(str(error).split()))


def _records(file: Path) -> Iterator[tuple[bytes, int]]:
    """Yields every whole record and where it ends."""
    content = file.read_bytes()
    position, pending = _FILE_HEADER, b""
    while position + _HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        checksum, length, kind = struct.unpack_from("<IHB", content, position)
        if left < _HEADER or (kind == 0 and length == 0):  # padding
            position += left
            continue
        data = content[position + _HEADER : position + _HEADER + length]
        if len(data) < length or checksum != zlib.crc32(data, zlib.crc32(bytes([kind]))):
            return
        position += _HEADER + length
        pending = data if kind in (_FULL, _FIRST) else pending + data
        if kind in (_FULL, _LAST):
            yield pending, position
