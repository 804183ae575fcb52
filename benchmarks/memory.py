"""Gradient checkpointing: peak activation memory and time of a micro-batch, per policy and model.

    python -m benchmarks.memory --json benchmarks/results/memory-cpu.json

Owns the policies that are compared, how their memory and time are measured, the JSON that comes of it, its table and
its plot. Each model has a fresh process; in it every policy has a copy of the model that shares the parameters, and
their gradients, and every round measures each of them once, in random order.
"""

from __future__ import annotations

import argparse
import collections
import copy
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.commands import add_device, add_rounds, add_tiny, is_ready, new_parser, show_again
from benchmarks.drawing import new_figure, save_figure
from benchmarks.rounds import (
    MOST_FOREIGN_CORES,
    Timing,
    alternate,
    compare,
    in_fresh_process,
    load_note,
    show_times,
    waiting_for,
)
from benchmarks.telling import describe, markdown_table, origin, write
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
PACKAGES = ("torchvision", "accelerate")

_NUM_PARTS = {"cpu": 1, "cuda": 10}  # micro-batches in one measurement of time
_MARKERS = {"none": "o", "full": "s", "every_2": "^", "selective": "D", "auto": "*", "auto-50": "P"}

Batch = tuple[torch.Tensor, torch.Tensor]


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


def table(result: Mapping[str, Any]) -> str:
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
        load_note(result["entries"], settings["keep_loaded"]),
        *origin(result),
    ]
    return markdown_table(rows, notes)


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Draws time against memory, both as ratios to `none`: a colour per model, a marker per policy.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = new_figure(8, 5)
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
    if shown:
        figure.legend(loc="outside right upper", frameon=False)
    save_figure(figure, file)


# ---- command line ------------------------------------------------------------------------------------------------


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("benchmarks.memory", __doc__)
    add_device(parser)
    add_rounds(parser, rounds=5)
    add_tiny(parser)
    parser.add_argument("--models", nargs="+", metavar="NAME", default=list(MODELS))
    parser.add_argument("--policies", nargs="+", metavar="NAME", choices=POLICIES, default=list(DEFAULT_POLICIES))
    parser.add_argument("--batch-size", type=int, help="images of a micro-batch; 8 on a CPU, 64 on a GPU")
    parser.add_argument("--threads", type=int, default=cores_of_a_rank(1), help="of torch; default: one per core")
    options = parser.parse_args(arguments)
    options.batch_size = options.batch_size or (8 if options.device == "cpu" else 64)
    if options.tiny:
        options.models, options.batch_size, options.rounds = list(TINY_MODELS), 4, 1
        options.threads, options.keep_loaded = 1, True
    if min(options.batch_size, options.threads) < 1:
        parser.error("--batch-size and --threads must be at least 1")
    return options


def _chosen(asked: Sequence[str]) -> tuple[str, ...]:
    """Returns the policies in our order, with those that the asked ones are compared with."""
    needed = {*asked, YARDSTICK, *(["full"] if "auto" in asked else [])}
    return tuple(policy for policy in POLICIES if policy in needed)


def _run(options: argparse.Namespace, given: Sequence[str] | None) -> dict[str, Any]:
    """Measures, and writes what is known after each model: a run that is cut short leaves its models behind."""
    setup = Setup(
        device_type=options.device,
        policies=_chosen(options.policies),
        batch_size=options.batch_size,
        image_size=32 if options.tiny else 224,
        rounds=options.rounds,
        num_runs=1 if options.tiny else _NUM_PARTS[options.device],
        num_threads=options.threads,
        seed=options.seed,
    )
    environment = describe("benchmarks.memory", given, PACKAGES, options.device)
    started = time.monotonic()
    result: dict[str, Any] = {
        "environment": environment,
        "settings": {
            **asdict(setup),
            "precision": setup.precision,
            "most_foreign_cores": MOST_FOREIGN_CORES,
            "keep_loaded": options.keep_loaded,
            "tiny": options.tiny,
        },
        "took_seconds": 0.0,
        "entries": [],
    }
    for model in options.models:
        with in_fresh_process() as process:
            try:
                taken = process.submit(measure_model, model, setup).result()
            except Exception as error:  # the other models go on; one that was killed for memory ends up here too
                sys.stderr.write(traceback.format_exc())
                taken = {policy: Taken(problem=one_line(error)) for policy in setup.policies}
        result["entries"] += summarize(model, taken, options.keep_loaded)
        result["took_seconds"] = round(time.monotonic() - started, 1)
        write(result, options.json)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 without a GPU, 1 where a policy of a model could not be measured."""
    options = _arguments(arguments)
    if options.markdown:
        return show_again(options.json, table)
    if not is_ready(options.device):
        return 2
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler would tell of each of its starts
    result = _run(options, arguments)
    sys.stdout.write(table(result))
    return int(any(entry["problem"] for entry in result["entries"]))


if __name__ == "__main__":
    sys.exit(main())
