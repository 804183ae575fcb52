"""Batches of any nesting: dicts, lists, tuples, named tuples and dataclasses of tensors.

Whatever is no tensor (strings, None, the user's own objects) passes through untouched.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]  # an empty tensor of a shape and type


def map_tensors(function: Callable[[torch.Tensor], Any], data: Any, leaf_type: type = torch.Tensor) -> Any:
    """Returns `data` with every tensor (or other `leaf_type`) replaced by `function(tensor)`."""
    if isinstance(data, leaf_type):
        return function(data)  # type: ignore[arg-type]
    if isinstance(data, str | bytes):
        return data
    if isinstance(data, Mapping):
        return _like(data, {key: map_tensors(function, value, leaf_type) for key, value in data.items()})
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(map_tensors(function, value, leaf_type) for value in data))
    if isinstance(data, list | tuple):
        return type(data)(map_tensors(function, value, leaf_type) for value in data)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return _with_fields(data, lambda name: map_tensors(function, getattr(data, name), leaf_type))
    return data


def num_bytes(data: Any) -> int:
    """Returns the size of all tensors in `data` together."""
    sizes = [0]
    map_tensors(lambda tensor: sizes.append(tensor.nbytes), data)
    return sum(sizes)


def _like(mapping: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """Returns a mapping of the same type, as far as that can be made."""
    if type(mapping) is dict:
        return values
    try:
        if not isinstance(mapping, MutableMapping):
            return type(mapping)(values)  # type: ignore[call-arg]
        same = copy.copy(mapping)  # which may know more than its items, such as a default
        same.update(values)
        return same
    except TypeError:
        return values


def _with_fields(data: Any, value: Callable[[str], Any]) -> Any:
    """Returns a copy of a dataclass with other values; its `__post_init__` has run already and must not again."""
    same = copy.copy(data)
    for field in dataclasses.fields(data):
        if hasattr(data, field.name):
            object.__setattr__(same, field.name, value(field.name))  # also where it is frozen
    return same


def part(data: Any, key: str, position: int) -> Any:
    """Returns `data[key]` of a dict, the field `key` of a dataclass, or `data[position]` of a pair.

    Raises:
        LookupError: there is no such part.
    """
    if isinstance(data, Mapping):
        return data[key]
    if isinstance(data, list | tuple):
        return data[position]
    if dataclasses.is_dataclass(data) and hasattr(data, key):
        return getattr(data, key)
    raise LookupError(key)


def with_part(data: Any, key: str, position: int, value: Any) -> Any:
    """Returns `data`, of the same type, with one `part` replaced."""
    if isinstance(data, Mapping):
        changed = dict(data) | {key: value}
        return changed if type(data) is dict else _like(data, changed)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(value if i == position else old for i, old in enumerate(data)))
    if isinstance(data, list | tuple):
        return [*data[:position], value, *data[position + 1 :]]
    changed = copy.copy(data)
    object.__setattr__(changed, key, value)  # also where the dataclass is frozen
    return changed


def collate(items: Sequence[Any], allocate: Allocate) -> Any:
    """Makes one batch of samples, as torch's `default_collate`; also of dataclasses, and of None.

    Args:
        items: samples of equal structure.
        allocate: where stacked tensors are written.

    Raises:
        RuntimeError, TypeError, ValueError, KeyError: the samples do not fit together.
    """
    first = items[0]
    if isinstance(first, torch.Tensor):
        return _stacked(items, allocate)
    if isinstance(first, np.ndarray) and first.dtype.kind not in "SUO":
        return collate([torch.as_tensor(item) for item in items], allocate)
    if first is None and all(item is None for item in items):
        return None
    if isinstance(first, str | bytes):
        return list(items)
    if isinstance(first, Mapping):
        if any(set(item) != set(first) for item in items):
            raise KeyError(f"samples have different keys: {sorted(map(str, set().union(*items)))}")
        return _like(first, {key: collate([item[key] for item in items], allocate) for key in first})
    if isinstance(first, list | tuple):
        if any(len(item) != len(first) for item in items):
            raise RuntimeError("samples have different numbers of parts")
        parts = [collate(part, allocate) for part in zip(*items, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else parts
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        return _with_fields(first, lambda name: collate([getattr(item, name) for item in items], allocate))
    return default_collate(list(items))


@torch.no_grad()
def in_lists(items: Sequence[Any], allocate: Allocate) -> Any:
    """Makes one batch of samples that are not stacked: each part of a pair or a dict becomes a list over the samples.

    Args:
        items: pairs or dicts; whatever is in them.
        allocate: where their tensors are copied.

    Raises:
        RuntimeError, KeyError: the samples do not fit together.
    """

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return allocate(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    first = items[0]
    copies = [map_tensors(copied, item) for item in items]
    if isinstance(first, Mapping):
        if any(set(item) != set(first) for item in items):
            raise KeyError(f"samples have different keys: {sorted(map(str, set().union(*items)))}")
        return {key: [item[key] for item in copies] for key in first}
    if not isinstance(first, list | tuple) or any(len(item) != len(first) for item in items):
        raise RuntimeError("samples must be pairs or dicts of the same parts")
    return [list(values) for values in zip(*copies, strict=True)]


@torch.no_grad()  # what a sample went through is no part of the model
def _stacked(items: Sequence[Any], allocate: Allocate) -> torch.Tensor:
    first = items[0]
    is_plain = first.layout == torch.strided and first.device.type == "cpu" and not first.is_nested
    kind, dtype = type(first), first.dtype
    if not is_plain or any(type(item) is not kind or item.dtype != dtype for item in items):
        return default_collate(list(items))  # which says what differs, or converts
    stacked = allocate((len(items), *first.shape), dtype)
    plain = items if kind is torch.Tensor else [item.as_subclass(torch.Tensor) for item in items]
    try:
        torch.stack(plain, out=stacked)  # type: ignore[arg-type]
    except RuntimeError:  # of other shapes
        return default_collate(list(items))
    return stacked
