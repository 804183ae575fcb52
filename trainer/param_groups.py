"""Which parameters are treated how: weight decay, the rate of their layer, which of two optimizers takes them.

Owns `optim.no_weight_decay`, `optim.layer_decay` and `optim.rest.match`, and what a pattern of names means, for
`model.freeze` too. Decides by name, on the model as built, so that a simulated or sharded one is treated alike.
Building optimizers is `trainer.optim`.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.config_model import OptimConfig
from trainer.errors import Problem, UserError, nearest
from trainer.memory.blocks import repeated_blocks
from trainer.two_optimizers import TwoOptimizers

# Those of torchvision's reference `set_weight_decay`, and RMSNorm.
_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
_NAMED_NORM = re.compile(r"Norm(\dd)?$")  # classes of models' own: LlamaRMSNorm, T5LayerNorm, GlobalResponseNorm


@dataclass(frozen=True)
class Treatment:
    """How an optimizer treats a parameter.

    Args:
        lr_scale: what its learning rate is multiplied by.
        is_decayed: whether it has weight decay.
        is_rest: whether `optim.rest` takes it.
    """

    lr_scale: float = 1.0
    is_decayed: bool = True
    is_rest: bool = False


def choose_treatments(config: OptimConfig, model: nn.Module, blocks: Sequence[str] = ()) -> dict[str, Treatment]:
    """Returns how each parameter that is trained is treated, by name.

    Args:
        config: the `optim` section.
        model: as built, neither sharded nor wrapped.
        blocks: the `memory.blocks` patterns.

    Raises:
        UserError: a pattern names nothing, the model has no layers to tell apart, or an optimizer would get nothing.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scales = _layer_scales(model, config.layer_decay, blocks) if config.layer_decay is not None else {}
    undecayed = _selected(model, config.no_weight_decay, _WITHOUT_DECAY, "optim.no_weight_decay")
    if config.no_weight_decay and undecayed.isdisjoint(named.values()):
        raise UserError("matches no parameter that is trained", path="optim.no_weight_decay")
    rest = _selected(model, config.rest.match, _REST, "optim.rest.match") if config.rest is not None else set()
    chosen = {
        name: Treatment(scales.get(name, 1.0), parameter not in undecayed, parameter in rest)
        for name, parameter in named.items()
    }
    if config.no_weight_decay and not any(treatment.is_decayed for treatment in chosen.values()):
        raise UserError("leaves nothing that is trained to weight_decay", path="optim.no_weight_decay")
    if config.rest is not None and len({treatment.is_rest for treatment in chosen.values()}) < 2:
        message = "matches every parameter that is trained, and leaves none to" if rest else "leaves nothing but"
        raise UserError(f"{message} '{config.name}'", path="optim.rest.match")
    return chosen


# ---- by name and kind ------------------------------------------------------------------------------------------


def parameters_named(model: nn.Module, patterns: Sequence[str], path: str) -> set[nn.Parameter]:
    """Returns the parameters that shell-style patterns name.

    A parameter is known by its whole name, by the last part of it, as in torchvision's references, and by the whole
    name of each module around it.

    Args:
        model: the model; `*` in a pattern matches dots too, and a tied parameter has several names.
        patterns: such as `layer1`, `layer1.*`, `encoder.pos_embedding` or `pos_embedding`.
        path: where the patterns stand in the config.

    Raises:
        UserError: a pattern names no parameter, one problem for each.
    """
    found: set[nn.Parameter] = set()
    unmatched = dict.fromkeys(patterns)
    names: set[str] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        known_as = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        known_as.append(parts[-1])
        names.update(known_as)
        matching = [p for p in patterns if any(fnmatch.fnmatchcase(known, p) for known in known_as)]
        if matching:
            found.add(parameter)
        for pattern in matching:
            unmatched.pop(pattern, None)
    if unmatched:
        problems = []
        for pattern in unmatched:
            hint = nearest(pattern, sorted(n for n in names if n.count(".") == pattern.count(".")))
            problems.append(Problem(f"'{pattern}' names no parameter and no module with parameters{hint}", path))
        raise UserError(*problems)
    return found


Kind = Callable[[nn.Module], Iterator[nn.Parameter]]


def _selected(model: nn.Module, wanted: Sequence[str], kinds: Mapping[str, Kind], path: str) -> set[nn.Parameter]:
    """Returns the parameters of these kinds, of which a model may have none, and those that patterns name."""
    found = parameters_named(model, [pattern for pattern in wanted if pattern not in kinds], path)
    for kind in wanted:
        if kind in kinds:
            found.update(kinds[kind](model))
    return found


def _own(module: nn.Module, name: str = "*") -> Iterator[nn.Parameter]:
    return (p for n, p in module.named_parameters(recurse=False) if name in ("*", n))


def _of_norms(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, _NORMS) or _NAMED_NORM.search(type(module).__name__):
            yield from _own(module)


def _biases(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        yield from _own(module, "bias")


def _vectors(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.ndim <= 1)


def _other_than_matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.ndim != 2)


def _embeddings(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            yield from _own(module)


def _last_layer(model: nn.Module) -> Iterator[nn.Parameter]:
    last: nn.Module | None = None
    for module in model.modules():
        if any(p.ndim >= 2 for p in _own(module)):
            last = module
    return _own(last) if last is not None else iter(())


_WITHOUT_DECAY: dict[str, Kind] = {"norm": _of_norms, "bias": _biases, "vector": _vectors}
_REST: dict[str, Kind] = {
    "not_matrix": _other_than_matrices,
    "embedding": _embeddings,
    "last_layer": _last_layer,
}


# ---- by layer --------------------------------------------------------------------------------------------------


def _layer_scales(model: nn.Module, decay: float, blocks: Sequence[str]) -> dict[str, float]:
    """Returns `decay ** (last layer - layer)` by parameter name, as BEiT and timm's `param_groups_layer_decay`."""
    layers = _layers(model, blocks)
    last = max(layers.values())
    if last == 0:
        raise UserError("the model is one layer, so that a rate per layer has no effect", path="optim.layer_decay")
    return {name: decay ** (last - layer) for name, layer in layers.items()}


def has_layers_of_timm(model: nn.Module) -> bool:
    """Tells whether timm's own grouping tells the model's layers apart, whatever its repeated blocks are."""
    return getattr(model, "group_matcher", None) is not None


def _layers(model: nn.Module, patterns: Sequence[str]) -> dict[str, int]:
    """Returns the number of each parameter's layer, from the input on.

    By timm's own grouping where the model has one. Else what comes before the repeated blocks is layer 0, each block is
    one, what comes after them is the last, and what stands between two belongs to the next.
    """
    if has_layers_of_timm(model):
        try:
            from timm.models import group_parameters
        except ImportError as error:
            message = "layers of this model are told apart by timm: pip install 'lockstep-trainer[timm]'"
            raise UserError(message, path="optim.layer_decay") from error
        matcher: Any = model.group_matcher
        grouped: dict[str, int] = group_parameters(model, matcher(coarse=False), reverse=True)
        return grouped
    blocks = list(repeated_blocks(model, patterns))
    if not blocks:
        message = "the model has no repeated blocks, which layers are told apart by; name them in memory.blocks"
        raise UserError(message, path="optim.layer_decay")
    number = {name: i for i, name in enumerate(blocks, start=1)}
    layers: dict[str, int] = {}
    reached = 0  # the latest block
    for name, _ in model.named_parameters():
        parts = name.split(".")
        inside = next((number[n] for d in range(1, len(parts)) if (n := ".".join(parts[:d])) in number), None)
        reached = max(reached, inside or 0)
        layers[name] = inside or (reached + 1 if reached else 0)
    return layers


# ---- what a run says -------------------------------------------------------------------------------------------


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """Returns how many tensors of parameters an optimizer has, and with which weight decay and rate."""
    if isinstance(optimizer, TwoOptimizers):
        return "; ".join(map(describe_groups, optimizer.parts))
    decays: Counter[float] = Counter()
    scales: Counter[float] = Counter()
    for group in optimizer.param_groups:
        decays[group.get("weight_decay", 0.0)] += len(group["params"])
        scales[group.get("lr_scale", 1.0)] += len(group["params"])
    parts = [f"weight decay {decay:g} on {count}" for decay, count in sorted(decays.items(), reverse=True)]
    if len(scales) > 3:
        parts.append(f"{len(scales)} rates, {min(scales):.3g} to {max(scales):.3g} of optim.lr")
    elif list(scales) != [1.0]:
        parts += [f"{scale:.3g} of optim.lr on {count}" for scale, count in sorted(scales.items())]
    return f"{type(optimizer).__name__}: {decays.total()} tensors of parameters, {', '.join(parts)}"
