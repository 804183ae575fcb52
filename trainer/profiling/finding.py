"""From the trace of a rank to what is found in it: its table of kernels, and its memory. Imports no torch.

Owns the files that are made of a trace, and the process that makes them beside the training.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.files import replacing
from trainer.profiling.tables import kernels_text
from trainer.profiling.traces import analyse, read_trace
from trainer.units import format_bytes

TRACE = "trace.json.gz"
ABOUT = "lockstep"  # the key of a trace under which it says of whom it is
MOST_BYTES = 300 << 20  # of a trace that is looked into, unpacked: each takes about five times that, in memory
_NICENESS = 10


def look_into(trace: Path) -> dict[str, Any]:
    """Finds what is in a trace, and writes the files of it beside it where that is possible.

    Returns:
        What `rank-N.kernels.json` says.

    Raises:
        ValueError: it is no whole trace of ours, or too large to look into.
        OSError: it cannot be read.
    """
    packed = trace.stat()
    with gzip.open(trace, "rb") as stream:
        try:
            content = stream.read(MOST_BYTES + 1)
        except (EOFError, zlib.error) as error:
            raise ValueError("it is not whole") from error
    if len(content) > MOST_BYTES:
        raise ValueError(too_large(len(content)))
    read = read_trace(content.decode(errors="replace"))
    del content
    about = read.get(ABOUT)
    if not isinstance(about, dict) or "traceEvents" not in read:
        raise ValueError("it is not a trace of a training run")
    found = analyse(read, is_alone=about["num_ranks"] == 1)
    record = {**about, **found.record()}
    files = {"kernels.txt": kernels_text(record), "kernels.json": json.dumps(record, indent=1)}
    if record["memory"] is not None and record["device"] == "cpu":
        files = {"memory.json": json.dumps(found.memory.table(found.start)), **files}
    with contextlib.suppress(OSError):  # someone else's folder, or a full disk: the record is known nevertheless
        for ending, text in files.items():
            if not _is_same(packed, trace.stat()):  # a new one took its place: this is of other steps
                break
            with replacing(trace.with_name(trace.name.removesuffix(TRACE) + ending)) as staged:
                staged.write_text(text, encoding="utf-8")
    return record


def too_large(num_bytes: int) -> str:
    """Says why a trace is not looked into."""
    least = "more than " if num_bytes == MOST_BYTES + 1 else ""
    return f"{least}{format_bytes(num_bytes)} are too much to look into; trace fewer steps"


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_ino, one.st_mtime_ns, one.st_size) == (other.st_ino, other.st_mtime_ns, other.st_size)


def begin_to_look_into(trace: Path) -> subprocess.Popen[bytes]:
    """Starts a process that does it: of its own, so that it may outlive this one, and after all others' work.

    Raises:
        OSError: it cannot be started.
    """
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(trace)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,
    )


def about_text(about: Mapping[str, Any]) -> bytes:
    """Returns what a trace says of itself as the beginning of its file, in place of the bracket that opens it."""
    return f'{{"{ABOUT}": {json.dumps(about)},'.encode()


if __name__ == "__main__":
    os.nice(_NICENESS)
    look_into(Path(sys.argv[1]))
