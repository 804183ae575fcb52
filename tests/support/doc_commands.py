"""The commands that the pages tell readers to type: every line of an indented block, and of a fence marked `sh`.

Whatever else stands in a block is in a fence that says what it is: `text`, `yaml`, `python`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from conftest import REPOSITORY

PAGES = sorted(
    [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        REPOSITORY / "benchmarks" / "README.md",
        *(REPOSITORY / "docs").glob("*.md"),
        *(REPOSITORY / "examples").glob("*/README.md"),
    ]
)


class Command(NamedTuple):
    """One command of a page, as it is typed, without a comment at its end."""

    page: str
    line: int
    text: str

    @property
    def folder(self) -> Path:
        """Where the page says that it is typed."""
        return FOLDERS.get(self.page, Path())

    @property
    def words(self) -> list[str]:
        """The command without variables before it and pipes after it."""
        words = shlex.split(self.text)
        while re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        return words[: words.index("|")] if "|" in words else words


FOLDERS = {
    "examples/bring_your_own/README.md": Path("examples", "bring_your_own"),
    "examples/language_model/README.md": Path("examples"),
}


def commands_of(page: Path) -> Iterator[Command]:
    """Yields a page's commands; a line that ends in a backslash goes on."""
    fence: str | None = None
    may_begin, inside, started, begun = True, False, 0, ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fence = None if fence is not None else line.strip().removeprefix("```")
            assert fence != "", f"{page}:{number}: say what is in this block: sh, text, yaml, python"
            may_begin, inside = True, False
            continue
        if fence is None:
            inside = line.startswith("    ") and (inside or may_begin)
            may_begin = not line.strip()
        if (inside or fence == "sh") and line.strip():
            begun, started = begun + line.strip(), started or number
            if begun.endswith("\\"):
                begun = begun[:-1]
                continue
            text = re.sub(r"\s{2,}# .*", "", begun)
            yield Command(page.relative_to(REPOSITORY).as_posix(), started, text)
            begun, started = "", 0
