"""What a step costs beside the model: one training, by a hand-written loop, by our peers' and by ours, in the same run.

    python -m benchmarks.step_overhead --json benchmarks/results/step-overhead-cpu.json
    python -m benchmarks.step_overhead --device cuda --json benchmarks/results/step-overhead-gpu.json

Owns what is trained, how the loops take turns, the JSON that comes of it, its table and its plot. The loops are
`benchmarks.loops`, how they wait for each other is `benchmarks.turns`. Each loop of a workload has a process of its own
for the whole run. A round gives each of them one turn, in random order: so many steps, while the others wait at the end
of theirs. The figures of a round are compared within it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import loops
from benchmarks.commands import add_device, add_tiny, is_ready, new_parser, show_again
from benchmarks.drawing import Bar, draw_bars
from benchmarks.loops import AfterStep, Work, open_loader
from benchmarks.rounds import (
    MOST_FOREIGN_CORES,
    Problem,
    compare,
    load_note,
    median_interval,
    paired_ratios,
    show_times,
)
from benchmarks.telling import describe, goal_text, markdown_table, origin, spread, write
from benchmarks.turns import Loop, Measured, Turn, take_turns
from trainer.data.tuning import cores_of_a_rank
from trainer.precision import STEP_DTYPES
from trainer.tasks.classification import Classification
from trainer.telemetry.efficiency import FlopCounter, peak_flops

OURS, RAW, PAGED = "ours", "raw", "huge_pages"
LOOPS: dict[str, Callable[[Work, AfterStep, Path], None]] = {
    RAW: lambda work, after_step, folder: loops.raw(work, open_loader(work), after_step),
    PAGED: lambda work, after_step, folder: loops.on_huge_pages(work, after_step),
    "accelerate": lambda work, after_step, folder: loops.accelerate(work, open_loader(work), after_step),
    "timm": lambda work, after_step, folder: loops.timm(work, open_loader(work), after_step),
    "lightning": lambda work, after_step, folder: loops.lightning(work, open_loader(work), after_step, folder),
    OURS: loops.ours,
}
# What there is no loop for, and why.
IMPOSSIBLE = {"composer": "mosaicml 0.32.1, its newest version, requires torch < 2.7.1"}
DESCRIPTIONS = {
    RAW: "PyTorch, written by hand",
    PAGED: "the same on huge pages, as ours",
    "accelerate": "Accelerate, bare",
    "timm": "the loop of timm's train.py",
    "lightning": "Lightning's Trainer",
    "composer": "Composer's Trainer",
    OURS: "our Trainer, whole",
}
NAMES = tuple(DESCRIPTIONS)
PACKAGES = ("accelerate", "timm", "lightning")
# Our speed, of each of these loops, must be so much at least.
GOAL_MODEL, GOALS = "resnet18", {RAW: 0.99, PAGED: 0.99, "accelerate": 1.0, "lightning": 1.0}


@dataclass(frozen=True)
class Workload:
    """What is trained, and how much of it makes a turn."""

    work: Work
    steps: int  # that are counted
    lead: int  # before them, for caches and threads that have gone cold meanwhile
    rounds: int

    @property
    def name(self) -> str:
        """Of the model."""
        return self.work.model


def workloads(device_type: str, tiny: bool) -> list[Workload]:
    """Returns what is trained on a kind of device.

    A turn, its lead included, has as many steps as there are between two reports, or a multiple of them, so that each
    turn of a loop holds as many reports as its others.
    """
    if tiny:
        return [
            Workload(Work("small_cnn", (3, 8, 8), 4, 40, {"in_channels": 3, "width": 8}), steps=2, lead=1, rounds=2),
            Workload(
                Work("mlp", (16,), 4, 40, {"in_features": 16}, 10, "bf16", data="device", device_type=device_type),
                steps=2,
                lead=1,
                rounds=1,
            ),
        ]
    mlp = Work("mlp", (64,), 64, 64_000, {"in_features": 64, "hidden": [256, 256]}, device_type=device_type)
    if device_type != "cuda":
        resnet = Work("resnet18", (3, 32, 32), 64, 12_800, device_type=device_type, report_every=4)
        # Short turns: how fast these steps are here changes by a tenth within a minute.
        return [Workload(resnet, steps=3, lead=1, rounds=40), Workload(mlp, steps=300, lead=50, rounds=9)]

    def large(model: str) -> Workload:
        work = Work(model, (3, 224, 224), 256, 1_280_000, {}, 1000, "bf16", True, "device", device_type)
        return Workload(work, steps=45, lead=5, rounds=8)

    return [large("resnet50"), large("vit_b_16"), Workload(mlp, steps=300, lead=50, rounds=25)]


def run_loop(name: str, work: Work, after_step: AfterStep, folder: Path) -> None:
    """Runs one of the loops by its name, which can be pickled."""
    LOOPS[name](work, after_step, folder)


def measure(workload: Workload, names: Sequence[str], num_threads: int, seed: int) -> dict[str, Measured]:
    """Measures every loop once a round."""
    device = workload.work.device
    entrants: dict[str, Loop | Problem] = {
        name: Problem(IMPOSSIBLE[name], is_absence=True)
        if name in IMPOSSIBLE
        else partial(run_loop, name, workload.work)
        for name in names
    }
    turn = Turn(workload.lead, workload.steps)
    return take_turns(entrants, device, num_threads, turn, workload.rounds, seed, workload.name)


# ---- JSON, table and plot ------------------------------------------------------------------------------------


def count_flops(work: Work) -> float | None:
    """Returns the FLOPs of a sample, forward and backward; None where they cannot be counted."""
    counter = FlopCounter(work.build_model(), Classification(num_classes=work.num_classes), None)
    if counter.is_due:
        counter.count(list(work.fake_samples(2)), 2)
    return counter.per_sample


def summarize(
    workload: Workload, measured: Mapping[str, Measured], flops: float | None, peak: float, keep_loaded: bool
) -> list[dict[str, Any]]:
    """Returns what the JSON says of every loop of a workload, compared with ours and with the floor.

    The floor is the hand-written loop with the same memory; on a GPU all have it.

    Args:
        workload: what was trained.
        measured: by loop.
        flops: of a sample.
        peak: FLOP/s of the device.
        keep_loaded: whether rounds count in which others used the machine.
    """
    ours, floor = (measured.get(loop, Measured()).times for loop in (OURS, _floor(measured)))
    entries = []
    for name, entry in measured.items():
        compared = compare(entry.times, ours, keep_loaded)
        beyond = [
            1e6 * (t.seconds - f.seconds)
            for t, f in zip(entry.times, floor, strict=False)
            if keep_loaded or max(t.foreign_cores, f.foreign_cores) <= MOST_FOREIGN_CORES
        ]
        rate = workload.work.batch_size / compared["seconds"]["median"] if compared["seconds"] else None
        entries.append(
            {
                "model": workload.name,
                "loop": name,
                **compared,
                "overhead_microseconds": spread(beyond),
                "samples_per_second": rate,
                "mfu": rate * flops / peak if rate is not None and flops is not None else None,
                "num_threads": entry.num_threads,
                "problem": str(entry.problem) if entry.problem else None,
                "is_left_out": entry.problem is not None and entry.problem.is_absence,
            }
        )
    return entries


def table(result: Mapping[str, Any]) -> str:
    """Returns the Markdown table of a result, with a line about what it was measured on."""
    header = ["model", "loop", "", "ms per step", "min to max", f"to `{OURS}`", "min to max", "95% interval"]
    floor = _floor([entry["loop"] for entry in result["entries"]])
    header += [f"above `{floor}`, µs", "samples/s", "MFU"]
    rows = [header, ["---"] * 3 + ["---:"] * 8]
    ours = {entry["model"]: entry for entry in result["entries"] if entry["loop"] == OURS}
    for entry in result["entries"]:
        name, beyond = entry["loop"], entry["overhead_microseconds"]
        row = [entry["model"], f"`{name}`", DESCRIPTIONS[name], *show_times(entry)]
        if entry["seconds"] is None:
            rows.append([*row, "", "", "", ""])
            continue
        interval = _interval(entry, ours) if name != OURS else None
        row.append("" if interval is None else "{:.2f} to {:.2f}".format(*interval))
        above = "" if beyond is None or name == floor else f"{beyond['median']:+.0f}"
        mfu = "" if entry["mfu"] is None else f"{100 * entry['mfu']:.1f}%"
        rows.append([*row, above, f"{entry['samples_per_second']:.0f}", mfu])
    settings = result["settings"]
    threads = sorted({str(entry["num_threads"]) for entry in result["entries"] if entry["num_threads"]})
    notes = [
        f"to `{OURS}`: time within the same round, above 1 is slower than ours",
        "95% interval: of the median ratio, by order statistics",
        f"above `{floor}`: time of a step within the same round, less that of this hand-written loop",
        *(_describe(workload) for workload in settings["workloads"]),
        *_reports_note(settings["workloads"]),
        "the data in memory are tensors, of which our trainer takes a batch at once, and the others' loaders sample by "
        "sample; to each sample of a data set of a user's own it gives a seed, which is not in these figures",
        "SGD with momentum; the same memory format, in which our trainer keeps the model",
        *_memory_note(floor),
        f"torch's threads: {', '.join(threads)} in every loop",
        f"MFU: of {_peaks(result['peak_flops'])}",
        load_note(result["entries"], settings["keep_loaded"]),
        *origin(result),
    ]
    return markdown_table(rows, notes) + "\n" + "".join(_goals(result["entries"], ours))


def _interval(entry: Mapping[str, Any], ours: Mapping[str, Mapping[str, Any]]) -> tuple[float, float] | None:
    """Returns between which limits the median ratio to ours lies."""
    own = ours.get(entry["model"])
    return median_interval(paired_ratios(entry, own)) if own else None


def _goals(entries: Sequence[Mapping[str, Any]], ours: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yields a line for each of `GOALS`, with whether these rounds can tell."""
    for entry in entries:
        least = GOALS.get(entry["loop"])
        if entry["model"] != GOAL_MODEL or least is None:
            continue
        ratio, interval = entry["time_ratio"], _interval(entry, ours)
        what = f"{GOAL_MODEL}, our speed to that of `{entry['loop']}`"
        if interval is not None:
            what += " (95% interval {:.3f} to {:.3f}".format(*interval)
            what += ", the bar is within it)" if interval[0] < least <= interval[1] else ")"
        yield goal_text(what, ratio and ratio["median"], least=least)


def _reports_note(workloads: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns where the reports are, for the models whose turns have one: there it matters."""
    with_one = [w for w in workloads if w["lead"] + w["steps"] == w["work"]["report_every"]]
    if not with_one:
        return []
    names = ", ".join(workload["work"]["model"] for workload in with_one)
    return [
        f"each turn of {names} has one report: ours in the steps that are counted, that of Lightning's and timm's "
        "loops in the uncounted ones before them, to our disadvantage"
    ]


def _memory_note(floor: str) -> list[str]:
    """Returns which loops have other memory than by default."""
    if floor != PAGED:
        return []
    return [
        f"ours has huge pages by default (`backends.huge_pages`), and so has `{PAGED}`; the others have memory as "
        "PyTorch gives it by default"
    ]


def _floor(loops_there: Collection[str]) -> str:
    """Returns the loop above which a step's time is what the loop itself costs."""
    return PAGED if PAGED in loops_there else RAW


def _peaks(peaks: float | Mapping[str, float]) -> str:
    """Returns the peaks of the models' precisions, or the one that the first results have."""
    if not isinstance(peaks, Mapping):
        return f"{peaks / 1e12:.3g} TFLOP/s"
    return ", ".join(f"{peak / 1e12:.3g} TFLOP/s ({model})" for model, peak in peaks.items())


def _describe(workload: Mapping[str, Any]) -> str:
    work = workload["work"]
    where = "one batch on the device" if work["data"] == "device" else "data in memory, loaded by the training process"
    shape, precision = "x".join(map(str, work["shape"])), "float32" if work["precision"] == "no" else work["precision"]
    compiled = ", compiled" if work["compile"] else ""
    return (
        f"{work['model']}: batches of {work['batch_size']}, {shape}, {precision}{compiled}, {where}, a report every "
        f"{work['report_every']} steps, median of {workload['rounds']} alternating rounds of {workload['steps']} steps "
        f"after {workload['lead']}"
    )


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Draws the time of each loop's step as a ratio to ours, a panel per model.

    Raises:
        ImportError: matplotlib is not installed.
    """
    groups: dict[str, list[Bar]] = {}
    for entry in result["entries"]:
        if entry["time_ratio"] is not None:
            bar = Bar(entry["loop"], entry["time_ratio"], ours=entry["loop"] == OURS)
            groups.setdefault(entry["model"], []).append(bar)
    draw_bars(groups, f"time of a step, to {OURS} (median, min to max)", file, bar=1)


# ---- command line --------------------------------------------------------------------------------------------


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("benchmarks.step_overhead", __doc__)
    add_device(parser)
    add_tiny(parser)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="of those of the device; default: all")
    parser.add_argument("--loops", nargs="+", metavar="NAME", choices=NAMES, default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, help="default: as many as each model needs")
    parser.add_argument("--threads", type=int, default=cores_of_a_rank(1), help="of torch; default: one per core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-loaded", action="store_true", help="keep rounds in which others used the machine too")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.threads, options.keep_loaded = 1, True
    if min(options.threads, options.rounds or 1) < 1:
        parser.error("--rounds and --threads must be at least 1")
    return options


def _chosen(options: argparse.Namespace) -> Iterator[Workload]:
    for workload in workloads(options.device, options.tiny):
        if options.models is None or workload.name in options.models:
            rounds = options.rounds or workload.rounds
            yield Workload(workload.work, workload.steps, workload.lead, rounds)


def _run(options: argparse.Namespace, given: Sequence[str] | None) -> dict[str, Any]:
    """Measures, and writes what is known after each model: a run that is cut short leaves its models behind."""
    chosen = list(_chosen(options))
    names = [name for name in NAMES if name in options.loops and (name != PAGED or options.device == "cpu")]
    environment = describe("benchmarks.step_overhead", given, [*PACKAGES, "torchvision"], options.device)
    started = time.monotonic()
    result: dict[str, Any] = {
        "environment": environment,
        "settings": {
            "workloads": [asdict(workload) for workload in chosen],
            "most_foreign_cores": MOST_FOREIGN_CORES,
            "keep_loaded": options.keep_loaded,
            "seed": options.seed,
            "tiny": options.tiny,
        },
        "peak_flops": {},
        "took_seconds": 0.0,
        "entries": [],
    }
    for workload in chosen:
        flops = count_flops(workload.work)
        peak = peak_flops(torch.device(options.device), STEP_DTYPES[workload.work.precision], False, False)
        result["peak_flops"][workload.name] = peak
        measured = measure(workload, names, options.threads, options.seed)
        result["entries"] += summarize(workload, measured, flops, peak, options.keep_loaded)
        result["took_seconds"] = round(time.monotonic() - started, 1)
        write(result, options.json)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 without a GPU, 1 where a loop failed for another reason than a missing library."""
    options = _arguments(arguments)
    if options.markdown:
        return show_again(options.json, table)
    if not is_ready(options.device):
        return 2
    result = _run(options, arguments)
    sys.stdout.write(table(result))
    failed = any(entry["problem"] and not entry["is_left_out"] for entry in result["entries"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
