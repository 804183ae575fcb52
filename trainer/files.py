"""Small files beside a run: written whole or not at all, and read without failing. Imports no torch.

What is in them is owned by whoever writes them; checkpoints are `trainer.checkpoint.storage`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SUMMARY = "summary.json"


@contextmanager
def replacing(file: Path, ending: str = ".new") -> Iterator[Path]:
    """Gives a file to write, which takes the place of another one once it is whole; not so if the body is left.

    Args:
        file: the other one.
        ending: of the name of the file to write, until then.
    """
    staged = file.with_name(f".{file.name}.{os.getpid()}{ending}")
    try:
        yield staged
        os.replace(staged, file)
    finally:
        with suppress(OSError):
            staged.unlink()


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all, whatever other processes write there; makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as staged:
        staged.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_text(file: Path) -> str:
    """Returns what a file says, an empty string where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_json(file: Path) -> Any:
    """Returns what a JSON file holds, None where it cannot be read."""
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError):
        return None


def read_object(file: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds, an empty one where it cannot be read."""
    value = read_json(file)
    return value if isinstance(value, dict) else {}


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Returns what a run says of itself; nothing where it has not come to its first summary."""
    return read_object(run_dir / SUMMARY)
