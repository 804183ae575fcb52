"""The repeated blocks of a model: the layers whose activations fill the memory, found by structure or by name.

Owns which modules are blocks. What is done with them is up to `trainer.memory.checkpointing` and others.
"""

from __future__ import annotations

import collections
import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn

from trainer.errors import Problem, UserError, nearest

# A stage may have this many weights beside its chain of blocks, such as a stem and a head. A module with more is a
# block that happens to hold a list, such as a mixture of experts beside attention.
_MAX_WEIGHTS_BESIDE_A_CHAIN = 2
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def repeated_blocks(model: nn.Module, patterns: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Returns the model's repeated blocks by qualified name, in order of registration; empty if it has none.

    A block is a module of a class that the model holds at least twice, made of parts and with at least two weights;
    of nested ones the outermost, so neither a convolution with its normalization nor a block's attention is one.
    Plain containers and stages, whose substance is a chain of blocks, are looked into. A model without such blocks
    may have smaller ones, with one weight each, or plain `nn.Sequential`s lined up in a container.

    Args:
        model: a model that is not wrapped yet.
        patterns: what to take instead: shell-style patterns of qualified names or of class names. `*` matches dots
            too, but nothing inside a match is a block of its own, so `layer3.*` are the direct parts of `layer3`.

    Raises:
        UserError: a pattern matches no module that can be called.
    """
    if patterns:
        return _matching(model, patterns)
    return _outermost_repeated(model, 2) or _outermost_repeated(model, 1) or _lined_up_sequentials(model)


# ---- by name -------------------------------------------------------------------------------------------------


def _matching(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    unmatched = dict.fromkeys(patterns)
    chosen: dict[str, nn.Module] = {}
    outermost: dict[str, nn.Module] = {}  # with the other names of a module that is registered twice
    names: dict[str, None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or not _has_forward(module):
            continue
        known_as = (name, type(module).__name__)
        names.update(dict.fromkeys(known_as))
        matches = [p for p in patterns if any(fnmatch.fnmatchcase(n, p) for n in known_as)]
        for pattern in matches:
            unmatched.pop(pattern, None)
        if matches and not _is_inside(name, outermost):
            if all(module is not known for known in chosen.values()):
                chosen[name] = module
            outermost[name] = module
    if unmatched:
        problems = []
        for pattern in unmatched:
            hint = nearest(pattern, (n for n in names if n.count(".") == pattern.count(".")))
            text = f"'{pattern}' matches no module of the model, by name or by class{hint}"
            problems.append(Problem(text, "memory.blocks"))
        raise UserError(*problems)
    return chosen


def _is_inside(name: str, outer: dict[str, nn.Module]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:depth]) in outer for depth in range(1, len(parts)))


# ---- by structure --------------------------------------------------------------------------------------------


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _num_weights(module: nn.Module) -> int:
    """Modules inside, or the module itself, with a parameter of two dimensions or more: not normalizations."""
    return sum(any(p.ndim >= 2 for p in part.parameters(recurse=False)) for part in module.modules())


def _is_unit(module: nn.Module) -> bool:
    """It is made of parts and is more than a list of them."""
    return _has_forward(module) and type(module) not in _CONTAINERS and any(True for _ in module.children())


def _chains(module: nn.Module, classes: set[type[nn.Module]]) -> Iterator[list[nn.Module]]:
    """Yields modules of one class that stand in one container, not looking into modules other than containers."""
    if isinstance(module, _CONTAINERS):
        by_class = collections.defaultdict(list)
        for child in module.children():
            if type(child) in classes:
                by_class[type(child)].append(child)
        yield from (chain for chain in by_class.values() if len(chain) >= 2)
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            yield from _chains(child, classes)


def _is_stage(module: nn.Module, classes: set[type[nn.Module]]) -> bool:
    in_chains = sum(_num_weights(block) for chain in _chains(module, classes) for block in chain)
    return in_chains > 0 and _num_weights(module) - in_chains <= _MAX_WEIGHTS_BESIDE_A_CHAIN


def _outermost_repeated(model: nn.Module, min_weights: int) -> dict[str, nn.Module]:
    """Returns the outermost modules of classes held twice, some of whose instances have that many weights."""
    units = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if n and _is_unit(m)]
    classes = {type(m) for _, m in units if _num_weights(m) >= min_weights}
    num_held = collections.Counter(type(m) for _, m in units)
    # By class: a stage with a single block is a stage like its siblings.
    classes -= {type(m) for _, m in units if num_held[type(m)] >= 2 and _is_stage(m, classes)}
    while True:
        outermost: dict[str, nn.Module] = {}
        for name, module in units:
            if type(module) in classes and not _is_inside(name, outermost):
                outermost[name] = module
        num_outermost = collections.Counter(type(m) for m in outermost.values())
        if all(number >= 2 for number in num_outermost.values()):
            break
        classes -= {c for c, number in num_outermost.items() if number < 2}  # then what is inside may be repeated
    by_module = {module: name for name, module in reversed(outermost.items())}  # one registered twice is one
    return {name: module for name, module in outermost.items() if by_module[module] == name}


def _lined_up_sequentials(model: nn.Module) -> dict[str, nn.Module]:
    chosen: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, _CONTAINERS) and not _is_inside(name, chosen) and name not in chosen:
            parts = [(n, m) for n, m in module.named_children() if type(m) is nn.Sequential and _num_weights(m) >= 1]
            if len(parts) >= 2:
                chosen.update((f"{name}.{part}" if name else part, m) for part, m in parts)
    return chosen
