"""The figures in docs/, written anew from the committed results: `python -m benchmarks.document`.

Every block `<!-- table: benchmarks/results/NAME-cpu.json -->` ... `<!-- end -->` of a page becomes the table of that
result and its picture, or says that it was not measured yet; `<!-- index: benchmarks -->` becomes the list of all of
them. Nothing is measured, and nothing else of a page is touched. Results of `--quick` and `--keep-loaded` are refused.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.registry import BENCHMARKS, DOCS, Result, all_results
from benchmarks.telling import REPOSITORY

BLOCK = re.compile(
    r"(?P<begin><!-- (?P<kind>table|index): (?P<what>\S+) -->\n)(?P<text>.*?)(?P<end><!-- end -->)", re.S
)


class NoSource(Exception):
    """A result that must not stand in docs/, or a block that nothing is known about."""


def read(result: Result) -> dict[str, Any]:
    """Returns a committed result.

    Raises:
        NoSource: it is one of a check that all parts run, or of a machine that had other things to do.
    """
    found: dict[str, Any] = json.loads(result.file.read_text(encoding="utf-8"))
    if found.get("quick") or found.get("settings", {}).get("tiny"):
        raise NoSource(f"{result.file.name} is of a quick run: nothing was measured")
    if found.get("settings", {}).get("keep_loaded"):
        raise NoSource(f"{result.file.name} was measured with --keep-loaded: other load may be in its figures")
    return found


def result_block(result: Result) -> str:
    """Returns what stands in the block of a result."""
    if not result.file.exists():
        where = "On a GPU: not" if result.hardware == "gpu" else "Not"
        return f"{where} measured yet; `{result.command}`.\n"
    make_table, draw = result.benchmark.makers()
    table = make_table(read(result))
    if draw is None:
        return table
    return f"{table}\n![{result.stem}](images/{result.picture.name})\n"


def index(page: str) -> str:
    """Returns the list of all benchmarks, as it stands on a page of docs/."""
    lines = ["| benchmark | measures | against | CPU | GPU |", "| --- | --- | --- | --- | --- |"]
    for benchmark in BENCHMARKS:
        measured = {result.hardware: result.file.exists() for result in benchmark.results.values()}
        states = [{True: "measured", False: "not measured yet", None: "-"}[measured.get(h)] for h in ("cpu", "gpu")]
        link = f"[{benchmark.name}]({benchmark.place.removeprefix(page)})"
        name = link if (DOCS / benchmark.page).exists() else benchmark.name
        lines.append(f"| {name} | {benchmark.measures} | {benchmark.peers} | {' | '.join(states)} |")
    return "\n".join(lines) + "\n"


def rewritten(page: Path) -> str:
    """Returns a page with all its blocks made anew.

    Raises:
        NoSource: a block names what the registry does not know, or a result that must not stand in docs/.
    """
    known = {str(result.file.relative_to(REPOSITORY)): result for result in all_results()}

    def block(match: re.Match[str]) -> str:
        if match["kind"] == "index":
            return match["begin"] + index(page.name) + match["end"]
        if match["what"] not in known:
            raise NoSource(f"{page.name}: {match['what']} is no result that benchmarks/registry.py has")
        return match["begin"] + result_block(known[match["what"]]) + match["end"]

    return BLOCK.sub(block, page.read_text(encoding="utf-8"))


def draw(result: Result, file: Path) -> bool:
    """Draws a committed result to a file; returns whether there is anything to draw."""
    _, plot = result.benchmark.makers() if result.file.exists() else (None, None)
    if plot is None:
        return False
    plot(read(result), file)
    return True


def write_pages() -> list[Path]:
    """Writes all pages of docs/ anew, and returns those that have changed."""
    texts: Mapping[Path, str] = {page: rewritten(page) for page in sorted(DOCS.glob("*.md"))}
    changed = [page for page, text in texts.items() if text != page.read_text(encoding="utf-8")]
    for page in changed:
        page.write_text(texts[page], encoding="utf-8")
    return changed


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where a result cannot stand in docs/, or pictures could not be drawn."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.document", description=(__doc__ or "").splitlines()[0])
    parser.parse_args(arguments)
    try:
        for page in write_pages():
            sys.stdout.write(f"{page.relative_to(REPOSITORY)}\n")
    except NoSource as problem:
        sys.stderr.write(f"{problem}\n")
        return 1
    if importlib.util.find_spec("matplotlib") is None:
        sys.stderr.write("pictures need matplotlib, which is not installed: pip install matplotlib\n")
        return 1
    for result in all_results():
        if draw(result, result.picture):
            sys.stdout.write(f"{result.picture.relative_to(REPOSITORY)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
