"""What telemetry costs: the same job with everything that is measured by default, and without any of it.

`python -m benchmarks.telemetry --json FILE` trains two models alike in one process, a step of one and a step of the
other in random order, and compares each pair. With: the split of every step into parts, and at the report memory, the
machine, MFU and advice. Without: loss, learning rate and throughput only. Beside the ratio, which noise blurs, the time
spent in the stopwatch and the observer is added up.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.telling import describe, publish, with_origin
from trainer.config import load_config
from trainer.loop import Trainer
from trainer.window import Window

_JOB: dict[str, Any] = {
    "run": {"name": "telemetry", "seed": 0},
    "data": {"train": {"name": "synthetic", "args": {"num_samples": 6400, "shape": [3, 32, 32], "num_classes": 10}}},
    "model": {"name": "resnet18", "args": {"num_classes": 10}},
    "optim": {"name": "sgd", "lr": 0.01, "args": {"momentum": 0.9}},
    "train": {"steps": 1_000_000, "batch_size": 16},
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


def step_seconds(trainer: Trainer, reports: bool) -> float:
    """Returns what a step takes, with or without a report after it."""
    began = time.perf_counter()
    trainer.train_step()
    trainer.after_step()
    if reports:
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
    for step in range(num_steps):
        step_seconds(trainer, reports=step == num_steps - 1)
    return spent[0]


def measure(pairs: int, every: int) -> dict[str, Any]:
    """Makes pairs of steps, one of each kind, in random order, and a report of each after every so many."""
    steps: dict[str, list[float]] = {"with": [], "without": []}
    reports: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {"with": make(Trainer, Path(folder), True), "without": make(BareTrainer, Path(folder), False)}
        for number in range(1, pairs + 1):
            for name in random.sample(list(trainers), 2):
                taken = reports if number % every == 0 else steps
                taken[name].append(step_seconds(trainers[name], reports=taken is reports))
        own = own_seconds(trainers["with"], every)
        for trainer in trainers.values():
            trainer.close()
    ratios = sorted(bare / full for bare, full in zip(steps["without"], steps["with"], strict=True))
    step = statistics.median(steps["without"])
    # What a report takes more, for each of the steps up to it.
    report = (statistics.median(reports["with"]) - statistics.median(reports["without"])) / every
    return {
        "pairs": len(ratios),
        "steps_per_report": every,
        "step_seconds": round(step, 5),
        "step_ratio": round(statistics.median(ratios), 4),
        "step_ratio_quartiles": [round(ratios[len(ratios) // 4], 4), round(ratios[-1 - len(ratios) // 4], 4)],
        "report_seconds_per_step": round(report, 7),
        "ratio": round(step / (step / statistics.median(ratios) + report), 4),
        "own_seconds_per_step": round(own / every, 7),
        "own_share": round(own / every / step, 6),
    }


def table(result: Mapping[str, Any]) -> str:
    """Returns the result as a Markdown table."""
    low, high = result["step_ratio_quartiles"]
    rows = [
        "| | |",
        "|---|---|",
        f"| speed of a step with telemetry, of one without: median of {result['pairs']} pairs "
        f"| {result['step_ratio']:.4f} |",
        f"| quartiles | {low:.3f}, {high:.3f} |",
        f"| the same with reports, one in {result['steps_per_report']} steps | {result['ratio']:.4f} |",
        f"| a step without telemetry | {1e3 * result['step_seconds']:.1f} ms |",
        f"| what reports take more, per step | {1e6 * result['report_seconds_per_step']:.0f} microseconds |",
        f"| in the stopwatch and the observer, by timing each call, per step "
        f"| {1e6 * result['own_seconds_per_step']:.0f} microseconds, {100 * result['own_share']:.3f}% |",
    ]
    return with_origin(rows, f"ResNet-18, {_JOB['train']['batch_size']} images of 32x32", result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, shows the table and writes the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.telemetry", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1000, metavar="N", help="of steps (default: 1000)")
    parser.add_argument("--every", type=int, default=50, metavar="N", help="steps to a report (default: 50)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    result = {**describe("benchmarks.telemetry", arguments, ["accelerate"]), **measure(options.pairs, options.every)}
    publish(result, table, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
