"""FSDP2: what of a model is sharded with what, and the memory of a training step that is, on one of several processes.

Owns how a model is sharded, for training (`trainer.parallel`) and for predictions alike: each repeated block by itself
and what is left as a whole. A prediction is torch's own `fully_shard` on fake tensors, among fake processes, so nothing
is assumed about which parameters are whole at what time; the rest of the step is `trainer.memory.simulation`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param as fsdp_param
from torch.distributed.tensor import DTensor

from trainer.errors import UserError
from trainer.memory.fakes import fake_mesh
from trainer.memory.simulation import StepMemory, simulate_step

# Their statistics are float32, and their kernels take weights of the same type only.
_KEPT_IN_FLOAT32 = nn.modules.batchnorm._NormBase


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype | None = None,
    *,
    reshard_after_forward: bool = True,
    offload: OffloadPolicy | None = None,
    before: Callable[[nn.Module], None] | None = None,
) -> None:
    """Shards the blocks' parameters over a mesh, then the rest of the model.

    Args:
        model: the model; it is changed. Its names stay, its parameters become DTensors.
        blocks: parts of it, none inside another. One that shares a parameter with another part of the model is
            sharded with the rest: a parameter can be gathered with one group only.
        mesh: the processes, in one dimension; or in two, of which the second shares.
        dtype: what parameters are gathered in; gradients are summed in float32, and BatchNorm keeps float32. None:
            in the type they have.
        reshard_after_forward: whether a block's parameters are let go after its forward and gathered again for
            backward. The rest of the model, whose backward comes first, keeps them.
        offload: where shares are kept.
        before: called with each part before it is sharded.

    Raises:
        UserError: a block is a container without a forward of its own.
    """
    settings: dict[str, Any] = {"mesh": mesh, "offload_policy": offload or OffloadPolicy()}

    def shard_part(part: nn.Module, output_dtype: torch.dtype | None = None, **more: Any) -> None:
        if before is not None:
            before(part)
        policy = MixedPrecisionPolicy()
        if dtype is not None:
            for module in part.modules():
                is_done = isinstance(module, FSDPModule)
                if isinstance(module, _KEPT_IN_FLOAT32) and not is_done and any(True for _ in module.parameters()):
                    fully_shard(module, **settings, **more, mp_policy=policy)
            # No output type inside of the model: what follows a block takes what its parameters are gathered in.
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=output_dtype)
        fully_shard(part, **settings, **more, mp_policy=policy)

    for block in _with_parameters_of_their_own(model, blocks):
        if isinstance(block, nn.ModuleList | nn.ModuleDict):
            message = f"a {type(block).__name__} has no forward and cannot be sharded as a block; name what it holds"
            raise UserError(message, path="memory.blocks")
        shard_part(block, reshard_after_forward=reshard_after_forward)
    shard_part(model, torch.float32 if dtype is not None else None)


def _with_parameters_of_their_own(model: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    def owners(module: nn.Module) -> Counter[nn.Parameter]:
        # A module that is registered twice is one; a parameter that two modules hold is counted twice.
        return Counter(p for part in module.modules() for p in part._parameters.values() if p is not None)

    in_model = owners(model)
    counted = ((block, owners(block)) for block in blocks)
    return [block for block, own in counted if own and all(in_model[p] == count for p, count in own.items())]


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this process's part of a tensor, sharing its memory; all of one that is not sharded."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class _Shares:
    """What torch's `_chunk_with_empty` returns, each when it is asked for."""

    def __init__(self, tensor: torch.Tensor, num_chunks: int, dim: int) -> None:
        self._tensor, self._dim = tensor, dim
        self._size = math.ceil(tensor.size(dim) / num_chunks)  # as torch.chunk's

    def __getitem__(self, number: int) -> torch.Tensor:
        start = number * self._size
        left = self._tensor.size(self._dim) - start
        if left <= 0:
            return self._tensor.new_empty(0)
        return self._tensor.narrow(self._dim, start, min(self._size, left))


@contextmanager
def _shares_on_demand() -> Iterator[None]:
    """Has `fully_shard` make the shares that it looks at, and not a fake tensor for each of very many processes."""
    original = fsdp_param._chunk_with_empty
    fsdp_param._chunk_with_empty = _Shares  # type: ignore[assignment]
    try:
        yield
    finally:
        fsdp_param._chunk_with_empty = original


def simulate_sharded_step(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], torch.Tensor],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    batch: Any,
    num_ranks: int,
    find_blocks: Callable[[nn.Module], Mapping[str, nn.Module]],
    *,
    prepare: Callable[[nn.Module], None] | None = None,
    autocast_dtype: torch.dtype | None = None,
    is_accumulating: bool = False,
    **settings: Any,
) -> StepMemory:
    """Simulates a step under FSDP2 on the first of `num_ranks` processes: the one with the largest shares.

    Args:
        model: `simulate_step`, as all that is not named here.
        loss: `simulate_step`.
        make_optimizer: `simulate_step`; its parameters are shares.
        batch: one process's micro-batch.
        num_ranks: processes that share the parameters.
        find_blocks: the blocks of a copy of the model, sharded each by itself.
        prepare: called with the copy before it is sharded.
        autocast_dtype: what parameters are gathered in, and the type of `simulate_step`.
        is_accumulating: there is an earlier micro-batch, whose gradients are not yet summed over the processes: they
            are whole. Its memory counts for the phase `forward`.

    Raises:
        CannotSimulate: the step needs the numbers of a tensor.
    """

    def loss_of_last(model: nn.Module, batch: Any) -> torch.Tensor:
        if is_accumulating:
            assert isinstance(model, FSDPModule)
            model.set_requires_gradient_sync(False)
            loss(model, batch).backward()
            model.set_requires_gradient_sync(True)
        return loss(model, batch)

    with fake_mesh(num_ranks) as mesh:

        def prepare_and_shard(model: nn.Module) -> None:
            if prepare is not None:
                prepare(model)
            with _shares_on_demand():
                shard(model, find_blocks(model).values(), mesh, autocast_dtype)

        settings["autocast_dtype"] = autocast_dtype
        return simulate_step(model, loss_of_last, make_optimizer, batch, prepare=prepare_and_shard, **settings)
