"""The jobs whose scaling is estimated, from the recipes in `configs/`, and the estimate of one on so many GPUs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scaling import model
from benchmarks.scaling.constants import Constant
from benchmarks.scaling.model import Compute, Exchange, Network, Part
from trainer.config import load_config
from trainer.memory.blocks import repeated_blocks

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
GATHERED_BYTES = 2  # of a parameter, in bfloat16
HOUR = 3600.0
LEAST_MICRO_BATCH = 16  # assumed: with fewer samples, launches of kernels decide, and time is not even in samples

Strategy = Literal["ddp", "fsdp", "hsdp"]


@dataclass(frozen=True)
class Job:
    """A model on GPUs, as a recipe trains it.

    Args:
        name: for tables.
        strategy: `parallel.strategy`.
        root: what is in no block; all of the model with DDP.
        parts: parameters' modules with DDP, blocks else, in the order of forward.
        forward: seconds per sample on one GPU.
        backward: the same, with what is recomputed.
        micro_batch_size: samples of a GPU that fill it.
        batch_size: of the recipe, over all GPUs.
        bucket_bytes: of DDP.
    """

    name: str
    strategy: Strategy
    root: Part
    parts: tuple[Part, ...]
    forward: float
    backward: float
    micro_batch_size: int
    batch_size: int
    bucket_bytes: float


@dataclass(frozen=True)
class Machine:
    """What jobs run on, and how often it breaks.

    Args:
        network: between GPUs.
        speed: of a GPU, relative to what a job's seconds are of.
        spread: standard deviation of a rank's step, of its mean.
        stall: seconds of a checkpoint.
        restart: seconds from a failure to training again.
        mtbf: mean seconds between failures of one GPU and all that belongs to it.
    """

    network: Network
    speed: float
    spread: float
    stall: float
    restart: float
    mtbf: float

    @classmethod
    def from_constants(cls, constants: Mapping[str, Constant], network: Network) -> Machine:
        """Returns the machine of the tables."""
        restart = constants["back"].value + constants["start"].value
        return cls(network, 1.0, constants["spread"].value, constants["stall"].value, restart, constants["mtbf"].value)


@dataclass(frozen=True)
class Estimate:
    """A job on so many GPUs; seconds are of one optimizer's step.

    Args:
        num_ranks: GPUs.
        batch_size: over all of them.
        compute: that each GPU computes.
        exposed: that each waits for others' gradients and parameters.
        slowest: that all wait for the slowest.
        interval: seconds between checkpoints that lose least.
        goodput: share of time in which steps are made that are not made again, with that interval.
        goodput_hourly: the same with a checkpoint every hour.
    """

    num_ranks: int
    batch_size: int
    compute: float
    exposed: float
    slowest: float
    interval: float
    goodput: float
    goodput_hourly: float

    @property
    def step(self) -> float:
        return self.compute + self.exposed + self.slowest

    @property
    def efficiency(self) -> float:
        """Speed of a GPU relative to one that trains by itself, while nothing fails."""
        return self.compute / self.step

    @property
    def overall(self) -> float:
        """Speed of a GPU over a run, relative to one by itself that never fails."""
        return self.efficiency * self.goodput


def estimate(job: Job, num_ranks: int, machine: Machine, batch_size: int | None = None) -> Estimate:
    """Returns what a job does on so many GPUs. Compute is taken to be even in samples, whatever launches cost.

    Args:
        job: the job.
        num_ranks: GPUs.
        machine: what they are.
        batch_size: over all GPUs; None for one full micro-batch on each, however many there are.

    Raises:
        ValueError: the batch does not split over the GPUs.
    """
    batch_size = batch_size or num_ranks * job.micro_batch_size
    share = batch_size // num_ranks
    micro = min(job.micro_batch_size, share)
    if batch_size % num_ranks or share % micro:
        raise ValueError(f"{batch_size} samples do not split over {num_ranks} GPUs in micro-batches of {micro}")
    compute = Compute(job.forward * micro / machine.speed, job.backward * micro / machine.speed)
    num_micro_batches = share // micro
    exposed = _exposed(job, num_ranks, machine.network, compute, num_micro_batches)
    seconds = compute.seconds * num_micro_batches
    mtbf = machine.mtbf / num_ranks
    interval = model.optimal_interval(machine.stall, mtbf)
    return Estimate(
        num_ranks,
        batch_size,
        seconds,
        exposed,
        seconds * machine.spread * _expected_maximum(num_ranks),
        interval,
        model.goodput(interval, machine.stall, machine.restart, mtbf),
        model.goodput(HOUR, machine.stall, machine.restart, mtbf),
    )


def _exposed(job: Job, num_ranks: int, network: Network, compute: Compute, num_micro_batches: int) -> float:
    if num_ranks == 1:
        return 0.0
    if job.strategy == "ddp":  # earlier micro-batches exchange nothing
        buckets = model.make_buckets(job.parts, compute.backward, job.bucket_bytes)
        return model.exposed_by_ddp(buckets, compute.backward, lambda size: network.all_reduce(size, num_ranks))
    shard_size = num_ranks if job.strategy == "fsdp" else min(num_ranks, network.ranks_per_node)
    exchange = exchange_of(network, num_ranks, shard_size)
    last = model.fsdp_seconds(job.root, job.parts, compute, exchange, is_last=True)
    earlier = model.fsdp_seconds(job.root, job.parts, compute, exchange, is_last=False)
    return last + (num_micro_batches - 1) * earlier - num_micro_batches * compute.seconds


def exchange_of(network: Network, num_ranks: int, shard_size: int) -> Exchange:
    """Returns FSDP's collectives: shares among `shard_size` ranks, and copies of the model among as many as there are.

    Parameters are gathered in bfloat16, gradients summed in float32.
    """
    across = network.of_one_per_node()
    num_copies = num_ranks // shard_size

    def gather(num_parameters: int) -> float:
        return network.gather(GATHERED_BYTES * num_parameters, shard_size)

    def reduce(num_parameters: int) -> float:
        num_bytes = model.GRADIENT_BYTES * num_parameters
        return network.gather(num_bytes, shard_size) + across.all_reduce(num_bytes / shard_size, num_copies)

    return Exchange(gather, reduce)


@functools.cache
def _expected_maximum(num_ranks: int) -> float:
    return model.expected_maximum(num_ranks)


# ---- from recipes ------------------------------------------------------------------------------------------------


def resnet50(recipe: str, micro_batch_size: int, constants: Mapping[str, Constant]) -> Job:
    """Returns ResNet-50 under DDP; a third of a sample's time is forward, as of its arithmetic."""
    config = load_config(str(CONFIGS / f"{recipe}.yaml"))
    parts, _ = leaf_parts(config.model.name)
    seconds = 1 / constants["images_per_second"].value
    return Job(
        f"ResNet-50, DDP, {micro_batch_size} images a GPU",
        "ddp",
        Part(sum(part.num_parameters for part in parts), 1.0),
        parts,
        seconds / 3,
        seconds * 2 / 3,
        micro_batch_size,
        config.train.batch_size,
        config.parallel.bucket_mb * 2**20,
    )


def vit_h(strategy: Strategy, constants: Mapping[str, Constant]) -> Job:
    """Returns ViT-H/14, recomputed in backward, whose arithmetic is that of a forward and two more."""
    config = load_config(str(CONFIGS / "fsdp_vit_h_14.yaml"))
    assert config.memory.checkpointing == "full"
    assert isinstance(config.train.micro_batch_size, int)
    root, blocks, flops = block_parts(config.model.name)
    forward = flops / (constants["peak"].value * constants["mfu"].value)
    return Job(
        f"ViT-H/14, {strategy.upper()}, {config.train.micro_batch_size} images a GPU",
        strategy,
        root,
        blocks,
        forward,
        3 * forward,
        config.train.micro_batch_size,
        config.train.batch_size,
        config.parallel.bucket_mb * 2**20,
    )


@functools.cache
def leaf_parts(name: str, image_size: int = 224) -> tuple[tuple[Part, ...], int]:
    """Returns a torchvision model's modules with parameters of their own, and the FLOPs of one sample's forward."""
    net, flops, by_module = _counted(name, image_size)
    parts = []
    for path, module in net.named_modules():
        num_parameters = sum(p.numel() for p in module.parameters(recurse=False))
        if num_parameters:
            parts.append(Part(num_parameters, by_module.get(path, 0) / flops))
    # What is not counted as arithmetic, such as additions of residuals, goes with what is.
    total = sum(part.work for part in parts)
    return tuple(Part(part.num_parameters, part.work / total) for part in parts), flops


@functools.cache
def block_parts(name: str) -> tuple[Part, tuple[Part, ...], int]:
    """Returns a torchvision model's root and blocks as FSDP has them, and the FLOPs of one sample's forward."""
    net, flops, by_module = _counted(name)
    blocks = [
        Part(sum(p.numel() for p in block.parameters()), by_module[path] / flops)
        for path, block in repeated_blocks(net).items()
    ]
    rest = sum(p.numel() for p in net.parameters()) - sum(block.num_parameters for block in blocks)
    return Part(rest, 1 - sum(block.work for block in blocks)), tuple(blocks), flops


def _counted(name: str, image_size: int = 224) -> tuple[nn.Module, int, dict[str, int]]:
    with torch.device("meta"):
        net = torchvision.models.get_model(name).eval()
        image = torch.empty(1, 3, image_size, image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(image)
    root = type(net).__name__
    by_module = {
        path.removeprefix(f"{root}."): sum(counts.values()) for path, counts in counter.get_flop_counts().items()
    }
    return net, counter.get_total_flops(), by_module
