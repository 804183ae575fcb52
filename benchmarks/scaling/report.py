"""The tables and the plot of a result of `python -m benchmarks.scaling`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.telling import markdown_table, origin, range_text
from trainer.units import format_bytes

Result = Mapping[str, Any]
Rows = list[list[str]]


def table(result: Result) -> str:
    """Returns all tables as Markdown, each under its title; a part that did not run has none."""
    parts = result["parts"]
    made = [f"**{title}**\n\n{maker(parts[part])}" for title, (part, maker) in _TABLES.items() if part in parts]
    return "\n".join(made)


def _markdown(head: Sequence[str], rows: Rows, notes: Sequence[str]) -> str:
    return markdown_table([head, ["---", *["---:"] * (len(head) - 1)], *rows], notes)


def _scaled(part: Result) -> str:
    notes = ["each GPU has as many samples in a step however many GPUs there are", *origin(part)]
    return _markdown(_HEAD, [_row(entry) for entry in part["scaled"]], notes)


def _recipes(part: Result) -> str:
    notes = [
        "the batch of the recipe, shared among all GPUs as far as it splits",
        f"left out is where a GPU would have fewer than {part['settings']['least_micro_batch']} samples: launches of "
        "kernels, which the model lacks, would decide",
        *origin(part),
    ]
    return _markdown(_HEAD, [[row[0].rpartition(", ")[0], *row[1:]] for row in map(_row, part["recipes"])], notes)


_HEAD = (
    "job",
    "GPUs",
    "batch",
    "compute, ms",
    "exposed, ms",
    "slowest, ms",
    "efficiency",
    "best interval, s",
    "goodput",
    "goodput, hourly",
    "overall",
)


def _row(entry: Mapping[str, Any]) -> list[str]:
    return [
        entry["job"],
        f"{entry['num_ranks']:,}",
        f"{entry['batch_size']:,}",
        *(f"{1000 * entry[key]:.1f}" for key in ("compute", "exposed", "slowest")),
        f"{entry['efficiency']:.1%}",
        f"{entry['interval']:,.0f}",
        *(f"{entry[key]:.1%}" for key in ("goodput", "goodput_hourly", "overall")),
    ]


def _sensitivity(part: Result) -> str:
    found = part["sensitivity"]
    names = [key for key in found["rows"][0] if key != "change"]
    rows = [[row["change"], *(f"{row[name]:.1%}" for name in names)] for row in found["rows"]]
    notes = [f"overall on {found['gpus']:,} GPUs, with one constant changed and the interval that then is best"]
    return _markdown(["", *names], rows, notes)


def _constants(part: Result) -> str:
    rows = [[known["name"], known["shown"], known["kind"], known["source"]] for known in part["constants"]]
    head = ["constant", "value", "how known", "source"]
    return markdown_table([head, ["---"] * 4, *rows], ["nothing was measured on a GPU"])


def _check(part: Result) -> str:
    setup = part["settings"]["setup"]
    steps = setup["rounds"] * setup["num_steps"]
    notes = [
        f"{setup['model']}, {setup['batch_size']} images of {setup['image_size']} pixels a rank, one thread each",
        f"milliseconds, median of {steps} steps (least to most)",
        "exposed is decided by buckets and overlap on the clock, or by the CPU time of the exchange on the cores",
        *(f"{entry['name']}: not measured, {entry['problem']}" for entry in part["entries"] if "problem" in entry),
        *origin(part),
    ]
    head = ["ranks", "without exchange", "exposed", "decided by", "slowest", "predicted", "measured", "error"]
    return _markdown(head, [_checked(entry) for entry in part["entries"] if "problem" not in entry], notes)


def _checked(entry: Mapping[str, Any]) -> list[str]:
    predicted = entry["predicted"]
    ddp = {key: 1000 * entry["ddp"][key] for key in ("median", "min", "max")}
    return [
        entry["name"],
        f"{1000 * entry['alone']['median']:.0f}",
        f"{1000 * predicted['exposed']:.0f}",
        predicted["bound"] or "-",
        f"{1000 * predicted['slowest']:.0f}",
        f"{1000 * predicted['step']:.0f}",
        f"{ddp['median']:.0f} ({range_text(ddp, 0)})",
        f"{entry['error']:+.1%}",
    ]


def _simulated(part: Result) -> str:
    found = part["found"]
    numbers = sorted({entry["ranks"] for entries in found.values() for entry in entries})
    rows = []
    for key, name, shown in _SIMULATED:
        cells = {entry["ranks"]: shown(entry) for entry in found.get(key, [])}
        if cells:
            rows.append([name, *(cells.get(number, "-") for number in numbers)])
    notes = [
        "one process that is one of so many ranks; peak memory is of the whole process, torch included",
        "ViT-H/14 with AdamW and EMA, sharded over all ranks; 64 samples a rank",
        "-: not run",
        *origin(part),
    ]
    return _markdown(["", *(f"{number:,} ranks" for number in numbers)], rows, notes)


def _ms(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda entry: f"{1000 * entry[key]:.2f} ms"


def _s(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda entry: f"{entry[key]:.2f} s"


def _bytes(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda entry: format_bytes(entry[key])


def _count(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda entry: f"{entry[key]:,}"


_SIMULATED: tuple[tuple[str, str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("sampler", "sampler: samples of a step", _ms("step_seconds")),
    ("sampler", "sampler: elements computed for that", _count("elements")),
    ("sampler", "sampler: peak memory", _bytes("peak_bytes")),
    ("layout", "checkpoint: a rank lays out its file", _s("seconds")),
    ("layout", "checkpoint: parts in its file", _count("items")),
    ("layout", "checkpoint: what it tells rank 0", _bytes("told_bytes")),
    ("layout", "checkpoint: peak memory", _bytes("peak_bytes")),
    ("manifest", "parts of all ranks", _count("parts")),
    ("manifest", "rank 0: makes the layout of all, once", _s("layout_seconds")),
    ("manifest", "rank 0: manifest of the first save", _s("first_seconds")),
    ("manifest", "rank 0: manifest of each other save", _s("seconds")),
    ("manifest", "manifest", _bytes("bytes")),
    ("manifest", "- of it, what is said of tensors", _bytes("tensor_bytes")),
    ("manifest", "any rank: reads it and finds its parts, at a start", _s("read_seconds")),
    ("manifest", "any rank: parts to read", _count("parts_to_read")),
    ("manifest", "- in so many files; one more for all but rank 0", _count("files_to_read")),
    ("manifest", "rank 0: peak memory", _bytes("peak_bytes")),
    ("planner", "planner: a step under FSDP", _s("seconds")),
    ("planner", "planner: peak memory", _bytes("peak_bytes")),
    ("planner", "planner: predicted for a GPU", _bytes("predicted_bytes")),
)


_TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "Predicted, as many samples a GPU": ("estimate", _scaled),
    "Predicted, the batch of the recipe": ("estimate", _recipes),
    "What that depends on": ("estimate", _sensitivity),
    "Constants": ("estimate", _constants),
    "Predicted and measured": ("check", _check),
    "One rank of many": ("simulate", _simulated),
}


def plot(result: Result, file: Path) -> None:
    """Draws efficiency and overall speed of a GPU against the number of GPUs; a colour per job.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = importlib.import_module("matplotlib")
    figures = importlib.import_module("matplotlib.figure")
    matplotlib.rcParams["svg.hashsalt"] = "lockstep"  # the same file from the same figures
    scaled = result["parts"]["estimate"]["scaled"]
    figure = figures.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(entry["job"] for entry in scaled))
    for position, name in enumerate(names):
        entries = [entry for entry in scaled if entry["job"] == name]
        gpus = [entry["num_ranks"] for entry in entries]
        for key, style in (("efficiency", "--"), ("overall", "-")):
            values = [100 * entry[key] for entry in entries]
            axes.plot(gpus, values, style, marker="o", markersize=4, color=f"C{position}")
        axes.plot([], [], "-", color=f"C{position}", label=name)
    for key, style in (("while nothing fails", "--"), ("with failures and checkpoints", "-")):
        axes.plot([], [], style, color="0.4", label=key)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({entry["num_ranks"] for entry in scaled}))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("GPUs (predicted, not measured)")
    axes.set_ylabel("speed of a GPU, % of one by itself")
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize="small", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format=file.suffix[1:] or "svg", metadata={"Date": None} if file.suffix == ".svg" else None)
