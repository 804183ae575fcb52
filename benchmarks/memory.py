"""Gradient checkpointing: peak activation memory and time of a micro-batch, per policy and model.

    python -m benchmarks.memory --json benchmarks/results/memory-cpu.json --plot docs/memory-cpu.svg

Owns the policies that are compared, how their memory and time are measured, the JSON that comes of it, its table and
its plot. Each model has a fresh process; in it every policy has a copy of the model that shares the parameters, and
their gradients, and every round measures each of them once, in random order.
"""

from __future__ import annotations

import argparse
import collections
import copy
import importlib
import json
import multiprocessing
import os
import random
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.feed import MOST_FOREIGN_CORES, _spread, describe_environment
from benchmarks.measure import _Clocks
from trainer.config_model import ModelConfig
from trainer.data.tuning import cores_of_a_rank
from trainer.errors import one_line
from trainer.memory.blocks import repeated_blocks
from trainer.memory.checkpointing import Policy, Setting, apply_checkpointing, uniform_policies
from trainer.memory.measure import measure_cpu_peak
from trainer.model import build_model, uses_channels_last

MODELS = ("resnet50", "convnext_tiny", "vit_b_16", "swin_t", "efficientnet_b0")
TINY_MODELS = ("small_cnn",)
YARDSTICK = "none"
UNIFORM: tuple[Setting, ...] = ("none", "full", "every_2", "selective")
DESCRIPTIONS = {
    "none": "keeps everything",
    "full": "recomputes every block",
    "every_2": "recomputes every second block",
    "selective": "keeps products, convolutions and attention",
    "auto": "solved for the peak that `full` reaches, to half a percent",
    "auto-50": "solved for half of what `none` takes",
}
POLICIES = tuple(DESCRIPTIONS)
DEFAULT_POLICIES = ("none", "full", "every_2", "selective", "auto", "auto-50")
NUM_CLASSES = 1000
PACKAGES = ("torch", "torchvision", "accelerate")

_NUM_PARTS = {"cpu": 1, "cuda": 10}  # micro-batches in one measurement of time
_MARKERS = {"none": "o", "full": "s", "every_2": "^", "selective": "D", "auto": "*", "auto-50": "P"}

Batch = tuple[torch.Tensor, torch.Tensor]


# ---- timing, also of benchmarks.switches -----------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """What one measurement of time gave."""

    seconds: float  # of one run
    own_cores: float  # that this process and those below it kept busy meanwhile, on average
    foreign_cores: float  # that others kept busy


def measure_time(run: Callable[[], object], num_runs: int, wait: Callable[[], object]) -> Timing:
    """Runs several times between two waits for the device."""
    wait()
    before = _Clocks.read()
    for _ in range(num_runs):
        run()
    wait()
    after = _Clocks.read()
    wall, own = after.wall - before.wall, after.tree - before.tree
    foreign = max(0.0, after.machine - before.machine - own)
    return Timing(wall / num_runs, own / wall, foreign / wall)


def alternate(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    num_runs: int,
    wait: Callable[[], object],
    seed: int,
    what: str,
) -> dict[str, list[Timing]]:
    """Measures each of `runs` once a round, in random order."""
    taken: dict[str, list[Timing]] = {name: [] for name in runs}
    for number in range(rounds):
        order = list(runs)
        random.Random(seed + number).shuffle(order)
        for name in order:
            timing = measure_time(runs[name], num_runs, wait)
            taken[name].append(timing)
            sys.stderr.write(
                f"round {number + 1}: {what}: {name}: {1000 * timing.seconds:.2f} ms, "
                f"others kept {timing.foreign_cores:.2f} cores busy\n"
            )
    return taken


def compare(taken: Sequence[Timing], yardstick: Sequence[Timing], keep_loaded: bool) -> dict[str, Any]:
    """Returns what the JSON says of the times of one entry and of how they compare with those of another.

    The ratios are of measurements of the same round, so that a machine that slows down slows both.
    """
    kept = [keep_loaded or t.foreign_cores <= MOST_FOREIGN_CORES for t in taken]
    comparable = [keep_loaded or t.foreign_cores <= MOST_FOREIGN_CORES for t in yardstick]
    pairs = [(t, y) for t, y, k, c in zip(taken, yardstick, kept, comparable, strict=False) if k and c]
    return {
        "seconds": _spread([t.seconds for t, k in zip(taken, kept, strict=True) if k]),
        "time_ratio": _spread([t.seconds / y.seconds for t, y in pairs]),
        "dropped_rounds": kept.count(False),
        "rounds": [{**asdict(t), "kept": k} for t, k in zip(taken, kept, strict=True)],
    }


def describe_machine(module: str, device_type: str) -> dict[str, Any]:
    """Returns on what, with which libraries and from what source a benchmark ran."""
    environment = {
        **describe_environment(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "gpu": None,
        "cuda": None,
    }
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        environment["gpu"] = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        environment["cuda"] = torch.version.cuda
    return environment


def machine_notes(environment: Mapping[str, Any], entries: Iterable[Mapping[str, Any]], keep_loaded: bool) -> list[str]:
    """Returns what a table says of the machine, its load and the source."""
    entries = list(entries)
    dropped = sum(entry["dropped_rounds"] for entry in entries)
    measured = sum(len(entry["rounds"]) for entry in entries)
    loaded = "kept whatever else ran" if keep_loaded else f"{dropped} of {measured} dropped for other load"
    gpu = environment["gpu"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return [
        f"measurements: {loaded}",
        *([f"{gpu['name']} ({gpu['memory_gib']} GiB), CUDA {environment['cuda']}"] if gpu else []),
        f"{environment['cpu']}, {environment['cores']} cores",
        f"Python {environment['python']}, {packages}",
        f"{environment['date'][:10]}, commit {(environment['commit'] or 'unknown')[:10]}",
    ]


def markdown_table(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Returns a Markdown table, and under it its notes as one sentence."""
    return "\n".join([*("| " + " | ".join(row) + " |" for row in rows), "", "; ".join(notes) + "."]) + "\n"


def show_times(entry: Mapping[str, Any]) -> list[str]:
    """Returns four cells: milliseconds with their spread, and the ratio with its spread."""
    seconds, ratio = entry["seconds"], entry["time_ratio"]
    if seconds is None:
        return ["-", entry["problem"] or "no quiet round", "", ""]
    digits = sum(1000 * seconds["median"] < limit for limit in (1, 10, 100))
    cells = [f"{1000 * seconds['median']:.{digits}f}"]
    cells.append(f"{1000 * seconds['min']:.{digits}f} to {1000 * seconds['max']:.{digits}f}")
    if ratio is None:
        return [*cells, "", ""]
    return [*cells, f"{ratio['median']:.2f}", f"{ratio['min']:.2f} to {ratio['max']:.2f}"]


def in_fresh_process() -> Executor:
    """Returns an executor whose one process starts from nothing."""
    return ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))


def waiting_for(device: torch.device) -> Callable[[], object]:
    """Returns what waits until a device has done all its work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


# ---- one model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What the measurements of all models have in common."""

    device_type: str
    policies: tuple[str, ...]
    batch_size: int  # of a micro-batch
    image_size: int  # pixels, of both sides
    rounds: int
    num_runs: int  # micro-batches in one measurement of time
    num_threads: int
    seed: int

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self.device_type, 0) if self.device_type == "cuda" else torch.device(self.device_type)

    @property
    def precision(self) -> str:
        """Of the forward pass: bfloat16 autocast on a GPU, float32 elsewhere."""
        return "bf16" if self.device_type == "cuda" else "float32"

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context of a forward pass."""
        return torch.autocast("cuda", torch.bfloat16) if self.device_type == "cuda" else nullcontext()


@dataclass
class Taken:
    """What was measured of one policy of a model."""

    peak_bytes: int | None = None
    policies: dict[str, Policy] = field(default_factory=dict)  # by block
    times: list[Timing] = field(default_factory=list)
    problem: str | None = None


def measure_model(name: str, setup: Setup) -> dict[str, Taken]:
    """Measures every policy of a model: first what memory each takes, then their times, alternating.

    `none` and `full` come first, for the budgets of the others are taken from them.
    """
    torch.set_num_threads(setup.num_threads)
    torch.manual_seed(setup.seed)
    model, batch = _build(name, setup)
    names = list(repeated_blocks(model))
    taken = {policy: Taken() for policy in setup.policies}
    runs: dict[str, Callable[[], None]] = {}
    for policy, entry in taken.items():
        try:
            if not names and policy != YARDSTICK:
                raise ValueError("the model has no repeated blocks")
            entry.policies = _policies(policy, model, names, batch, setup)
            runs[policy] = _step(_checkpointed(model, entry.policies), batch, setup)
            runs[policy]()  # creates the gradients where there are none yet; what is learnt of buffers is learnt
            entry.peak_bytes = measure_peak(runs[policy], setup.device)
            sys.stderr.write(f"{name}: {policy}: {entry.peak_bytes / 2**20:.0f} MiB\n")
        except Exception as error:  # the other policies go on
            sys.stderr.write(traceback.format_exc())
            entry.problem = str(error) if isinstance(error, ValueError) else one_line(error)
            runs.pop(policy, None)
    times = alternate(runs, setup.rounds, setup.num_runs, waiting_for(setup.device), setup.seed, name)
    for policy, timings in times.items():
        taken[policy].times = timings
    return taken


def _build(name: str, setup: Setup) -> tuple[nn.Module, Batch]:
    """Returns the model in training mode, in the memory format in which we train it, and a batch as our feed gives."""
    arguments: dict[str, Any] = {"in_channels": 3} if name == "small_cnn" else {}
    config = ModelConfig.model_validate({"name": name, "args": arguments})
    model = build_model(config, NUM_CLASSES).to(setup.device).train()
    if uses_channels_last(config, model):
        model.to(memory_format=torch.channels_last)
    shape = setup.batch_size, 3, setup.image_size, setup.image_size
    images = torch.randn(shape).to(setup.device, memory_format=torch.channels_last)
    return model, (images, torch.randint(NUM_CLASSES, shape[:1]).to(setup.device))


def _policies(name: str, model: nn.Module, blocks: Sequence[str], batch: Batch, setup: Setup) -> dict[str, Policy]:
    for setting in UNIFORM:
        if name == setting:
            return uniform_policies(blocks, setting)
    return _auto_policies(model, batch, setup, *((1.005, "full") if name == "auto" else (0.5, "none")))


def _auto_policies(model: nn.Module, batch: Batch, setup: Setup, share: float, of: Policy) -> dict[str, Policy]:
    """Returns what the solver chooses for a share of the peak that it predicts for another policy."""
    from trainer.memory.devices import this_device
    from trainer.memory.planner import solve_policies

    policies = solve_policies(
        model,
        _loss,
        batch,
        setup.batch_size,
        share,
        of,
        this_device(setup.device),
        setup.device_type,
        autocast_dtype=torch.bfloat16 if setup.precision == "bf16" else None,
    )
    if policies is None:
        raise ValueError(f"nothing fits into {share:g} of what {of} takes")
    return policies


def _checkpointed(model: nn.Module, policies: Mapping[str, Policy]) -> nn.Module:
    """Returns a copy that shares the parameters, and so their gradients, but not the buffers."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    result = copy.deepcopy(model, shared)
    apply_checkpointing(repeated_blocks(result), policies)
    return result


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def _step(model: nn.Module, batch: Batch, setup: Setup) -> Callable[[], None]:
    """Returns the run of one micro-batch, whose gradients are added to those that are there."""

    def run() -> None:
        with setup.autocast():
            loss = _loss(model, batch)
        loss.backward()

    return run


def measure_peak(run: Callable[[], None], device: torch.device) -> int:
    """Returns the most bytes that `run` has allocated at any moment, above what was there before."""
    if device.type != "cuda":
        return measure_cpu_peak(run)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# ---- JSON, table and plot --------------------------------------------------------------------------------------


def summarize(model: str, taken: Mapping[str, Taken], keep_loaded: bool) -> list[dict[str, Any]]:
    """Returns what the JSON says about every policy of a model, compared with `none`."""
    yardstick = taken[YARDSTICK]
    entries = []
    for policy, entry in taken.items():
        comparable = entry.peak_bytes is not None and yardstick.peak_bytes
        entries.append(
            {
                "model": model,
                "policy": policy,
                "num_blocks": dict(collections.Counter(entry.policies.values())),
                "peak_bytes": entry.peak_bytes,
                "memory_ratio": entry.peak_bytes / yardstick.peak_bytes if comparable else None,  # type: ignore[operator]
                **compare(entry.times, yardstick.times, keep_loaded),
                "problem": entry.problem,
                "policies": entry.policies,
            }
        )
    return entries


def table(result: dict[str, Any]) -> str:
    """Returns the Markdown table of a result, with a line about what it was measured on."""
    settings = result["settings"]
    header = ["model", "policy", "", "blocks", "peak MiB", f"to `{YARDSTICK}`", "ms", "min to max"]
    header += [f"to `{YARDSTICK}`", "min to max"]
    rows = [header, ["---"] * 4 + ["---:"] * 6]
    for entry in result["entries"]:
        blocks = ", ".join(f"{number} {policy}" for policy, number in sorted(entry["num_blocks"].items()))
        memory = ["-", ""]
        if entry["peak_bytes"] is not None:
            ratio = entry["memory_ratio"]
            memory = [f"{entry['peak_bytes'] / 2**20:.0f}", "" if ratio is None else f"{ratio:.2f}"]
        name = entry["policy"]
        rows.append([entry["model"], f"`{name}`", DESCRIPTIONS[name], blocks, *memory, *show_times(entry)])
    notes = [
        "peak: most activations and working memory at any moment of a micro-batch, measured, without parameters and "
        "gradients",
        "ms: forward, loss and backward of a micro-batch",
        f"{settings['batch_size']} images of {settings['image_size']}x{settings['image_size']} pixels, "
        f"{settings['precision']}, channels_last where a model has convolutions",
        f"{settings['num_threads']} threads, median of {settings['rounds']} alternating rounds of "
        f"{settings['num_runs']} micro-batches, ratios within rounds",
        *machine_notes(result["environment"], result["entries"], settings["keep_loaded"]),
    ]
    return markdown_table(rows, notes)


def plot(result: dict[str, Any], file: Path) -> None:
    """Draws time against memory, both as ratios to `none`: a colour per model, a marker per policy.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = importlib.import_module("matplotlib")
    figures = importlib.import_module("matplotlib.figure")
    matplotlib.rcParams["svg.hashsalt"] = "lockstep"  # the same file from the same figures
    figure = figures.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    shown = [e for e in result["entries"] if e["memory_ratio"] is not None and e["time_ratio"] is not None]
    models = list(dict.fromkeys(e["model"] for e in shown))
    colours = {model: f"C{position}" for position, model in enumerate(models)}
    for model in models:
        own = sorted((e for e in shown if e["model"] == model), key=lambda e: e["memory_ratio"])
        for entry in own:
            ratio = entry["time_ratio"]
            axes.errorbar(
                entry["memory_ratio"],
                ratio["median"],
                yerr=[[ratio["median"] - ratio["min"]], [ratio["max"] - ratio["median"]]],
                marker=_MARKERS[entry["policy"]],
                markersize=8,
                elinewidth=0.8,
                color=colours[model],
                linestyle="none",
            )
    for model in models:
        axes.plot([], [], marker="o", linestyle="none", color=colours[model], label=model)
    for policy in dict.fromkeys(e["policy"] for e in shown):
        axes.plot([], [], marker=_MARKERS[policy], linestyle="none", color="0.4", label=policy)
    axes.set_xlabel("peak activation memory, to none")
    axes.set_ylabel("time of a micro-batch, to none (median, min to max)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    if shown:
        figure.legend(loc="outside right upper", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format=file.suffix[1:] or "svg", metadata={"Date": None} if file.suffix == ".svg" else None)


# ---- command line ------------------------------------------------------------------------------------------------


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the result goes; read with --markdown")
    parser.add_argument("--markdown", action="store_true", help="measure nothing: print the table of --json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw time against memory, to an .svg file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", metavar="NAME", default=list(MODELS))
    parser.add_argument("--policies", nargs="+", metavar="NAME", choices=POLICIES, default=list(DEFAULT_POLICIES))
    parser.add_argument("--batch-size", type=int, help="images of a micro-batch; 8 on a CPU, 64 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores_of_a_rank(1), help="of torch; default: one per core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-loaded", action="store_true", help="keep rounds in which others used the machine too")
    parser.add_argument("--tiny", action="store_true", help="a check that all parts run: measures nothing of interest")
    arguments = parser.parse_args()
    arguments.batch_size = arguments.batch_size or (8 if arguments.device == "cpu" else 64)
    if arguments.tiny:
        arguments.models, arguments.batch_size, arguments.rounds = list(TINY_MODELS), 4, 1
        arguments.threads, arguments.keep_loaded = 1, True
    if min(arguments.batch_size, arguments.rounds, arguments.threads) < 1:
        parser.error("--batch-size, --rounds and --threads must be at least 1")
    return arguments


def _chosen(asked: Sequence[str]) -> tuple[str, ...]:
    """Returns the policies in our order, with those that the asked ones are compared with."""
    needed = {*asked, YARDSTICK, *(["full"] if "auto" in asked else [])}
    return tuple(policy for policy in POLICIES if policy in needed)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, and writes what is known after each model: a run that is cut short leaves its models behind."""
    setup = Setup(
        device_type=arguments.device,
        policies=_chosen(arguments.policies),
        batch_size=arguments.batch_size,
        image_size=32 if arguments.tiny else 224,
        rounds=arguments.rounds,
        num_runs=1 if arguments.tiny else _NUM_PARTS[arguments.device],
        num_threads=arguments.threads,
        seed=arguments.seed,
    )
    environment = describe_machine("benchmarks.memory", arguments.device)  # before: of what is measured
    started = time.monotonic()
    result: dict[str, Any] = {
        "environment": environment,
        "settings": {
            **asdict(setup),
            "precision": setup.precision,
            "most_foreign_cores": MOST_FOREIGN_CORES,
            "keep_loaded": arguments.keep_loaded,
            "tiny": arguments.tiny,
        },
        "took_seconds": 0.0,
        "entries": [],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for model in arguments.models:
        with in_fresh_process() as process:
            try:
                taken = process.submit(measure_model, model, setup).result()
            except Exception as error:  # the other models go on; one that was killed for memory ends up here too
                sys.stderr.write(traceback.format_exc())
                taken = {policy: Taken(problem=one_line(error)) for policy in setup.policies}
        result["entries"] += summarize(model, taken, arguments.keep_loaded)
        result["took_seconds"] = round(time.monotonic() - started, 1)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def main() -> int:
    """Returns the exit code: 2 without what it needs, 1 where a policy of a model could not be measured."""
    arguments = _arguments()
    if arguments.plot is not None:
        try:
            importlib.import_module("matplotlib")
        except ImportError:
            sys.stderr.write("--plot needs matplotlib, which is not installed: pip install matplotlib\n")
            return 2
    if arguments.markdown:
        result = json.loads(arguments.json.read_text(encoding="utf-8"))
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("there is no CUDA GPU here; use --device cpu\n")
        return 2
    else:
        if arguments.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler would tell of each of its starts
        result = _run(arguments)
    sys.stdout.write(table(result))
    if arguments.plot is not None:
        plot(result, arguments.plot)
    return int(not arguments.markdown and any(entry["problem"] for entry in result["entries"]))


if __name__ == "__main__":
    sys.exit(main())
