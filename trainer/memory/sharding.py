"""The memory of a training step under FSDP2, on one of several processes.

Owns how a model is sharded: each repeated block by itself and what is left as a whole, as Accelerate's FSDP2 does. The
step itself is torch's own `fully_shard` on fake tensors, among fake processes, so nothing is assumed about which
parameters are whole at what time; counting is `trainer.memory.trace`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from trainer.memory.fakes import fake_mesh
from trainer.memory.trace import StepMemory, simulate_step


def shard(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, dtype: torch.dtype | None = None) -> None:
    """Shards the blocks' parameters over a mesh, then the rest of the model.

    Args:
        model: the model; it is changed.
        blocks: parts of it, none inside another.
        mesh: the processes, in one dimension.
        dtype: what the model computes in; its gradients are summed in float32. None: in the type it has.
    """
    policy = MixedPrecisionPolicy()
    if dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    for block in blocks:
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


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
        autocast_dtype: what parameters are gathered in and the model computes in.
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
            shard(model, find_blocks(model).values(), mesh, autocast_dtype)

        return simulate_step(model, loss_of_last, make_optimizer, batch, prepare=prepare_and_shard, **settings)
