"""JPEG folder -> augmented 224x224 batches: pictures per second and core, ours against our peers' in the same run.

    python -m benchmarks.feed --json benchmarks/results/feed-cpu.json

Owns the rounds, the JSON that comes of them and its table. In every round each entry is measured once, in a fresh
process and in random order, so that a machine that slows down slows all of them. What they are is
`benchmarks.feed_entries`, what a measurement is `benchmarks.measure`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.commands import add_rounds, new_parser, show_again
from benchmarks.drawing import Bar, draw_bars
from benchmarks.feed_entries import Entry
from benchmarks.measure import ENTRIES, EXIT_NOT_INSTALLED, Measurement
from benchmarks.pictures import DEFAULT_FOLDER, SHAPES, describe_pictures, list_pictures, make_pictures
from benchmarks.rounds import MOST_FOREIGN_CORES, Problem, in_rounds, is_quiet, load_note
from benchmarks.telling import REPOSITORY, describe, goal_text, markdown_table, origin, publish, range_text, spread

BATCH_SIZE = 64
WARM_UP_IMAGES = 200
TIMEOUT = 900  # seconds, of one measurement

GOALS = (
    ("ours", "torchvision", 2.4),
    ("ours", "torchvision", 3.0),  # beyond what was asked for
    ("ours", "dali", 1.4),
    ("ours-packed-jpeg", "torchvision", 5.0),  # as the cache's defaults are
    ("ours-packed-jpeg-256", "torchvision", 5.0),
    ("ours-packed-raw", "torchvision", 5.0),
)
_YARDSTICKS = ("torchvision", "dali")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def run_rounds(
    names: Sequence[str], folder: Path, images: int, rounds: int, seed: int
) -> tuple[dict[str, list[Measurement]], dict[str, Problem]]:
    """Measures every entry once a round; one that fails is left out from then on.

    Returns:
        The measurements by entry, and why entries were left out.
    """
    taken: dict[str, list[Measurement]] = {name: [] for name in names}
    problems: dict[str, Problem] = {}
    for file in list_pictures(folder):
        file.read_bytes()  # so that all find them in the page cache
    remaining = list(names)
    for number, name in in_rounds(remaining, rounds, seed):
        try:
            measurement = measure_apart(ENTRIES[name], folder, images, seed + number)
        except Problem as problem:
            problems[name] = problem
            remaining.remove(name)
            sys.stderr.write(f"round {number + 1}: {name}: {problem}\n")
            continue
        taken[name].append(measurement)
        sys.stderr.write(
            f"round {number + 1}: {name}: {measurement.images_per_core_second:.0f} images/s/core, "
            f"others kept {measurement.foreign_cores:.2f} cores busy\n"
        )
    return taken, problems


def measure_apart(entry: Entry, folder: Path, images: int, seed: int) -> Measurement:
    """Measures an entry in a process of its own.

    Raises:
        Problem: its library is not installed, or it failed.
    """
    command = [sys.executable, "-m", "benchmarks.measure", entry.name, str(folder), "--images", str(images)]
    command += ["--warm-up", str(min(WARM_UP_IMAGES, images)), "--batch-size", str(min(BATCH_SIZE, images))]
    with entry.variables() as variables:
        try:
            ended = subprocess.run(
                [*command, "--seed", str(seed)],
                cwd=REPOSITORY,
                env={**os.environ, **_ONE_THREAD, **variables},
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Problem(f"not done after {TIMEOUT} s", is_absence=False) from None
    if ended.returncode:
        last_line = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        raise Problem(last_line, is_absence=ended.returncode == EXIT_NOT_INSTALLED)
    return Measurement(**json.loads(ended.stdout.strip().splitlines()[-1]))


def summarize(entry: Entry, taken: Sequence[Measurement], problem: Problem | None, keep_loaded: bool) -> dict[str, Any]:
    """Returns what the JSON says about an entry, apart from its ratios to others."""
    quiet = [m for m in taken if is_quiet(m, keep_loaded)]
    return {
        "name": entry.name,
        "kind": entry.kind,
        "output": entry.output,
        "versions": entry.versions(),
        "images_per_core_second": spread([m.images_per_core_second for m in quiet]),
        "images_per_second": spread([m.images_per_second for m in quiet]),
        "dropped_rounds": len(taken) - len(quiet),
        "problem": str(problem) if problem else None,
        "rounds": [
            {
                **asdict(m),
                "images_per_core_second": m.images_per_core_second,
                "images_per_second": m.images_per_second,
                "kept": m in quiet,
            }
            for m in taken
        ],
    }


def add_ratios(entries: Iterable[dict[str, Any]]) -> None:
    """Adds to every entry the ratio of its median to that of each yardstick, where both were measured."""
    entries = list(entries)
    medians = {e["name"]: e["images_per_core_second"]["median"] for e in entries if e["images_per_core_second"]}
    for entry in entries:
        entry["ratios"] = {
            yardstick: medians[entry["name"]] / medians[yardstick]
            for yardstick in _YARDSTICKS
            if entry["name"] in medians and yardstick in medians
        }


def goals(entries: Iterable[Mapping[str, Any]]) -> str:
    """Returns what has become of those of `GOALS` that were measured, a line each."""
    ratios = {(entry["name"], theirs): ratio for entry in entries for theirs, ratio in entry["ratios"].items()}
    measured = [(ours, theirs, least) for ours, theirs, least in GOALS if (ours, theirs) in ratios]
    return "".join(goal_text(f"{ours} to {theirs}", ratios[ours, theirs], least) for ours, theirs, least in measured)


def table(result: Mapping[str, Any]) -> str:
    """Returns the Markdown table of a result, with a line about what it was measured on."""
    settings = result["settings"]
    yardsticks = [y for y in _YARDSTICKS if any(y in entry["ratios"] for entry in result["entries"])]
    header = ["", "delivers", "images/s/core", "min to max", *(f"to `{y}`" for y in yardsticks), "version"]
    rows = [header, ["---", "---", "---:", "---:", *("---:" for _ in yardsticks), "---"]]
    for entry in result["entries"]:
        rate = entry["images_per_core_second"]
        if rate is None:
            reason = entry["problem"] or "no quiet round"
            rows.append([f"`{entry['name']}`", entry["output"], "-", reason, *("" for _ in yardsticks), ""])
            continue
        ratios = [f"{entry['ratios'][y]:.2f}" if y in entry["ratios"] else "" for y in yardsticks]
        versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
        rows.append(
            [f"`{entry['name']}`", entry["output"], f"{rate['median']:.0f}", range_text(rate, 0), *ratios, versions]
        )
    pictures = result["pictures"]
    notes = [
        f"{pictures['pictures']} JPEGs of {', '.join(pictures['pixels'])} pixels in the page cache",
        f"{pictures['mean_bytes'] / 1000:.0f} kB on average, {100 * pictures['share_420']:.0f}% of them 4:2:0",
        f"one decoding worker or thread, batches of {settings['batch_size']}",
        f"median of {settings['rounds']} alternating rounds of {settings['images']} images",
        load_note(result["entries"], settings["keep_loaded"]),
        *origin(result),
    ]
    told = goals(result["entries"])
    return markdown_table(rows, notes) + (f"\n{told}" if told else "")


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Draws images per second and core.

    Raises:
        ImportError: matplotlib is not installed.
    """
    shown = [entry for entry in result["entries"] if entry["images_per_core_second"]]
    bars = [Bar(e["name"], e["images_per_core_second"], ours=e["kind"] == "ours") for e in shown]
    draw_bars({"": bars}, "images per second and core (median, min to max)", file)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("benchmarks.feed", __doc__)
    add_rounds(parser, rounds=5)
    parser.add_argument("--images", type=int, default=2000, help="JPEGs in the folder, and images counted per round")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=ENTRIES, help=f"of: {', '.join(ENTRIES)}")
    parser.add_argument("--size", choices=SHAPES, default="imagenet", help="large: 1600x1200 pixels")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the JPEGs are kept")
    options = parser.parse_args(arguments)
    if options.images < 1:
        parser.error("--images must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where an entry failed for another reason than a missing library."""
    options = _arguments(arguments)
    if options.markdown:
        return show_again(options.json, table)
    names = [name for name in ENTRIES if options.only is None or name in options.only]
    environment = describe("benchmarks.feed", arguments, device_type="cpu")
    folder = make_pictures(options.images, options.size, options.folder)
    taken, problems = run_rounds(names, folder, options.images, options.rounds, options.seed)
    entries = [summarize(ENTRIES[n], taken[n], problems.get(n), options.keep_loaded) for n in names]
    add_ratios(entries)
    result = {
        "environment": environment,
        "settings": {
            "images": options.images,
            "rounds": options.rounds,
            "batch_size": min(BATCH_SIZE, options.images),
            "warm_up_images": min(WARM_UP_IMAGES, options.images),
            "most_foreign_cores": MOST_FOREIGN_CORES,
            "keep_loaded": options.keep_loaded,
            "seed": options.seed,
            "size": options.size,
            "threads_per_process": 1,
        },
        "pictures": describe_pictures(folder),
        "dropped_rounds": sum(entry["dropped_rounds"] for entry in entries),
        "entries": entries,
    }
    publish(result, table, options.json)
    return int(any(not problem.is_absence for problem in problems.values()))


if __name__ == "__main__":
    sys.exit(main())
