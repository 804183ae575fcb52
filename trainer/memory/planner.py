"""The planner: what a step will take on a device, which settings fit, and the fastest of these.

Everything is predicted from steps on fake tensors (`trainer.memory.simulation`), on a machine with or without the
device. Between a small and the largest micro-batch memory grows evenly; the setting that is chosen is simulated as a
whole before it is trusted. Times are estimates from data sheets: good for choosing between settings of one job, not
for promising a throughput. Not counted: the CUDA context, NCCL's buffers, kernels' workspaces, fragmentation.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from trainer.data.nested import map_tensors
from trainer.ema import average_dtype
from trainer.errors import UserError, one_line
from trainer.memory.blocks import repeated_blocks
from trainer.memory.budget import BlockCost, cheapest_policies, least_policies
from trainer.memory.checkpointing import (
    Policy,
    apply_checkpointing,
    explain_checkpointing_error,
    uniform_policies,
)
from trainer.memory.devices import Device
from trainer.memory.sharding import simulate_sharded_step
from trainer.memory.simulation import StepMemory, simulate_step
from trainer.units import format_bytes

logger = logging.getLogger("lockstep")

POLICIES: tuple[Policy, ...] = ("none", "selective", "full")
_BUCKETS_IN_FLIGHT = 2  # one compressed bucket is sent while the next is made
_WORTHWHILE = 0.97  # of the time: what a larger micro-batch must promise to be looked at
_MOST_TRIES = 4  # of solving again with less, where the simulated step takes more than the solver expected


@dataclass(frozen=True)
class Job:
    """A training step on one of several processes, but for the settings that a plan chooses.

    Args:
        model: real or fake, neither compiled nor wrapped; it is not changed.
        loss: of (model, batch): the summed loss, a scalar.
        make_optimizer: the optimizer of a model, with explicit `fused` or `foreach` where torch would choose one.
        example: a batch as the step gets it; the first dimension of its tensors are the samples.
        share: samples per process and optimizer step.
        micro_batch_sizes: those that split the share evenly, ascending.
        num_ranks: processes that train together.
        shard_size: processes that share one copy of the model's state, under FSDP2; 1 under DDP.
        device_type: such as `cuda`.
        autocast_dtype: what matrix products take, where it is not float32.
        allows_tf32: whether float32 products use TF32.
        clips_gradients: whether the norm of the gradients is clipped.
        keeps_averages: whether there is a moving average of the parameters.
        feed_bytes: device memory per sample of a micro-batch that waiting batches take.
        resident_bytes: device memory of data that lives there.
        bucket_bytes: size of DDP's buckets.
        gradient_as_bucket_view: whether gradients live in these buckets.
        compresses_gradients: whether buckets are exchanged in bfloat16.
        block_patterns: `memory.blocks`.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Any], torch.Tensor]
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    example: Any
    share: int
    micro_batch_sizes: Sequence[int]
    num_ranks: int = 1
    shard_size: int = 1
    device_type: str = "cuda"
    autocast_dtype: torch.dtype | None = None
    allows_tf32: bool = False
    clips_gradients: bool = False
    keeps_averages: bool = False
    feed_bytes: int = 0
    resident_bytes: int = 0
    bucket_bytes: int = 25 * 2**20
    gradient_as_bucket_view: bool = True
    compresses_gradients: bool = False
    block_patterns: Sequence[str] = ()

    def keeps_gradients(self, micro_batch_size: int) -> bool:
        """Tells whether gradients are there before a forward: in DDP's buckets, or while they accumulate."""
        return self.num_ranks > 1 or micro_batch_size < self.share

    def keeps_gradients_beside_buckets(self, micro_batch_size: int) -> bool:
        """Tells whether there are gradients besides those in DDP's buckets."""
        return micro_batch_size < self.share or (self.num_ranks > 1 and not self.gradient_as_bucket_view)


@dataclass(frozen=True)
class Prediction:
    """What one setting takes on each device.

    Args:
        micro_batch_size: samples that a device holds at once.
        checkpointing: `memory.checkpointing`, or `auto`.
        policies: policy of each block.
        parts: bytes at the peak by name.
        step_seconds: estimated time of an optimizer step.
        memory: the simulated step.
    """

    micro_batch_size: int
    checkpointing: str
    policies: Mapping[str, Policy]
    parts: Mapping[str, int]
    step_seconds: float
    memory: StepMemory = field(repr=False)

    @property
    def peak_bytes(self) -> int:
        """Most bytes that are allocated at once."""
        return sum(self.parts.values())

    def missing_bytes(self, job: Job, micro_batch_size: int) -> int:
        """Returns what a step takes that a mere forward and backward, before the first step, does not."""
        missing = self.memory.persistent["optimizer"] + job.feed_bytes * micro_batch_size
        if job.device_type == "cuda":  # the rest is on the GPU already, and counted there
            return missing
        return missing + self.parts.get("communication", 0) + self.parts.get("averages", 0) + job.resident_bytes

    def describe(self) -> str:
        """Returns the choice in one line."""
        text = f"micro-batch {self.micro_batch_size}"
        if self.policies:
            text += f", {self.num_recomputed} of {len(self.policies)} blocks recomputed"
        return f"{text}: {format_bytes(self.peak_bytes)} predicted"

    @property
    def num_recomputed(self) -> int:
        """Blocks that compute something again in backward."""
        return sum(policy != "none" for policy in self.policies.values())


class Planner:
    """Predicts and compares settings of one job on one kind of device. Simulated steps are kept."""

    def __init__(self, job: Job, device: Device) -> None:
        self.job = job
        self.device = device
        self.blocks = list(repeated_blocks(job.model, job.block_patterns))
        self._steps: dict[tuple[int, tuple[Policy, ...]], StepMemory] = {}
        self._sharded_steps: dict[tuple[int, int, tuple[Policy, ...]], StepMemory] = {}

    # ---- one setting -----------------------------------------------------------------------------------------

    def predict(self, micro_batch_size: int, checkpointing: str, policies: Mapping[str, Policy]) -> Prediction:
        """Simulates a setting."""
        whole = self._predict_whole(micro_batch_size, checkpointing, policies)
        return self.sharded(whole) if self.job.shard_size > 1 else whole

    def _predict_whole(self, micro_batch_size: int, checkpointing: str, policies: Mapping[str, Policy]) -> Prediction:
        job, step = self.job, self._step(micro_batch_size, policies)
        parts = {name: size for name, size in step.at_peak.items() if size}
        parts["feed"] = job.resident_bytes + job.feed_bytes * micro_batch_size
        if job.keeps_averages:
            parts["averages"] = self._average_bytes()
        if job.num_ranks > 1:
            parts["communication"] = self._communication_bytes(step.persistent["gradients"], micro_batch_size)
        seconds = self._step_seconds(micro_batch_size, step)
        return Prediction(micro_batch_size, checkpointing, policies, parts, seconds, step)

    def uniform(self, micro_batch_size: int, checkpointing: Any) -> Prediction:
        """Simulates a setting that treats all blocks alike: none, full, every_2 or selective."""
        return self.predict(micro_batch_size, checkpointing, uniform_policies(self.blocks, checkpointing))

    def _average_bytes(self, num_shards: int = 1) -> int:
        trained = [p for p in self.job.model.parameters() if p.requires_grad]
        return sum(math.ceil(p.numel() / num_shards) * average_dtype(p).itemsize for p in trained)

    def _communication_bytes(self, gradient_bytes: int, micro_batch_size: int) -> int:
        # Gradients of earlier micro-batches are not in the buckets, which are there all the same; they get there one
        # by one in the last one's backward.
        extra = gradient_bytes if self.job.keeps_gradients_beside_buckets(micro_batch_size) else 0
        if self.job.compresses_gradients:
            extra += min(_BUCKETS_IN_FLIGHT * self.job.bucket_bytes, gradient_bytes) // 2
        return extra

    def _step_seconds(self, micro_batch_size: int, step: StepMemory) -> float:
        num_micro_batches = self.job.share // micro_batch_size
        return num_micro_batches * (step.seconds["forward"] + step.seconds["backward"]) + step.seconds["optimizer"]

    def _step(self, micro_batch_size: int, policies: Mapping[str, Policy]) -> StepMemory:
        chosen = tuple(policies.get(name, "none") for name in self.blocks)
        key = micro_batch_size, chosen
        if key not in self._steps:
            try:
                self._steps[key] = self._simulate(micro_batch_size, dict(zip(self.blocks, chosen, strict=True)))
            except Exception as error:  # a user's model meets tensors without numbers, or policies it cannot have
                explained = explain_checkpointing_error(error)
                message = f"a step of this model cannot be predicted: {one_line(error)}; without `auto` it can run"
                raise explained or UserError(message, path="memory") from error
        return self._steps[key]

    def _simulate(self, micro_batch_size: int, policies: Mapping[str, Policy]) -> StepMemory:
        job = self.job

        def prepare(model: nn.Module) -> None:
            # Also where nothing is recomputed: the model may have come with another choice.
            apply_checkpointing(repeated_blocks(model, job.block_patterns), policies)

        return simulate_step(
            job.model,
            job.loss,
            job.make_optimizer,
            self._batch(micro_batch_size),
            device_type=job.device_type,
            device=self.device,
            allow_tf32=job.allows_tf32,
            autocast_dtype=job.autocast_dtype,
            is_accumulating=job.keeps_gradients(micro_batch_size),
            clip_norm=job.clips_gradients,
            prepare=prepare,
            watch={name: name for name in self.blocks},
        )

    def _batch(self, micro_batch_size: int) -> Any:
        """Returns a batch like the example, without memory, in the same layout: kernels follow that."""

        def like(tensor: torch.Tensor) -> torch.Tensor:
            larger = torch.empty((micro_batch_size, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
            is_channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
            return larger.contiguous(memory_format=torch.channels_last) if is_channels_last else larger

        return map_tensors(like, self.job.example)

    def sharded(self, prediction: Prediction) -> Prediction:
        """Simulates a predicted setting under FSDP2 instead of DDP; its estimated time stays, so it is too short."""
        job, size = self.job, prediction.micro_batch_size
        num_shards = job.shard_size if job.shard_size > 1 else job.num_ranks
        key = num_shards, size, tuple(prediction.policies.get(name, "none") for name in self.blocks)
        if key not in self._sharded_steps:
            self._sharded_steps[key] = self._simulate_sharded(size, prediction.policies, num_shards)
        step = self._sharded_steps[key]
        parts = {name: num_bytes for name, num_bytes in step.at_peak.items() if num_bytes}
        parts["feed"] = job.resident_bytes + job.feed_bytes * size
        if job.keeps_averages:
            parts["averages"] = self._average_bytes(num_shards)
        return replace(prediction, parts=parts, memory=step)

    def _simulate_sharded(self, size: int, policies: Mapping[str, Policy], num_shards: int) -> StepMemory:
        job = self.job

        def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
            return repeated_blocks(model, job.block_patterns)

        return simulate_sharded_step(
            job.model,
            job.loss,
            job.make_optimizer,
            self._batch(size),
            num_shards,
            blocks_of,
            prepare=lambda model: apply_checkpointing(blocks_of(model), policies),
            autocast_dtype=job.autocast_dtype,
            is_accumulating=size < job.share,
            device_type=job.device_type,
            clip_norm=job.clips_gradients,
        )

    def under_ddp(self) -> Planner:
        """Returns a planner of the same job with a copy of the model per process, which shares what was simulated."""
        other = copy.copy(self)
        other.job = replace(self.job, shard_size=1)
        return other

    def restricted_to(self, micro_batch_sizes: Sequence[int]) -> Planner:
        """Returns a planner that chooses among these micro-batches only, and shares what was simulated."""
        other = copy.copy(self)
        other.job = replace(self.job, micro_batch_sizes=micro_batch_sizes)
        return other

    # ---- many settings ---------------------------------------------------------------------------------------

    def solve(self, micro_batch_size: int, budget_bytes: float) -> Prediction | None:
        """Chooses a policy per block, for the least time, so that the step peaks at no more than `budget_bytes`.

        Returns:
            The simulated choice, or None where nothing fits.
        """
        none = self.uniform(micro_batch_size, "none")
        if none.peak_bytes <= budget_bytes:
            return Prediction(micro_batch_size, "auto", none.policies, none.parts, none.step_seconds, none.memory)
        if not self.blocks:
            return None
        costs, head = self.block_costs(micro_batch_size)
        whole = self._step(micro_batch_size, none.policies)  # of which a sharded step differs outside of the blocks
        beside = none.peak_bytes - whole.peak_bytes  # feed and communication, less what others have
        allowed = budget_bytes - beside - whole.blocks[self.blocks[0]].before_bytes
        for _ in range(_MOST_TRIES):
            policies = cheapest_policies(costs, allowed, head) if allowed > 0 else None
            if policies is None:
                break
            found = self.predict(micro_batch_size, "auto", dict(zip(self.blocks, policies, strict=True)))
            if found.peak_bytes <= budget_bytes:
                return found
            allowed -= 1.02 * (found.peak_bytes - budget_bytes)
        full = self.predict(micro_batch_size, "auto", dict(zip(self.blocks, least_policies(costs), strict=True)))
        return full if full.peak_bytes <= budget_bytes else None

    def block_costs(self, micro_batch_size: int) -> tuple[list[BlockCost], float]:
        """Returns what each block keeps, holds and costs under each policy, and what follows the blocks holds."""
        steps: dict[Policy, StepMemory] = {}
        for policy in POLICIES:
            try:
                steps[policy] = self._step(micro_batch_size, dict.fromkeys(self.blocks, policy))
            except UserError as error:
                if policy == "none":
                    raise
                logger.info("memory     not with %s: %s", policy, error)  # the others may do
        none = steps["none"].blocks
        costs = [
            BlockCost(
                {policy: _kept(step, name, following) for policy, step in steps.items()},
                {policy: _held_in_backward(step, name) for policy, step in steps.items()},
                {"none": 0.0, "selective": none[name].cheap_seconds, "full": none[name].seconds},
            )
            for name, following in zip(self.blocks, [*self.blocks[1:], None], strict=True)
        ]
        last = none[self.blocks[-1]]
        return costs, max(steps["none"].head_peak_bytes - last.before_bytes - last.kept_bytes, 0)

    def largest_micro_batch(self, checkpointing: Any, limit_bytes: int) -> Prediction | None:
        """Returns the largest micro-batch that peaks at no more than the limit, all blocks treated alike."""
        return self._largest(lambda size: self.uniform(size, checkpointing), limit_bytes)

    def largest_sharded(self, checkpointing: Any, limit_bytes: int) -> Prediction | None:
        """Returns the same as `largest_micro_batch` under FSDP2."""
        return self._largest(lambda size: self.sharded(self.uniform(size, checkpointing)), limit_bytes)

    def _largest(self, predict: Callable[[int], Prediction], limit_bytes: int) -> Prediction | None:
        sizes = list(self.job.micro_batch_sizes)
        while sizes:
            found = predict(sizes[-1])
            if found.peak_bytes <= limit_bytes:
                return found
            # What does not stay grows evenly with the micro-batch, or slower: nothing beyond this can fit.
            stays = sum(found.memory.persistent.values())
            most = sizes[-1] * (limit_bytes - stays) / (found.peak_bytes - stays)
            sizes = [s for s in sizes[:-1] if s <= most]
        return None

    def fastest(self, limit_bytes: int, micro_batch_size: int | None = None) -> Prediction | None:
        """Returns the fastest setting of micro-batch and checkpointing that peaks at no more than the limit.

        Args:
            limit_bytes: memory that a step may take.
            micro_batch_size: only the checkpointing is to be chosen, for this one.
        """
        if micro_batch_size is not None:
            return self.solve(micro_batch_size, limit_bytes)
        plain = self.largest_micro_batch("none", limit_bytes)
        candidates = [] if plain is None else [plain]
        larger = [s for s in self.job.micro_batch_sizes if plain is None or s > plain.micro_batch_size]
        if self.blocks:
            # A larger micro-batch is worth some recomputing only where kernels are too short to fill the device.
            for size in larger[:2]:
                if plain is None or self.uniform(size, "none").step_seconds < _WORTHWHILE * plain.step_seconds:
                    candidates += [found] if (found := self.solve(size, limit_bytes)) is not None else []
            if not candidates:
                largest = self.largest_micro_batch("full", limit_bytes)
                candidates = [] if largest is None else [largest]
        return min(candidates, key=lambda found: (found.step_seconds, -found.micro_batch_size), default=None)


def _kept(step: StepMemory, name: str, following: str | None) -> int:
    """Returns what stays after a block's forward, with that of whatever runs between it and the following block."""
    if following is None:
        return step.blocks[name].kept_bytes
    return max(step.blocks[following].before_bytes - step.blocks[name].before_bytes, 0)


def _held_in_backward(step: StepMemory, name: str) -> int:
    """Returns what a block's backward holds beyond what was there before its forward."""
    block = step.blocks[name]
    return max(block.backward_peak_bytes - block.before_bytes, block.kept_bytes)


def solve_policies(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], torch.Tensor],
    example: Any,
    micro_batch_size: int,
    share: float,
    of: Policy,
    device: Device,
    device_type: str,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Policy] | None:
    """Returns the policies that keep the peak of a forward and backward within a share of a policy's, in least time.

    Gradients are there before the step, and do not count; nor does an optimizer. For a whole job, with a target,
    `memory.checkpointing: auto` does the same.
    """

    def optimizer(fake: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(fake.parameters(), lr=0.1, foreach=False)

    job = Job(
        model,
        loss,
        optimizer,
        example,
        share=2 * micro_batch_size,  # so gradients are there before it
        micro_batch_sizes=[micro_batch_size],
        device_type=device_type,
        autocast_dtype=autocast_dtype,
    )
    planner = Planner(job, device)
    uniform = planner.uniform(micro_batch_size, of)
    there = sum(uniform.memory.persistent.values())
    found = planner.solve(micro_batch_size, there + share * (uniform.peak_bytes - there))
    return None if found is None else dict(found.policies)
