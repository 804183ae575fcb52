"""Training from JPEGs on a GPU: how much of the speed with data already there each feed keeps, in the same run.

    python -m benchmarks.feed_training --json benchmarks/results/feed-training.json

Owns the loop, the feeds, the rounds, the JSON that comes of them and its table. All feeds but `train.py` go through
one plain loop with the same model, precision and optimizer, so that only the feed differs; `train.py` is our whole
trainer on the `host` feed, read from its reports. Every round measures each feed once per model, in random order.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks.feed import TIMEOUT, Problem, _show_progress, _spread, describe_environment
from benchmarks.peers import AREA, ASPECT, ENTRIES, MEAN, SIZE, STD, open_timm_loader
from benchmarks.pictures import DEFAULT_FOLDER, NUM_CLASSES, Shape, describe, make_picture, make_pictures
from trainer.config_data import DataConfig
from trainer.config_model import ModelConfig
from trainer.data.datasets import ImageFolder
from trainer.data.feed import DeviceFeed
from trainer.data.sampler import BatchPlan, StepSampler
from trainer.data.tuning import cores_of_a_rank
from trainer.errors import UserError, one_line
from trainer.model import build_model
from trainer.tasks.classification import Classification

NUM_OUTPUTS = 1000  # of the models, as on ImageNet; the pictures' labels are the first of them
PRECISION = torch.bfloat16
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
YARDSTICK = "synthetic"
TRACED_STEPS = 8
TINY_MODEL = "small_cnn"

_REPOSITORY = Path(__file__).resolve().parent.parent
_ENDLESS = 10**6  # steps
_FIRST_STEPS = 3  # these compile, choose kernels and allocate; then the seconds of the warm-up begin
_REPORT_STEPS = 10
_STOPPED = 75  # train.py's exit code where it was asked to stop
_TINY_SHAPE = Shape(width=96, height=72, target_bytes=4000, grain=2)

Batches = Generator[tuple[torch.Tensor, torch.Tensor], None, None]  # images and labels on the device, without end


@dataclass(frozen=True)
class Setup:
    """What the measurements of one model have in common."""

    model: str
    folder: Path  # class folders of JPEGs
    batch_size: int
    image_size: int  # pixels, of both sides
    workers: int
    device: torch.device
    compile: bool
    seconds: float  # that are counted
    warm_up_seconds: float  # before them


@dataclass(frozen=True)
class Measurement:
    """What one window gave."""

    images: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Pictures trained on per second on the clock."""
        return self.images / self.seconds


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
    config = DataConfig.model_validate(_data_section(setup, mode))
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


def _data_section(setup: Setup, mode: str) -> dict[str, Any]:
    """Returns the `data` section of our config."""
    crop = {"name": "RandomResizedCrop", "args": {"size": setup.image_size, "scale": list(AREA), "ratio": list(ASPECT)}}
    return {
        "train": {"name": "image_folder", "args": {"root": str(setup.folder)}},
        "transforms": {"train": [crop, {"name": "RandomHorizontalFlip"}]},
        "normalize": {"mean": list(MEAN), "std": list(STD)},
        "feed": mode,
        "workers": setup.workers,
        "drop_last": True,
    }


def _model_section(setup: Setup) -> dict[str, Any]:
    """Returns the `model` section of our config."""
    channels = {"in_channels": 3} if setup.model == TINY_MODEL else {}
    return {"name": setup.model, "args": {"num_classes": NUM_OUTPUTS, **channels}}


# ---- the plain loop ------------------------------------------------------------------------------------------


class PlainLoop:
    """A model in training: forward and backward in bfloat16 autocast, channels_last, SGD with momentum."""

    def __init__(self, setup: Setup) -> None:
        self.device = setup.device
        model = build_model(ModelConfig.model_validate(_model_section(setup)), NUM_OUTPUTS)
        model = model.to(setup.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = torch.optim.SGD(
            model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self._model: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model) if setup.compile else model

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> int:
        """Trains on a batch, without waiting for the device; returns the number of its images."""
        with torch.autocast(self.device.type, PRECISION):
            outputs = self._model(images.contiguous(memory_format=torch.channels_last))
            loss = torch.nn.functional.cross_entropy(outputs, labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return len(images)

    def measure(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], setup: Setup) -> Measurement:
        """Trains through a warm-up that does not count, then counts images for `setup.seconds`."""
        for _ in range(_FIRST_STEPS):
            self.step(*next(batches))
        self._train_for(setup.warm_up_seconds, batches)
        return self._train_for(setup.seconds, batches)

    def trace(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], file: Path) -> tuple[int, int]:
        """Writes a Chrome trace of some steps; returns its copies, and how many of them overlap with kernels."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        for _ in range(TRACED_STEPS):
            self.step(*next(batches))
        self._wait()
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(TRACED_STEPS):
                self.step(*next(batches))
            self._wait()
        file.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(file))
        return count_overlapping_copies(json.loads(file.read_text(encoding="utf-8")))

    def _train_for(self, seconds: float, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> Measurement:
        self._wait()
        images = 0
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            images += self.step(*next(batches))
        self._wait()
        return Measurement(images, time.perf_counter() - started)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def count_overlapping_copies(trace: Mapping[str, Any]) -> tuple[int, int]:
    """Counts a Chrome trace's copies to the device, and those during which a kernel of another stream ran.

    Args:
        trace: what `torch.profiler` exports.
    """
    events = [event for event in trace["traceEvents"] if event.get("cat") in ("kernel", "gpu_memcpy")]
    kernels = [event for event in events if event["cat"] == "kernel"]
    copies = [event for event in events if event["cat"] == "gpu_memcpy" and "HtoD" in event["name"]]

    def overlap(copy: Mapping[str, Any], kernel: Mapping[str, Any]) -> bool:
        is_elsewhere = copy["args"]["stream"] != kernel["args"]["stream"]
        starts_before_end = kernel["ts"] < copy["ts"] + copy["dur"] and copy["ts"] < kernel["ts"] + kernel["dur"]
        return is_elsewhere and bool(starts_before_end)

    return len(copies), sum(any(overlap(copy, kernel) for kernel in kernels) for copy in copies)


# ---- our whole trainer ---------------------------------------------------------------------------------------


def measure_trainer(setup: Setup, seed: int) -> Measurement:
    """Runs train.py until its reports cover the warm-up and the window, then asks it to stop.

    Raises:
        Problem: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="lockstep-feed-training-") as folder:
        run_dir = Path(folder) / "run"
        config = {
            "run": {"name": "feed-training", "dir": str(run_dir), "seed": seed},
            "data": _data_section(setup, "host"),
            "model": _model_section(setup),
            "optim": {
                "name": "sgd",
                "lr": LEARNING_RATE,
                "weight_decay": WEIGHT_DECAY,
                "args": {"momentum": MOMENTUM},
            },
            "precision": "bf16",
            "train": {"steps": _ENDLESS, "batch_size": setup.batch_size},
            "log": {"every": _REPORT_STEPS},
            "checkpoint": {"every": _ENDLESS},
            "tracking": {"trackers": []},
        }
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        with _running_trainer(file, setup.device) as trainer:
            deadline = time.monotonic() + TIMEOUT
            while (taken := _read_reports(run_dir / "metrics.jsonl", setup)) is None:
                if trainer.poll() is not None:
                    raise Problem(_last_line(trainer), is_absence=False)
                if time.monotonic() > deadline:
                    raise Problem(f"not done after {TIMEOUT} s", is_absence=False)
                time.sleep(0.2)
            trainer.send_signal(signal.SIGTERM)
            if trainer.wait(TIMEOUT) not in (0, _STOPPED):
                raise Problem(_last_line(trainer), is_absence=False)
    return taken


@contextmanager
def _running_trainer(config: Path, device: torch.device) -> Iterator[subprocess.Popen[str]]:
    variables = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    with open(config.with_suffix(".log"), "w+", encoding="utf-8") as log:
        trainer = subprocess.Popen(
            [sys.executable, "train.py", "--config", str(config)],
            cwd=_REPOSITORY,
            env={**os.environ, **variables},
            stdout=log,
            stderr=log,
            text=True,
        )
        trainer.stderr = log
        try:
            yield trainer
        finally:
            if trainer.poll() is None:
                trainer.kill()
            trainer.wait()


def _last_line(trainer: subprocess.Popen[str]) -> str:
    assert trainer.stderr is not None
    trainer.stderr.seek(0)
    return (trainer.stderr.read().strip().splitlines() or [f"exit code {trainer.returncode}"])[-1]


def _read_reports(file: Path, setup: Setup) -> Measurement | None:
    """Returns what the reports of a run say about the window; None while they do not cover it."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    reports = [json.loads(line) for line in lines if line.endswith("\n") and "train/samples_per_second" in line]
    samples = warmed = images = 0
    seconds = 0.0
    for number, report in enumerate(reports):
        in_report = report["samples"] - samples
        samples = report["samples"]
        took = in_report / report["train/samples_per_second"]
        if number == 0:  # compiles, chooses kernels, starts workers
            continue
        if warmed < setup.warm_up_seconds:
            warmed += took
            continue
        images += in_report
        seconds += took
        if seconds >= setup.seconds:
            return Measurement(images, seconds)
    return None


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
            order = [name for name in names if (setup.model, name) not in problems]
            random.Random(seed + number).shuffle(order)
            for name in order:
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
        if setup.compile:
            raise Problem("train.py cannot compile the model", is_absence=True)
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
    rates = {key: _spread([m.images_per_second for m in measured]) for key, measured in taken.items()}
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


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns on what, with which libraries and from what source the benchmark ran."""
    command = shlex.join(["python", "-m", "benchmarks.feed_training", *sys.argv[1:]])
    packages = {**ENTRIES["ours"].versions(), **ENTRIES["timm"].versions()}
    result = {**describe_environment(), "command": command, "packages": packages, "gpu": None, "cuda": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result["gpu"] = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        result["cuda"] = torch.version.cuda
    return result


def table(result: dict[str, Any]) -> str:
    """Returns the Markdown table of a result, with a line about what it was measured on."""
    environment, settings, pictures = result["environment"], result["settings"], result["pictures"]
    rows = [["model", "feed", "", "images/s", "min to max", "of synthetic"], ["---"] * 3 + ["---:"] * 3]
    for entry in result["entries"]:
        name, rate, share = entry["feed"], entry["images_per_second"], entry["share_of_synthetic"]
        row = [entry["model"], f"`{name}`", DESCRIPTIONS[name]]
        if rate is None:
            row += ["-", entry["problem"] or "not measured", ""]
        else:
            spread = f"{rate['min']:.0f} to {rate['max']:.0f}"
            row += [f"{rate['median']:.0f}", spread, "" if share is None else f"{100 * share:.0f}%"]
        rows.append(row)
    gpu = environment["gpu"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    notes = [
        f"{gpu['name']} ({gpu['memory_gib']} GiB)" if gpu else "no GPU",
        f"{environment['cpu']}, {environment['cores']} cores, {settings['workers']} workers",
        f"batches of {settings['batch_size']}, {settings['image_size']} pixels, bfloat16 autocast, channels_last, SGD"
        + (", compiled" if settings["compile"] else ""),
        f"{pictures['pictures']} JPEGs of {', '.join(pictures['pixels'])} pixels, "
        f"{pictures['mean_bytes'] / 1000:.0f} kB on average, in the page cache",
        f"median of {settings['rounds']} alternating rounds of {settings['seconds']:g} s "
        f"after {settings['warm_up_seconds']:g} s",
        f"Python {environment['python']}, {packages}",
        f"{environment['date'][:10]}, commit {(environment['commit'] or 'unknown')[:10]}",
    ]
    if result["trace"]:
        copies, overlapping = result["trace"]["copies"], result["trace"]["overlapping"]
        notes.insert(-1, f"in the trace, {overlapping} of {copies} copies to the device overlap with kernels")
    return "\n".join([*("| " + " | ".join(row) + " |" for row in rows), "", "; ".join(notes) + "."]) + "\n"


# ---- command line --------------------------------------------------------------------------------------------


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.feed_training", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--json", type=Path, required=True, help="where the result goes; read with --markdown")
    parser.add_argument("--markdown", action="store_true", help="measure nothing: print the table of --json")
    parser.add_argument("--models", nargs="+", metavar="NAME", default=["resnet18", "resnet50"])
    parser.add_argument("--feeds", nargs="+", metavar="NAME", choices=NAMES, default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=max(cores_of_a_rank(1) - 1, 1), help="of every feed")
    parser.add_argument("--seconds", type=float, default=10.0, help="counted per measurement")
    parser.add_argument("--warm-up", type=float, default=4.0, help="seconds before those that are counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000, help="JPEGs in the folder")
    parser.add_argument("--compile", action="store_true", help="compile the model; leaves out train.py")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="also trace some steps of `host`, to a .json file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a check that all parts run: measures nothing of interest")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the JPEGs are kept")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.models, arguments.batch_size, arguments.workers, arguments.images = [TINY_MODEL], 4, 1, 24
        arguments.seconds, arguments.warm_up, arguments.rounds = 0.2, 0.0, 1
    if min(arguments.batch_size, arguments.workers, arguments.rounds) < 1 or arguments.seconds <= 0:
        parser.error("--batch-size, --workers, --rounds and --seconds must be positive")
    if arguments.images < arguments.batch_size:
        parser.error(f"{arguments.images} images make no batch of {arguments.batch_size}")
    return arguments


def make_tiny_pictures(count: int, folder: Path) -> Path:
    """Returns a folder of `count` small JPEGs in class folders, made of coloured clouds: nobody needs photos here."""
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    photos = [Image.fromarray(colours).resize((320, 240), Image.Resampling.BICUBIC)]
    for i in range(count):
        label = folder / f"class-{i % NUM_CLASSES}"
        label.mkdir(parents=True, exist_ok=True)
        (label / f"{i:06d}.jpg").write_bytes(make_picture(photos, _TINY_SHAPE, 0, i))
    return folder


def _run(arguments: argparse.Namespace, folder: Path) -> int:
    """Measures, and writes what is known after each round: a run that is cut short leaves its rounds behind."""
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    environment = describe_machine(device)  # before: a commit made meanwhile is not what was measured
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as timm's train.py and torchvision's reference have it
    setups = [
        Setup(
            model=model,
            folder=folder,
            batch_size=arguments.batch_size,
            image_size=16 if arguments.tiny else SIZE,
            workers=arguments.workers,
            device=device,
            compile=arguments.compile,
            seconds=arguments.seconds,
            warm_up_seconds=arguments.warm_up,
        )
        for model in arguments.models
    ]
    settings = {key: value for key, value in asdict(setups[0]).items() if key not in ("model", "folder", "device")}
    result: dict[str, Any] = {
        "environment": environment,
        "settings": {**settings, "rounds": 0, "seed": arguments.seed, "tiny": arguments.tiny},
        "pictures": describe(folder),
        "trace": _trace(setups[0], arguments.trace, arguments.seed) if arguments.trace else None,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name in NAMES if name in arguments.feeds]
    problems: Mapping[Any, Problem] = {}
    for taken, problems in run_rounds(setups, names, arguments.rounds, arguments.seed):
        result["settings"]["rounds"] += 1
        result["entries"] = summarize(taken, problems)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(table(result))
    return int(any(not problem.is_absence for problem in problems.values()))


def _trace(setup: Setup, file: Path, seed: int) -> dict[str, Any]:
    with closing(FEEDS["host"](setup, seed)) as batches:
        copies, overlapping = PlainLoop(setup).trace(batches, file)
    return {"model": setup.model, "steps": TRACED_STEPS, "copies": copies, "overlapping": overlapping}


def main() -> int:
    """Returns the exit code: 2 without a GPU, 1 where a feed failed for another reason than a missing library."""
    arguments = _arguments()
    if arguments.markdown:
        sys.stdout.write(table(json.loads(arguments.json.read_text(encoding="utf-8"))))
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("there is no CUDA GPU here; `--device cpu --tiny` checks that all parts run\n")
        return 2
    if arguments.tiny:
        with tempfile.TemporaryDirectory(prefix="lockstep-tiny-pictures-") as temporary:
            return _run(arguments, make_tiny_pictures(arguments.images, Path(temporary)))
    return _run(arguments, make_pictures(arguments.images, "imagenet", arguments.folder, progress=_show_progress))


if __name__ == "__main__":
    sys.exit(main())
