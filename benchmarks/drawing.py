"""The pictures of docs/: bars with their spread, and SVG files that are the same bytes for the same figures."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS, OTHERS = "#2f6fde", "#9aa4b2"
_SETTINGS = {
    "svg.hashsalt": "lockstep",  # the same names inside the file every time
    "svg.fonttype": "none",  # text stays text
    "font.size": 9.0,
}


@dataclass(frozen=True)
class Bar:
    """One bar: a label, and median, least and most as `telling.spread` gives them."""

    label: str
    spread: Mapping[str, float]
    ours: bool = False


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """Returns a figure of so many inches, and its axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def save_figure(figure: Any, file: Path) -> None:
    """Writes a figure as SVG, the same bytes for the same figure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with importlib.import_module("matplotlib").rc_context(_SETTINGS):
        figure.savefig(file, format="svg", metadata={"Date": None})


def draw_bars(groups: Mapping[str, Sequence[Bar]], what: str, file: Path, bar: float | None = None) -> None:
    """Draws horizontal bars, group below group, ours in colour, whiskers from the least to the most.

    Args:
        groups: bars by the name of their group; an empty name stays away.
        what: is measured, and in which unit: beside the axis.
        file: an .svg file.
        bar: where a line says what must be reached.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = [(group, entry) for group, entries in groups.items() for entry in entries]
    figure, axes = new_figure(8, 0.9 + 0.26 * len(rows))
    for position, (_, entry) in enumerate(rows):
        middle = entry.spread["median"]
        whiskers = [[middle - entry.spread["min"]], [entry.spread["max"] - middle]]
        colour = OURS if entry.ours else OTHERS
        axes.barh(position, middle, color=colour, xerr=whiskers, error_kw={"elinewidth": 0.8, "ecolor": "0.25"})
    axes.set_yticks(range(len(rows)), [f"{group}: {entry.label}" if group else entry.label for group, entry in rows])
    axes.invert_yaxis()
    axes.set_xlabel(what)
    axes.set_xlim(left=0)
    if bar is not None:
        axes.axvline(bar, color="0.25", linestyle="--", linewidth=0.8)
    save_figure(figure, file)
