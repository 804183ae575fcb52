"""Training from JPEGs on a GPU: how much of the speed with data already there each feed keeps, in the same run.

    python -m benchmarks.feed_training --json benchmarks/results/feed-training.json

Owns the feeds, the rounds, the JSON that comes of them and its table. All feeds but `train.py` go through
one plain loop with the same model, precision and optimizer (`benchmarks.plain_loop`); `train.py` is our whole trainer
(`benchmarks.whole_trainer`). Every round measures each feed once per model, in random order.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.commands import add_device, add_rounds, add_tiny, is_ready, new_parser, show_again
from benchmarks.drawing import Bar, draw_bars
from benchmarks.feed_entries import SIZE
from benchmarks.measure import ENTRIES
from benchmarks.peers import open_timm_loader
from benchmarks.pictures import DEFAULT_FOLDER, NUM_CLASSES, Shape, describe_pictures, make_picture, make_pictures
from benchmarks.plain_loop import (
    NUM_OUTPUTS,
    PRECISION,
    TINY_MODEL,
    TRACED_STEPS,
    Measurement,
    PlainLoop,
    Setup,
    data_section,
)
from benchmarks.rounds import Problem, in_rounds
from benchmarks.telling import describe, markdown_table, origin, range_text, spread, write
from benchmarks.whole_trainer import measure_trainer
from trainer.config_data import DataConfig
from trainer.data.datasets import ImageFolder
from trainer.data.feed import DeviceFeed
from trainer.data.sampler import BatchPlan, StepSampler
from trainer.data.tuning import cores_of_a_rank
from trainer.errors import UserError, one_line
from trainer.tasks.classification import Classification

YARDSTICK = "synthetic"

_ENDLESS = 10**6  # steps
_TINY_SHAPE = Shape(width=96, height=72, target_bytes=4000, grain=2)

Batches = Generator[tuple[torch.Tensor, torch.Tensor], None, None]  # images and labels on the device, without end


# ---- feeds ---------------------------------------------------------------------------------------------------


def synthetic(setup: Setup, seed: int) -> Batches:
    """One batch that is on the device already: what a feed can reach at most."""
    generator = torch.Generator().manual_seed(seed)
    shape = setup.batch_size, 3, setup.image_size, setup.image_size
    images = torch.randn(shape, generator=generator).to(setup.device, PRECISION, memory_format=torch.channels_last)
    labels = torch.randint(NUM_CLASSES, (setup.batch_size,), generator=generator).to(setup.device)
    while True:
        yield images, labels


def ours(mode: str, setup: Setup, seed: int) -> Batches:
    """Our `DeviceFeed` as our trainer opens it: images come in the precision of the step, channels_last."""
    config = DataConfig.model_validate(data_section(setup, mode))
    dataset = ImageFolder(str(setup.folder))
    task = Classification(num_classes=NUM_OUTPUTS)
    feed = DeviceFeed(dataset, config, "train", setup.device, seed, task, PRECISION, max_workers=setup.workers)
    try:
        plan = BatchPlan.split(len(dataset), setup.batch_size, None, num_ranks=1, drop_last=True)
        feed.start(StepSampler(plan, rank=0, seed=seed), step=0, total_steps=_ENDLESS)
        for step in range(_ENDLESS):
            for batch in feed.step_batches(step):
                yield batch.data[0], batch.data[1]
    finally:
        feed.close()


def timm(setup: Setup, seed: int) -> Batches:
    """timm's loader with its prefetcher, as its train.py has it, with the same crops and flips.

    Two of its options that are off by default make it faster and are on: pinned memory, and workers that go on from
    epoch to epoch, for our few pictures make short epochs.
    """
    loader = open_timm_loader(
        setup.folder,
        setup.batch_size,
        seed,
        setup.image_size,
        num_workers=setup.workers,
        pin_memory=setup.device.type == "cuda",
        device=setup.device,
        use_multi_epochs_loader=True,
    )
    while True:
        yield from loader


FEEDS: dict[str, Callable[[Setup, int], Batches]] = {
    YARDSTICK: synthetic,
    "host": partial(ours, "host"),
    "device_decode": partial(ours, "device_decode"),
    "resident": partial(ours, "resident"),
    "timm": timm,
}
WHOLE_TRAINER = "train.py"
NAMES = (*FEEDS, WHOLE_TRAINER)
DESCRIPTIONS = {
    YARDSTICK: "data already on the device",
    "host": "ours, workers decode",
    "device_decode": "ours, the GPU decodes",
    "resident": "ours, pixels live on the device",
    "timm": "timm's loader with prefetcher",
    WHOLE_TRAINER: "our whole trainer, `host` feed",
}


# ---- rounds, JSON and table ----------------------------------------------------------------------------------


def run_rounds(
    setups: Sequence[Setup], names: Sequence[str], rounds: int, seed: int
) -> Iterator[tuple[dict[tuple[str, str], list[Measurement]], dict[tuple[str, str], Problem]]]:
    """Measures every feed once a round and model; one that fails is left out from then on.

    Yields:
        After each round, all measurements so far by model and feed, and why feeds were left out.
    """
    taken: dict[tuple[str, str], list[Measurement]] = {(s.model, name): [] for s in setups for name in names}
    problems: dict[tuple[str, str], Problem] = {}
    loops = {setup.model: PlainLoop(setup) for setup in setups}
    for number in range(rounds):
        for setup in setups:
            names_left = [name for name in names if (setup.model, name) not in problems]
            for _, name in in_rounds(names_left, 1, seed + number):
                where = f"round {number + 1}: {setup.model}: {name}"
                try:
                    measurement = measure(name, setup, loops[setup.model], seed + number)
                except Problem as problem:
                    problems[setup.model, name] = problem
                    sys.stderr.write(f"{where}: {problem}\n")
                    continue
                taken[setup.model, name].append(measurement)
                sys.stderr.write(f"{where}: {measurement.images_per_second:.0f} images/s\n")
        yield taken, problems


def measure(name: str, setup: Setup, loop: PlainLoop, seed: int) -> Measurement:
    """Measures one feed once.

    Raises:
        Problem: its library is not installed, or it failed.
    """
    if name == WHOLE_TRAINER:
        return measure_trainer(setup, seed)
    try:
        with closing(FEEDS[name](setup, seed)) as batches:
            return loop.measure(batches, setup)
    except ImportError as error:
        raise Problem(str(error), is_absence=True) from error
    except UserError as error:
        is_absence = all(problem.path == "data.feed" for problem in error.problems)  # this machine lacks the way
        raise Problem(" ".join(str(error).split()), is_absence) from error
    except Exception as error:  # the others go on
        sys.stderr.write(traceback.format_exc())
        raise Problem(one_line(error), is_absence=False) from error
    finally:
        gc.collect()
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()  # what a stream of one feed has cached no other can use


def summarize(
    taken: Mapping[tuple[str, str], Sequence[Measurement]], problems: Mapping[tuple[str, str], Problem]
) -> list[dict[str, Any]]:
    """Returns what the JSON says about every model and feed, with its share of the yardstick's median."""
    rates = {key: spread([m.images_per_second for m in measured]) for key, measured in taken.items()}
    entries = []
    for (model, name), rate in rates.items():
        yardstick = rates.get((model, YARDSTICK))
        problem = problems.get((model, name))
        entries.append(
            {
                "model": model,
                "feed": name,
                "images_per_second": rate,
                "share_of_synthetic": rate["median"] / yardstick["median"] if rate and yardstick else None,
                "problem": str(problem) if problem else None,
                "rounds": [{**asdict(m), "images_per_second": m.images_per_second} for m in taken[model, name]],
            }
        )
    return entries


def table(result: Mapping[str, Any]) -> str:
    """Returns the Markdown table of a result, with a line about what it was measured on."""
    settings, pictures = result["settings"], result["pictures"]
    rows = [["model", "feed", "", "images/s", "min to max", "of synthetic"], ["---"] * 3 + ["---:"] * 3]
    for entry in result["entries"]:
        name, rate, share = entry["feed"], entry["images_per_second"], entry["share_of_synthetic"]
        row = [entry["model"], f"`{name}`", DESCRIPTIONS[name]]
        if rate is None:
            row += ["-", entry["problem"] or "not measured", ""]
        else:
            row += [f"{rate['median']:.0f}", range_text(rate, 0), "" if share is None else f"{100 * share:.0f}%"]
        rows.append(row)
    notes = [
        f"batches of {settings['batch_size']}, {settings['image_size']} pixels, bfloat16 autocast, channels_last, SGD"
        + (", compiled" if settings["compile"] else ""),
        f"{settings['workers']} workers",
        f"{pictures['pictures']} JPEGs of {', '.join(pictures['pixels'])} pixels, "
        f"{pictures['mean_bytes'] / 1000:.0f} kB on average, in the page cache",
        f"median of {settings['rounds']} alternating rounds of {settings['seconds']:g} s "
        f"after {settings['warm_up_seconds']:g} s",
        *origin(result),
    ]
    if result["trace"]:
        copies, overlapping = result["trace"]["copies"], result["trace"]["overlapping"]
        notes.insert(4, f"in the trace, {overlapping} of {copies} copies to the device overlap with kernels")
    return markdown_table(rows, notes)


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Draws images per second, model by model.

    Raises:
        ImportError: matplotlib is not installed.
    """
    groups: dict[str, list[Bar]] = {}
    for entry in result["entries"]:
        if entry["images_per_second"]:
            is_ours = entry["feed"] not in (YARDSTICK, "timm")
            bar = Bar(entry["feed"], entry["images_per_second"], ours=is_ours)
            groups.setdefault(entry["model"], []).append(bar)
    draw_bars(groups, "images per second (median, min to max)", file)


# ---- command line --------------------------------------------------------------------------------------------


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("benchmarks.feed_training", __doc__)
    add_device(parser, default="cuda")
    add_rounds(parser, rounds=3)
    add_tiny(parser)
    parser.add_argument("--models", nargs="+", metavar="NAME", default=["resnet18", "resnet50"])
    parser.add_argument("--feeds", nargs="+", metavar="NAME", choices=NAMES, default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=max(cores_of_a_rank(1) - 1, 1), help="of every feed")
    parser.add_argument("--seconds", type=float, default=10.0, help="counted per measurement")
    parser.add_argument("--warm-up", type=float, default=4.0, help="seconds before those that are counted")
    parser.add_argument("--images", type=int, default=2000, help="JPEGs in the folder")
    parser.add_argument("--compile", action="store_true", help="compile the model, in train.py as well")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="also trace some steps of `host`, to a .json file")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the JPEGs are kept")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.models, options.batch_size, options.workers, options.images = [TINY_MODEL], 4, 1, 24
        options.seconds, options.warm_up, options.rounds = 0.2, 0.0, 1
    if min(options.batch_size, options.workers) < 1 or options.seconds <= 0:
        parser.error("--batch-size, --workers and --seconds must be positive")
    if options.images < options.batch_size:
        parser.error(f"{options.images} images make no batch of {options.batch_size}")
    return options


def make_tiny_pictures(count: int, folder: Path) -> Path:
    """Returns a folder of `count` small JPEGs in class folders, made of coloured clouds: nobody needs photos here."""
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    photos = [Image.fromarray(colours).resize((320, 240), Image.Resampling.BICUBIC)]
    for i in range(count):
        label = folder / f"class-{i % NUM_CLASSES}"
        label.mkdir(parents=True, exist_ok=True)
        (label / f"{i:06d}.jpg").write_bytes(make_picture(photos, _TINY_SHAPE, 0, i))
    return folder


def _run(options: argparse.Namespace, given: Sequence[str] | None, folder: Path) -> int:
    """Measures, and writes what is known after each round: a run that is cut short leaves its rounds behind."""
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    environment = describe("benchmarks.feed_training", given, device_type=options.device)
    environment["packages"] |= {**ENTRIES["ours"].versions(), **ENTRIES["timm"].versions()}
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as timm's train.py and torchvision's reference have it
    setups = [
        Setup(
            model=model,
            folder=folder,
            batch_size=options.batch_size,
            image_size=16 if options.tiny else SIZE,
            workers=options.workers,
            device=device,
            compile=options.compile,
            seconds=options.seconds,
            warm_up_seconds=options.warm_up,
        )
        for model in options.models
    ]
    settings = {key: value for key, value in asdict(setups[0]).items() if key not in ("model", "folder", "device")}
    result: dict[str, Any] = {
        "environment": environment,
        "settings": {**settings, "rounds": 0, "seed": options.seed, "tiny": options.tiny},
        "pictures": describe_pictures(folder),
        "trace": _trace(setups[0], options.trace, options.seed) if options.trace else None,
    }
    names = [name for name in NAMES if name in options.feeds]
    problems: Mapping[Any, Problem] = {}
    for taken, problems in run_rounds(setups, names, options.rounds, options.seed):
        result["settings"]["rounds"] += 1
        result["entries"] = summarize(taken, problems)
        write(result, options.json)
    sys.stdout.write(table(result))
    return int(any(not problem.is_absence for problem in problems.values()))


def _trace(setup: Setup, file: Path, seed: int) -> dict[str, Any]:
    with closing(FEEDS["host"](setup, seed)) as batches:
        copies, overlapping = PlainLoop(setup).trace(batches, file)
    return {"model": setup.model, "steps": TRACED_STEPS, "copies": copies, "overlapping": overlapping}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 without a GPU, 1 where a feed failed for another reason than a missing library."""
    options = _arguments(arguments)
    if options.markdown:
        return show_again(options.json, table)
    if not is_ready(options.device):
        return 2
    if options.tiny:
        with tempfile.TemporaryDirectory(prefix="lockstep-tiny-pictures-") as temporary:
            return _run(options, arguments, make_tiny_pictures(options.images, Path(temporary)))
    return _run(options, arguments, make_pictures(options.images, "imagenet", options.folder))


if __name__ == "__main__":
    sys.exit(main())
