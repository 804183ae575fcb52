"""What telemetry costs: the same job with everything that is measured by default, and without any of it.

`python -m benchmarks.telemetry --json FILE` trains two models alike in one process, a step of one and a step of the
other in random order, and compares each pair. With: the split of every step into parts, and at the report memory, the
machine, MFU and advice. Without: loss, learning rate and throughput only. Beside the ratio, which noise blurs, the time
spent in the stopwatch and the observer is added up.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.commands import add_device, is_ready, new_parser, show_again
from benchmarks.rounds import in_rounds, waiting_for
from benchmarks.telling import describe, markdown_table, origin, publish
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
    waiting_for(trainer.runtime.device)()
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
        for number, name in in_rounds(trainers, pairs, seed=0):
            taken = reports if (number + 1) % every == 0 else steps
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
    own = f"{1e6 * result['own_seconds_per_step']:.0f} microseconds, {100 * result['own_share']:.3f}%"
    rows = [
        ["", ""],
        ["---", "---:"],
        ["speed of a step with telemetry, of one without", f"{result['step_ratio']:.4f}"],
        ["quartiles", f"{low:.3f}, {high:.3f}"],
        [f"the same with reports, one in {result['steps_per_report']} steps", f"{result['ratio']:.4f}"],
        ["a step without telemetry", f"{1e3 * result['step_seconds']:.1f} ms"],
        ["what reports take more, per step", f"{1e6 * result['report_seconds_per_step']:.0f} microseconds"],
        ["in the stopwatch and the observer, by timing each call, per step", own],
    ]
    what = f"ResNet-18, {_JOB['train']['batch_size']} images of 32x32"
    return markdown_table(rows, [what, f"median of {result['pairs']} pairs", *origin(result)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, shows the table and writes the figures."""
    parser = new_parser("benchmarks.telemetry", __doc__)
    add_device(parser)
    parser.add_argument("--pairs", type=int, default=1000, metavar="N", help="of steps (default: 1000)")
    parser.add_argument("--every", type=int, default=50, metavar="N", help="steps to a report (default: 50)")
    options = parser.parse_args(arguments)
    if options.markdown:
        return show_again(options.json, table)
    if not is_ready(options.device):
        return 2
    environment = describe("benchmarks.telemetry", arguments, ["accelerate"], options.device)
    publish({"environment": environment, **measure(options.pairs, options.every)}, table, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
