"""The Accelerator from the config, and everything that involves more than one process.

Owns the world (how many processes, and that it is the promised number), the device, precision, wrapping,
seeds and collectives. Accelerate does the work; this module picks what works and refuses what would silently
not.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DDPCommunicationHookType, patch_environment
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config import Config
from trainer.config_devices import ParallelConfig
from trainer.data.modes import device_memory
from trainer.data.tuning import cores_of_a_rank
from trainer.errors import Problem, UserError, one_line
from trainer.memory.checkpointing import explain_checkpointing_error
from trainer.memory.sharding import local_part
from trainer.parallel import (
    broadcast,
    choose_shard_size,
    explained_optimizer_errors,
    gradient_norm,
    prepare_sharded,
    reshard,
    settle_buckets,
    use_fsdp,
)
from trainer.placement import place_this_process
from trainer.precision import STEP_DTYPES, autocast_on_cpu, check_precision, set_backends
from trainer.rendezvous import init_method, is_elastic
from trainer.system import LAUNCHER_VARIABLE, die_with_parent

logger = logging.getLogger("lockstep")

T = TypeVar("T")


class Runtime:
    """This process among its peers."""

    def __init__(self, config: Config) -> None:
        if is_elastic() and sys.platform == "linux":
            # A killed agent ends nobody, and the next start would find this one in the run folder.
            die_with_parent()
            launcher = os.environ.get(LAUNCHER_VARIABLE, "")
            if launcher.isdigit() and not psutil.pid_exists(int(launcher)):  # it was killed before that
                os._exit(1)
        self._config = config.parallel
        promised = promised_processes()
        _refuse_foreign_settings(config.precision)
        check_precision(config.precision)
        set_backends(config.backends)
        has_accelerator = torch.accelerator.is_available()
        # Without the first variable accelerate starts no process group on the CPU, and every rank trains alone. With a
        # local rank it starts one, and DDP, for a single process too, which torchrun may run for its restarts.
        variables = {"ACCELERATE_USE_CPU": str(not has_accelerator).lower()}
        if promised == 1:
            variables["LOCAL_RANK"] = "-1"
        with patch_environment(**variables):
            self.accelerator = Accelerator(
                mixed_precision=config.precision,
                cpu=not has_accelerator,
                kwargs_handlers=[_process_group_settings(config.parallel), _ddp_settings(config.parallel)],
            )
        if config.precision == "fp16" and not has_accelerator:
            autocast_on_cpu(self.accelerator)
        self.rank: int = self.accelerator.process_index
        self.local_rank: int = self.accelerator.local_process_index
        self.num_ranks: int = self.accelerator.num_processes
        self.num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine
        self.step_dtype: torch.dtype = STEP_DTYPES[config.precision]  # of what matrix products take
        # With its index: accelerate says `cuda` on a single GPU, and tensors there say `cuda:0`.
        self.device: torch.device = torch.empty(0, device=self.accelerator.device).device
        # The cores next to the GPU, for this process and for the loader workers that it starts.
        share = config.parallel.pin_cores and self.num_local_ranks > 1
        placement = place_this_process(self.device, self.local_rank, self.num_local_ranks) if share else None
        if placement is not None:
            logger.info("rank %d %s", self.rank, placement)
        self.num_cores = cores_of_a_rank(self.num_local_ranks, has_its_own=placement is not None)
        self.is_main: bool = self.accelerator.is_main_process
        if promised != self.num_ranks:
            raise UserError(_wrong_world(promised, self.num_ranks))
        # Decisions between hosts travel over gloo, so that agreeing on them never waits for the GPU.
        self.host_group = self.new_host_group()
        # Processes that share one copy of parameters, gradients and optimizer state.
        self.shard_size = choose_shard_size(config.parallel, self.gather(self.num_local_ranks))
        self.is_sharded = self.shard_size > 1
        # Whether a training forward is a collective, so that every rank has to run as many as the others.
        self.in_lockstep = self.is_sharded or (config.parallel.sync_batchnorm and self.num_ranks > 1)
        if self.is_sharded:
            use_fsdp(
                self.accelerator,
                config.parallel,
                self.shard_size,
                None if config.precision == "no" else self.step_dtype,
            )
        if config.parallel.strategy != "ddp":
            logger.info("parallel   %s", _describe_sharding(config.parallel, self.num_ranks, self.shard_size))

    @property
    def device_memory(self) -> int:
        """Bytes that this process may count on: its GPU's, or its share of the host's."""
        whole = device_memory(self.device)
        return whole if self.device.type == "cuda" else whole // self.num_local_ranks

    # ---- model and optimizer ------------------------------------------------------------------------------

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, blocks: Iterable[nn.Module] = ()
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Places the model on the device and wraps model and optimizer for this world and precision.

        Args:
            model: in its final shape. DDP wraps it; FSDP shards it in place.
            optimizer: of its parameters, without state.
            blocks: what FSDP shards each by itself.
        """
        if self.is_sharded:
            return prepare_sharded(self.accelerator, model, optimizer, blocks)
        if self.num_ranks > 1:  # whose buffers the loop exchanges; the setting for it has two names in torch
            names = [name for name, _ in model.named_buffers(remove_duplicate=False)]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        wrapped, optimizer = self.accelerator.prepare(model, optimizer)
        # A sum of two gradients is the same in either order. A static graph must see the model itself first.
        if self.num_ranks > 2 and not self._config.find_unused_parameters and not self._config.static_graph:
            settle_buckets(wrapped)
        return wrapped, optimizer

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Gives every rank the tensors of rank 0: a model's buffers at the beginning of a step, as DDP would.

        DDP would do it in the step's first forward; whoever measures how long a rank takes to the end of its forward
        would then measure the others, too.
        """
        if self.num_ranks > 1:
            broadcast(tensors)

    def end_evaluation(self, model: nn.Module) -> None:
        """Brings a sharded model's parameters back into shares, which a forward without backward leaves whole."""
        if self.is_sharded:
            reshard(model)

    def accumulate(self, model: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Exchanges gradients only in the last micro-batch of a step."""
        return nullcontext() if is_last or self.num_ranks == 1 else self.accelerator.no_sync(model)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The fp16 loss scaler; None in other precisions."""
        return self.accelerator.scaler

    def backward(self, loss: torch.Tensor, on_computed: Callable[[], None] | None = None) -> None:
        """Runs backward, through the loss scaler where precision is fp16.

        Args:
            loss: a scalar.
            on_computed: called when all gradients are computed, before the wait for their exchange with other ranks.
        """
        # Not accelerator.backward: it looks up installed packages at every call (0.2 ms).
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        if on_computed is not None:
            # Autograd calls these in the order in which they were queued. DDP and FSDP queue theirs, which wait for the
            # exchange, in the course of this backward; the hook of the loss is the first thing that runs in it.
            queue = torch.autograd.Variable._execution_engine.queue_callback
            scaled.register_hook(lambda _: queue(on_computed))
        scaled.backward()

    def unscale_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the loss scale out of the gradients, before they are clipped."""
        if self.scaler is not None:
            self.accelerator.unscale_gradients(optimizer)

    def gradient_norm(self, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """Returns the norm of all gradients together."""
        return gradient_norm(_parameters(optimizer))

    def clip_norm(self, optimizer: torch.optim.Optimizer, max_norm: float, norm: torch.Tensor) -> None:
        """Clips the norm of all gradients together, which is `norm`."""
        torch.nn.utils.clip_grads_with_norm_(_parameters(optimizer), max_norm, norm)

    def clip_values(self, optimizer: torch.optim.Optimizer, max_value: float) -> None:
        """Clips each number in the gradients to [-max_value, max_value]; NaN stays."""
        torch.nn.utils.clip_grad_value_(_parameters(optimizer), max_value)

    def overflow(self, optimizer: torch.optim.Optimizer, where: torch.Tensor) -> None:
        """Has the loss scaler skip this step where a boolean scalar is true: it then finds an infinite gradient."""
        gradients = (local_part(p.grad) for p in _parameters(optimizer) if p.grad is not None)
        first = next((gradient for gradient in gradients if gradient.numel()), None)
        if first is not None:
            first.view(-1)[:1].masked_fill_(where, torch.inf)

    def step(self, optimizer: torch.optim.Optimizer, unless: torch.Tensor | None = None) -> bool:
        """Takes an optimizer step, and tells whether the loss scaler skipped it because of an overflow.

        Args:
            optimizer: the prepared one.
            unless: a boolean scalar on the device, the same on all ranks: no step is taken where it is true. The host
                waits for it only where the optimizer cannot leave a step out on the device, as fused ones can.
        """
        with explained_optimizer_errors() if self.is_sharded else nullcontext():
            return self._step(optimizer, unless)

    def _step(self, optimizer: torch.optim.Optimizer, unless: torch.Tensor | None) -> bool:
        if self.scaler is not None:
            # accelerate looks whether `step` was called, which a fused optimizer's always is: it skips on the device.
            scale = self.scaler.get_scale()
            optimizer.step()
            return self.scaler.get_scale() < scale
        inner = _inner(optimizer)
        if unless is None:
            inner.step(None)  # as Accelerate's calls it
        elif self.device.type == "cuda" and not self.is_sharded and leaves_out_on_device(optimizer):
            step_unless(optimizer, unless)
        elif not unless.item():
            inner.step(None)
        return False

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Drops the gradients of a prepared optimizer's parameters."""
        inner = _inner(optimizer)
        is_plain = type(inner).zero_grad is torch.optim.Optimizer.zero_grad
        (inner if is_plain else optimizer).zero_grad()

    def new_host_group(self) -> dist.ProcessGroup | None:
        """Returns another gloo group of all ranks, for a thread of its own; None for a single process."""
        return _gloo_group() if self.num_ranks > 1 else None

    # ---- collectives --------------------------------------------------------------------------------------

    def sum(self, values: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Sums scalars over all ranks and brings them to the host. Waits for the device."""
        if not values:
            return {}
        stacked = torch.stack([self.exact(v).to(self.device) for v in values.values()])
        if self.num_ranks > 1:
            dist.all_reduce(stacked)
        return dict(zip(values, stacked.tolist(), strict=True))

    def sum_tables(self, tables: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums integer tensors over all ranks, on the device; a rank without any of a name adds zeros."""
        if self.num_ranks == 1:
            return dict(tables)
        shapes = {
            name: shape
            for known in self.gather({n: t.shape for n, t in tables.items()})
            for name, shape in known.items()
        }
        found = {}
        for name in sorted(shapes):
            table = tables.get(name)
            found[name] = torch.zeros(shapes[name], dtype=torch.int64, device=self.device) if table is None else table
            found[name] = found[name].to(self.device).contiguous()
            dist.all_reduce(found[name])
        return found

    def sum_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """Sums a tensor of the same shape over all ranks, on the device."""
        total = self.exact(value).to(self.device).contiguous()
        if self.num_ranks > 1:
            dist.all_reduce(total)
        return total

    def exact(self, value: torch.Tensor) -> torch.Tensor:
        """Returns a tensor, where it is, wide enough to add up: float64 holds every count below 2**53 exactly."""
        # Apple's GPUs have no float64.
        return value.detach().to(torch.float32 if self.device.type == "mps" else torch.float64)

    def zero(self) -> torch.Tensor:
        """Returns a scalar on the device to add up in, as wide as `exact`'s."""
        return self.exact(torch.zeros((), device=self.device))

    def gather(self, value: T) -> list[T]:
        """Returns every rank's object, in rank order, on every rank."""
        if self.num_ranks == 1:
            return [value]
        gathered: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(gathered, value, group=self.host_group)
        return gathered

    def gather_on_main(self, value: T) -> list[T]:
        """Returns every rank's object, in rank order, on rank 0; elsewhere an empty list."""
        if self.num_ranks == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.num_ranks if self.is_main else None
        dist.gather_object(value, gathered, dst=0, group=self.host_group)
        return gathered or []

    def from_main(self, value: Callable[[], T]) -> T:
        """Calls `value` on rank 0 and returns its result on every rank."""
        box = [value() if self.is_main else None]
        if self.num_ranks > 1:
            dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]  # type: ignore[return-value]

    def num_collectives(self) -> int:
        """Returns how many collectives the main thread has begun; ranks that have met have begun as many."""
        groups: tuple[Any, ...] = (dist.group.WORLD, self.host_group) if self.num_ranks > 1 else ()
        return sum(group._get_sequence_number_for_group() for group in groups if group is not None)

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.num_ranks > 1:
            dist.barrier(group=self.host_group)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Runs the body on rank 0, then on the first rank of every other host, then on the rest."""
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.barrier()
        try:
            yield
        finally:
            for _ in range(2 - turn):
                self.barrier()

    def agree(self, build: Callable[[], T]) -> T:
        """Calls `build` on every rank; if it raises UserError on any, every rank raises all of them.

        Without this, a problem that only one rank has would leave the others waiting for it.
        """
        problems: tuple[Problem, ...] = ()
        result: T | None = None
        try:
            result = build()
        except UserError as error:
            problems = error.problems
        by_rank = self.gather(problems)
        if not any(by_rank):
            return result  # type: ignore[return-value]
        shared = [p for p in by_rank[0] if all(p in others for others in by_rank)]
        lone = [
            Problem(f"rank {rank}: {p.message}", p.path, p.origin)
            for rank, problems in enumerate(by_rank)
            for p in problems
            if p not in shared
        ]
        raise UserError(*shared, *lone, agreed=True)

    # ---- end ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leaves the process group. Call it when nothing refers to the wrapped model any more."""
        # A DDP model that is still alive here ends some runs in SIGABRT on gloo.
        self.accelerator.free_memory()
        gc.collect()
        # No rank leaves before rank 0 has closed its trackers: a launcher ends the rest when the first one goes.
        self.barrier()
        if self.num_ranks > 1:
            dist.destroy_process_group()


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _inner(optimizer: torch.optim.Optimizer) -> Any:
    """Returns the optimizer inside Accelerate's, whose every call looks up signatures and installed packages."""
    return getattr(optimizer, "optimizer", optimizer)


def leaves_out_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Tells whether an optimizer can leave a step out without the host knowing."""
    inner = _inner(optimizer)
    # At the first step SGD takes memory for its momentum that it then does not fill.
    is_filled = bool(inner.state) or not any(group.get("momentum") for group in inner.param_groups)
    return is_filled and bool(getattr(inner, "_step_supports_amp_scaling", False))


def step_unless(optimizer: torch.optim.Optimizer, unless: torch.Tensor) -> None:
    """Takes a fused optimizer's step where a boolean scalar is false, by the way in which GradScaler skips steps."""
    inner = _inner(optimizer)
    inner.grad_scale, inner.found_inf = None, unless.to(torch.float32)
    try:
        optimizer.step()
    finally:
        del inner.grad_scale, inner.found_inf


def _process_group_settings(config: ParallelConfig) -> InitProcessGroupKwargs:
    settings: dict[str, Any] = {}
    if config.cpu_offload and torch.cuda.is_available():
        settings["backend"] = "cuda:nccl,cpu:gloo"  # norms and overflows of gradients in host memory are agreed there
    return InitProcessGroupKwargs(init_method=init_method(), timeout=timedelta(minutes=30), **settings)


def _describe_sharding(config: ParallelConfig, num_ranks: int, shard_size: int) -> str:
    if shard_size == 1:
        text = f"{config.strategy}: one process has nobody to share with, so the model is whole"
        return f"{text}, and in its memory" if config.cpu_offload else text
    copies = num_ranks // shard_size
    text = f"{config.strategy}: {shard_size} processes share one copy of parameters, gradients and optimizer state"
    return f"{text}; {copies} copies" if copies > 1 else text


def _ddp_settings(config: ParallelConfig) -> DistributedDataParallelKwargs:
    hooks = {
        "none": DDPCommunicationHookType.NO,
        "bf16": DDPCommunicationHookType.BF16,
        "fp16": DDPCommunicationHookType.FP16,
    }
    return DistributedDataParallelKwargs(
        bucket_cap_mb=config.bucket_mb,
        find_unused_parameters=config.find_unused_parameters,
        gradient_as_bucket_view=config.gradient_as_bucket_view,
        static_graph=config.static_graph,
        comm_hook=hooks[config.gradient_compression],
    )


def _gloo_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return group


@contextmanager
def explained_model_errors() -> Iterator[None]:
    """Turns errors of a model's forward that a user can mend into one line that says how."""
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel when training" not in str(error):
            raise
        message = (
            "BatchNorm needs more than one sample: leave the last, small batch of the epoch out, or train larger "
            "micro-batches (train.micro_batch_size)"
        )
        raise UserError(message, path="data.drop_last") from error
    except RuntimeError as error:
        explained = explain_checkpointing_error(error)
        if explained is not None:
            raise explained from error
        if "view size is not compatible" in str(error):
            message = (
                "the model views its input as flat, but images come in channels_last memory: use flatten or reshape"
            )
            raise UserError(f"{message} there; {one_line(error)}", path="model") from error
        if "find_unused_parameters" not in str(error):
            raise
        message = "the last step left parameters unused (without a gradient); if the model is meant so, set it to true"
        raise UserError(message, path="parallel.find_unused_parameters") from error


def seed_everything(seed: int) -> None:
    """Seeds the global generators of torch (all devices), numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def promised_processes() -> int:
    """Returns how many processes the launcher was asked to start for this job.

    torchrun and our launcher say so in WORLD_SIZE. `accelerate launch --cpu --num_processes 2` starts one
    process and says nothing; then the launcher's own command line tells.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent else []
    except psutil.Error:
        return 1
    if not any(re.search(r"(^|[/\\.])accelerate(-launch)?(\.exe)?$|accelerate[./\\]commands", a) for a in command):
        return 1
    asked = _option(command, "num[_-]processes")
    if asked is None:
        asked = _processes_in_accelerate_config(_option(command, "config[_-]file"), "--cpu" in command)
    return int(asked) if asked.isdigit() else 1


def _option(command: Sequence[str], name: str) -> str | None:
    for argument, following in zip(command, [*command[1:], ""], strict=True):
        match = re.fullmatch(rf"--{name}(?:=(.*))?", argument)
        if match:
            return match[1] or following
    return None


def _processes_in_accelerate_config(file: str | None, on_cpu: bool) -> str:
    """Returns `num_processes` of the config file that `accelerate launch` reads, as it chooses it."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if file is None and (on_cpu or not os.path.isfile(default_config_file)):
        return "1"
    return str(load_config_from_file(file).num_processes)


def _wrong_world(promised: int, actual: int) -> str:
    command = shlex.join(["python", "-m", "launch", "local", *sys.argv[1:], "--processes", str(promised)])
    return (
        f"{promised} processes were asked for and {actual} started: `accelerate launch` starts several processes "
        f"only on GPUs; this works: {command}"
    )


def _refuse_foreign_settings(precision: str) -> None:
    """Refuses what accelerate's flags or config file ask for behind the YAML's back."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        raise UserError(
            f"accelerate was launched with mixed precision {asked}, the config says {precision}", path="precision"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError("accelerate was launched with a dynamo backend, which the config does not ask for")
    for variable, what in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if os.environ.get(variable, "false").lower() == "true":
            message = f"accelerate was launched with {what} ({variable}=true), which Lockstep does not run"
            raise UserError(f"{message}; launch without it: the YAML file decides how a run is distributed")
