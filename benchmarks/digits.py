"""What accuracy the digits' recipe reaches: `configs/digits.yaml` as shipped, once per seed.

`python -m benchmarks.digits --seeds 5 --json FILE` runs `train.py` with `run.seed` 0, 1, ..., and reads the accuracy on
the 355 images for evaluation from each run's `summary.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.telling import describe, publish, with_origin

REPOSITORY = Path(__file__).resolve().parent.parent


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
    lines = [
        "| seed | " + " | ".join(str(seed) for seed in range(len(found))) + " | mean |",
        "|---|" + "---|" * (len(found) + 1),
        "| eval accuracy | " + " | ".join(f"{value:.2f}%" for value in (*found, result["mean"])) + " |",
    ]
    return with_origin(lines, "`configs/digits.yaml`, one process", result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, shows the table and writes the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    packages = ["accelerate", "torchvision", "scikit-learn"]
    publish({**describe("benchmarks.digits", arguments, packages), **measure(options.seeds)}, table, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
