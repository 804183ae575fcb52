"""A run's config and components -> the training step that the planner simulates.

Used before a run starts and by `python -m launch plan`, which has no device; so nothing here needs one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainer.config import Config
from trainer.data.feed import DeviceFeed
from trainer.data.sampler import BatchPlan
from trainer.errors import UserError
from trainer.memory.planner import Job
from trainer.optim import build_optimizer
from trainer.param_groups import choose_treatments
from trainer.precision import STEP_DTYPES, allows_tf32
from trainer.tasks.base import Task

_EXAMPLES = 2  # samples of which the shapes are taken


def plan_job(
    config: Config,
    model: nn.Module,
    task: Task,
    feed: DeviceFeed,
    batch: BatchPlan,
    device_type: str,
    shard_size: int = 1,
) -> Job:
    """Returns the training step that a config describes.

    Args:
        config: the whole run.
        model: as built, real or fake.
        task: what a batch means.
        feed: of the training data; two of its samples are read.
        batch: the batch arithmetic; its micro-batch does not matter.
        device_type: where the step will run.
        shard_size: processes that share one copy of the model's state; 1 for DDP.

    Raises:
        UserError: the samples cannot be read, or are not stacked to batches, or a teacher takes part.
    """
    if not task.stacks:
        message = "memory cannot be planned for samples of different sizes: give a number, and no checkpointing: auto"
        raise UserError(message, path="train.micro_batch_size")
    if config.task.teacher is not None:
        raise UserError("a teacher's memory is not planned", path="task.teacher")
    task = _on_the_cpu(task)
    example, feed_bytes = feed.example(_EXAMPLES)
    waiting = config.data.prefetch + 1  # and the one from which the step's own batch is made
    return Job(
        model,
        summed_loss(task),
        _optimizer_as_on(device_type, config, model),
        example,
        share=batch.batch_size // batch.num_ranks,
        micro_batch_sizes=batch.micro_batch_sizes,
        num_ranks=batch.num_ranks,
        shard_size=shard_size,
        device_type=device_type,
        autocast_dtype=None if config.precision == "no" else STEP_DTYPES[config.precision],
        allows_tf32=allows_tf32(config.backends, model),
        clips_gradients=config.optim.clip_norm is not None,
        keeps_averages=config.optim.ema is not None,
        feed_bytes=waiting * feed_bytes,
        resident_bytes=feed.resident_bytes,
        bucket_bytes=int(config.parallel.bucket_mb * 2**20),
        gradient_as_bucket_view=config.parallel.gradient_as_bucket_view,
        compresses_gradients=config.parallel.gradient_compression != "none",
        block_patterns=config.memory.blocks,
    )


def _on_the_cpu(task: Task) -> Task:
    """Returns a task whose modules, such as class weights, are where simulated tensors say that they are.

    They alone are copied: what else a task keeps may be a data set, or a file that is open.
    """
    copied = copy.copy(task)
    for name, value in vars(task).items():
        if isinstance(value, nn.Module):
            setattr(copied, name, copy.deepcopy(value))
    copied.to(torch.device("cpu"))
    return copied


def summed_loss(task: Task) -> Callable[[nn.Module, Any], torch.Tensor]:
    """Returns the task's loss as a function of (model, batch)."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        outputs = task.forward(model, batch)
        loss_sum = task.training_loss_sum(outputs, batch)
        task.loss_count(outputs, batch)  # which takes memory, too
        return loss_sum

    return loss


def _optimizer_as_on(
    device_type: str, config: Config, built: nn.Module
) -> Callable[[nn.Module], torch.optim.Optimizer]:
    treatments = choose_treatments(config.optim, built, config.memory.blocks)  # copies may be sharded

    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = build_optimizer(config.optim, model, device_type, treatments)
        for group in optimizer.param_groups:
            # torch's own choice, which it makes by looking at the tensors; fake ones hide where they are.
            if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = device_type == "cuda"
        return optimizer

    return make
