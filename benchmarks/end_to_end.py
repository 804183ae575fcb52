"""From a folder of JPEGs to a trained model: pictures per second and CPU time, ours against our peers in the same run.

    python -m benchmarks.end_to_end --json benchmarks/results/end-to-end-cpu.json
    python -m benchmarks.end_to_end --device cuda --json benchmarks/results/end-to-end-gpu.json

Owns which loader goes with which loop, the JSON that comes of it, its table and its plot. Each has its own loader and
its own loop, with the same crops, flips, model, precision, optimizer and number of workers. The loops are
`benchmarks.loops`, their loaders are in `benchmarks.peers`, how they take turns is `benchmarks.turns`. What a feed
alone is worth, under one loop on a GPU, is `benchmarks.feed_training`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import loops
from benchmarks.commands import add_device, add_rounds, add_tiny, is_ready, new_parser, show_again
from benchmarks.drawing import Bar, draw_bars
from benchmarks.feed_entries import AREA, ASPECT, MEAN, STD
from benchmarks.feed_training import make_tiny_pictures
from benchmarks.loops import AfterStep, Work
from benchmarks.peers import open_timm_loader, open_torchvision_loader
from benchmarks.pictures import DEFAULT_FOLDER, NUM_CLASSES, describe_pictures, list_pictures, make_pictures
from benchmarks.plain_loop import TINY_MODEL
from benchmarks.rounds import MOST_FOREIGN_CORES, compare, load_note
from benchmarks.telling import describe, markdown_table, origin, range_text, spread, write
from benchmarks.turns import Loop, Measured, Turn, take_turns
from trainer.data.tuning import cores_of_a_rank
from trainer.precision import HUGE_PAGES_VARIABLE
from trainer.units import counted

OURS, RESIDENT = "ours", "ours-resident"
DESCRIPTIONS = {
    "torchvision": "torchvision's loader, a loop by hand",
    "lightning": "torchvision's loader, Lightning's Trainer",
    "timm": "timm's loader, the loop of its train.py",
    OURS: "our `host` feed, our Trainer",
    RESIDENT: "our `resident` feed, our Trainer: nothing is decoded while it is measured",
}
NAMES = tuple(DESCRIPTIONS)
ONLY_ON_GPU = (RESIDENT,)
BATCHES_PER_WORKER = 50  # of an epoch, at least: where an epoch ends, loaders run empty and are filled anew
PACKAGES = ("torchvision", "accelerate", "lightning", "timm")


@dataclass(frozen=True)
class Setup:
    """What all entries have in common."""

    work: Work
    pictures: Path  # class folders, with every picture several times where an epoch would be short
    originals: Path  # class folders, with every picture once
    num_workers: int
    lead: int  # steps of a turn that are not counted: what was loaded while others had their turn is used up
    steps: int
    seed: int


def _torchvision(setup: Setup) -> Any:
    size, on_gpu = setup.work.shape[-1], setup.work.device_type == "cuda"
    return open_torchvision_loader(
        setup.pictures,
        setup.work.batch_size,
        setup.seed,
        size,
        num_workers=setup.num_workers,
        pin_memory=on_gpu,
        drop_last=True,
    )


def run_torchvision(setup: Setup, after_step: AfterStep, folder: Path) -> None:
    """A hand-written loop."""
    loops.raw(setup.work, _torchvision(setup), after_step)


def run_lightning(setup: Setup, after_step: AfterStep, folder: Path) -> None:
    """Lightning, with the same loader."""
    loops.lightning(setup.work, _torchvision(setup), after_step, folder)


def run_timm(setup: Setup, after_step: AfterStep, folder: Path) -> None:
    """The loop of timm's train.py with its loader and prefetcher."""
    loader = open_timm_loader(
        setup.pictures,
        setup.work.batch_size,
        setup.seed,
        setup.work.shape[-1],
        num_workers=setup.num_workers,
        pin_memory=setup.work.device_type == "cuda",
        device=setup.work.device,
    )
    loops.timm(setup.work, loader, after_step)


def run_ours(setup: Setup, after_step: AfterStep, folder: Path, feed: str = "host") -> None:
    """Our Trainer, on its feed whose workers decode each picture of each step, as those of the others do."""
    crop = {"size": setup.work.shape[-1], "scale": list(AREA), "ratio": list(ASPECT)}
    data = {
        "train": {"name": "image_folder", "args": {"root": str(setup.pictures if feed == "host" else setup.originals)}},
        "feed": feed,
        "transforms": {"train": [{"name": "RandomResizedCrop", "args": crop}, {"name": "RandomHorizontalFlip"}]},
        "normalize": {"mean": list(MEAN), "std": list(STD)},
        "workers": setup.num_workers,
        "drop_last": True,
    }
    loops.ours(setup.work, after_step, folder, data=data)


ENTRIES: dict[str, Callable[[Setup, AfterStep, Path], None]] = {
    "torchvision": run_torchvision,
    "lightning": run_lightning,
    "timm": run_timm,
    OURS: run_ours,
    RESIDENT: partial(run_ours, feed="resident"),
}


# ---- JSON, table and plot ------------------------------------------------------------------------------------


def summarize(measured: Mapping[str, Measured], batch_size: int, keep_loaded: bool) -> list[dict[str, Any]]:
    """Returns what the JSON says of every entry, compared with ours.

    Args:
        measured: by entry, the times of a step.
        batch_size: pictures of a step.
        keep_loaded: whether rounds count in which others used the machine.
    """
    ours = measured.get(OURS, Measured()).times
    entries = []
    for name, entry in measured.items():
        compared = compare(entry.times, ours, keep_loaded)
        kept = [timing for timing, taken in zip(entry.times, compared["rounds"], strict=True) if taken["kept"]]
        entries.append(
            {
                "entry": name,
                **compared,
                "images_per_second": spread([batch_size / timing.seconds for timing in kept]),
                "cpu_seconds_per_image": spread([t.seconds * t.own_cores / batch_size for t in kept]),
                "num_threads": entry.num_threads,
                "problem": str(entry.problem) if entry.problem else None,
                "is_left_out": entry.problem is not None and entry.problem.is_absence,
            }
        )
    return entries


def table(result: Mapping[str, Any]) -> str:
    """Returns the Markdown table of a result, with a line about what it was measured on."""
    rows = [["", "", "images/s", "min to max", f"time, to `{OURS}`", "min to max", "CPU ms per image"]]
    rows.append(["---"] * 2 + ["---:"] * 5)
    for entry in result["entries"]:
        name, rate, ratio = entry["entry"], entry["images_per_second"], entry["time_ratio"]
        row = [f"`{name}`", DESCRIPTIONS[name]]
        if rate is None:
            rows.append([*row, "-", entry["problem"] or "no quiet round", "", "", ""])
            continue
        row += [f"{rate['median']:.0f}", range_text(rate, 0)]
        row += ["", ""] if ratio is None else [f"{ratio['median']:.2f}", range_text(ratio, 2)]
        rows.append([*row, f"{1000 * entry['cpu_seconds_per_image']['median']:.1f}"])
    settings, pictures = result["settings"], result["pictures"]
    work = settings["work"]
    precision = "float32" if work["precision"] == "no" else work["precision"]
    notes = [
        f"time, to `{OURS}`: of a step, within the same round, above 1 is slower than ours",
        f"{work['model']}, {work['shape'][-1]} pixels, batches of {work['batch_size']}, {precision}"
        + (", compiled" if work["compile"] else ""),
        f"each with {counted(settings['num_workers'], 'worker')} and {counted(settings['num_threads'], 'thread')} "
        "of torch",
        f"{pictures['pictures']} JPEGs of {', '.join(pictures['pixels'])} pixels, "
        f"{pictures['mean_bytes'] / 1000:.0f} kB on average, in the page cache, "
        f"{counted(work['num_samples'] // work['batch_size'], 'step')} in an epoch",
        f"median of {settings['rounds']} alternating rounds of {settings['steps']} steps",
        *(["huge pages for all, as ours has them by default"] if settings.get("huge_pages") else []),
        load_note(result["entries"], settings["keep_loaded"]),
        *origin(result),
    ]
    return markdown_table(rows, notes)


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Draws pictures per second, a bar for each.

    Raises:
        ImportError: matplotlib is not installed.
    """
    shown = [entry for entry in result["entries"] if entry["images_per_second"] is not None]
    bars = [Bar(e["entry"], e["images_per_second"], ours=e["entry"] in (OURS, RESIDENT)) for e in shown]
    draw_bars({"": bars}, "images/s, from JPEGs to a trained model (median, min to max)", file)


# ---- command line --------------------------------------------------------------------------------------------


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("benchmarks.end_to_end", __doc__)
    add_device(parser)
    add_rounds(parser, rounds=5)
    add_tiny(parser)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=NAMES, default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--model", help="default: resnet18 on a CPU, resnet50 on a GPU")
    parser.add_argument("--image-size", type=int, help="pixels; default: 96 on a CPU, 224 on a GPU")
    parser.add_argument("--batch-size", type=int, help="default: 32 on a CPU, 256 on a GPU")
    parser.add_argument("--workers", type=int, default=max(cores_of_a_rank(1) - 1, 1), help="of each entry")
    parser.add_argument("--threads", type=int, default=cores_of_a_rank(1), help="of torch; default: one per core")
    parser.add_argument("--steps", type=int, help="that are counted, of a turn; default: 12 on a CPU, 50 on a GPU")
    parser.add_argument("--images", type=int, default=2000, help="JPEGs in the folder")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the JPEGs are kept")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.only = [name for name in NAMES if name in options.only and (on_gpu or name not in ONLY_ON_GPU)]
    if options.tiny:
        options.model, options.image_size, options.batch_size, options.steps = TINY_MODEL, 16, 4, 2
        options.workers, options.threads, options.rounds, options.images = 1, 1, 1, 24
        options.keep_loaded = True
    options.model = options.model or ("resnet50" if on_gpu else "resnet18")
    options.image_size = options.image_size or (224 if on_gpu else 96)
    options.batch_size = options.batch_size or (256 if on_gpu else 32)
    options.steps = options.steps or (50 if on_gpu else 12)
    if min(options.workers, options.threads, options.steps) < 1:
        parser.error("--workers, --threads and --steps must be at least 1")
    if options.images < options.batch_size:
        parser.error(f"{options.images} images make no batch of {options.batch_size}")
    return options


@contextlib.contextmanager
def repeated(originals: Path, least: int) -> Iterator[Path]:
    """Gives a folder of class folders in which each picture is so often, as links, that there are `least` of them."""
    found = list_pictures(originals)
    with tempfile.TemporaryDirectory(prefix="lockstep-epoch-") as name:
        for number in range(-(-least // len(found))):
            for file in found:
                folder = Path(name) / file.parent.name
                folder.mkdir(exist_ok=True)
                (folder / f"{number}-{file.name}").symlink_to(file.resolve())
        yield Path(name)


def _run(options: argparse.Namespace, given: Sequence[str] | None, originals: Path, pictures: Path) -> dict[str, Any]:
    on_gpu = options.device == "cuda"
    environment = describe("benchmarks.end_to_end", given, PACKAGES, options.device)
    setup = Setup(
        work=Work(
            options.model,
            (3, options.image_size, options.image_size),
            options.batch_size,
            len(list_pictures(pictures)),
            {"in_channels": 3} if options.model == TINY_MODEL else {},
            NUM_CLASSES,
            "bf16" if on_gpu else "no",
            compile=on_gpu and not options.tiny,
            device_type=options.device,
        ),
        pictures=pictures,
        originals=originals,
        num_workers=options.workers,
        lead=2 * options.workers + 3,  # the batches that wait in the workers' queues, and on the device
        steps=options.steps,
        seed=options.seed,
    )
    for file in list_pictures(originals):
        file.read_bytes()  # so that all find them in the page cache
    started = time.monotonic()
    os.environ[HUGE_PAGES_VARIABLE] = "1"  # for all what ours has by default
    entrants: dict[str, Loop | Any] = {name: partial(ENTRIES[name], setup) for name in options.only}
    turn = Turn(setup.lead, setup.steps)
    measured = take_turns(
        entrants, setup.work.device, options.threads, turn, options.rounds, options.seed, "end to end"
    )
    result = {
        "environment": environment,
        "settings": {
            **asdict(setup),
            "pictures": None,
            "originals": None,
            "huge_pages": True,
            "rounds": options.rounds,
            "num_threads": options.threads,
            "most_foreign_cores": MOST_FOREIGN_CORES,
            "keep_loaded": options.keep_loaded,
            "tiny": options.tiny,
        },
        "pictures": describe_pictures(originals),
        "took_seconds": round(time.monotonic() - started, 1),
        "entries": summarize(measured, options.batch_size, options.keep_loaded),
    }
    write(result, options.json)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 without a GPU, 1 where an entry failed for another reason than a missing library."""
    options = _arguments(arguments)
    if options.markdown:
        return show_again(options.json, table)
    if not is_ready(options.device):
        return 2
    with contextlib.ExitStack() as stack:
        if options.tiny:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lockstep-tiny-pictures-")))
            originals = make_tiny_pictures(options.images, folder)
        else:
            originals = make_pictures(options.images, "imagenet", options.folder)
        least = BATCHES_PER_WORKER * options.batch_size * options.workers
        pictures = stack.enter_context(repeated(originals, least))
        result = _run(options, arguments, originals, pictures)
    sys.stdout.write(table(result))
    return int(any(entry["problem"] and not entry["is_left_out"] for entry in result["entries"]))


if __name__ == "__main__":
    sys.exit(main())
