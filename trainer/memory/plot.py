"""A picture of the memory over one training step.

Owns how it looks and the files it is written to; what it shows is `trainer.memory.simulation`.
"""

from __future__ import annotations

import html
import io
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.memory.simulation import StepMemory
from trainer.memory.trace import CATEGORIES
from trainer.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".html")
# What stays lies below what comes and goes.
_COLORS = {
    "parameters": "#4477aa",
    "optimizer": "#66ccee",
    "buffers": "#bbbbbb",
    "inputs": "#999933",
    "gradients": "#228833",
    "communication": "#aa3377",
    "activations": "#ee8866",
    "temporary": "#ccbb44",
}
_BEHIND_TEXT = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
assert set(_COLORS) == set(CATEGORIES)


def plot_step(step: StepMemory, title: str, limit_bytes: int | None, file: Path) -> None:
    """Draws the live bytes of a step by category, its phases, its peak and the memory there is.

    Args:
        step: the simulated step.
        title: of the picture.
        limit_bytes: what the step may take; None: no line.
        file: a `.png` or `.svg` picture, or an `.html` page with the largest tensors at the peak below it.

    Raises:
        UserError: the file's ending is another, it cannot be written, or matplotlib is not installed.
    """
    ending = file.suffix.lower()
    if ending not in ENDINGS:
        raise UserError(f"cannot draw to '{file}': its name must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        message = f"drawing '{file}' needs matplotlib: pip install 'lockstep-trainer[plot]'"
        raise UserError(message) from None
    # Text stays text, ids are the same every time, and a user's own style does not interfere.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lockstep", "text.parse_math": False}):
        figure = Figure(figsize=(11, 5.5), layout="constrained")
        _draw(figure, step, title, limit_bytes)
        content = _rendered(figure, "png" if ending == ".png" else "svg")
    if ending == ".html":
        content = _page(content.decode(), step, title).encode()
    try:
        file.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write '{file}': {error.strerror or error}") from error


def _rendered(figure: Figure, format_name: str) -> bytes:
    # A figure made without pyplot has the canvas of its format: no display, nothing global.
    metadata = {"Date": None} if format_name == "svg" else None
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format_name, dpi=150, metadata=metadata)
    return buffer.getvalue()


def _draw(figure: Figure, step: StepMemory, title: str, limit_bytes: int | None) -> None:
    points = [point for point in step.timeline if point.phase != "setup"]
    assert points
    totals = [sum(point.num_bytes.values()) for point in points]
    highest = max([*totals, limit_bytes or 0])
    unit_name = format_bytes(highest).split()[-1]
    unit = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit_name]
    shown = [name for name in _COLORS if any(point.num_bytes[name] for point in points)]
    axes = figure.add_subplot()
    axes.stackplot(
        range(len(points)),
        [[point.num_bytes[name] / unit for point in points] for name in shown],
        labels=shown,
        colors=[_COLORS[name] for name in shown],
        step="post",
        linewidth=0,
    )
    axes.set_xlim(0, len(points) - 1)
    axes.set_ylim(0, 1.16 * highest / unit)
    axes.set_title(title, loc="left", fontweight="bold", pad=22)
    axes.set_xlabel("allocations and releases, in order")
    axes.set_xticks([])  # of many events some are left out
    axes.set_ylabel(f"memory in {unit_name}")
    axes.spines[["top", "right"]].set_visible(False)
    _mark_phases(axes, [point.phase for point in points])
    _mark_peak(axes, totals, unit)
    if limit_bytes is not None:
        axes.axhline(limit_bytes / unit, color="#cc3311", linestyle="--", linewidth=1.5)
        axes.annotate(
            f"limit {format_bytes(limit_bytes)}",
            (1, limit_bytes / unit),
            (-4, 4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color="#cc3311",
            horizontalalignment="right",
            bbox=_BEHIND_TEXT,
        )
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)  # in the order of the stack


def _mark_phases(axes: Axes, phases: list[str]) -> None:
    start, previous_label = 0, -1.0
    for phase, group in groupby(phases):
        end = start + len([*group])
        if start:
            axes.axvline(start, color="#555555", linewidth=0.8)
        middle = (start + min(end, len(phases) - 1)) / 2 / max(len(phases) - 1, 1)
        # Names of short phases keep clear of the one before.
        position = max(middle, previous_label + 0.08)
        axes.annotate(
            phase,
            (min(position, 1.0), 1.01),
            xycoords="axes fraction",
            horizontalalignment="center",
            verticalalignment="bottom",
            color="#555555",
        )
        start, previous_label = end, position


def _mark_peak(axes: Axes, totals: list[int], unit: int) -> None:
    at = max(range(len(totals)), key=totals.__getitem__)
    is_right = at > 0.6 * len(totals)
    axes.plot([at], [totals[at] / unit], "o", color="black", markersize=5)
    axes.annotate(
        f"peak {format_bytes(totals[at])}",
        (at, totals[at] / unit),
        (-8 if is_right else 8, 5),
        textcoords="offset points",
        horizontalalignment="right" if is_right else "left",
        fontweight="bold",
        bbox=_BEHIND_TEXT,
    )


def _page(svg: str, step: StepMemory, title: str) -> str:
    picture = svg[svg.index("<svg") :]  # without the XML declaration
    rows = "".join(f"<tr>{''.join(_cells(tensor))}</tr>\n" for tensor in step.largest)
    title = html.escape(title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; max-width: 72rem; margin: 1rem auto; }}
svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; padding: 0.2rem 0.8rem; border-bottom: 1px solid #ddd; }}
td:first-child {{ text-align: right; }}
</style>
</head>
<body>
{picture}
<h2>Largest tensors at the peak of {format_bytes(step.peak_bytes)}</h2>
<table>
<tr><th>size</th><th>category</th><th>shape</th><th>type</th><th>parameter or operation</th></tr>
{rows}</table>
</body>
</html>
"""


def _cells(tensor: Any) -> list[str]:
    shape = " x ".join(map(str, tensor.shape)) or "scalar"
    dtype = str(tensor.dtype).removeprefix("torch.")
    texts = [format_bytes(tensor.num_bytes), tensor.category, shape, dtype, tensor.origin]
    return [f"<td>{html.escape(text)}</td>" for text in texts]
