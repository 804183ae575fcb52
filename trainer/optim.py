"""The optimizer. The learning rate of a step is `trainer.schedule`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainer.components import accepts, call, resolve
from trainer.config import OptimConfig
from trainer.errors import UserError

_FUSED_ON_GPUS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def build_optimizer(config: OptimConfig, model: nn.Module, device_type: str) -> torch.optim.Optimizer:
    """Builds the optimizer over the model's trainable parameters.

    Args:
        config: the `optim` section.
        model: its parameters need not be on the device yet.
        device_type: where they will be, such as `cuda`.

    Raises:
        UserError: an unknown optimizer, or arguments that do not fit.
    """
    target = resolve("optimizer", config.name, "optim")
    args: dict[str, Any] = {"params": [p for p in model.parameters() if p.requires_grad], "lr": config.lr}
    ours = {"lr": "lr", "weight_decay": "weight_decay", "fused": "implementation", "foreach": "implementation"}
    for key in (*ours, "params"):
        if key in config.args:
            raise UserError(
                f"set it as optim.{ours[key]}" if key in ours else "not yours to set", path=f"optim.args.{key}"
            )
    if accepts(target, "weight_decay"):
        args["weight_decay"] = config.weight_decay
    elif config.weight_decay:
        raise UserError(f"'{config.name}' has no weight decay", path="optim.weight_decay")
    args.update(_implementation(config, target, device_type))
    optimizer = call(target, {**args, **config.args}, config.name, "optim")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"'{config.name}' is not a torch.optim.Optimizer", path="optim.name")
    return optimizer


def _implementation(config: OptimConfig, target: Callable[..., Any], device_type: str) -> dict[str, bool]:
    """Returns the arguments that choose how torch updates parameters; none leaves the choice to torch."""
    asked = config.implementation
    if asked == "auto":
        # On the CPU torch loops over the parameters unless told otherwise.
        return {"fused": True} if device_type == "cuda" and target in _FUSED_ON_GPUS else {}
    argument = "foreach" if asked == "for_loop" else asked
    if not accepts(target, argument):
        raise UserError(f"'{config.name}' has no {asked} implementation", path="optim.implementation")
    return {argument: asked != "for_loop"}
