"""`python -m benchmarks --suite cpu`: every benchmark of a suite, one after the other, each in a fresh process.

Owns the order, the progress and what is said of those that fail or lack something; the others go on. What there is to
run is `benchmarks.registry`; docs/ is made of the results by `python -m benchmarks.document`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.registry import BENCHMARKS, RESULTS, SCRATCH, SUITES, Benchmark, Result
from benchmarks.telling import REPOSITORY, write

TIMEOUT = 4 * 3600  # seconds, of one benchmark
# What entries are told apart by.
_LABELS = ("model", "name", "workload", "policy", "switch", "value", "feed", "loop", "entry", "mode")


def missing(benchmark: Benchmark) -> list[str]:
    """Returns what of a benchmark is not installed: packages, or its own module."""
    return [name for name in (benchmark.module, *benchmark.needs) if importlib.util.find_spec(name) is None]


def command(result: Result, file: Path, scratch: Path, is_quick: bool) -> list[str]:
    """Returns the command of a benchmark; in its result it stands as anybody would type it, from the repository."""
    benchmark = result.benchmark
    given = [str(scratch) if argument == SCRATCH else argument for argument in benchmark.suites[result.suite]]
    shown = file.relative_to(REPOSITORY) if file.is_relative_to(REPOSITORY) else file
    quick = benchmark.quick if is_quick else ()
    return [sys.executable, "-m", benchmark.module, *given, *quick, "--json", str(shown)]


def run(result: Result, file: Path, is_quick: bool) -> list[str]:
    """Runs a benchmark to its end, and returns what went wrong, line by line; entries that it left out are among it."""
    lacks = missing(result.benchmark)
    if lacks:
        return [f"not installed: {', '.join(lacks)}"]
    before = file.stat().st_mtime_ns if file.exists() else None
    variables = {} if result.hardware == "gpu" else {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="lockstep-", ignore_cleanup_errors=True) as folder:
        log, scratch = Path(folder) / "log.txt", Path(folder) / "scratch"
        code = _run_through(command(result, file, scratch, is_quick), variables, log)
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
    if not file.exists() or file.stat().st_mtime_ns == before:
        return [f"exit code {code}, and no result: {said[-1]}"]
    figures = json.loads(file.read_text(encoding="utf-8"))
    if is_quick:
        write({"quick": True, **figures}, file)
    problems = [f"{label}: {problem}" for label, problem in left_out(figures)]
    if code and not problems:
        problems.append(f"exit code {code}: {said[-1]}")
    return problems


def left_out(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields label and reason of each entry that could not be measured, though this machine should have it."""
    for entry in figures.get("entries", []):
        if isinstance(entry, dict) and entry.get("problem") and not entry.get("is_left_out"):
            yield " ".join(str(entry[key]) for key in _LABELS if entry.get(key)), str(entry["problem"])


def _run_through(command: Sequence[str], variables: dict[str, str], log: Path) -> int | None:
    """Runs a command, and shows what it says as it comes; returns its exit code, or None where it took too long."""
    with open(log, "wb") as written, open(log, encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **variables},
            stdout=subprocess.DEVNULL,
            stderr=written,
            start_new_session=True,  # so that all of it can be ended
        )
        deadline = time.monotonic() + TIMEOUT
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
                sys.stderr.write(said.read())
            sys.stderr.write(said.read())
            return process.poll()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    suites = "; ".join(f"{name}: {what}" for name, what in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0], epilog=f"suites: {suites}"
    )
    parser.add_argument("--suite", choices=list(SUITES), required=True)
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FOLDER",
        help="for a JSON file per benchmark (default: benchmarks/results; a temporary folder with --quick)",
    )
    parser.add_argument("--only", metavar="A,B", help="some of: " + ", ".join(b.name for b in BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether everything works on this machine")
    options = parser.parse_args(arguments)
    names = [b.name for b in BENCHMARKS if options.suite in b.suites]
    options.only = names if options.only is None else options.only.replace("_", "-").split(",")
    for name in options.only:
        if name not in names:
            parser.error(f"{name} is not in the suite {options.suite}, which has: {', '.join(names)}")
    if options.json is None:
        options.json = Path(tempfile.mkdtemp(prefix="lockstep-benchmarks-")) if options.quick else RESULTS
    if options.quick and options.json.resolve() == RESULTS:
        parser.error("--quick must not write over measured results: give another --json")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 without a GPU for its suite, 1 where anything failed or was left out."""
    options = _arguments(arguments)
    if options.suite == "gpu":
        import torch

        if not torch.cuda.is_available():
            sys.stderr.write("there is no CUDA GPU here; --suite cpu needs none\n")
            return 2
    chosen = [b.results[options.suite] for b in BENCHMARKS if options.suite in b.suites and b.name in options.only]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended, too
    try:
        problems = run_all(chosen, options.json.resolve(), options.quick)
    finally:
        signal.signal(signal.SIGTERM, before)
    for name, lines in problems.items():
        for line in lines:
            sys.stdout.write(f"{name}: {line}\n")
    return int(any(problems.values()))


def run_all(chosen: Sequence[Result], folder: Path, is_quick: bool) -> dict[str, list[str]]:
    """Runs one after the other, tells of each, and returns what went wrong, by benchmark."""
    folder.mkdir(parents=True, exist_ok=True)
    problems: dict[str, list[str]] = {}
    for number, result in enumerate(chosen, start=1):
        name, file = result.benchmark.name, folder / f"{result.stem}.json"
        sys.stdout.write(f"[{number}/{len(chosen)}] {name}: {result.benchmark.measures}\n")
        sys.stdout.flush()
        began = time.monotonic()
        problems[name] = run(result, file, is_quick)
        how = f"{len(problems[name])} problems" if problems[name] else "done"
        sys.stdout.write(f"[{number}/{len(chosen)}] {name}: {how} after {time.monotonic() - began:.0f} s, {file}\n")
    return problems


if __name__ == "__main__":
    sys.exit(main())
