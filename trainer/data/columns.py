"""Batches of data sets that keep the parts of their items as columns in memory: rows taken at once, not one by one.

Owns which data sets these are, and how a batch is taken from them. It has the bits that `trainer.data.nested.collate`
makes of the items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from trainer.data.datasets import Digits, SizedDataset, TorchFile
from trainer.data.nested import Allocate, collate

Column = torch.Tensor | NDArray[Any] | list[int]  # a value per sample

_OF_NUMPY = {"bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"}


def columns(dataset: SizedDataset) -> tuple[Column, ...] | None:
    """Returns what the items of a data set are rows of, a column per part; None where items are made in another way."""
    read = getattr(type(dataset), "__getitem__", None)
    found: tuple[Column, ...]
    if read is TensorDataset.__getitem__:
        found = dataset.tensors  # type: ignore[attr-defined]
    elif read is Digits.__getitem__:
        found = (dataset.images, dataset.labels)  # type: ignore[attr-defined]
    elif read is TorchFile.__getitem__:
        found = (dataset.inputs, dataset.targets)  # type: ignore[attr-defined]
    else:
        return None
    return found if all(_is_plain(column) for column in found) else None


def _is_plain(column: Any) -> bool:
    if type(column) is torch.Tensor:
        is_dense = column.layout == torch.strided and not column.is_nested and not column.is_quantized
        return is_dense and column.device.type == "cpu"
    if isinstance(column, np.ndarray):
        return column.dtype.isnative and column.dtype.name in _OF_NUMPY
    return isinstance(column, list)


@torch.no_grad()  # what a sample went through is no part of the model
def rows(found: Sequence[Column], numbers: NDArray[np.int64], allocate: Allocate) -> list[torch.Tensor]:
    """Returns a batch: of each column the rows at `numbers` (B,), in memory from `allocate`."""
    index = torch.from_numpy(numbers)
    batch = []
    for column in found:
        if isinstance(column, torch.Tensor):
            taken = allocate((len(numbers), *column.shape[1:]), column.dtype)
            torch.index_select(column, 0, index, out=taken)
        elif isinstance(column, np.ndarray):
            values = torch.from_numpy(np.take(column, numbers, axis=0))
            taken = allocate(tuple(values.shape), values.dtype).copy_(values)
        else:
            taken = collate([column[number] for number in numbers.tolist()], allocate)
        batch.append(taken)
    return batch
