"""From the command to the end of the first step, against a bare torchrun script with the same imports.

`python -m benchmarks.startup --json FILE` starts, in turn, `python -m launch local` on the digits and torchrun on
`benchmarks/bare_script.py`, which does what a person would write by hand: the same packages, model, data and batch,
Accelerate's `prepare`, one step. Both say when their first step is done. Ours also reads and checks the config, makes
the run folder, writes logs, connects the watch of each rank and saves the environment.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.telling import describe, publish, with_origin

REPOSITORY = Path(__file__).resolve().parent.parent
_BARE = Path(__file__).with_name("bare_script.py")
_FIRST_STEP = "step 1/"  # which both print
_TIMEOUT = 300


def seconds_to_first_step(command: Sequence[str], cwd: Path) -> tuple[float, float]:
    """Returns when a job said that its first step is done, and when it had ended, in seconds from the command."""
    variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    began = time.perf_counter()
    first: float | None = None
    with subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if first is None and _FIRST_STEP in line:
                first = time.perf_counter() - began
        assert process.stderr is not None
        said = process.stderr.read()
    if first is None or process.wait(_TIMEOUT) != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} and no step:\n{said}")
    return first, time.perf_counter() - began


def commands(processes: int, run_dir: Path) -> dict[str, list[str]]:
    """Returns both jobs by name."""
    ours = [sys.executable, "-m", "launch", "local", "--config", str(REPOSITORY / "configs" / "digits.yaml")]
    ours += ["--processes", str(processes), f"run.dir={run_dir}", "train={steps: 2, epochs: null, batch_size: 96}"]
    ours += ["schedule.warmup=0", "log.every=1", "eval.every=1000", "checkpoint.every=1000", "tracking.trackers=[]"]
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", str(processes)]
    return {"lockstep": ours, "bare": [*torchrun, str(_BARE)]}


def measure(processes: int, rounds: int) -> dict[str, Any]:
    """Runs both in turn; one round beforehand fills the system's caches."""
    seconds: dict[str, list[float]] = {"lockstep": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            both = commands(processes, Path(folder, str(number)))
            for name in sorted(both, reverse=bool(number % 2)):
                first, _ = seconds_to_first_step(both[name], Path(folder))
                if number:
                    seconds[name].append(round(first, 3))
                sys.stderr.write(f"{'warm-up' if not number else f'round {number}'}: {name} {first:.2f} s\n")
    ratios = [ours / theirs for ours, theirs in zip(seconds["lockstep"], seconds["bare"], strict=True)]
    return {
        "processes": processes,
        "seconds": seconds,
        "median": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def table(result: Mapping[str, Any]) -> str:
    """Returns the result as a Markdown table."""
    lines = ["| | seconds to the first step, median | least and most |", "|---|---|---|"]
    names = {"lockstep": "`python -m launch local`", "bare": "bare torchrun script"}
    for name, shown in names.items():
        values = result["seconds"][name]
        lines.append(f"| {shown} | {result['median'][name]:.2f} | {min(values):.2f}, {max(values):.2f} |")
    lines.append(
        f"| ratio, median of {len(result['ratios'])} rounds | {result['ratio']:.2f} | "
        f"{min(result['ratios']):.2f}, {max(result['ratios']):.2f} |"
    )
    return with_origin(lines, f"{result['processes']} processes", result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, shows the table and writes the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    result = {**describe("benchmarks.startup", arguments, ["accelerate"]), **measure(options.processes, options.rounds)}
    publish(result, table, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
