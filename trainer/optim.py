"""The optimizer. The learning rate of a step is `trainer.schedule`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.components import accepts, call, resolve
from trainer.config_model import OptimConfig
from trainer.config_values import Component
from trainer.errors import UserError
from trainer.param_groups import Treatment, choose_treatments
from trainer.two_optimizers import TwoOptimizers

_FUSED_ON_GPUS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


@dataclass(frozen=True)
class _Part:
    """One of the optimizers, and where it stands in the config."""

    path: str
    component: Component
    lr: float
    weight_decay: float


def build_optimizer(
    config: OptimConfig, model: nn.Module, device_type: str, treatments: Mapping[str, Treatment] | None = None
) -> torch.optim.Optimizer:
    """Builds the optimizer over the model's trainable parameters; with `optim.rest` two that look like one.

    Args:
        config: the `optim` section.
        model: its parameters need not be on the device yet.
        device_type: where they will be, such as `cuda`.
        treatments: `choose_treatments` of the model as it was built; None where it is still that.

    Raises:
        UserError: an unknown optimizer, or arguments that do not fit.
    """
    chosen = choose_treatments(config, model) if treatments is None else treatments
    trained = [(p, chosen[name]) for name, p in model.named_parameters() if p.requires_grad]
    parts = [_Part("optim", config, config.lr, config.weight_decay)]
    if (rest := config.rest) is not None:
        weight_decay = config.weight_decay if rest.weight_decay is None else rest.weight_decay
        parts.append(_Part("optim.rest", rest, rest.lr or config.lr, weight_decay))
    targets = [resolve("optimizer", part.component.name, part.path) for part in parts]
    implementations = _implementations(config, targets, device_type)
    optimizers = []
    for i, part in enumerate(parts):
        own = [(p, treatment) for p, treatment in trained if treatment.is_rest == (i == 1)]
        optimizers.append(_build(part, targets[i], _groups(part, config.lr, own), implementations[i]))
    return optimizers[0] if len(optimizers) == 1 else TwoOptimizers(*optimizers)


def _groups(part: _Part, base_lr: float, own: Sequence[tuple[nn.Parameter, Treatment]]) -> list[dict[str, Any]]:
    """Returns parameter groups in the order of the model's parameters, with `lr_scale`, as timm calls it."""
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for parameter, treatment in own:
        scale = treatment.lr_scale if part.lr == base_lr else treatment.lr_scale * (part.lr / base_lr)
        settings = {"lr_scale": scale, "weight_decay": part.weight_decay if treatment.is_decayed else 0.0}
        group = groups.setdefault((scale, treatment.is_decayed), {"params": [], **settings})
        group["params"].append(parameter)
    return list(groups.values())


def _build(
    part: _Part, target: Callable[..., Any], groups: list[dict[str, Any]], implementation: Mapping[str, bool]
) -> torch.optim.Optimizer:
    component, path = part.component, part.path
    ours = {"lr": "lr", "weight_decay": "weight_decay", "fused": "implementation", "foreach": "implementation"}
    for key in (*ours, "params"):
        if key in component.args:
            place = "optim" if key in ("fused", "foreach") else path
            message = f"set it as {place}.{ours[key]}" if key in ours else "not yours to set"
            raise UserError(message, path=f"{path}.args.{key}")
    args: dict[str, Any] = {"lr": part.lr, **implementation, **component.args}
    if accepts(target, "weight_decay"):
        args["weight_decay"] = part.weight_decay
    elif part.weight_decay:
        raise UserError(f"'{component.name}' has no weight decay", path=f"{path}.weight_decay")
    else:
        groups = [{key: value for key, value in group.items() if key != "weight_decay"} for group in groups]
    # One that treats all alike gets them as a plain list, for optimizers of users that know of no groups.
    is_plain = (
        len(groups) == 1 and groups[0]["lr_scale"] == 1 and groups[0].get("weight_decay", 0.0) == part.weight_decay
    )
    scales = [None] if is_plain else [group["lr_scale"] for group in groups]
    optimizer = call(target, {"params": groups[0]["params"] if is_plain else groups, **args}, component.name, path)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"'{component.name}' is not a torch.optim.Optimizer", path=f"{path}.name")
    if [group.get("lr_scale") for group in optimizer.param_groups] != scales:
        raise UserError(f"'{component.name}' does not keep the groups of parameters that it is given", path=path)
    return optimizer


def _implementations(
    config: OptimConfig, targets: Sequence[Callable[..., Any]], device_type: str
) -> list[dict[str, bool]]:
    """Returns, for each optimizer, the arguments that choose how torch updates parameters; none leaves it to torch."""
    asked = config.implementation
    if asked == "auto":
        # On the CPU torch loops over the parameters unless told otherwise.
        return [{"fused": True} if device_type == "cuda" and target in _FUSED_ON_GPUS else {} for target in targets]
    argument: str = "foreach" if asked == "for_loop" else asked
    chosen = [{argument: asked != "for_loop"} if accepts(target, argument) else {} for target in targets]
    if not any(chosen):
        raise UserError(f"'{config.name}' has no {asked} implementation", path="optim.implementation")
    return chosen
