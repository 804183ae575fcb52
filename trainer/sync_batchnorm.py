"""BatchNorm over the samples of all processes: torch's own on GPUs, and one of plain operations on the CPU.

Owns the conversion of a model, and what torch's `SyncBatchNorm` computes where it refuses to: on the CPU, so that the
same config runs there. Names of parameters and buffers stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainer.errors import UserError


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """SyncBatchNorm for the CPU. Forward and backward are collectives in training.

    Not torch's class, nor one of it: DistributedDataParallel refuses these on the CPU.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2D input (got {input.ndim}D input)")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        return self._normalised(input)

    @torch.compiler.disable  # torch.compile knows no collective with a gradient
    def _normalised(self, input: torch.Tensor) -> torch.Tensor:
        values = input.float()
        dims = [dim for dim in range(values.ndim) if dim != 1]
        shape = [1, -1] + [1] * (values.ndim - 2)
        count = values.new_tensor([values.numel() // values.shape[1]])
        sums: torch.Tensor = _SumOverRanks.apply(torch.cat([values.sum(dims), count]))
        total = sums[-1].detach()
        if total <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
        mean = sums[:-1] / total
        centred = values - mean.view(shape)
        # The squares of what is centred: a mean far from zero would leave little of the difference of two sums.
        variance: torch.Tensor = _SumOverRanks.apply(centred.square().sum(dims)) / total
        self._track(mean.detach(), variance.detach() * total / (total - 1))
        normal = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            normal = normal * self.weight.view(shape)
        if self.bias is not None:
            normal = normal + self.bias.view(shape)
        return normal.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class _SumOverRanks(torch.autograd.Function):
    """A sum over processes. Each of them goes on with it, so what they send back is summed, too."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def synchronise_batchnorm(model: nn.Module, num_ranks: int, device_type: str) -> nn.Module:
    """Returns the model with every BatchNorm over all processes; a single process keeps what it has.

    Args:
        model: not wrapped yet; it is changed. Its parameters stay the same objects, so an optimizer need not know.
        num_ranks: processes that train together.
        device_type: where the model will be.

    Raises:
        UserError: the model has no BatchNorm.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise UserError("the model has no BatchNorm", path="parallel.sync_batchnorm")
    if num_ranks == 1:
        return model
    if device_type != "cpu":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for module in norms:
        module.__class__ = CpuSyncBatchNorm
    return model
