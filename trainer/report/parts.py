"""Pieces of a page: escaped text, numbers as a person reads them, tables, figures and the frame around it all."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import time
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from trainer import units

UNKNOWN = "\N{EN DASH}"  # stands for a value that is not known

_SCRIPTS = ("scales.js", "marks.js", "charts.js")


class Html(str):
    """Text that is markup already; all other text is escaped where it enters the page."""


def safe(text: object) -> Html:
    """Returns text as markup."""
    return text if isinstance(text, Html) else Html(html.escape(str(text), quote=True))


def join(parts: Iterable[object]) -> Html:
    """Returns parts one after the other."""
    return Html("".join(map(safe, parts)))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """Returns an element. An attribute that is None is left out; `class_` stands for `class`, `data_x` for `data-x`."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{safe(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{shown}>{join(content)}</{name}>")


def section(identity: str, title: str, *content: object, note: str | None = None) -> Html:
    """Returns a section of the page with its heading, or nothing where it has no content."""
    if not any(map(safe, content)):
        return Html("")
    hint = tag("p", note, class_="note") if note else ""
    return tag("section", tag("h2", title), hint, *content, id=identity)


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], numeric: Iterable[int] = (), **attributes: Any
) -> Html:
    """Returns a table that scrolls within its box.

    Args:
        head: one cell per column; none for a table without a head.
        rows: cells; the first one of each names the row.
        numeric: columns that hold numbers.
        attributes: of the table.
    """
    right = frozenset(numeric)

    def cell(name: str, column: int, content: object, **more: str) -> Html:
        return tag(name, content, class_="num" if column in right else None, **more)

    top = join(cell("th", i, content, scope="col") for i, content in enumerate(head))
    body = join(
        tag("tr", cell("th", 0, row[0], scope="row"), *(cell("td", i, row[i]) for i in range(1, len(row))))
        for row in rows
    )
    whole = tag("table", tag("thead", tag("tr", top)) if head else "", tag("tbody", body), **attributes)
    return tag("div", whole, class_="scroll", tabindex="0")


def figure(chart: str, title: str) -> Html:
    """Returns the place of a chart, which the script fills."""
    return tag("figure", tag("figcaption", tag("h3", title)), class_="chart", data_chart=chart)


def link(path: str, text: object) -> Html:
    """Returns a link to a path that is relative to the page and quoted already."""
    return tag("a", text, href=path)


# ---- numbers ------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Returns a number with as many digits as a reader takes in."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.3g}"
    if float(value).is_integer() or size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def percent(value: float | None) -> str:
    """Returns a share as percents."""
    return UNKNOWN if value is None else f"{value:.1%}" if abs(value) < 0.9995 or value == 1 else f"{value:.2%}"


def duration(seconds: float | None) -> str:
    """Returns a time as a person reads it."""
    return UNKNOWN if seconds is None else units.duration(seconds)


def moment(seconds: float | None) -> str:
    """Returns a time of the clock on the wall of this machine, with its offset from UTC."""
    if seconds is None:
        return UNKNOWN
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return UNKNOWN


def gain(value: float) -> str:
    """Returns an expected speed-up."""
    return f"about {value:.0%} faster" if value >= 0.01 else "under 1% faster"


# ---- the whole page ------------------------------------------------------------------------------------------


def page(title: str, body: Html, charts: Sequence[dict[str, Any]]) -> str:
    """Returns a page that needs nothing but itself: no script but ours runs in it, and nothing is fetched."""
    here = resources.files(__package__)
    style = here.joinpath("page.css").read_text(encoding="utf-8")
    script = "\n".join(here.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="Lockstep">
<title>{safe(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="charts">{embedded(charts)}</script>
<script>{script}</script>
</body>
</html>
"""


def embedded(data: object) -> str:
    """Returns data as JSON that cannot end the script element that it stands in."""
    text = json.dumps(_short(data), separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _short(value: Any) -> Any:
    """Six digits are more than a screen shows; what is no number becomes null."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 1e15 else float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _short(entry) for key, entry in value.items()}
    return [_short(entry) for entry in value] if isinstance(value, list | tuple) else value
