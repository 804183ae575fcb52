"""What telemetry costs: the same job with everything that is measured by default, and without any of it.

`python -m benchmarks.telemetry --json FILE` trains two models alike in one process, in turn, some steps and a report at
a time, and compares each pair of turns. With: the split of every step into parts, and at the report memory, the
machine, MFU and advice. Without: loss, learning rate and throughput only. Beside the ratio, which noise blurs, the time
spent in measuring itself is added up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch

from trainer.config import load_config
from trainer.loop import Trainer
from trainer.window import Window

_JOB = {
    "run": {"name": "telemetry", "seed": 0},
    "data": {"train": {"name": "synthetic", "args": {"num_samples": 6400, "shape": [3, 32, 32], "num_classes": 10}}},
    "model": {"name": "resnet18", "args": {"num_classes": 10}},
    "optim": {"name": "sgd", "lr": 0.01, "args": {"momentum": 0.9}},
    "train": {"steps": 1_000_000, "batch_size": 64},
    "log": {"every": 1_000_000},
    "checkpoint": {"every": 1_000_000},
    "faults": {"hang_timeout": None},
    "tracking": {"trackers": []},
}


class BareTrainer(Trainer):
    """Reports loss, learning rate and throughput, and measures nothing else."""

    def report(self) -> None:
        self.at("report")
        window, step = self.window, self.progress.step
        totals = self.runtime.sum({"loss": window.loss_sum, "count": window.num_counted})
        record = {
            "train/loss": totals["loss"] / totals["count"],
            "train/lr": self.learning_rate(step - 1),
            "train/samples_per_second": window.num_timed_samples / window.train_seconds(self.clock),
        }
        assert self.reporter is not None
        self.reporter.publish(step, record)
        self.window = Window(self.runtime, self.clock)


def make(kind: type[Trainer], folder: Path, time_split: bool) -> Trainer:
    """Returns a trainer that has started, and made its first steps."""
    file = folder / "job.json"
    file.write_text(json.dumps(_JOB))  # which is YAML, too
    overrides = [f"run.dir={folder / kind.__name__}", f"log.time_split={str(time_split).lower()}"]
    trainer = kind(load_config(str(file), overrides))
    trainer.start()
    for _ in range(3):
        trainer.train_step()
    trainer.report()
    return trainer


def seconds_of(trainer: Trainer, num_steps: int) -> float:
    """Returns what some steps and a report take."""
    began = time.perf_counter()
    for _ in range(num_steps):
        trainer.train_step()
        trainer.after_step()
    trainer.report()
    return time.perf_counter() - began


def own_seconds(trainer: Trainer, num_steps: int) -> float:
    """Returns how much of the same time goes into the stopwatch and the observer, by timing each call of theirs."""
    spent = [0.0]

    def timed(function: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent[0] += time.perf_counter() - began

        return wrapped

    assert trainer.stopwatch is not None
    originals = [(trainer.stopwatch, "enter"), (trainer.observer, "observe"), (trainer.observer, "figures")]
    for thing, name in originals:
        setattr(thing, name, timed(getattr(thing, name)))
    trainer.feed.on_arrival = timed(trainer.feed.on_arrival)
    seconds_of(trainer, num_steps)
    return spent[0]


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """Runs both in turn, in random order within a round."""
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {"with": make(Trainer, Path(folder), True), "without": make(BareTrainer, Path(folder), False)}
        for number in range(rounds):
            for name in random.sample(list(trainers), 2):
                seconds[name].append(seconds_of(trainers[name], steps))
            sys.stderr.write(f"round {number + 1}: {seconds['without'][-1] / seconds['with'][-1]:.4f}\n")
        own = own_seconds(trainers["with"], steps)
        for trainer in trainers.values():
            trainer.close()
    ratios = sorted(bare / measured for bare, measured in zip(seconds["without"], seconds["with"], strict=True))
    step = statistics.median(seconds["with"]) / steps
    return {
        "steps_per_round": steps,
        "seconds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(ratios[len(ratios) // 4], 4), round(ratios[-1 - len(ratios) // 4], 4)],
        "step_seconds": round(step, 5),
        "own_seconds_per_step": round(own / steps, 7),
        "own_share": round(own / steps / step, 6),
    }


def table(result: Mapping[str, Any]) -> str:
    """Returns the result as a Markdown table."""
    low, high = result["ratio_quartiles"]
    rounds = len(result["seconds"]["with"])
    rows = [
        "| | |",
        "|---|---|",
        f"| speed with telemetry, of that without: median of {rounds} pairs | {result['ratio']:.4f} |",
        f"| quartiles | {low:.4f}, {high:.4f} |",
        f"| a step | {1e3 * result['step_seconds']:.1f} ms |",
        f"| of it in measuring, reports included | {1e6 * result['own_seconds_per_step']:.0f} microseconds, "
        f"{100 * result['own_share']:.3f}% |",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    where = f"ResNet-18, 64 images of 32x32, a report every {result['steps_per_round']} steps; {result['hardware']}"
    return "\n".join(rows) + f"\n\n{where}; {versions}; `{result['command']}`.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, shows the table and writes the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.telemetry", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, metavar="N")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="of a round")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    result = {
        "command": f"python -m benchmarks.telemetry {' '.join(sys.argv[1:] if arguments is None else arguments)}",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, {gpu}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
        },
        **measure(options.rounds, options.steps),
    }
    sys.stdout.write(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
