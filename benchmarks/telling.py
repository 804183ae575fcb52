"""What small benchmarks tell besides their figures: command, machine and versions, under the table and in the JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def describe(module: str, arguments: Sequence[str] | None, packages: Sequence[str]) -> dict[str, Any]:
    """Returns what was run, on what, and with which versions.

    Args:
        module: the benchmark, such as `benchmarks.startup`.
        arguments: of its command line; None for those of this process.
        packages: whose versions matter, besides Python and torch.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": f"python -m {module} {' '.join(sys.argv[1:] if arguments is None else arguments)}",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, {gpu}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: metadata.version(package) for package in packages},
        },
    }


def with_origin(lines: Sequence[str], what: str, result: Mapping[str, Any]) -> str:
    """Returns the lines of a table, and under them what was measured and what `describe` knows."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(lines) + f"\n\n{what}; {result['hardware']}; {versions}; `{result['command']}`.\n"


def publish(result: Mapping[str, Any], table: Callable[[Mapping[str, Any]], str], file: Path | None) -> None:
    """Shows the table, and writes the figures where that is asked for."""
    sys.stdout.write(table(result))
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")
