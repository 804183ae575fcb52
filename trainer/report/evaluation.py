"""Sample predictions and the confusion matrix of an evaluation, with their pictures inside the page."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from trainer.files import read_json, read_object
from trainer.report.charts import Chart
from trainer.report.parts import Html, figure, join, percent, safe, table, tag
from trainer.report.reading import as_number

_MOST_SAMPLES = 48
_MOST_CLASSES = 50
_MOST_PAIRS = 30
_MOST_BYTES = 256 * 1024  # of one picture
_MOST_BYTES_IN_ALL = 4 * 1024 * 1024


def samples(folder: Path) -> Html:
    """Returns the sample predictions of an evaluation; pictures too large for a page are left out."""
    found = read_json(folder / "samples.json")
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    left = _MOST_BYTES_IN_ALL
    shown = []
    for entry in entries[:_MOST_SAMPLES]:
        picture = _picture(folder, entry.get("image"))
        if picture is not None and len(picture) <= left:
            left -= len(picture)
        else:
            picture = None
        shown.append(_sample(entry, picture))
    return tag("ul", *shown, class_="samples") if shown else Html("")


def _picture(folder: Path, name: object) -> bytes | None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+\.png", name):
        return None
    try:
        with open(folder / name, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError:
        return None
    return data if data.startswith(b"\x89PNG\r\n") and len(data) <= _MOST_BYTES else None


def _sample(entry: dict[str, Any], picture: bytes | None) -> Html:
    target, prediction = entry.get("target"), entry.get("prediction")
    confidence = as_number(entry.get("confidence"))
    has_views = entry.get("num_views") not in (1, None)  # of which nobody says whether they agree
    is_wrong = target is not None and prediction != target and not has_views
    image = tag("span", "no picture", class_="blank")
    if picture is not None:
        source = "data:image/png;base64," + base64.b64encode(picture).decode()
        image = Html(f'<img src="{source}" alt="{safe(f"sample of {target}")}">')
    mark = tag("b", "✗ ", class_="bad") if is_wrong else tag("b", "✓ ", class_="good")
    lines = [tag("span", "" if has_views else mark, prediction, class_="prediction")]
    if is_wrong or has_views:
        lines.append(tag("span", f"is {target}", class_="target"))
    if confidence is not None:
        lines.append(tag("span", percent(confidence), class_="confidence"))
    return tag("li", image, *lines, class_="wrong" if is_wrong else "wide" if has_views else None)


def confusion(folder: Path) -> tuple[Html, list[Chart]]:
    """Returns the confusion matrix as a chart, or the pairs most often confused where there are many classes."""
    found = read_object(folder / "confusion.json")
    classes, counts = found.get("classes"), found.get("counts")
    if not isinstance(classes, list) or not isinstance(counts, list) or not _is_square(counts, len(classes)):
        return Html(""), []
    names = [str(name) for name in classes]
    pairs = [(count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j and count > 0]
    pairs.sort(reverse=True, key=lambda pair: (pair[0], -pair[1], -pair[2]))
    rows = [[names[i], names[j], f"{count:,}", percent(count / sum(counts[i]))] for count, i, j in pairs[:_MOST_PAIRS]]
    if len(names) > _MOST_CLASSES:
        return join((tag("h3", f"Most often confused of {len(names)} classes"), _pairs(rows))), []
    chart = Chart("confusion", "Confusion matrix", {"kind": "matrix", "classes": names, "counts": counts})
    beside = tag("div", tag("h3", "Most often confused"), _pairs(rows[:10])) if rows else ""
    return tag("div", figure(chart.identity, chart.title), beside, class_="beside matrix"), [chart]


def _pairs(rows: list[list[str]]) -> Html:
    return table(["is", "taken for", "samples", "of this class"], rows, numeric=(2, 3), class_="narrow")


def _is_square(counts: list[Any], size: int) -> bool:
    return (
        size > 0
        and len(counts) == size
        and all(
            isinstance(row, list)
            and len(row) == size
            and all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in row)
            for row in counts
        )
    )
