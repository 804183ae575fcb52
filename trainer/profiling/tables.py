"""Kernels and memory of a profile as text. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.units import format_bytes


def kernels_text(record: Mapping[str, Any]) -> str:
    """Returns the table of kernels of a rank, and what held its memory, as a person reads it.

    Args:
        record: as `traces.Analysis.record` returned it, with what the recording knows.
    """
    steps = record["steps"]
    what = "GPU kernels" if record["kinds_are_of"] == "gpu" else "CPU operators (time of their own)"
    title = f"rank {record['rank']}, steps {steps[0]} to {steps[-1]}: {what}"
    lines = [title, "", *kernel_lines(record["kernels"])]
    if record["memory"] is not None:
        lines += ["", *memory_lines(record["memory"])]
    return "\n".join(lines) + "\n"


def kernel_lines(rows: Sequence[Mapping[str, Any]], width: int = 0) -> list[str]:
    """Returns the lines of a table of kernels.

    Args:
        rows: with `share`, `seconds`, `mean_seconds`, `calls`, `kind` and `name`.
        width: longest name that is shown whole; 0: all are.
    """
    lines = [f"{'share':>6} {'total':>10} {'mean':>10} {'calls':>8}  {'kind':<14} name"]
    for row in rows:
        total, mean = format_seconds(row["seconds"]), format_seconds(row["mean_seconds"])
        name = row["name"] if not width or len(row["name"]) <= width else row["name"][: width - 3] + "..."
        lines.append(f"{row['share']:>6.1%} {total:>10} {mean:>10} {row['calls']:>8}  {row['kind']:<14} {name}")
    return lines


def memory_lines(memory: Mapping[str, Any], num_rows: int | None = None) -> list[str]:
    """Returns the peak of the memory and what held it, in lines."""
    peak, before = format_bytes(memory["peak_bytes"]), format_bytes(memory["before_bytes"])
    where = f" in {memory['place']} of step {memory['step']}" if memory["place"] is not None else ""
    if memory["of"] == "gpu":
        peak += f"{where}, {before} of it from before these steps"
    else:
        peak += f" more than before these steps{',' if where else ''}{where}"
    lines = [f"peak {peak}; allocated since and held then:"]
    for row in memory["held_by"][:num_rows]:
        size = format_bytes(row["bytes"])
        lines.append(f"{size:>12} {row['allocations']:>6} x  {row['operator']}, in {row['place']}")
    return lines


def format_seconds(seconds: float) -> str:
    """Returns a duration as a person reads it, such as `1.25 s`, `12.5 ms` or `3.1 us`."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
