"""From the command to the end of the first step, against a bare torchrun script with the same imports.

`python -m benchmarks.startup --json FILE` starts, in turn, `python -m launch local` on the digits and torchrun on
`benchmarks/bare_script.py`, which does what a person would write by hand: the same packages, model, data and batch,
Accelerate's `prepare`, one step. Both say when their first step is done. Ours also reads and checks the config, makes
the run folder, writes logs, connects the watch of each rank and saves the environment.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.commands import add_device, is_ready, new_parser, show_again
from benchmarks.drawing import Bar, draw_bars
from benchmarks.rounds import in_rounds
from benchmarks.telling import REPOSITORY, describe, markdown_table, origin, publish, range_text, spread

SHOWN = {"lockstep": "`python -m launch local`", "bare": "bare torchrun script"}
_BARE = Path(__file__).with_name("bare_script.py")
_FIRST_STEP = "step 1/"  # which both print
_TIMEOUT = 300


def seconds_to_first_step(command: Sequence[str], cwd: Path, on_gpu: bool) -> tuple[float, float]:
    """Returns when a job said that its first step is done, and when it had ended, in seconds from the command."""
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    if not on_gpu:
        variables["ACCELERATE_USE_CPU"] = "true"
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


def measure(processes: int, rounds: int, on_gpu: bool) -> dict[str, Any]:
    """Runs both in turn; one round beforehand fills the system's caches."""
    seconds: dict[str, list[float]] = {"lockstep": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in in_rounds(seconds, rounds + 1, seed=0):
            command = commands(processes, Path(folder, str(number)))[name]
            first, _ = seconds_to_first_step(command, Path(folder), on_gpu)
            if number:
                seconds[name].append(round(first, 3))
            sys.stderr.write(f"{f'round {number}' if number else 'warm-up'}: {name} {first:.2f} s\n")
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
    rows = [["", "seconds to the first step", "min to max"], ["---", "---:", "---:"]]
    for name, shown in SHOWN.items():
        rows.append([shown, f"{result['median'][name]:.2f}", range_text(_spread_of(result, name), 2)])
    ratios = {"min": min(result["ratios"]), "max": max(result["ratios"])}
    rows.append(["ratio within a round", f"{result['ratio']:.2f}", range_text(ratios, 2)])
    return markdown_table(
        rows, [f"{result['processes']} processes", f"median of {len(result['ratios'])} rounds", *origin(result)]
    )


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Draws the seconds to the first step.

    Raises:
        ImportError: matplotlib is not installed.
    """
    bars = [Bar(shown.strip("`"), _spread_of(result, name), name == "lockstep") for name, shown in SHOWN.items()]
    draw_bars({"": bars}, "seconds from the command to the end of the first step (median, min to max)", file)


def _spread_of(result: Mapping[str, Any], name: str) -> dict[str, float]:
    found = spread(result["seconds"][name])
    assert found is not None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, shows the table and writes the figures."""
    parser = new_parser("benchmarks.startup", __doc__)
    add_device(parser)
    parser.add_argument("--processes", type=int, metavar="N", help="default: 2 on a CPU, one per GPU")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    options = parser.parse_args(arguments)
    if options.markdown:
        return show_again(options.json, table)
    if not is_ready(options.device):
        return 2
    on_gpu = options.device == "cuda"
    processes = options.processes or (torch.cuda.device_count() if on_gpu else 2)
    environment = describe("benchmarks.startup", arguments, ["accelerate"], options.device)
    publish({"environment": environment, **measure(processes, options.rounds, on_gpu)}, table, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
