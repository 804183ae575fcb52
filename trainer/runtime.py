"""The Accelerator from the config, and what is trained with it: placed, wrapped, and run backward.

Owns the world (that there are as many processes as promised), the device, precision and wrapping. Accelerate does the
work; this module picks what works and refuses what would silently not. What ranks tell each other is `trainer.world`.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DDPCommunicationHookType, patch_environment
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config import Config
from trainer.config_devices import ParallelConfig
from trainer.data.tuning import cores_of_a_rank
from trainer.errors import UserError
from trainer.launched import end_with_agent, promised_processes, refuse_foreign_settings, wrong_world
from trainer.parallel import broadcast, choose_shard_size, prepare_sharded, reshard, settle_buckets, use_fsdp
from trainer.placement import place_this_process
from trainer.precision import STEP_DTYPES, autocast_on_cpu, check_precision, set_backends
from trainer.rendezvous import init_method
from trainer.telemetry.memory import device_memory
from trainer.world import World

logger = logging.getLogger("lockstep")


class Runtime(World):
    """This process among its peers, and how it trains.

    Args:
        config: the whole run.

    Raises:
        UserError: the config, or how this process was launched, cannot be carried out here.
    """

    def __init__(self, config: Config) -> None:
        end_with_agent()
        self._config = config.parallel
        promised = promised_processes()
        refuse_foreign_settings(config.precision)
        check_precision(config.precision)
        set_backends(config.backends)
        self.accelerator = accelerator = _accelerator(config, is_alone=promised == 1)
        rank, local_rank = accelerator.process_index, accelerator.local_process_index
        num_ranks = accelerator.num_processes
        if promised != num_ranks:
            raise UserError(wrong_world(promised, num_ranks))
        self.num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine
        self.step_dtype: torch.dtype = STEP_DTYPES[config.precision]  # of what matrix products take
        # With its index: accelerate says `cuda` on a single GPU, and tensors there say `cuda:0`.
        device = torch.empty(0, device=accelerator.device).device
        # The cores next to the GPU, for this process and for the threads and loader workers that it starts.
        share = config.parallel.pin_cores and self.num_local_ranks > 1
        placement = place_this_process(device, local_rank, self.num_local_ranks) if share else None
        if placement is not None:
            logger.info("rank %d %s", rank, placement)
        self.num_cores = cores_of_a_rank(self.num_local_ranks, has_its_own=placement is not None)
        super().__init__(rank, num_ranks, local_rank, device)
        # Processes that share one copy of parameters, gradients and optimizer state.
        self.shard_size = choose_shard_size(config.parallel, self.gather(self.num_local_ranks))
        self.is_sharded = self.shard_size > 1
        # Whether a training forward is a collective, so that every rank has to run as many as the others.
        self.in_lockstep = self.is_sharded or (config.parallel.sync_batchnorm and self.num_ranks > 1)
        if self.is_sharded:
            dtype = None if config.precision == "no" else self.step_dtype
            use_fsdp(accelerator, config.parallel, self.shard_size, dtype)
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


def _accelerator(config: Config, is_alone: bool) -> Accelerator:
    has_accelerator = torch.accelerator.is_available()
    # Without the first variable accelerate starts no process group on the CPU, and every rank trains alone. With a
    # local rank it starts one, and DDP, for a single process too, which torchrun may run for its restarts.
    variables = {"ACCELERATE_USE_CPU": str(not has_accelerator).lower()}
    if is_alone:
        variables["LOCAL_RANK"] = "-1"
    with patch_environment(**variables):
        accelerator = Accelerator(
            mixed_precision=config.precision,
            cpu=not has_accelerator,
            kwargs_handlers=[_process_group_settings(config.parallel), _ddp_settings(config.parallel)],
        )
    if config.precision == "fp16" and not has_accelerator:
        autocast_on_cpu(accelerator)
    return accelerator


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
