"""Reads what an offline W&B run wrote: wandb ships no Python reader of its own `.wandb` files.

The file is LevelDB's log format (32 KiB blocks; records with checksum, length and type) around protobuf
records. A cut tail, as a killed run leaves it, ends the reading.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

_BLOCK, _HEADER = 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(file: Path) -> Iterator[Any]:
    """Yields every whole record."""
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    position, pending = 7, bytearray()
    while position + _HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", content[position : position + _HEADER])
        data = content[position + _HEADER : position + _HEADER + length]
        if kind == 0 and length == 0:  # padding
            position += left
            continue
        if len(data) < length:
            return
        assert checksum == zlib.crc32(data, zlib.crc32(bytes([kind]))) & 0xFFFFFFFF
        position += _HEADER + length
        pending = bytearray(data) if kind in (_FULL, _FIRST) else pending + data
        if kind in (_FULL, _LAST):
            record = pb.Record()  # type: ignore[attr-defined]  # made when imported
            record.ParseFromString(bytes(pending))
            yield record


def history(file: Path) -> list[dict[str, Any]]:
    """Returns every logged row."""
    found = [r.history.item for r in records(file) if r.WhichOneof("record_type") == "history"]
    return [{i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items} for items in found]


def run(file: Path) -> Any:
    """Returns the record that describes the run."""
    return next(r.run for r in records(file) if r.WhichOneof("record_type") == "run")


def config(file: Path) -> dict[str, Any]:
    """Returns the run's config, top level by key."""
    found: dict[str, Any] = {}
    for r in records(file):
        if r.WhichOneof("record_type") == "config":
            found.update({i.key: json.loads(i.value_json) for i in r.config.update})
    return found


def summary(file: Path) -> dict[str, Any]:
    """Returns the run's summary as it was set, top level by key."""
    found: dict[str, Any] = {}
    for r in records(file):
        if r.WhichOneof("record_type") == "summary":
            found.update({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in r.summary.update})
    return found


def artifacts(file: Path) -> list[Any]:
    """Returns the records of artifacts that the run is to upload."""
    found = []
    for r in records(file):
        if r.WhichOneof("record_type") == "artifact":
            found.append(r.artifact)
        elif r.WhichOneof("record_type") == "request" and r.request.WhichOneof("request_type") == "log_artifact":
            found.append(r.request.log_artifact.artifact)
    return found


def exit_code(file: Path) -> int | None:
    """Returns how the run ended, if it says so."""
    return next((r.exit.exit_code for r in records(file) if r.WhichOneof("record_type") == "exit"), None)
