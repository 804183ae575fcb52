"""Which charts there are for the curves of one run or of several, as the data that the script in the page draws."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.report.curves import MOST_COLUMNS, Curve, Curves, RankTable
from trainer.report.reading import as_number

# In the order in which they are stacked: what has to be first, what is waiting on top.
TIME_PARTS = {
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "communication": "communication",
    "h2d": "copies to the device",
    "data_wait": "waiting for data",
    "host": "host",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
}
_NUM_COLOURS = 8
_MOST_LINES = 8  # of a chart of ranks or machines; more are rows of a heat map
_MOST_ROWS = 64
# Words in the names of metrics.
_LOWER_IS_BETTER = re.compile(
    r"(?<![a-z])((log)?loss|err(ors?)?|perplexity|ppl|nll|bp[bc]|bits|[wce]er|map?e|r?mse|rmsle|fid|fvd|kid|lpips|ece|"
    r"brier)(?![a-z])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Chart:
    """A chart: its place in the page, what stands over it, and what the script needs to draw it."""

    identity: str
    title: str
    data: dict[str, Any] = field(default_factory=dict)

    def spec(self) -> dict[str, Any]:
        """Returns what is embedded in the page."""
        return {"id": self.identity, **self.data}


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    name: str
    curve: Curve
    colour: str
    best: dict[str, Any] | None = None
    dashed: bool = False


def colour(index: int) -> str:
    """Returns the name of the colour of a series."""
    return f"c{index % _NUM_COLOURS}"


def lines(identity: str, title: str, series: Sequence[Line], end: float, **options: Any) -> Chart | None:
    """Returns a chart of lines over the steps, None where there is nothing to draw.

    Args:
        identity: of the chart.
        title: over it.
        series: its lines.
        end: the last step of the page, the same for all of its charts.
        options: `format`, `log`, `zero`, `top`.
    """
    if not series:
        return None
    drawn = []
    for line in series:
        points = line.curve.points()
        entry: dict[str, Any] = {"name": line.name, "colour": line.colour}
        entry |= {"x": [step for step, _ in points], "y": [value for _, value in points]}
        entry |= {"best": line.best} if line.best is not None else {}
        entry |= {"dashed": True} if line.dashed else {}
        drawn.append(entry)
    data = {"kind": "lines", "domain": [0, max(end, 1)], "format": "", "series": drawn}
    return Chart(identity, title, {**data, **options})


def is_lower_better(metric: str, goals: Mapping[str, str]) -> bool:
    """Tells whether a metric is better the lower it is: guesses from the words of its name what nobody says.

    Args:
        metric: its name.
        goals: `min` or `max` of the metrics of which the config says it.
    """
    if metric in goals:
        return goals[metric] == "min"
    return _LOWER_IS_BETTER.search(metric) is not None


def best_point(
    curve: Curve, metric: str, goals: Mapping[str, str], best: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Returns the best point of a metric's curve.

    Args:
        curve: of the metric.
        metric: its name.
        goals: what the config says of metrics.
        best: what the summary says, if it is of this metric.
    """
    step, value = as_number((best or {}).get("step")), as_number((best or {}).get("value"))
    if step is not None and value is not None:
        highest = curve.best(highest=True)
        return {"x": step, "y": value, "isLow": highest is not None and value < highest[1]}
    is_low = is_lower_better(metric, goals)
    found = curve.best(highest=not is_low)
    return {"x": found[0], "y": found[1], "isLow": is_low} if found is not None and curve.num_values > 1 else None


def training(curves: Curves, end: float, goals: Mapping[str, str], best: dict[str, Any] | None) -> list[Chart]:
    """Returns the charts of what is learned: loss, metrics, learning rate and gradient norm.

    Args:
        curves: of the run.
        end: the last step of the page.
        goals: what the config says of metrics.
        best: what the summary says of the best evaluation.
    """
    losses = []
    for name, key, index in (("train", "train/loss", 0), ("eval", "eval/loss", 1)):
        if (curve := curves.get(key)) is not None:
            point = best_point(curve, "loss", goals, _of(best, "loss")) if key == "eval/loss" else None
            losses.append(Line(name, curve, colour(index), point))
    charts = [lines("loss", "Loss", losses, end, log=True)]
    for key in curves.keys("eval/"):
        metric, curve = key.removeprefix("eval/"), curves.by_key[key]
        if metric != "loss":
            line = Line(metric, curve, colour(1), best_point(curve, metric, goals, _of(best, metric)))
            charts.append(lines(f"eval-{len(charts)}", metric, [line], end, log=is_lower_better(metric, goals)))
    charts.append(_single(curves, "train/lr", "Learning rate", end, colour(2), zero=True))
    charts.append(_single(curves, "train/grad_norm", "Gradient norm", end, colour(3), log=True))
    shown = {"train/loss", "train/lr", "train/grad_norm", *_THROUGHPUT, "train/straggler_wait", "train/data_wait"}
    for key in curves.keys("train/"):
        if key not in shown:
            charts.append(_single(curves, key, key.removeprefix("train/"), end, colour(4)))
    return _there(charts)


def _of(best: dict[str, Any] | None, metric: str) -> dict[str, Any] | None:
    return best if best is not None and best.get("metric") == metric else None


_THROUGHPUT = {
    "train/samples_per_second": ("Samples per second", "", 0),
    "train/samples_per_second_per_device": ("Samples per second and device", "", 0),
    "train/tokens_per_second": ("Tokens per second", "", 4),
    "train/mfu": ("Model FLOPs utilisation", "share", 5),
}


def throughput(curves: Curves, end: float, num_ranks: int) -> list[Chart]:
    """Returns the charts of speed."""
    charts = []
    for key, (title, format_name, index) in _THROUGHPUT.items():
        if key.endswith("per_device") and num_ranks < 2:  # the same as of all devices
            continue
        charts.append(_single(curves, key, title, end, colour(index), zero=True, format=format_name))
    charts.append(_single(curves, "goodput", "Goodput so far", end, colour(2), zero=True, top=1, format="share"))
    return _there(charts)


def time_split(curves: Curves, end: float) -> Chart | None:
    """Returns where the time went over the run, shares on top of one another."""
    known = {key.removeprefix("time/"): curves.by_key[key].means() for key in curves.keys("time/")}
    if not known:
        return None
    grid = [step for step, _ in max(known.values(), key=len)]
    order = [*(part for part in TIME_PARTS if part in known), *(part for part in known if part not in TIME_PARTS)]
    series = [
        {
            "name": TIME_PARTS.get(part, part.replace("_", " ")),
            "colour": f"t-{part}" if part in TIME_PARTS else colour(i),
            "y": _on_grid(known[part], grid),
        }
        for i, part in enumerate(order)
    ]
    data = {"kind": "area", "domain": [0, max(end, 1)], "format": "share", "x": grid, "series": series}
    return Chart("time", "Share of the time since the last report", data)


def _on_grid(points: Sequence[tuple[float, float | None]], grid: Sequence[float]) -> list[float]:
    """Returns a value per step of the grid: that of the next point."""
    steps = [step for step, _ in points]
    if steps == grid:
        return [value or 0.0 for _, value in points]
    found = (min(bisect.bisect_left(steps, step), len(points) - 1) if step >= steps[0] else None for step in grid)
    return [(points[i][1] or 0.0) if i is not None else 0.0 for i in found]


def memory(curves: Curves, end: float) -> list[Chart]:
    """Returns the charts of memory."""
    named = {"allocated_gib": ("allocated", 0), "reserved_gib": ("reserved", 1), "peak_gib": ("peak", 4)}
    series = [
        Line(name, curve, colour(index), dashed=key == "peak_gib")
        for key, (name, index) in named.items()
        if (curve := curves.get(f"memory/{key}")) is not None
    ]
    charts = [lines("memory", "Memory, most of any rank", series, end, zero=True, format="GiB")]
    workers = "Loader workers of rank 0"
    charts.append(_single(curves, "memory/workers_gib", workers, end, colour(2), zero=True, format="GiB"))
    return _there(charts)


# By the end of a name, which is no part of the title.
_UNITS = {"_percent": "percent", "_mib_per_second": "MiB/s", "_gib": "GiB", "_w": "W", "_celsius": "°C"}


def system(curves: Curves, end: float) -> list[Chart]:
    """Returns the charts of the machines: one per kind of figure, with a line per node, or per GPU of a node."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in curves.keys("system/"):
        node, _, figure = key.removeprefix("system/").partition("/")
        if not figure:
            node, figure = "", node
        device = re.match(r"([a-z]+)(\d+)[_/]", figure)
        kind = re.sub(r"^([a-z]+)\d+([_/])", r"\1\2", figure)
        name = " ".join(
            part
            for part in (f"node {node}" if node else "", f"{device[1].upper()} {device[2]}" if device else "")
            if part
        )
        groups.setdefault(kind, []).append((name or figure, key))
    charts: list[Chart | None] = []
    for kind, members in groups.items():
        title, unit = system_title(kind)
        identity, names = f"system-{len(charts)}", [name for name, _ in members]
        found = [curves.by_key[key] for _, key in members]
        if len(found) > _MOST_LINES:
            charts.append(_heat(identity, title, unit, names, *_columns(found), end))
            continue
        series = [Line(name, curve, colour(i)) for i, (name, curve) in enumerate(zip(names, found, strict=True))]
        is_whole = unit == "percent" and all((curve.best(highest=True) or (0, 0))[1] <= 100 for curve in found)
        options = {"top": 100} if is_whole else {}
        charts.append(lines(identity, title, series, end, zero=True, format=unit, showLegend=True, **options))
    return _there(charts)


def system_title(kind: str) -> tuple[str, str]:
    """Returns the title and the unit of a figure of machines."""
    ending = next((ending for ending in _UNITS if kind.endswith(ending)), "")
    unit = _UNITS[ending] if ending else "°C" if kind.endswith("temperature") else ""
    title = kind.removesuffix(ending).replace("_", " ").replace("/", " ")
    title = re.sub(r"\b(cpu|gpu)\b", lambda found: found[0].upper(), title)
    return title[:1].upper() + title[1:] + (" in use" if unit == "percent" else ""), unit


def _columns(curves: Sequence[Curve]) -> tuple[list[float], np.ndarray]:
    """Returns the means of curves over the same stretches of the run: their last steps, and values, NaN if unknown."""
    means = [curve.means() for curve in curves]
    grid = [step for step, _ in max(means, key=len)]
    grid = grid[::-1][:: -(-len(grid) // MOST_COLUMNS)][::-1]
    sums, nums = np.zeros((len(grid), len(curves))), np.zeros((len(grid), len(curves)))
    for i, points in enumerate(means):
        known = [(step, value) for step, value in points if value is not None]
        at = np.minimum(np.searchsorted(grid, [step for step, _ in known]), len(grid) - 1)
        np.add.at(sums[:, i], at, [value for _, value in known])
        np.add.at(nums[:, i], at, 1)
    with np.errstate(invalid="ignore"):
        return grid, sums / nums


def ranks(table: RankTable, curves: Curves, end: float) -> list[Chart]:
    """Returns the charts of the ranks beside one another."""
    titles = {
        "seconds_to_exchange": ("Seconds to the exchange of gradients", "s"),
        "communication": ("Share of communication", "share"),
        "data_wait": ("Share of waiting for data", "share"),
        "peak_gib": ("Peak memory", "GiB"),
    }
    charts: list[Chart | None] = []
    for name, (title, unit) in titles.items():
        columns = table.columns(name)
        if columns is None:
            continue
        names = [f"rank {rank}" for rank in range(table.num_ranks)]
        draw = _rank_lines if table.num_ranks <= _MOST_LINES else _heat
        charts.append(draw(f"ranks-{name}", title, unit, names, table.steps, columns, end))
    charts.append(
        _single(
            curves,
            "train/straggler_wait",
            "Share of a step that ranks wait for the slowest",
            end,
            colour(4),
            zero=True,
            format="share",
        )
    )
    return _there(charts)


def _rank_lines(
    identity: str, title: str, unit: str, names: Sequence[str], steps: list[float], columns: np.ndarray, end: float
) -> Chart:
    series = [
        {"name": name, "colour": colour(i), "x": steps, "y": columns[:, i].tolist()} for i, name in enumerate(names)
    ]
    data = {"kind": "lines", "domain": [0, max(end, 1)], "format": unit, "zero": True, "series": series}
    return Chart(identity, title, data)


def _heat(
    identity: str, title: str, unit: str, names: Sequence[str], steps: list[float], columns: np.ndarray, end: float
) -> Chart:
    """Of many rows, the one with the highest value stands for its neighbours."""
    together = -(-len(names) // _MOST_ROWS)
    starts = range(0, len(names), together)
    values = np.fmax.reduceat(columns, list(starts), axis=1)
    known = values[~np.isnan(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    data = {
        "kind": "heat",
        "domain": [0, max(end, 1)],
        "format": unit,
        "x": steps,
        "rows": [_row_name(names[start], names[min(start + together, len(names)) - 1]) for start in starts],
    }
    note = f" ({number_range(low, high, unit)})"
    return Chart(identity, title + note, {**data, "values": values.tolist(), "low": low, "high": high})


def _row_name(first: str, last: str) -> str:
    """Returns the name of the rows from one to another."""
    if first == last:
        return first
    words, others = first.split(" "), last.split(" ")
    end = others[-1] if words[:-1] == others[:-1] else f" {last}"
    return f"{first}\N{EN DASH}{end}"


def number_range(low: float, high: float, unit: str) -> str:
    """Returns the range of a heat map as text."""
    if unit == "share":
        return f"{low:.0%} to {high:.0%}"
    if unit == "percent":
        return f"{low:.0f}% to {high:.0f}%"
    return f"{low:.3g} to {high:.3g} {unit}"


def _single(curves: Curves, key: str, title: str, end: float, colour_name: str, **options: Any) -> Chart | None:
    curve = curves.get(key)
    if curve is None:
        return None
    identity = re.sub(r"[^a-z0-9]+", "-", key.lower())
    return lines(identity, title, [Line(title, curve, colour_name)], end, **options)


def _there(charts: Iterable[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart is not None]
