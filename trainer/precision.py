"""Precision: what each setting needs, and the switches of torch behind it.

Owns `precision` and `backends`. Accelerate casts the forward pass; wrapping is `trainer.runtime`.
"""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import is_torchao_available, is_transformer_engine_available
from torch import nn

from trainer.config import Precision
from trainer.config_devices import BackendsConfig
from trainer.errors import UserError

STEP_DTYPES: dict[Precision, torch.dtype] = {
    "no": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,  # around the matrix products, which alone are in 8 bits
}
HUGE_PAGES_VARIABLE = "THP_MEM_ALLOC_ENABLE"  # of torch's
_FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


def check_precision(precision: Precision) -> None:
    """Refuses a precision that this machine does not have.

    Raises:
        UserError: names what is missing.
    """
    if precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        name = torch.cuda.get_device_name()
        raise UserError(f"{name} has no bfloat16; use fp16", path="precision")
    if precision != "fp8":
        return
    if not torch.cuda.is_available():
        raise UserError("fp8 needs an NVIDIA GPU, which is missing here; use bf16", path="precision")
    capability = torch.cuda.get_device_capability()
    if capability < _FP8_CAPABILITY:
        message = f"fp8 needs compute capability 8.9 or newer, {torch.cuda.get_device_name()} has"
        raise UserError(f"{message} {capability[0]}.{capability[1]}; use bf16", path="precision")
    if not (is_torchao_available() or is_transformer_engine_available()):
        message = "fp8 needs torchao or transformer-engine, and neither is installed"
        raise UserError(f"{message}: pip install torchao", path="precision")


def set_backends(config: BackendsConfig) -> None:
    """Sets torch's process-wide switches; that for memory is read at the first tensor of the process."""
    if config.huge_pages:
        os.environ.setdefault(HUGE_PAGES_VARIABLE, "1")
    torch.set_float32_matmul_precision(config.matmul_precision)
    torch.backends.cudnn.allow_tf32 = config.cudnn_tf32
    torch.backends.cudnn.benchmark = config.cudnn_benchmark


def autocast_on_cpu(accelerator: Accelerator) -> None:
    """Gives a CPU the fp16 that accelerate keeps for GPUs: the same config runs there, with its loss scaling."""
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu")


def allows_tf32(config: BackendsConfig, model: nn.Module) -> bool:
    """Tells whether most of a model's float32 arithmetic, convolutions or matrix products, may round to TF32."""
    # Where the kernel is as large as the stride it only cuts patches.
    if any(isinstance(module, nn.Conv2d) and module.kernel_size != module.stride for module in model.modules()):
        return config.cudnn_tf32
    return config.matmul_precision != "highest"
