"""What a dead network costs a run that tracks online: steps per second, against the same run without trackers.

`python -m benchmarks.tracking --json FILE` trains a small model on the digits, in turn without a tracker, with W&B
online at a server that takes connections and never answers, and with W&B online at a server that dies once the first
history has come. The speed is that between two reports, by the clock in `metrics.jsonl`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.commands import new_parser, show_again
from benchmarks.drawing import Bar, draw_bars
from benchmarks.rounds import in_rounds
from benchmarks.telling import REPOSITORY, describe, markdown_table, origin, publish, range_text, spread

_SERVER = REPOSITORY / "tests" / "support" / "wandb_server.py"
_TIMEOUT = 300
_FIRST = 100  # step; before it all is warming up
CASES = {
    "none": "`tracking.trackers: []`",
    "silent": "W&B online, a server that never answers",
    "dies": "W&B online, a server that dies in the middle",
}


def command(case: str, run_dir: Path, steps: int) -> list[str]:
    """Returns the training of a case."""
    found = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(REPOSITORY / "configs" / "digits.yaml")]
    found += [f"run.dir={run_dir}", f"train={{steps: {steps}, epochs: null, batch_size: 96}}", "schedule.warmup=0"]
    found += ["model.args.width=8", "log.every=10", f"eval.every={steps}", f"checkpoint.every={steps}"]
    if case == "none":
        return [*found, "tracking.trackers=[]"]
    online = "tracking.wandb={mode: online, finish_timeout: 5 s}"
    init = "tracking.init={wandb: {settings: {x_file_stream_transmit_interval: 0.5}}}"  # it dies early
    return [*found, "tracking.trackers=[wandb]", online, init]


def steps_per_second(case: str, folder: Path, steps: int) -> float:
    """Runs a case and returns its speed after the first steps."""
    run_dir = folder / "run"
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HOME": str(folder)}
    with _server(case) as server:
        if server is not None:
            variables |= server.variables
        job = command(case, run_dir, steps)
        done = subprocess.run(
            job, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, timeout=_TIMEOUT
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(job)} ended with {done.returncode}:\n{done.stderr}")
        if case == "dies" and not server.stopped:
            raise RuntimeError("the server never died: no history came")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    reports = {record["step"]: record["time"] for record in records if "train/loss" in record}
    return float((steps - _FIRST) / (reports[steps] - reports[_FIRST]))


def _server(case: str) -> Any:
    if case == "none":
        return nullcontext()
    spec = importlib.util.spec_from_file_location("wandb_server", _SERVER)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["wandb_server"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WandbServer(silent=case == "silent", dies=case == "dies")


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """Runs all cases in rounds; one round beforehand fills the system's caches."""
    speeds: dict[str, list[float]] = {case: [] for case in CASES}
    for number, case in in_rounds(CASES, rounds + 1, seed=0):
        with tempfile.TemporaryDirectory() as folder:
            speed = steps_per_second(case, Path(folder), steps if number else _FIRST + 10)
        if number:
            speeds[case].append(round(speed, 2))
        sys.stderr.write(f"{f'round {number}' if number else 'warm-up'}: {case} {speed:.1f} steps/s\n")
    return {"steps": steps, **compared(speeds)}


def compared(speeds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Returns the speeds by case, their medians, and the ratios to those without trackers, round by round."""
    ratios = {
        case: [round(ours / theirs, 4) for ours, theirs in zip(speeds[case], speeds["none"], strict=True)]
        for case in CASES
        if case != "none"
    }
    return {
        "steps_per_second": speeds,
        "median": {case: round(statistics.median(values), 2) for case, values in speeds.items()},
        "ratios": ratios,
        "ratio": {case: round(statistics.median(values), 4) for case, values in ratios.items()},
    }


def table(result: Mapping[str, Any]) -> str:
    """Returns the result as a Markdown table."""
    rows = [["", "steps/s", "ratio", "min to max"], ["---", *["---:"] * 3]]
    for case, shown in CASES.items():
        row = [shown, f"{result['median'][case]:.1f}", "", ""]
        if case in result["ratio"]:
            ratios = result["ratios"][case]
            row[2:] = [f"{result['ratio'][case]:.3f}", range_text({"min": min(ratios), "max": max(ratios)}, 3)]
        rows.append(row)
    rounds = len(result["steps_per_second"]["none"])
    notes = [
        f"1 process, {result['steps']} steps, a report every 10",
        f"median of {rounds} rounds, ratios within rounds",
    ]
    return markdown_table(rows, [*notes, *origin(result)])


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Draws steps per second.

    Raises:
        ImportError: matplotlib is not installed.
    """
    spreads = {shown: spread(result["steps_per_second"][case]) for case, shown in CASES.items()}
    bars = [Bar(shown.replace("`", ""), found, ours=True) for shown, found in spreads.items() if found]
    draw_bars({"": bars}, "steps per second (median, min to max)", file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, shows the table and writes the figures."""
    parser = new_parser("benchmarks.tracking", __doc__)
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--steps", type=int, default=1000, metavar="N")
    options = parser.parse_args(arguments)
    if options.markdown:
        return show_again(options.json, table)
    environment = describe("benchmarks.tracking", arguments, ["wandb"])
    publish({"environment": environment, **measure(options.rounds, options.steps)}, table, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
