"""The one list of benchmarks: what each measures, how a suite runs it, and where its table and its picture stand.

`python -m benchmarks` runs what stands here, `python -m benchmarks.document` writes docs/ from what that left under
`benchmarks/results/`, and the tests hold both against it. Benchmarks are imported where they are used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.telling import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"
DOCS = REPOSITORY / "docs"
SCRATCH = "SCRATCH"  # among arguments: a folder that is not there yet, and goes afterwards
SUITES = {
    "cpu": "what can be measured on the CPU of one machine",
    "gpu": "what needs a GPU, or is another thing there",
    "reliability": "runs that are killed and stopped on purpose, on the CPU: hours",
}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Args:
        name: as in `NAME-cpu.json`.
        module: what `python -m` runs, with `--json FILE` and the arguments of a suite.
        measures: what it measures, for a person.
        peers: against whom.
        place: of docs/, where its tables stand: a page, and a heading on it.
        suites: arguments besides `--json`, by suite.
        quick: further arguments, which make it so small that its figures mean nothing.
        needs: packages without which it cannot run, as they are imported.
        table: `module:function` that makes Markdown of a result; by default `table` of its module.
        has_plot: whether `plot` of the same module draws a result.
    """

    name: str
    module: str
    measures: str
    peers: str
    place: str
    suites: Mapping[str, tuple[str, ...]]
    quick: tuple[str, ...] = ("--tiny",)
    needs: tuple[str, ...] = ()
    table: str = ""
    has_plot: bool = True

    @property
    def page(self) -> str:
        """The page of `place`."""
        return self.place.partition("#")[0]

    @property
    def results(self) -> dict[str, Result]:
        """Its result files, by suite."""
        return {suite: Result(self, suite) for suite in self.suites}

    def makers(self) -> tuple[Callable[[Mapping[str, Any]], str], Callable[[Mapping[str, Any], Path], None] | None]:
        """Returns what makes a table of a result, and what draws it, if anything.

        Raises:
            ImportError: something that its module needs is not installed.
        """
        module_name, _, function = (self.table or f"{self.module}:table").partition(":")
        module = importlib.import_module(module_name)
        return getattr(module, function), module.plot if self.has_plot else None


@dataclass(frozen=True)
class Result:
    """One result of a benchmark: a file under `benchmarks/results/` that may not be there yet."""

    benchmark: Benchmark
    suite: str
    hardware: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hardware", "gpu" if self.suite == "gpu" else "cpu")

    @property
    def stem(self) -> str:
        """The name of its files, without their ending."""
        return f"{self.benchmark.name}-{self.hardware}"

    @property
    def file(self) -> Path:
        """Where it is committed."""
        return RESULTS / f"{self.stem}.json"

    @property
    def picture(self) -> Path:
        """Where it is drawn."""
        return DOCS / "images" / f"{self.stem}.svg"

    @property
    def command(self) -> str:
        """What measures it."""
        return f"python -m benchmarks --suite {self.suite} --only {self.benchmark.name}"


def _on_both(*arguments: str) -> dict[str, tuple[str, ...]]:
    return {"cpu": arguments, "gpu": (*arguments, "--device", "cuda")}


_CHAOS = ("chaos", "--config", "configs/digits.yaml", "--processes", "2", "--every", "40", "train.epochs=4000")

BENCHMARKS = (
    Benchmark(
        "step-overhead",
        "benchmarks.step_overhead",
        "what a step costs beside the model",
        "a hand-written loop, bare Accelerate, timm's loop, Lightning; Composer needs an older torch",
        "performance.md#step-overhead",
        _on_both(),
    ),
    Benchmark(
        "feed",
        "benchmarks.feed",
        "images per second and core, from JPEG files to batches of 224x224",
        "torchvision's reference, timm, DALI, SPDL",
        "performance.md#the-feed-per-cpu-core",
        {"cpu": ("--images", "1000", "--rounds", "5")},
        quick=("--images", "60", "--rounds", "1", "--keep-loaded"),
        needs=("skimage",),
    ),
    Benchmark(
        "end-to-end",
        "benchmarks.end_to_end",
        "steady training from a folder of JPEGs, each with its own loader and loop",
        "a hand-written loop, timm's loop, Lightning",
        "performance.md#end-to-end-from-jpegs",
        _on_both(),
        needs=("skimage",),
    ),
    Benchmark(
        "feed-training",
        "benchmarks.feed_training",
        "training from JPEGs, as a share of training on data that is on the GPU already",
        "timm's loader",
        "performance.md#training-from-jpegs-on-a-gpu",
        {"gpu": ()},
        needs=("skimage",),
    ),
    Benchmark(
        "ranks",
        "benchmarks.ranks",
        "one rank and several, with the same batch per rank and with the same global batch",
        "DDP by hand under torchrun, bare Accelerate",
        "performance.md#one-and-two-ranks",
        _on_both(),
    ),
    Benchmark(
        "checkpoint",
        "benchmarks.checkpoint",
        "how long a save holds training up, and how long until it is on the disk",
        "`torch.save`, `accelerator.save_state`, DCP's `async_save`",
        "performance.md#saving",
        _on_both("--rounds", "4"),
    ),
    Benchmark(
        "restore",
        "benchmarks.restore",
        "how long it takes to go on from a checkpoint, from the disk and from its cache",
        "`torch.load`, `accelerator.load_state`, DCP's `load`",
        "performance.md#going-on-from-a-checkpoint",
        _on_both("--rounds", "5"),
    ),
    Benchmark(
        "startup",
        "benchmarks.startup",
        "from the command to the end of the first step",
        "a torchrun script with the same imports",
        "launch.md#start-up",
        _on_both("--rounds", "5"),
        quick=("--rounds", "1"),
    ),
    Benchmark(
        "memory",
        "benchmarks.memory",
        "memory and time of a micro-batch, per checkpointing policy and model",
        "no checkpointing",
        "memory.md#measured",
        _on_both("--rounds", "6"),
        # Half of its memory is less than so small a model can do with.
        quick=("--tiny", "--policies", "none", "full", "every_2", "selective", "auto"),
    ),
    Benchmark(
        "switches",
        "benchmarks.switches",
        "what each switch for speed does to the time of a step",
        "the switch being off",
        "memory.md#speed-switches",
        _on_both("--rounds", "3"),
    ),
    Benchmark(
        "telemetry",
        "benchmarks.telemetry",
        "what measuring costs",
        "the same run without",
        "telemetry.md#what-it-costs",
        _on_both(),
        quick=("--pairs", "8", "--every", "4"),
        has_plot=False,
    ),
    Benchmark(
        "tracking",
        "benchmarks.tracking",
        "what a dead network costs a run that tracks online",
        "the same run without trackers",
        "tracking.md#what-a-dead-network-costs",
        {"cpu": ("--rounds", "5", "--steps", "500")},
        quick=("--rounds", "1", "--steps", "120"),
    ),
    Benchmark(
        "advice",
        "benchmarks.advice",
        "what following an advice gains, beside what it promised",
        "the same run before",
        "advice.md#how-it-was-checked",
        {"cpu": ()},
        quick=("--only", "more_workers"),
        needs=("pytest",),
        has_plot=False,
    ),
    Benchmark(
        "scaling",
        "benchmarks.scaling",
        "a model of step time, efficiency and goodput up to 16,384 GPUs, and how it meets measured runs",
        "measured runs of 1 to 3 ranks",
        "scaling.md",
        {"cpu": ()},
        quick=("--tiny",),
    ),
    Benchmark(
        "digits",
        "benchmarks.digits",
        "the accuracy of `configs/digits.yaml`, seed by seed",
        "nobody",
        "recipes.md#digits",
        {"cpu": ()},
        quick=("--seeds", "1"),
        has_plot=False,
    ),
    Benchmark(
        "faults",
        "benchmarks.faults",
        "each kind of fault: exit code, seconds and steps lost",
        "the same run in peace",
        "reliability.md#every-fault-and-what-it-costs",
        {"reliability": ()},
        quick=("--only", "slow"),
        needs=("pytest",),
        has_plot=False,
    ),
    Benchmark(
        "chaos",
        "launch",
        "a run under random faults: seconds lost to each, goodput, and whether it ends the same",
        "the same run in peace",
        "reliability.md#chaos",
        {"reliability": (*_CHAOS, "--minutes", "20", "--folder", SCRATCH)},
        quick=("--minutes", "0.5"),
        table="benchmarks.faults:chaos_table",
        has_plot=False,
    ),
    Benchmark(
        "soak",
        "benchmarks.soak",
        "a run that is killed about every minute, and whether it ends the same",
        "the same run in peace",
        "checkpoints.md#a-soak",
        {"reliability": ("--minutes", "50", "--kill-every", "60", "--checkpoint-every", "50", "--folder", SCRATCH)},
        quick=("--minutes", "1", "--kill-every", "20"),
        has_plot=False,
    ),
)


def all_results() -> list[Result]:
    """Returns every result that there is or should be."""
    return [result for benchmark in BENCHMARKS for result in benchmark.results.values()]
