"""Which rank writes which part of which tensor, and where in its file.

Who writes what is the decision of torch.distributed.checkpoint's planner: shards by their owners, what all ranks hold
by one of them, evenly. Owns the files' layout: safetensors, one file per rank, so that other tools can open them, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from trainer.checkpoint.manifest import Part, TensorRecord

T = TypeVar("T")

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 64  # of the data in a file


class Ranks(Protocol):
    """What we need of the processes that train together; `trainer.runtime.Runtime` is it."""

    rank: int
    num_ranks: int

    def gather(self, value: T) -> list[T]: ...


@dataclass(frozen=True)
class Item:
    """A part of a tensor in this rank's file: `begin` and `num_bytes` count from the first byte of data."""

    index: MetadataIndex
    dtype: torch.dtype
    sizes: tuple[int, ...]
    begin: int
    num_bytes: int


@dataclass(frozen=True)
class Layout:
    """What this rank writes, and where everything of all ranks is.

    Args:
        file: name of this rank's file, or None where nothing is left for it to write.
        header: the first bytes of the file.
        items: in the order of the file, without gaps.
        tensors: all tensors of all ranks.
    """

    file: str | None
    header: bytes
    items: tuple[Item, ...]
    tensors: dict[str, TensorRecord]

    @property
    def num_bytes(self) -> int:
        """Bytes of data in this rank's file."""
        return sum(item.num_bytes for item in self.items)


def make_layout(state: Mapping[str, torch.Tensor], ranks: Ranks) -> Layout:
    """Agrees on who writes what; all ranks call it together.

    Args:
        state: name -> tensor or DTensor. Ranks may have names of their own.
        ranks: the processes.

    Raises:
        ValueError: parts are missing or overlap, or a type is one that safetensors does not have.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(state), is_coordinator=ranks.rank == 0)
    # Every rank computes the same global plan from the same local plans, so nothing has to be sent back.
    plans, _ = planner.create_global_plan(ranks.gather(planner.create_local_plan()))
    parts: dict[str, list[Part]] = {}
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    mine: Layout | None = None
    for rank, plan in enumerate(plans):
        file = f"rank-{rank:05d}.safetensors"
        items = _items(plan)
        header = safetensors_header([(_entry_name(i), i.dtype, i.sizes) for i in items], {"format": "pt"})
        for item in items:
            offsets = tuple(item.index.offset or ())
            parts.setdefault(item.index.fqn, []).append(Part(offsets, item.sizes, file, len(header) + item.begin))
        for write in plan.items:
            assert write.tensor_data is not None
            shapes[write.index.fqn] = write.tensor_data.properties.dtype, tuple(write.tensor_data.size)
        if rank == ranks.rank:
            mine = Layout(file if items else None, header, items, {})
    assert mine is not None
    # In the model's order; what only other ranks have comes last.
    for name in [*state, *(name for name in shapes if name not in state)]:
        dtype, shape = shapes[name]
        mine.tensors[name] = TensorRecord(str(dtype).removeprefix("torch."), shape, tuple(parts.get(name, ())))
    return mine


def _items(plan: SavePlan) -> tuple[Item, ...]:
    """Lays out what one rank writes: the widest types first, so that every part is aligned without gaps."""
    writes = []
    for write in plan.items:
        assert write.tensor_data is not None, write.index  # what is not a tensor is in the manifest
        sizes = tuple(write.tensor_data.chunk.sizes)
        if math.prod(sizes):  # a rank's shard of a small tensor may be empty
            writes.append((write.index, write.tensor_data.properties.dtype, sizes))
    writes.sort(key=lambda write: -write[1].itemsize)
    items, begin = [], 0
    for index, dtype, sizes in writes:
        if dtype not in SAFETENSORS_NAMES:
            raise ValueError(f"'{index.fqn}' has type {dtype}, which a checkpoint cannot hold")
        num_bytes = math.prod(sizes) * dtype.itemsize
        items.append(Item(index, dtype, sizes, begin, num_bytes))
        begin += num_bytes
    return tuple(items)


def _entry_name(item: Item) -> str:
    """Returns the name in the file: the tensor's, and where its parts begin if it is not the first of them."""
    offsets = tuple(item.index.offset or ())
    return f"{item.index.fqn}[{','.join(map(str, offsets))}]" if any(offsets) else item.index.fqn


def safetensors_header(entries: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Returns the beginning of a safetensors file; the data follows in the order given, without gaps.

    Args:
        entries: name, type and shape of each tensor.
        metadata: of the file.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, dtype, sizes in entries:
        end = begin + math.prod(sizes) * dtype.itemsize
        table[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(sizes), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
