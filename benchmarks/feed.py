"""JPEG folder -> augmented 224x224 batches: pictures per second and core, ours against our peers' in the same run.

    python -m benchmarks.feed --json benchmarks/results/feed-cpu.json

Owns the rounds, the JSON that comes of them and its table. In every round each entry is measured once, in a fresh
process and in random order, so that a machine that slows down slows all of them. What they are is `benchmarks.peers`,
what a measurement is `benchmarks.measure`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import EXIT_NOT_INSTALLED, Measurement
from benchmarks.peers import ENTRIES, Entry
from benchmarks.pictures import DEFAULT_FOLDER, SHAPES, describe, list_pictures, make_pictures

BATCH_SIZE = 64
WARM_UP_IMAGES = 200
MOST_FOREIGN_CORES = 0.15  # that others may keep busy on average; rounds with more are dropped
TIMEOUT = 900  # seconds, of one measurement

_REPOSITORY = Path(__file__).resolve().parent.parent
_YARDSTICKS = ("torchvision", "dali")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class Problem(Exception):
    """Why an entry could not be measured; `is_absence` where its library is merely not installed."""

    def __init__(self, message: str, is_absence: bool) -> None:
        super().__init__(message)
        self.is_absence = is_absence


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
    for number in range(rounds):
        order = [name for name in names if name not in problems]
        random.Random(seed + number).shuffle(order)
        for name in order:
            try:
                measurement = measure_apart(ENTRIES[name], folder, images, seed + number)
            except Problem as problem:
                problems[name] = problem
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
                cwd=_REPOSITORY,
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
    quiet = [m for m in taken if keep_loaded or m.foreign_cores <= MOST_FOREIGN_CORES]
    return {
        "name": entry.name,
        "kind": entry.kind,
        "output": entry.output,
        "versions": entry.versions(),
        "images_per_core_second": _spread([m.images_per_core_second for m in quiet]),
        "images_per_second": _spread([m.images_per_second for m in quiet]),
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


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


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


def describe_environment() -> dict[str, Any]:
    """Returns on what and from what source the benchmark ran."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.feed", *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str | None:
    try:
        ended = subprocess.run(
            ["git", *arguments], cwd=_REPOSITORY, capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def table(result: dict[str, Any]) -> str:
    """Returns the Markdown table of a result, with a line about what it was measured on."""
    environment, settings = result["environment"], result["settings"]
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
        spread = f"{rate['min']:.0f} to {rate['max']:.0f}"
        rows.append([f"`{entry['name']}`", entry["output"], f"{rate['median']:.0f}", spread, *ratios, versions])
    dropped = sum(entry["dropped_rounds"] for entry in result["entries"])
    measured = sum(len(entry["rounds"]) for entry in result["entries"])
    pictures = result["pictures"]
    loaded = "kept whatever else ran" if settings["keep_loaded"] else f"{dropped} of {measured} dropped for other load"
    notes = [
        f"{pictures['pictures']} JPEGs of {', '.join(pictures['pixels'])} pixels in the page cache",
        f"{pictures['mean_bytes'] / 1000:.0f} kB on average, {100 * pictures['share_420']:.0f}% of them 4:2:0",
        f"one decoding worker or thread, batches of {settings['batch_size']}",
        f"median of {settings['rounds']} alternating rounds of {settings['images']} images (measurements: {loaded})",
        f"{environment['cpu']}, {environment['cores']} cores; Python {environment['python']}",
        f"{environment['date'][:10]}, commit {(environment['commit'] or 'unknown')[:10]}",
    ]
    return "\n".join([*("| " + " | ".join(row) + " |" for row in rows), "", "; ".join(notes) + "."]) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the result goes; read with --markdown")
    parser.add_argument("--markdown", action="store_true", help="measure nothing: print the table of --json")
    parser.add_argument("--images", type=int, default=2000, help="JPEGs in the folder, and images counted per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=ENTRIES, help=f"of: {', '.join(ENTRIES)}")
    parser.add_argument("--size", choices=SHAPES, default="imagenet", help="large: 1600x1200 pixels")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the JPEGs are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-loaded", action="store_true", help="keep rounds in which others used the machine too")
    arguments = parser.parse_args()
    if arguments.images < 1 or arguments.rounds < 1:
        parser.error("--images and --rounds must be at least 1")
    return arguments


def _show_progress(made: int) -> None:
    if made % 500 == 0:
        sys.stderr.write(f"{made} pictures made\n")


def main() -> int:
    """Returns the exit code: 1 where an entry failed for another reason than a missing library."""
    arguments = _arguments()
    if arguments.markdown:
        sys.stdout.write(table(json.loads(arguments.json.read_text(encoding="utf-8"))))
        return 0
    names = [name for name in ENTRIES if arguments.only is None or name in arguments.only]
    environment = describe_environment()  # before: a commit made meanwhile is not what was measured
    folder = make_pictures(arguments.images, arguments.size, arguments.folder, progress=_show_progress)
    taken, problems = run_rounds(names, folder, arguments.images, arguments.rounds, arguments.seed)
    entries = [summarize(ENTRIES[n], taken[n], problems.get(n), arguments.keep_loaded) for n in names]
    add_ratios(entries)
    result = {
        "environment": environment,
        "settings": {
            "images": arguments.images,
            "rounds": arguments.rounds,
            "batch_size": min(BATCH_SIZE, arguments.images),
            "warm_up_images": min(WARM_UP_IMAGES, arguments.images),
            "most_foreign_cores": MOST_FOREIGN_CORES,
            "keep_loaded": arguments.keep_loaded,
            "seed": arguments.seed,
            "size": arguments.size,
            "threads_per_process": 1,
        },
        "pictures": describe(folder),
        "dropped_rounds": sum(entry["dropped_rounds"] for entry in entries),
        "entries": entries,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(table(result))
    return int(any(not problem.is_absence for problem in problems.values()))


if __name__ == "__main__":
    sys.exit(main())
