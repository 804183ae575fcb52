"""Writes the page of one run, or of several in comparison, to a file."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import UserError, one_line_text
from trainer.files import replacing
from trainer.report.comparison import comparison_page
from trainer.report.curves import Curves
from trainer.report.page import run_page
from trainer.report.reading import read_run

logger = logging.getLogger("lockstep")

NAME = "report.html"

_one_at_a_time = threading.Lock()  # of a run that hangs and fails, the watch's thread writes the page as well


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the page of a run, or one that compares several, and returns its file.

    Args:
        folders: run folders.
        output: the file; by default `report.html` in the run folder, or here where there are several.

    Raises:
        UserError: a folder is no run folder, or the file cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    file = output if output is not None else folders[0] / NAME if len(folders) == 1 else Path(NAME)
    start = file.parent.resolve()
    try:
        _replace(file, run_page(runs[0], start) if len(runs) == 1 else comparison_page(runs, start))
    except OSError as error:
        raise UserError(f"cannot write '{file}': {error.strerror or one_line_text(error)}") from error
    return file


def write_page(folder: Path, curves: Curves | None = None) -> None:
    """Writes the page of a run that ends. A failure is a warning: the run is worth more than its page.

    Args:
        folder: the run folder.
        curves: its curves, where they are known already.
    """
    try:
        with _one_at_a_time:
            _replace(folder / NAME, run_page(read_run(folder, curves), folder.resolve()))
    except Exception as error:
        logger.warning("cannot write '%s': %s", folder / NAME, one_line_text(error))


def _replace(file: Path, content: str) -> None:
    """Writes a file whole or not at all."""
    if not file.parent.exists():
        file.parent.mkdir(parents=True)
    with replacing(file) as staged:
        staged.write_text(content, encoding="utf-8")
