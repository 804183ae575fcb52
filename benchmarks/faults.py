"""Every kind of fault once, and what it costs: the suite of faults, run for its figures.

`python -m benchmarks.faults --json FILE` runs `tests/dist/test_faults_dist.py` and keeps what each case measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_SUITE = Path(__file__).resolve().parent.parent / "tests" / "dist" / "test_faults_dist.py"


def table(result: Mapping[str, Any]) -> str:
    """Returns the result as a Markdown table."""
    lines = ["| fault | ranks | exit code | seconds | lost |", "|---|---|---|---|---|"]
    for case in result["cases"]:
        seconds = "goes on" if case["seconds"] is None else f"{case['seconds']:.1f}"
        lines.append(f"| {case['name']} | {case['ranks']} | {case['code']} | {seconds} | {case['lost']} |")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(lines) + f"\n\n{result['hardware']}; {versions}; `{result['command']}`.\n"


def chaos_table(result: Mapping[str, Any]) -> str:
    """Returns what `python -m launch chaos --json FILE` wrote as a Markdown table."""
    lines = [
        "| fault | times | seconds until it trains again, mean and most | steps made again, mean and most |",
        "|---|---|---|---|",
    ]
    for action, sums in result["by_action"].items():
        mean, most = sums["back_after_mean"], sums["back_after_max"]
        back = "-" if mean is None else f"{mean:.1f}, {most:.1f}"
        again = f"{sums['steps_again_mean']:.0f}, {sums['steps_again_max']:.0f}"
        lines.append(f"| {action} | {sums['count']} | {back} | {again} |")
    runs = result["runs"]
    for name, run in (("under faults", runs["chaos"]), ("in peace", runs["quiet"])):
        lines.append(f"| goodput {name} | | {run['goodput']:.1%} in {run['num_attempts']} attempts | |")
    lines.append(f"| the same at step {result['step']:,}, bit for bit | | {'yes' if result['same'] else 'NO'} | |")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(lines) + (
        f"\n\n{result['minutes']:.0f} minutes on {result['processes']} ranks; {result['hardware']}, no GPU; "
        f"{versions}; "
        f"`{result['command']}`.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of the suite: 0 where every case is as it must be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    file = options.json.resolve()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(_SUITE)],
        env={**os.environ, "LOCKSTEP_FAULTS_JSON": str(file)},
        cwd=_SUITE.parent.parent.parent,
        check=False,
    )
    result = {
        "command": f"python -m benchmarks.faults {' '.join(sys.argv[1:] if arguments is None else arguments)}",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **json.loads(file.read_text()),
    }
    file.write_text(json.dumps(result, indent=2) + "\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
