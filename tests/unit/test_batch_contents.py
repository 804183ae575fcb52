"""Whatever a batch holds: it arrives from a worker as it was, and is collated as torch does it."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import loads
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from torchvision import tv_tensors
from worker_pools import MakePool

from trainer.data.nested import collate, map_tensors
from trainer.data.sampler import SampleKey
from trainer.data.slots import Slot


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True, slots=True)
class Frozen:
    image: torch.Tensor
    name: str


@dataclass
class Scaled:
    """Changes what it is given, and computes a part itself."""

    image: torch.Tensor
    total: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.image = self.image / 2
        self.total = self.image.sum()


def same(a: Any, b: Any, strides: bool = True) -> bool:
    """Tells whether two structures are equal, in types, values and the strides of tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and (a.stride() == b.stride() or not strides) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[k], b[k], strides) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, strides) for x, y in zip(a, b, strict=True))
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)
    return bool(a == b)


def structure() -> Any:
    images = torch.rand(4, 3, 6, 5)
    return {
        "channels last": images.contiguous(memory_format=torch.channels_last),
        "transposed": images.permute(3, 1, 0, 2),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "types": [torch.ones(3).to(d) for d in (torch.bool, torch.bfloat16, torch.complex64, torch.uint8, torch.int16)],
        "tuple": (1, "text", b"bytes", None, True, 2.5, np.float32(1.5)),
        "array": np.arange(6).reshape(2, 3)[:, ::-1],
        "pair": Pair(images[0], {"deep": [torch.arange(3)]}),
        "frozen": Frozen(images[1].clone(), "name"),
        "scaled": Scaled(torch.ones(3)),
        "ordered": collections.OrderedDict(a=torch.ones(2)),
        7: [],
    }


def test_whatever_a_batch_holds_arrives(make_pool: MakePool) -> None:
    data = structure()
    pool = make_pool(loads.Structure(data))
    batches = pool.batches([[SampleKey(0, 0)]] * 9)
    for batch in batches:
        assert same(batch.data, data)
        pool.release(batch)


def test_tensors_with_gaps_arrive_as_clone_would_have_them(make_pool: MakePool) -> None:
    images = torch.rand(4, 3, 6, 5).contiguous(memory_format=torch.channels_last)
    data = [images[:, :, ::2], images[:, :2], torch.rand(3, 1).expand(3, 4), torch.rand(4, requires_grad=True) * 2]
    pool = make_pool(loads.Structure(data))
    for batch in pool.batches([[SampleKey(0, 0)]] * 9):
        assert all(same(sent.detach().clone(), got) for sent, got in zip(data, batch.data, strict=True))
        pool.release(batch)


def test_mapping_over_a_structure_keeps_it() -> None:
    data = structure()
    assert same(map_tensors(torch.clone, data), data)
    counts = collections.defaultdict(int, a=torch.ones(2))  # type: ignore[arg-type]
    mapped = map_tensors(torch.clone, counts)
    assert mapped["missing"] == 0


COLLATED: list[list[Any]] = [
    [1, 2, 3],
    [1.5, 2.5],
    [1, 2.5],
    [True, False],
    [np.float32(1), np.float32(2)],
    [np.int16(1), np.int16(2)],
    [np.bool_(True), np.bool_(False)],
    [np.array(1.5), np.array(2.5)],
    [np.array([1, 2], np.uint8), np.array([3, 4], np.uint8)],
    [np.arange(6.0).reshape(2, 3).T, np.ones((3, 2))],
    [np.array([1, 2], np.int32), np.array([1.5, 2.5])],
    [torch.tensor(1), torch.tensor(2)],
    [torch.ones(2), torch.ones(2, dtype=torch.float64)],
    [torch.rand(3, 4, 5).permute(2, 0, 1), torch.rand(5, 3, 4)],
    [torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last) for _ in range(2)],
    [torch.empty(0, 3), torch.empty(0, 3)],
    ["a", "b"],
    [b"a", b"b"],
    [[], []],
    [(), ()],
    [{}, {}],
    [[1, torch.ones(2)], [2, torch.zeros(2)]],
    [{"a": 1, "b": [1.5]}, {"a": 2, "b": [2.5]}],
    [collections.OrderedDict(a=1), collections.OrderedDict(a=2)],
    [collections.defaultdict(int, a=1), collections.defaultdict(int, a=2)],
    [collections.UserDict(a=1), collections.UserDict(a=2)],
    [Pair(1, torch.ones(2)), Pair(2, torch.ones(2))],
    [tv_tensors.Image(torch.ones(3, 2, 2)), tv_tensors.Image(torch.zeros(3, 2, 2))],
    [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(2))],
]


@pytest.mark.parametrize("items", COLLATED, ids=lambda items: type(items[0]).__name__)
def test_batches_are_those_of_torch_and_lie_in_the_slot(items: list[Any]) -> None:
    slot = Slot()
    expected, made = default_collate(items), collate(items, slot.allocate)
    assert same(map_tensors(torch.Tensor.detach, expected), made, strides=False)  # contiguous, as DataLoader's workers
    arrived = slot.get(slot.put(made))
    assert same(made, arrived)

    def is_in_slot(tensor: torch.Tensor) -> None:
        assert tensor.numel() == 0 or slot._offset_of(tensor) is not None
        assert not tensor.requires_grad

    map_tensors(is_in_slot, arrived)
    slot.close()


def test_batches_that_torch_does_not_make() -> None:
    assert collate([None, None], _in_new_memory) is None
    frozen = collate([Frozen(torch.ones(2), "a"), Frozen(torch.zeros(2), "b")], _in_new_memory)
    assert same(frozen, Frozen(torch.tensor([[1.0, 1], [0, 0]]), ["a", "b"]))  # type: ignore[arg-type]
    scaled = collate([Scaled(torch.ones(2)), Scaled(torch.zeros(2))], _in_new_memory)
    assert scaled.image.tolist() == [[0.5, 0.5], [0, 0]]
    assert scaled.total.tolist() == [1, 0]


@pytest.mark.parametrize(
    "items",
    [
        [torch.ones(2), torch.ones(3)],
        [torch.ones(2), None],
        [None, 1],
        [{"a": 1}, {"a": 1, "b": 2}],
        [[1], [1, 2]],
        [object(), object()],
        [np.array(["a"]), np.array(["b"])],
        [torch.ones(2).to_sparse(), torch.ones(2).to_sparse()],
    ],
    ids=["shapes", "none last", "none first", "keys", "lengths", "objects", "text", "sparse"],
)
def test_what_makes_no_batch_is_refused(items: list[Any]) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError, KeyError)):
        collate(items, _in_new_memory)


def _in_new_memory(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)
