"""Batches of any nesting: dicts, lists, tuples, named tuples and dataclasses of tensors.

Whatever is no tensor (strings, None, the user's own objects) passes through untouched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
        mapped = {key: map_tensors(function, value, leaf_type) for key, value in data.items()}
        return mapped if type(data) is dict else _like(data, mapped)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(map_tensors(function, value, leaf_type) for value in data))
    if isinstance(data, list | tuple):
        return type(data)(map_tensors(function, value, leaf_type) for value in data)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        names = [field.name for field in dataclasses.fields(data) if field.init]
        values = {name: map_tensors(function, getattr(data, name), leaf_type) for name in names}
        return dataclasses.replace(data, **values)
    return data


def _like(mapping: Any, values: dict[Any, Any]) -> Any:
    try:
        return type(mapping)(values)
    except TypeError:  # a mapping that is not built from a dict
        return values


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
        if any(type(item) is not type(first) for item in items):
            return default_collate(list(items))
        if first.is_sparse or first.is_nested:
            return default_collate(list(items))
        if any(item.shape != first.shape or item.dtype != first.dtype for item in items):
            return default_collate(list(items))  # which says what differs, or converts
        stacked = allocate((len(items), *first.shape), first.dtype)
        return torch.stack(list(items), out=stacked)
    if isinstance(first, np.ndarray) and first.dtype.kind not in "SUO":
        return collate([torch.as_tensor(item) for item in items], allocate)
    if first is None and all(item is None for item in items):
        return None
    if isinstance(first, str | bytes):
        return list(items)
    if isinstance(first, Mapping):
        if any(set(item) != set(first) for item in items):
            raise KeyError(f"samples have different keys: {sorted(map(str, set().union(*items)))}")
        return {key: collate([item[key] for item in items], allocate) for key in first}
    if isinstance(first, list | tuple):
        if any(len(item) != len(first) for item in items):
            raise RuntimeError("samples have different numbers of parts")
        parts = [collate(part, allocate) for part in zip(*items, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else parts
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first) if field.init]
        return dataclasses.replace(first, **{n: collate([getattr(i, n) for i in items], allocate) for n in names})
    return default_collate(list(items))
