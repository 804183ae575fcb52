"""The page that compares runs: curves over one another, figures side by side, and where their configs differ."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.report import charts
from trainer.report.attempts import address, status_chip
from trainer.report.charts import TIME_PARTS, Chart, Line, best_point, colour, is_lower_better, lines
from trainer.report.page import (
    Drawn,
    advice_card,
    average_split,
    device,
    navigation,
)
from trainer.report.parts import UNKNOWN, Html, duration, join, link, number, page, percent, section, table, tag
from trainer.report.reading import Run

_NUM_PLAIN = 8  # runs with a colour of their own; the next ones have the same again, dashed
_NOT_COMPARED = re.compile(r"run\.(name|dir)")


def comparison_page(runs: Sequence[Run], start: Path) -> str:
    """Returns the page of several runs.

    Args:
        runs: at least one.
        start: folder of the page.
    """
    names = labels(runs)
    drawn = Drawn()
    advised = [
        join((tag("h3", name), *(advice_card(advice, f"{i}-{j}") for j, advice in enumerate(run.advice))))
        for i, (name, run) in enumerate(zip(names, runs, strict=True))
        if run.advice
    ]
    sections = [
        section("runs", "Runs", overview(runs, names, start)),
        section("training", "Training", drawn.grid(training(runs, names))),
        section("speed", "Throughput", drawn.grid(speed(runs, names))),
        section(
            "time",
            "Where the time goes",
            time_splits(runs, names),
            note="Shares of the wall time, averaged over each run.",
        ),
        section("config", "Config differences", config_differences(runs, names)),
        section("advice", "What to change", *advised),
    ]
    shown = f"{len(runs)} runs compared"
    heading = tag(
        "header", tag("div", tag("h1", shown), class_="heading"), tag("p", ", ".join(names), class_="subtitle")
    )
    body = join((heading, navigation(sections), tag("main", *sections)))
    return page(f"{shown}: {', '.join(names)}", body, drawn.specs)


def labels(runs: Sequence[Run]) -> list[str]:
    """Returns a name for each run that no other one has."""
    count = Counter(run.name for run in runs)
    names = [run.name if count[run.name] == 1 else f"{run.name} ({run.folder.resolve().name})" for run in runs]
    count = Counter(names)
    return [name if count[name] == 1 else f"{run.name} ({run.folder})" for name, run in zip(names, runs, strict=True)]


def overview(runs: Sequence[Run], names: Sequence[str], start: Path) -> Html:
    """Returns the table of all runs with what they came to. The best of a column is marked."""
    metrics: dict[str, None] = {}
    for run in runs:
        metrics |= dict.fromkeys(key.removeprefix("eval/") for key in run.curves.keys("eval/"))
    columns: list[tuple[str, bool | None, list[float | None], Any]] = []  # name, highest is best, values, how to show
    for metric in metrics:
        highest = not is_lower_better(metric, goals_of(runs))
        curves = [run.curves.get(f"eval/{metric}") for run in runs]
        columns.append((f"{metric}, last", highest, [curve.last if curve else None for curve in curves], number))
        bests = [curve.best(highest) if curve else None for curve in curves]
        columns.append((f"{metric}, best", highest, [best[1] if best else None for best in bests], number))
    columns += [
        ("train loss", False, [_last(run, "train/loss") for run in runs], number),
        ("samples/s", True, [_speed(run) for run in runs], number),
        ("MFU", True, [run.number("mfu") or _mean(run, "train/mfu") for run in runs], percent),
        ("goodput", True, [run.goodput for run in runs], percent),
        ("peak GiB", None, [_gib(run.number("peak_memory_bytes")) for run in runs], number),
        ("wall time", None, [_took(run) for run in runs], duration),
    ]
    columns = [column for column in columns if any(value is not None for value in column[2])]
    rows = []
    for i, run in enumerate(runs):
        mark = tag("i", class_="key dashed" if i >= _NUM_PLAIN else "key", style=f"--colour:var(--{colour(i)})")
        steps = f"{number(run.step)} of {number(total)}" if (total := run.number("total_steps")) else number(run.step)
        if run.summary.get("stopped_early"):
            steps += ", stopped early"
        name = join((mark, link(address(run.folder, start), names[i])))
        cells = [_cell(values, i, highest, show) for _, highest, values, show in columns]
        rows.append([name, status_chip(run.status), tag("span", device(run), class_="whole"), steps, *cells])
    head = ["run", "status", "devices", "step", *(name for name, *_ in columns)]
    return table(head, rows, numeric=range(3, len(head)))


def goals_of(runs: Sequence[Run]) -> dict[str, str]:
    """Returns of which metrics the configs of all runs say whether the largest or the smallest is best."""
    goals: dict[str, str] = {}
    for run in runs:
        goals = {**run.goals, **goals}
    return goals


def _cell(values: Sequence[float | None], i: int, highest: bool | None, show: Any) -> Html:
    value, known = values[i], [value for value in values if value is not None]
    is_best = highest is not None and len(set(known)) > 1 and value == (max(known) if highest else min(known))
    return tag("strong", show(value), class_="top") if is_best else tag("span", show(value))


def _last(run: Run, key: str) -> float | None:
    curve = run.curves.get(key)
    return curve.last if curve is not None else None


def _mean(run: Run, key: str) -> float | None:
    curve = run.curves.get(key)
    return curve.mean if curve is not None else None


def _speed(run: Run) -> float | None:
    known = run.number("samples_per_second")
    return known if known is not None else _mean(run, "train/samples_per_second")


def _gib(num_bytes: float | None) -> float | None:
    return num_bytes / 2**30 if num_bytes is not None else None


def _took(run: Run) -> float | None:
    return run.last_seen - run.started if run.started is not None and run.last_seen is not None else None


def training(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """Returns the charts of what the runs learn."""
    metrics = dict.fromkeys(key for run in runs for key in run.curves.keys("eval/"))
    titles = {
        "train/loss": "Loss, train",
        "eval/loss": "Loss, eval",
        **{key: key.removeprefix("eval/") for key in metrics if key != "eval/loss"},
        "train/lr": "Learning rate",
        "train/grad_norm": "Gradient norm",
    }
    is_log = {"train/loss", "eval/loss", "train/grad_norm"}
    found = [overlay(runs, names, key, title, log=key in is_log) for key, title in titles.items()]
    return [chart for chart in found if chart is not None]


def speed(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """Returns the charts of their speed and memory."""
    wanted = {
        "train/samples_per_second": ("Samples per second", ""),
        "train/tokens_per_second": ("Tokens per second", ""),
        "train/mfu": ("Model FLOPs utilisation", "share"),
        "memory/peak_gib": ("Peak memory", "GiB"),
    }
    found = [overlay(runs, names, key, title, format=unit, zero=True) for key, (title, unit) in wanted.items()]
    return [chart for chart in found if chart is not None]


def overlay(runs: Sequence[Run], names: Sequence[str], key: str, title: str, **options: Any) -> Chart | None:
    """Returns a chart with a line per run that has this value; None where no run has it."""
    end = max((run.curves.last_step or 0 for run in runs), default=0)
    series = []
    for i, (name, run) in enumerate(zip(names, runs, strict=True)):
        curve = run.curves.get(key)
        if curve is None:
            continue
        best = best_point(curve, key.removeprefix("eval/"), goals_of(runs)) if key.startswith("eval/") else None
        best = {**best, "isQuiet": True} if best is not None else None  # its value is in the table
        series.append(Line(name, curve, colour(i), best, dashed=i >= _NUM_PLAIN))
    identity = re.sub(r"[^a-z0-9]+", "-", key.lower())
    return lines(identity, title, series, end, showLegend=True, **options)


def time_splits(runs: Sequence[Run], names: Sequence[str]) -> Html:
    """Returns the table of shares, a column per run, and a bar for each."""
    splits = [average_split(run) for run in runs]
    parts = [part for part in TIME_PARTS if any(part in split for split in splits)]
    parts += [part for split in splits for part in split if part not in TIME_PARTS and part not in parts]
    if not parts:
        return Html("")
    rows = []
    for part in parts:
        mark = tag("i", class_="key", style=f"--colour:var(--{f't-{part}' if part in TIME_PARTS else 't-other'})")
        name = join((mark, charts.TIME_PARTS.get(part, part.replace("_", " "))))
        rows.append([name, *(share_cell(split.get(part), part) for split in splits)])
    return table(["part", *names], rows, numeric=range(1, len(names) + 1))


def share_cell(share: float | None, part: str) -> Html:
    """Returns a share with a bar as long."""
    if share is None:
        return tag("span", UNKNOWN)
    colour_name = f"t-{part}" if part in TIME_PARTS else "t-other"
    style = f"width:{min(max(share, 0), 1) * 100:.1f}%;background:var(--{colour_name})"
    return tag("span", tag("i", style=style), percent(share), class_="share")


def config_differences(runs: Sequence[Run], names: Sequence[str]) -> Html:
    """Returns the settings in which the runs differ."""
    flat = [flattened(run.config) for run in runs]
    keys = sorted({key for settings in flat for key in settings if not _NOT_COMPARED.fullmatch(key)})
    rows = []
    for key in keys:
        values = [value_text(settings[key]) if key in settings else UNKNOWN for settings in flat]
        if len(set(values)) > 1:
            rows.append([tag("code", key), *(tag("code", value) for value in values)])
    if not rows:
        return tag("p", "Their configs are the same, but for name and folder.", class_="fact")
    return table(["setting", *names], rows)


def value_text(value: object) -> str:
    """Returns a value of a config as JSON, and text as it is."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def flattened(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Returns settings by their dotted path; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
