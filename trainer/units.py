"""Amounts of memory, times and counts as text, and text as numbers of bytes."""

from __future__ import annotations

import re

_FACTORS = {"B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


def parse_bytes(text: str) -> int:
    """Reads `24GiB`, `1.5 GB` or `512 MiB`; raises ValueError on anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B|B)\s*", text)
    if match is None:
        raise ValueError(f"write bytes like 24GiB or 512MiB (got {text!r})")
    return int(float(match[1]) * _FACTORS[match[2]])


def format_bytes(num_bytes: float) -> str:
    """Returns a size as a person reads it, such as `1.50 GiB` or `12 KiB`."""
    for power, unit in ((3, "GiB"), (2, "MiB")):
        if abs(num_bytes) >= 0.1 * 1024**power:
            return f"{num_bytes / 1024**power:.2f} {unit}"
    return f"{num_bytes / 1024:.0f} KiB"


def duration(seconds: float) -> str:
    """Returns a time as a person reads it, such as `12.5 s`, `3 min 05 s`, `2 h 07 min` or `3 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def counted(number: int, what: str) -> str:
    """Returns `1 node` or `3 nodes`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
