"""`python -m launch plan`: what a run will take on a device that need not be here, and which settings fit.

Reads two samples of the training data (or is told their shape) and builds the model without memory; starts nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from trainer.assembly import class_count
from trainer.config import Config
from trainer.config_values import Component
from trainer.data.build import build_data
from trainer.data.datasets import SizedDataset
from trainer.data.feed import DeviceFeed
from trainer.data.modes import choose_route, why_host_only
from trainer.data.resident import estimate_bytes
from trainer.data.sampler import BatchPlan
from trainer.data.transforms import build_transforms
from trainer.errors import Problem, UserError
from trainer.memory.devices import Device, find_device, this_device
from trainer.memory.fakes import fake_tensors
from trainer.memory.fitting import choose
from trainer.memory.jobs import plan_job
from trainer.memory.planner import Planner, Prediction
from trainer.memory.table import Row, config_lines, parts_table, settings_table
from trainer.model import CLASS_COUNTS, build_model
from trainer.parallel import choose_shard_size
from trainer.precision import STEP_DTYPES
from trainer.tasks import build_task
from trainer.tasks.base import Task
from trainer.units import format_bytes

T = TypeVar("T")

FITS = 0
DOES_NOT_FIT = 1


@dataclass
class _Alone:
    """One of several processes, of which the others are not running."""

    num_ranks: int
    rank: int = 0
    local_rank: int = 0
    num_cores: int = 1

    def agree(self, build: Callable[[], T]) -> T:
        return build()

    def from_main(self, value: Callable[[], T]) -> T:
        return value()

    def barrier(self) -> None:
        """Nobody to wait for."""

    @contextmanager
    def main_first(self) -> Iterator[None]:
        yield


def run(
    config: Config,
    device_name: str | None,
    num_processes: int | None,
    plot: Path | None = None,
    input_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
) -> int:
    """Prints the plan of a run.

    Args:
        config: the whole run.
        device_name: as `find_device` takes it; None for the GPU of this machine.
        num_processes: None for one per GPU here, or one.
        plot: where to draw memory over a step: .png, .svg or .html.
        input_shape: of a sample, where the data is not on this machine.
        num_classes: of the data then.

    Returns:
        `FITS` where the config as it is fits the device, else `DOES_NOT_FIT`.

    Raises:
        UserError: the config cannot be carried out.
    """
    device = _device(device_name)
    num_gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    num_ranks = num_processes or (num_gpus if device_name is None else 0) or 1
    if input_shape is not None:
        config = _with_stand_in(config, input_shape, num_classes)
    planner, share = _planner(config, device, num_ranks)
    limit = config.memory.target.of(device.memory_bytes)
    write = sys.stdout.write
    parameters = sum(p.numel() for p in planner.job.model.parameters())
    write(f"device     {device.name}: {format_bytes(limit)} to use ({config.memory.target} of its memory)\n")
    write(f"model      {config.model.name}, {parameters:,} parameters, {len(planner.blocks)} repeated blocks\n")
    write(f"precision  {config.precision}\n")
    write(f"batch      {config.train.batch_size} = {num_ranks} processes x {share}\n")
    strategy = "fsdp" if planner.job.shard_size > 1 else "ddp"
    if strategy == "fsdp":
        write(f"strategy   {config.parallel.strategy}: {planner.job.shard_size} processes share one copy\n")
    write("\n")
    own = _as_configured(config, planner, share, limit)
    if own is not None:
        write(f"per process with {config_lines(own)}, predicted:\n{parts_table(own, limit)}\n\n")
    rows = _rows(planner, limit)
    write("the largest micro-batch that fits (time: estimated, relative to the fastest):\n")
    write(f"{settings_table(rows, share)}\n\n")
    fastest = min(
        (row.prediction for row in rows if row.prediction is not None and row.strategy == strategy),
        key=lambda p: (p.step_seconds, -p.micro_batch_size),
        default=None,
    )
    if fastest is None and strategy == "fsdp":
        write("nothing fits; a device with more memory is needed, or more of them\n")
    elif fastest is None:
        write("nothing fits with DDP; a device with more memory is needed, or more of them and FSDP2\n")
    else:
        write(f"fastest that fits: {config_lines(fastest)}\n")
    write("not counted: CUDA's context, NCCL's buffers, kernels' workspaces, fragmentation\n")
    shown = own or fastest
    if plot is not None and shown is not None:
        from trainer.memory.plot import plot_step

        plot_step(shown.memory, f"{config.model.name}, {config_lines(shown)}", limit, plot)
        write(f"plotted to {plot}\n")
    return FITS if own is not None and own.peak_bytes <= limit else DOES_NOT_FIT


def _device(name: str | None) -> Device:
    if name is not None:
        return find_device(name)
    if not torch.cuda.is_available():
        raise UserError("there is no GPU here: say --device, such as h100-80g or 24GiB")
    return this_device(torch.device("cuda", 0))


def _with_stand_in(config: Config, input_shape: tuple[int, ...], num_classes: int | None) -> Config:
    classes = num_classes or next((config.model.args[key] for key in CLASS_COUNTS if key in config.model.args), None)
    if not isinstance(classes, int):
        raise UserError("say --num-classes with --input")
    args = {"num_samples": config.train.batch_size, "shape": list(input_shape), "num_classes": classes, "pool": 2}
    data = config.data.model_copy(
        update={
            "train": Component(name="synthetic", args=args),
            "eval": None,
            "eval_share": None,
            "transforms": type(config.data.transforms)(),
        }
    )
    return config.model_copy(update={"data": data})


def _planner(config: Config, device: Device, num_ranks: int) -> tuple[Planner, int]:
    ranks = _Alone(num_ranks)
    try:
        train_set, _ = build_data(config.data, ranks)
    except UserError as error:
        raise UserError(*map(_with_way_out, error.problems)) from None
    num_classes = class_count(config, train_set)
    micro_batch_size = None if config.train.micro_batch_size == "auto" else config.train.micro_batch_size
    group_size = 2 if config.data.augment.mixes else 1
    batch = BatchPlan.split(
        max(len(train_set), config.train.batch_size),  # what drop_last needs is not our question
        config.train.batch_size,
        micro_batch_size,
        num_ranks,
        config.data.drop_last,
        group_size,
    )
    task = build_task(config.task, num_classes)
    task.look_at(train_set, None)
    with fake_tensors():
        model = build_model(config.model, num_classes, is_fresh=True)
    here = config.data.model_copy(update={"feed": "host", "workers": 0, "cache": None})
    feed = DeviceFeed(
        train_set, here, "train", torch.device("cpu"), config.run.seed, task, STEP_DTYPES[config.precision]
    )
    try:
        resident = _resident_bytes(config, train_set, task, num_ranks, device)
        job = plan_job(config, model, task, feed, batch, "cuda", _shard_size(config, num_ranks))
    finally:
        feed.close()
    return Planner(replace(job, resident_bytes=resident), device), batch.batch_size // num_ranks


def _shard_size(config: Config, num_ranks: int) -> int:
    """Returns how many processes would share a copy of the model, taking them to be on one machine."""
    return choose_shard_size(config.parallel, [num_ranks] * num_ranks)


def _with_way_out(problem: Problem) -> Problem:
    if "no such f" not in problem.message:  # file or folder
        return problem
    return replace(problem, message=f"{problem.message}; a plan without the data needs --input and --num-classes")


def _resident_bytes(config: Config, train_set: SizedDataset, task: Task, num_ranks: int, device: Device) -> int:
    """Returns what the data itself will take on the device, as the feed will choose there."""
    transforms = build_transforms(config.data.transforms.train, "data.transforms.train")
    there = torch.device("cuda")
    if config.data.feed == "device_decode":
        return 0
    memory, host_only = device.memory_bytes, why_host_only(task)
    route = choose_route(train_set, config.data, "train", transforms, there, num_ranks, memory, host_only)
    if route.mode != "resident":
        return 0
    return estimate_bytes(route.dataset) // (num_ranks if route.is_sharded else 1)


def _as_configured(config: Config, planner: Planner, share: int, limit: int) -> Prediction | None:
    """Returns the setting of the config itself; what it leaves open is chosen as a run would choose it."""
    _check_device(config, planner)
    micro_batch_size = share if config.train.micro_batch_size in ("auto", None) else config.train.micro_batch_size
    assert isinstance(micro_batch_size, int)
    if not config.leaves_memory_open:
        return planner.uniform(min(micro_batch_size, share), config.memory.checkpointing)
    try:
        return choose(config, planner, min(micro_batch_size, share), limit)
    except UserError as error:
        sys.stdout.write(f"{error}\n\n")
        return None


def _check_device(config: Config, planner: Planner) -> None:
    """Refuses what a run would refuse there."""
    flops, precision = planner.device.flops, config.precision
    if (precision == "bf16" and flops.bfloat16 is None) or (precision == "fp8" and flops.fp8 is None):
        raise UserError(f"{planner.device.name} has no {precision}", path="precision")
    if config.memory.checkpointing != "none" and not planner.blocks:
        message = f"'{config.model.name}' has no repeated blocks; name them in memory.blocks"
        raise UserError(message, path="memory.checkpointing")


def _rows(planner: Planner, limit: int) -> list[Row]:
    settings = ("none", "selective", "full") if planner.blocks else ("none",)
    rows = []
    ddp = planner.under_ddp()
    for setting in settings:
        try:
            rows.append(Row(setting, "ddp", ddp.largest_micro_batch(setting, limit)))
        except UserError as error:
            if setting == "none":
                raise
            sys.stdout.write(f"not with memory.checkpointing={setting}: {error}\n")
    fastest = ddp.fastest(limit)
    if fastest is not None and fastest.num_recomputed:
        rows.insert(1, Row("auto", "ddp", fastest))
    if planner.job.num_ranks > 1:
        sharded = planner.largest_sharded("none", limit)
        rows.append(Row("none", "fsdp", sharded))
        if planner.blocks and (sharded is None or planner.job.shard_size > 1):
            rows.append(Row("full", "fsdp", planner.largest_sharded("full", limit)))
    return rows
