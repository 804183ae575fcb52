"""What every benchmark tells besides its figures: where they come from, how far they spread, how a table looks.

Owns the environment that is written to the JSON, the line of origin under every table, and the JSON file itself.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS_FOLDER = "benchmarks/results"  # what a suite leaves there changes nothing that is measured after it


def describe(
    module: str, arguments: Sequence[str] | None = None, packages: Sequence[str] = (), device_type: str | None = None
) -> dict[str, Any]:
    """Returns what was run, on what, from what source and with which versions: the `environment` of a result.

    To be called before anything is measured: a commit made meanwhile is not what was measured.

    Args:
        module: the benchmark, such as `benchmarks.startup`.
        arguments: of its command line; None for those of this process.
        packages: whose versions matter, besides Python and torch; one that is not installed is left out.
        device_type: `cuda` where the GPU took part, `cpu` where it did not; None: it did where there is one.
    """
    import torch

    on_gpu = torch.cuda.is_available() if device_type is None else device_type == "cuda"
    properties = torch.cuda.get_device_properties(0) if on_gpu else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", ".", f":(exclude){RESULTS_FOLDER}")),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions(["torch", *packages]),
        "gpu": properties and {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)},
        "gpus": torch.cuda.device_count() if on_gpu else 0,
        "cuda": torch.version.cuda if on_gpu else None,
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Returns the installed versions of packages, without those that are missing."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def origin(result: Mapping[str, Any]) -> list[str]:
    """Returns what a table says of the machine, the versions, the source and the command.

    Args:
        result: with an `environment` of `describe`, or as `python -m launch chaos` writes it and the first benchmarks
            did: `hardware`, `versions` and `command` beside the figures.
    """
    told = result.get("environment", result)
    if "hardware" in told:
        package_versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
        return [told["hardware"], package_versions, f"`{told['command']}`"]
    gpu = told.get("gpu")
    count = f"{told['gpus']} x " if gpu and told.get("gpus", 1) > 1 else ""
    packages = {"Python": told["python"], **told.get("packages", {})}
    return [
        *([f"{count}{gpu['name']} ({gpu['memory_gib']} GiB), CUDA {told['cuda']}"] if gpu else []),
        f"{told['cpu']}, {told['cores']} cores" + ("" if gpu else ", no GPU"),
        ", ".join(f"{name} {version}" for name, version in packages.items()),
        f"{told['date'][:10]}, commit {(told['commit'] or 'unknown')[:10]}"
        + (" with uncommitted changes" if told.get("uncommitted_changes") else ""),
        f"`{told['command']}`",
    ]


def markdown_table(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Returns a Markdown table, and under it its notes as one sentence.

    Args:
        rows: of cells; the first is the head, the second says how columns are aligned.
        notes: what the figures are, and `origin`.
    """
    return "\n".join([*("| " + " | ".join(row) + " |" for row in rows), "", "; ".join(notes) + "."]) + "\n"


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Returns median, least and most; None where there are none."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def goal_text(what: str, ratio: float | None, least: float | None = None, most: float | None = None) -> str:
    """Returns the line of a ratio that must not be smaller than `least`, or not larger than `most`."""
    if ratio is None:
        return f"- {what}: not measured\n"
    is_met = (least is None or ratio >= least) and (most is None or ratio <= most)
    bar = f"at most {most:g}" if least is None else f"at least {least:g}"
    return f"- {what}: {ratio:.3f}, {bar}: {'met' if is_met else 'NOT MET'}\n"


def range_text(found: Mapping[str, float], digits: int) -> str:
    """Returns the least and the most of a `spread` as a cell."""
    return f"{found['min']:.{digits}f} to {found['max']:.{digits}f}"


def write(result: Mapping[str, Any], file: Path) -> None:
    """Writes a result, or what is known of it so far."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def publish(result: Mapping[str, Any], table: Callable[[Mapping[str, Any]], str], file: Path | None) -> None:
    """Shows the table, and writes the figures where that is asked for."""
    sys.stdout.write(table(result))
    if file is not None:
        write(result, file)


def _git(*arguments: str) -> str | None:
    try:
        ended = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
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
