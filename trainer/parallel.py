"""Processes that share one copy of the model: FSDP2 through Accelerate, for `parallel.strategy: fsdp` and `hsdp`.

Owns who shares with whom, how Accelerate is told, the model's and the optimizer's way into shares, and what code around
a forward must do once every forward is a collective. What of a model is sharded with what is `trainer.memory.sharding`;
DDP's settings are in `trainer.runtime`.
"""

from __future__ import annotations

import functools
import itertools
import logging
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType, ParallelismConfig, patch_environment
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from trainer.config_devices import ParallelConfig
from trainer.data.feed import MicroBatch
from trainer.data.nested import map_tensors
from trainer.errors import UserError, one_line_text
from trainer.memory.sharding import shard

logger = logging.getLogger("lockstep")

_EXCHANGES = ("unshard", "wait_for_unshard", "post_backward", "finalize_backward")
_CHUNK_BYTES = 2**28  # what is sent at once: DDP's own size


def choose_shard_size(config: ParallelConfig, processes_by_rank: Sequence[int]) -> int:
    """Returns how many processes share one copy of the model's state; 1 where each has its own.

    Args:
        config: the `parallel` section.
        processes_by_rank: how many processes there are on the machine of each rank; the same on every rank.

    Raises:
        UserError: the processes do not split into groups of this size; on every rank alike.
    """
    num_ranks = len(processes_by_rank)
    if config.strategy == "ddp" or num_ranks == 1:
        return 1
    if config.strategy == "fsdp":
        return num_ranks
    path = "parallel.shard_size"
    size = config.shard_size
    if size is None:
        if len(set(processes_by_rank)) > 1:
            counts = ", ".join(map(str, sorted(set(processes_by_rank))))
            raise UserError(f"machines have {counts} processes: say how many share a copy", path=path, agreed=True)
        size = processes_by_rank[0]
        if size == 1:
            message = "every machine has one process, so none shares with another: say how many do, or use ddp or fsdp"
            raise UserError(message, path=path, agreed=True)
    if num_ranks % size:
        fits = [n for n in range(2, num_ranks + 1) if num_ranks % n == 0]
        message = f"{num_ranks} processes do not split into groups of {size}; these sizes fit:"
        raise UserError(f"{message} {', '.join(map(str, fits))}", path=path, agreed=True)
    return size


def use_fsdp(accelerator: Accelerator, config: ParallelConfig, shard_size: int, step_dtype: torch.dtype | None) -> None:
    """Tells Accelerate to shard what it prepares from here on.

    Args:
        accelerator: of several processes.
        config: the `parallel` section.
        shard_size: processes that share one copy.
        step_dtype: what parameters are gathered in; None: in float32.
    """
    offload = OffloadPolicy()
    if config.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=accelerator.device.type != "cpu")
    # Accelerate notes some of it in the environment, from where it would reach whatever this process starts.
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="NO_WRAP",  # it knows class names only; `prepare_sharded` has the blocks themselves
            reshard_after_forward=config.reshard_after_forward,
            cpu_offload=offload,
            mixed_precision_policy=(
                MixedPrecisionPolicy()
                if step_dtype is None
                else MixedPrecisionPolicy(
                    param_dtype=step_dtype, reduce_dtype=torch.float32, output_dtype=torch.float32
                )
            ),
            activation_checkpointing=False,
            activation_checkpointing_offload=False,
            cpu_ram_efficient_loading=False,
        )
    sizes = ParallelismConfig(
        dp_replicate_size=accelerator.num_processes // shard_size,
        dp_shard_size=shard_size,
        tp_size=1,
        cp_size=1,
        sp_size=1,
    )
    # Its constructor selects FSDP on accelerators only, and needs the sizes before it knows how many processes there
    # are. So it is told afterwards, on every device in the same way.
    state = accelerator.state
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin
    state.parallelism_config = sizes
    state.device_mesh = sizes.get_device_mesh(accelerator.device.type)


def prepare_sharded(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, blocks: Iterable[nn.Module]
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Shards a model in place and gives its optimizer the shares; every rank starts with rank 0's weights.

    Args:
        accelerator: after `use_fsdp`.
        model: in its final shape, checkpointed and compiled; not wrapped.
        optimizer: of its parameters, without state.
        blocks: parts that are gathered each by itself.

    Raises:
        UserError: the model cannot be sharded.
    """
    _check(model)
    plugin, device = accelerator.state.fsdp_plugin, accelerator.device
    names = {parameter: name for name, parameter in model.named_parameters()}
    names_by_group = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = []  # which would keep the whole parameters in memory

    def settle(part: nn.Module) -> None:
        # As DDP does at its start. Part by part, so that no device ever holds the whole model.
        parameters = [p for p in part.parameters() if not isinstance(p, DTensor)]
        for parameter in parameters:
            parameter.data = parameter.data.to(device).contiguous()  # FSDP shards rows of row-major memory
        broadcast([parameter.data for parameter in parameters])

    shard(
        model,
        blocks,
        accelerator.torch_device_mesh[tuple(accelerator.parallelism_config.dp_dim_names)],
        plugin.mixed_precision_policy.param_dtype,
        reshard_after_forward=plugin.reshard_after_forward,
        offload=plugin.cpu_offload,
        before=settle,
    )
    broadcast(list(model.buffers()))
    if plugin.mixed_precision_policy.param_dtype is not None:
        _autocast(model, device.type, plugin.mixed_precision_policy.param_dtype)
    _point(optimizer, model, names_by_group)
    prepared = accelerator.prepare(model, optimizer)
    # Accelerate finds parameters again by their address, and all shares without a row have the same.
    _point(optimizer, model, names_by_group)
    assert prepared[0] is model
    return prepared[0], prepared[1]


def _check(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            dtype = str(parameter.dtype).removeprefix("torch.")
            message = f"parameter {name} is {dtype}; parameters that are shared must be float32, in every precision"
            raise UserError(message, path="parallel.strategy", agreed=True)


def _autocast(model: nn.Module, device_type: str, dtype: torch.dtype) -> None:
    """Runs the model under autocast, as under DDP: what mixes a float32 buffer with gathered weights works in both."""
    forward = model.forward
    # A bound method, as Accelerate makes it, for whatever copies the model.
    function = getattr(forward, "__func__", None) or (lambda module, *args, **kwargs: forward(*args, **kwargs))
    model.forward = types.MethodType(torch.autocast(device_type, dtype)(function), model)


def _point(optimizer: torch.optim.Optimizer, model: nn.Module, names_by_group: Sequence[Sequence[str]]) -> None:
    parameters = dict(model.named_parameters())
    for group, names in zip(optimizer.param_groups, names_by_group, strict=True):
        group["params"] = [parameters[name] for name in names]


# ---- tensors ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def broadcast(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Gives every rank the tensors of rank 0, many in one message."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for alike in by_kind.values():
        for chunk in _chunks(alike):
            if len(chunk) == 1 and chunk[0].is_contiguous():
                dist.broadcast(chunk[0], src=0, group=group)
                continue
            together = torch.cat([tensor.flatten() for tensor in chunk])
            dist.broadcast(together, src=0, group=group)
            parts = together.split([tensor.numel() for tensor in chunk])
            shaped = [part.view(tensor.shape) for tensor, part in zip(chunk, parts, strict=True)]
            torch._foreach_copy_(chunk, shaped)


def _chunks(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    chunk: list[torch.Tensor] = []
    for tensor in tensors:
        if chunk and sum(t.nbytes for t in chunk) + tensor.nbytes > _CHUNK_BYTES:
            yield chunk
            chunk = []
        chunk.append(tensor)
    if chunk:
        yield chunk


class _TouchesAll(nn.Module):
    """Stands in for a model: its output depends on every parameter, and its backward gives each a gradient of zero."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._touched = list(parameters)  # which are another model's

    def forward(self) -> torch.Tensor:
        return torch.stack([(parameter.sum() * 0).float() for parameter in self._touched]).sum()


def settle_buckets(model: nn.Module) -> None:
    """Has DDP lay out, now, the buckets in which gradients are exchanged; all ranks call it, before the first step.

    DDP does so after its first backward, by the order in which gradients come, and the order in which the gradients of
    more than two ranks are added depends on their place there. Left to the first step of each attempt, that step would
    differ in its last bits from the same step of a run that was not interrupted. So a backward that is not the model's
    comes first, in which gradients come in the reverse order of the parameters.
    """
    bare = model.module
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.module = _TouchesAll(parameters)
    try:
        model().backward()
    finally:
        model.module = bare
    for parameter in parameters:
        parameter.grad = None


def gradient_norm(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the norm of all gradients together, whole or in shares. Nobody waits for it."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # of all shares; a collective


@contextmanager
def explained_optimizer_errors() -> Iterator[None]:
    """Turns what torch says of an optimizer that needs whole matrices, and so cannot work on shares, into one line.

    As with torch's Muon, and matrices of fewer rows than processes.
    """
    try:
        yield
    except RuntimeError as error:
        if "placement" not in str(error):
            raise
        message = f"the optimizer cannot work on shares of parameters, such as {one_line_text(error)[:150]}...; let"
        message += " optim.rest take them, or use strategy: ddp"
        raise UserError(message, path="parallel.strategy", agreed=True) from error


# ---- around a forward ------------------------------------------------------------------------------------------


def in_lockstep(
    batches: Iterator[MicroBatch], num_batches: int, rank: int, device: torch.device, gather: Callable[[Any], list[Any]]
) -> Generator[MicroBatch, None, None]:
    """Yields equally many evaluation batches on every rank: its own, then stand-ins, which hold 0 samples.

    A sharded forward is a collective, but ranks may have fewer batches than others, and lose some whose samples cannot
    be read. A rank without any borrows one.

    Args:
        batches: this rank's.
        num_batches: the most that any rank may have.
        rank: this one.
        device: this rank's.
        gather: `Runtime.gather`.
    """
    first = next(batches, None)
    has_some = gather(first is not None)
    if not any(has_some):
        return
    spare = None if first is None else first.data
    if not all(has_some):
        lender = has_some.index(True)
        lent = gather(map_tensors(torch.Tensor.cpu, spare) if rank == lender else None)[lender]
        spare = map_tensors(lambda tensor: tensor.to(device), lent) if first is None else spare
    num_own = 0
    for batch in itertools.chain([first] if first is not None else [], batches):
        spare = batch.data
        yield batch
        num_own += 1
    for _ in range(num_batches - num_own):
        yield MicroBatch(spare, 0, torch.empty(0, dtype=torch.int64), is_last=True)


def reshard(model: nn.Module) -> None:
    """Lets go of parameters that a forward without a backward has left whole: from here on they are shares again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def watch_exchanges(model: nn.Module, around: Callable[[], AbstractContextManager[None]]) -> None:
    """Has everything that a sharded model does to exchange parameters and gradients run inside of `around()`.

    What is issued to a stream of its own and waited for later counts where it is waited for. It takes torch's private
    parts; where these have other names, nothing is watched.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        groups = [group for module in modules for group in _parameter_groups(module)]
        methods = [(group, name, getattr(group, name)) for group in groups for name in _EXCHANGES]
    except AttributeError as error:
        logger.info("time.communication is not told apart from forward and backward: %s", error)
        return
    for group, name, method in methods:
        setattr(group, name, _inside(around, method))


def _parameter_groups(module: FSDPModule) -> list[Any]:
    state = module._get_fsdp_state()
    # One group per module in torch 2.11, several from some later version on.
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _inside(around: Callable[[], AbstractContextManager[None]], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with around():
            return function(*args, **kwargs)

    return wrapped
