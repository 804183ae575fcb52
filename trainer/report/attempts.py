"""The attempts at a run as a timeline, what ended them, and where the wall time of the run went."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from trainer.report.parts import UNKNOWN, Html, duration, join, link, moment, number, percent, safe, table, tag
from trainer.report.reading import Attempt, Run

# What the parts of `attempts.json` are called, and their colours; the others get a grey.
PARTS = {
    "train": ("steps that counted", "t-forward"),
    "data_wait": ("waiting for data", "t-data_wait"),
    "evaluation": ("evaluation", "t-evaluation"),
    "checkpoint": ("checkpoint stalls", "t-checkpoint"),
    "startup": ("start-up", "t-host"),
    "lost": ("lost work", "c4"),
    "restarts": ("restarts", "t-gap"),
}
_MOST_ATTEMPTS = 60
_WIDTH, _HEIGHT = 1000, 14


def address(path: Path, start: Path) -> str:
    """Returns a path relative to the folder of the page, as a link."""
    return urllib.parse.quote(os.path.relpath(path, start))


def bar(seconds: Mapping[str, float], width: float = _WIDTH, left: float = 0) -> Html:
    """Returns the parts of a time side by side, as pieces of an SVG picture."""
    total = sum(seconds.values())
    pieces, at = [], left
    for part in sorted(seconds, key=lambda part: list(PARTS).index(part) if part in PARTS else len(PARTS)):
        share = seconds[part] / total if total else 0.0
        if share <= 0:
            continue
        name, colour = PARTS.get(part, (part.replace("_", " "), "t-other"))
        hint = tag("title", f"{name}: {duration(seconds[part])} ({percent(share)})")
        size = {"x": f"{at:.2f}", "y": 0, "width": f"{share * width:.2f}", "height": _HEIGHT}
        pieces.append(tag("rect", hint, style=f"fill:var(--{colour})", **size))
        at += share * width
    return join(pieces)


def picture(pieces: Html, label: str) -> Html:
    """Returns pieces as a picture as wide as its box."""
    box = f"0 0 {_WIDTH} {_HEIGHT}"
    return tag("svg", pieces, class_="bar", viewBox=box, preserveAspectRatio="none", role="img", aria_label=label)


def key(parts: Mapping[str, float]) -> Html:
    """Returns the legend of bars."""
    shown = [part for part in PARTS if parts.get(part)] + [part for part in parts if part not in PARTS and parts[part]]
    named = [PARTS.get(part, (part.replace("_", " "), "t-other")) for part in shown]
    items = (tag("li", tag("i", class_="key", style=f"--colour:var(--{colour})"), name) for name, colour in named)
    return tag("ul", *items, class_="legend")


def wall_time(seconds: Mapping[str, float]) -> Html:
    """Returns where the wall time of a run went: a bar and a table."""
    total = sum(seconds.values())
    if not total:
        return Html("")
    rows = [
        [safe(PARTS.get(part, (part.replace("_", " "),))[0]), duration(value), percent(value / total)]
        for part, value in sorted(seconds.items(), key=lambda entry: -entry[1])
        if value > 0
    ]
    return join(
        (
            picture(bar(seconds), "wall time by part"),
            key(seconds),
            table(["part", "time", "share"], rows, numeric=(1, 2), class_="narrow"),
        )
    )


def timeline(run: Run, start: Path) -> Html:
    """Returns the attempts, the newest last, each with a bar on the clock of the whole run.

    Args:
        run: the run.
        start: folder of the page.
    """
    attempts = run.attempts
    if not attempts:
        return Html("")
    first, last = attempts[0].started, max(attempt.last_seen for attempt in attempts)
    scale = _WIDTH / max(last - first, 1e-9)
    rows = [_row(run, attempt, first, scale, start) for attempt in attempts[-_MOST_ATTEMPTS:]]
    all_parts: dict[str, float] = {}
    for attempt in attempts:
        for part, value in attempt.seconds.items():
            all_parts[part] = all_parts.get(part, 0.0) + value
    head = ["attempt", "status", "when", "started", "took", "ranks", "steps", "saved", "what ended it"]
    left_out = len(attempts) - len(rows)
    note = tag("p", f"The first {left_out} attempts are left out here.", class_="note") if left_out else ""
    return join((note, key(all_parts), table(head, rows, numeric=(4, 5, 6, 7), class_="attempts")))


def _row(run: Run, attempt: Attempt, first: float, scale: float, start: Path) -> list[object]:
    left = (attempt.started - first) * scale
    width = max((attempt.last_seen - attempt.started) * scale, 4)
    track = tag("rect", x=0, y=0, width=_WIDTH, height=_HEIGHT, class_="track")
    pieces = bar(attempt.seconds, width, left=min(left, _WIDTH - width))
    steps = UNKNOWN
    if attempt.first_step is not None and attempt.step is not None:
        steps = f"{attempt.first_step:,} → {attempt.step:,}"
    return [
        attempt.number,
        status_chip(attempt.status, run.status if attempt is run.attempts[-1] else None),
        picture(join((track, pieces)), f"attempt {attempt.number} on the clock of the run"),
        moment(attempt.started)[:-6],
        duration(attempt.last_seen - attempt.started),
        number(attempt.num_processes),
        steps,
        number(attempt.saved_step),
        _ending(attempt, start),
    ]


def _ending(attempt: Attempt, start: Path) -> Html:
    fault = attempt.fault
    if fault is None:
        return Html("")
    where = f"rank {fault.get('rank')} on {fault.get('host')}"
    if fault.get("step") is not None:
        where += f", step {fault['step']}"
    if fault.get("place"):
        where += f" ({fault['place']})"
    shown = [tag("span", f"{where}: {fault.get('message')}", class_="ending")]
    if attempt.fault_folder is not None:
        shown += [Html(" "), link(address(attempt.fault_folder, start), "files")]
    return join(shown)


_STATUS = {
    "finished": ("good", "✓ finished"),
    "stopped": ("calm", "■ stopped"),
    "failed": ("bad", "✗ failed"),
    "killed": ("bad", "✗ killed"),
    "running": ("calm", "… running or killed"),
}


def status_chip(status: str, of_run: str | None = None) -> Html:
    """Returns a status as a word with a colour."""
    kind, shown = _STATUS.get(of_run or status, ("calm", "? unknown"))
    return tag("span", shown, class_=f"chip {kind}")
