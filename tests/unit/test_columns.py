"""Batches that are taken at once from data in memory have the bits of their items, one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset, default_collate

from trainer.data.columns import columns, rows
from trainer.data.datasets import Digits, SizedDataset, TorchFile
from trainer.data.loader import LoadedBatch, SampleLoader
from trainer.data.sampler import SampleKey
from trainer.data.transforms import HostTransform

NUMBERS = [7, 0, 7, 3]


def own_memory(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def loaded(dataset: SizedDataset, *transforms: Callable[[Any], Any], reading: Any = lambda sample: None) -> LoadedBatch:
    loader = SampleLoader(dataset, HostTransform(transforms, "x"), None, 0, "data.train", "raise")
    batch = loader.load([SampleKey(2, number) for number in NUMBERS], own_memory, reading)
    assert isinstance(batch, LoadedBatch)
    return batch


def _tensors(tmp_path: Path) -> SizedDataset:
    images = torch.randn(9, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    return TensorDataset(images, torch.arange(9), torch.rand(9, dtype=torch.float64) < 0.5)


def _one_tensor(tmp_path: Path) -> SizedDataset:
    return TensorDataset(torch.randn(9, 2).to(torch.bfloat16)[:, 1])


def _digits(tmp_path: Path) -> SizedDataset:
    return Digits("eval")


def _torch_file(tmp_path: Path) -> SizedDataset:
    torch.save((torch.randn(9, 4), torch.randint(5, (9,))), tmp_path / "pair.pt")
    return TorchFile(str(tmp_path / "pair.pt"))


def _npy_files(tmp_path: Path) -> SizedDataset:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((9, 2, 3)).astype(np.float16))
    np.save(tmp_path / "y.npy", np.arange(9, dtype=np.int32))
    return TorchFile({"inputs": str(tmp_path / "x.npy"), "targets": str(tmp_path / "y.npy")})


@pytest.mark.parametrize("make", [_tensors, _one_tensor, _digits, _torch_file, _npy_files])
def test_the_bits_are_those_of_the_items(make: Callable[[Path], Any], tmp_path: Path) -> None:
    dataset = make(tmp_path)
    one_by_one = default_collate([dataset[number] for number in NUMBERS])
    asked: list[int] = []
    batch = loaded(dataset, reading=asked.append)
    assert asked == NUMBERS[:1]  # it was read at once
    assert batch.sample_ids.tolist() == NUMBERS
    assert len(batch.data) == len(one_by_one)
    for found, expected in zip(batch.data, one_by_one, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        assert found.is_contiguous()
        assert not found.requires_grad


class _Doubled(TensorDataset):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(2 * part for part in super().__getitem__(index))


def test_items_that_are_made_are_asked_for() -> None:
    dataset = _Doubled(torch.arange(9))
    assert columns(dataset) is None
    assert loaded(dataset).data[0].tolist() == [2 * number for number in NUMBERS]


def test_items_that_go_through_transforms_are_asked_for() -> None:
    dataset = TensorDataset(torch.arange(9.0), torch.arange(9))
    data = loaded(dataset, lambda value: value + 0.5).data
    assert data[0].tolist() == [number + 0.5 for number in NUMBERS]
    assert data[1].tolist() == NUMBERS


def test_what_torch_cannot_index_is_left_to_the_items() -> None:
    assert columns(TensorDataset(torch.eye(9).to_sparse())) is None
    assert columns(TensorDataset(torch.eye(9).as_subclass(_Marked))) is None


class _Marked(torch.Tensor):
    pass


def test_rows_lie_in_the_memory_that_is_given() -> None:
    given: list[torch.Tensor] = []

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        given.append(torch.empty(shape, dtype=dtype))
        return given[-1]

    found = rows((torch.arange(9), np.arange(9.0)), np.array(NUMBERS), allocate)
    assert [part.data_ptr() for part in found] == [part.data_ptr() for part in given]
