"""What accuracy the digits' recipe reaches: `configs/digits.yaml` as shipped, once per seed.

`python -m benchmarks.digits --seeds 5 --json FILE` runs `train.py` with `run.seed` 0, 1, ..., and reads the accuracy on
the 355 images for evaluation from each run's `summary.json`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.commands import new_parser, show_again
from benchmarks.telling import REPOSITORY, describe, markdown_table, origin, publish


def accuracy(seed: int, run_dir: Path) -> float:
    """Returns the accuracy of the last evaluation of a run, in percent."""
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(REPOSITORY / "configs" / "digits.yaml")]
    command += [f"run.seed={seed}", f"run.dir={run_dir}", "tracking.trackers=[]"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return 100 * float(json.loads((run_dir / "summary.json").read_text())["metrics"]["eval/accuracy"])


def measure(seeds: int) -> dict[str, Any]:
    """Runs one seed after the other."""
    found: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            found.append(round(accuracy(seed, Path(folder, str(seed))), 3))
            sys.stderr.write(f"seed {seed}: {found[-1]:.2f}%\n")
    return {"accuracy": found, "mean": round(statistics.mean(found), 3)}


def table(result: Mapping[str, Any]) -> str:
    """Returns the result as a Markdown table."""
    found = result["accuracy"]
    rows = [
        ["seed", *map(str, range(len(found))), "mean"],
        ["---", *["---:"] * (len(found) + 1)],
        ["eval accuracy", *(f"{value:.2f}%" for value in (*found, result["mean"]))],
    ]
    return markdown_table(rows, ["`configs/digits.yaml`, one process", *origin(result)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, shows the table and writes the figures."""
    parser = new_parser("benchmarks.digits", __doc__)
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    options = parser.parse_args(arguments)
    if options.markdown:
        return show_again(options.json, table)
    environment = describe("benchmarks.digits", arguments, ["accelerate", "torchvision", "scikit-learn"])
    publish({"environment": environment, **measure(options.seeds)}, table, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
