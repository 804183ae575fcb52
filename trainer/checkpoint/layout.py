"""Which rank writes which part of which tensor, and where in its file.

Shards are written by their owners, what several ranks hold by one of them, evenly. Each rank works out its own part by
itself, so that it takes as long and as much memory on any number of ranks; only rank 0, which writes the manifest, is
told of all parts. Owns the files' layout: safetensors, one file per rank, so that other tools can open them, too.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.distributed.tensor import DTensor

from trainer.checkpoint.manifest import Part, TensorRecord, TensorTable, checksum
from trainer.errors import one_line_text

T = TypeVar("T")
Form = tuple[torch.dtype, tuple[int, ...]]  # of a whole tensor

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
    """What we need of the processes that train together; `trainer.world.World` is it."""

    rank: int
    num_ranks: int

    def gather(self, value: T) -> list[T]: ...
    def gather_on_main(self, value: T) -> list[T]: ...
    def from_main(self, value: Callable[[], T]) -> T: ...


class Box(NamedTuple):
    """A part of a tensor that this rank has, from `offsets` on; `copy` counts the ranks that have the same."""

    name: str
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    copy: int = 0
    num_copies: int = 1

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class Item:
    """A part of a tensor in this rank's file: `begin` and `num_bytes` count from the first byte of data."""

    name: str
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: int
    num_bytes: int


@dataclass(frozen=True)
class Layout:
    """What this rank writes, and on rank 0 where everything of all ranks is.

    Args:
        file: name of this rank's file, or None where nothing is left for it to write.
        header: the first bytes of the file.
        items: in the order of the file, without gaps.
        tensors: all tensors of all ranks; empty but on rank 0.
    """

    file: str | None
    header: bytes
    items: tuple[Item, ...]
    tensors: TensorTable

    @property
    def num_bytes(self) -> int:
        """Bytes of data in this rank's file."""
        return sum(item.num_bytes for item in self.items)


@dataclass(frozen=True)
class Told:
    """What rank 0 is told by a rank: where its parts are, and the tensors that it alone may have."""

    file: str
    parts: list[tuple[str, tuple[int, ...], tuple[int, ...], int]]  # name, offsets, sizes, first byte
    forms: dict[str, Form]
    error: str | None


def make_layout(state: Mapping[str, torch.Tensor], ranks: Ranks) -> Layout:
    """Agrees on who writes what; all ranks call it together.

    Args:
        state: name -> tensor or DTensor. Ranks may have names of their own.
        ranks: the processes.

    Raises:
        ValueError: parts are missing or overlap, or a type is one that safetensors does not have. On all ranks.
    """
    boxes, is_same = _boxes_to_write(state, ranks)
    forms = {name: _form(t) for name, t in state.items() if not is_same or _is_own(name, ranks)}
    items, header, own = lay_out(boxes, ranks.rank, forms)
    told = ranks.gather_on_main(own)
    error: str | None = None
    tensors = TensorTable()
    if ranks.rank == 0:
        error = next((one.error for one in told if one.error is not None), None)
        if error is None:
            tensors, error = _records({name: _form(tensor) for name, tensor in state.items()}, told)
            error = error or _what_is_wrong(tensors)
    error = ranks.from_main(lambda: error)
    if error is not None:
        raise ValueError(error)
    return Layout(own.file if items else None, header, items, tensors)


def lay_out(boxes: Iterable[Box], rank: int, forms: dict[str, Form]) -> tuple[tuple[Item, ...], bytes, Told]:
    """Returns what a rank's file holds, how it begins, and what rank 0 is told of it."""
    items: tuple[Item, ...] = ()
    error: str | None = None
    try:
        items = _items(boxes)
    except ValueError as problem:
        error = one_line_text(problem)
    header = safetensors_header([(_entry_name(i), i.dtype, i.sizes) for i in items], {"format": "pt"})
    parts = [(item.name, item.offsets, item.sizes, len(header) + item.begin) for item in items]
    return items, header, Told(f"rank-{rank:05d}.safetensors", parts, forms, error)


def _form(tensor: torch.Tensor) -> Form:
    return tensor.dtype, tuple(tensor.shape)


def _is_own(name: str, ranks: Ranks) -> bool:
    return name.startswith(f"ranks.{ranks.rank}.")


def _boxes_to_write(state: Mapping[str, torch.Tensor], ranks: Ranks) -> tuple[list[Box], bool]:
    """Returns what this rank is to write, and whether all ranks have tensors of the same names beside their own."""
    boxes = [box for name, tensor in state.items() if (box := _box(name, tensor)) is not None]
    whole = [box for box in boxes if not isinstance(state[box.name], DTensor) and not _is_own(box.name, ranks)]
    writers, is_same = _writers(whole, ranks)
    of_copies = spread((box.num_bytes, box.num_copies) for box in boxes)
    mine = []
    for box, copy in zip(boxes, of_copies, strict=True):
        if box.copy == copy and writers.get(box.name, ranks.rank) == ranks.rank:
            mine.append(box)
    return mine, is_same


def _box(name: str, tensor: torch.Tensor) -> Box | None:
    """Returns the part of a tensor that this rank has; None where it has none."""
    if not isinstance(tensor, DTensor):
        return Box(name, tensor.dtype, (0,) * tensor.ndim, tuple(tensor.shape))
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    copy, num_copies = 0, 1
    for place, size, placement in zip(coordinate, mesh.shape, tensor.placements, strict=True):
        if placement.is_replicate():
            copy, num_copies = copy * size + place, num_copies * size
    (chunk,) = tensor.__create_chunk_list__()
    return Box(name, tensor.dtype, tuple(chunk.offsets), tuple(chunk.sizes), copy, num_copies)


def _writers(whole: Sequence[Box], ranks: Ranks) -> tuple[dict[str, int], bool]:
    """Returns who writes each tensor that ranks hold as a whole, the same on all ranks that hold it."""
    if ranks.num_ranks == 1:
        return {}, True
    form = checksum(repr([(box.name, str(box.dtype), box.sizes) for box in whole]).encode())
    if len(set(ranks.gather(form))) == 1:
        chosen = spread((box.num_bytes, ranks.num_ranks) for box in whole)
        return {box.name: rank for box, rank in zip(whole, chosen, strict=True)}, True
    # Some rank lacks what others have, such as the optimizer's state of a parameter that it never used.
    held = ranks.gather({box.name: box.num_bytes for box in whole})
    sizes = {name: size for of_rank in held for name, size in of_rank.items()}
    loads, writers = [0] * ranks.num_ranks, {}
    for name, size in sizes.items():
        writers[name] = min((rank for rank, names in enumerate(held) if name in names), key=loads.__getitem__)
        loads[writers[name]] += size
    return writers, False


def spread(pieces: Iterable[tuple[int, int]]) -> list[int]:
    """Returns who takes each piece: of its candidates, 0 to n - 1, the one that has the fewest bytes so far.

    Args:
        pieces: bytes, and the number of candidates n.
    """
    loads: dict[int, list[tuple[int, int]]] = {}  # by number of candidates: a heap of those that have some
    chosen = []
    for num_bytes, num_candidates in pieces:
        heap = loads.setdefault(num_candidates, [])
        if len(heap) < num_candidates:  # somebody has nothing yet
            taker = len(heap)
            heapq.heappush(heap, (num_bytes, taker))
        else:
            load, taker = heap[0]
            heapq.heapreplace(heap, (load + num_bytes, taker))
        chosen.append(taker)
    return chosen


def _records(forms: dict[str, Form], told: Sequence[Told]) -> tuple[TensorTable, str | None]:
    """Returns all tensors, in the model's order, what only other ranks have last; and what is wrong, if anything is."""
    parts: dict[str, list[Part]] = {}
    for one in told:
        for name, offsets, sizes, begin in one.parts:
            parts.setdefault(name, []).append(Part(offsets, sizes, one.file, begin))
        for name, form in one.forms.items():
            forms.setdefault(name, form)
    unknown = next((name for name in parts if name not in forms), None)
    error = None if unknown is None else f"rank 0 has no '{unknown}', of which other ranks have parts"
    table = TensorTable(
        (name, TensorRecord(str(dtype).removeprefix("torch."), shape, tuple(parts.get(name, ()))))
        for name, (dtype, shape) in forms.items()
    )
    return table, error


def _what_is_wrong(tensors: Mapping[str, TensorRecord]) -> str | None:
    """Tells where parts are missing or overlap. Those of a tensor are slices of it along one dimension."""
    for name, record in tensors.items():
        parts, shape = record.parts, record.shape
        if len(parts) == 1 and parts[0].sizes == shape:
            continue
        if not parts and math.prod(shape) == 0:
            continue
        if not shape or any(len(part.sizes) != len(shape) for part in parts):
            return f"the parts of '{name}' do not make up the whole of it"
        dim = next((d for d, size in enumerate(shape) if any(part.sizes[d] != size for part in parts)), 0)
        end = 0
        for part in sorted(parts):
            is_slice = part.sizes[:dim] + part.sizes[dim + 1 :] == shape[:dim] + shape[dim + 1 :]
            if not is_slice or part.offsets[dim] != end:
                break
            end += part.sizes[dim]
        else:
            if end == shape[dim]:
                continue
        return f"the parts of '{name}' do not make up the whole of it"
    return None


def _items(boxes: Iterable[Box]) -> tuple[Item, ...]:
    """Lays out what one rank writes: the widest types first, so that every part is aligned without gaps."""
    writes = [box for box in boxes if math.prod(box.sizes)]  # a rank's shard of a small tensor may be empty
    writes.sort(key=lambda box: -box.dtype.itemsize)
    items, begin = [], 0
    for box in writes:
        if box.dtype not in SAFETENSORS_NAMES:
            raise ValueError(f"'{box.name}' has type {box.dtype}, which a checkpoint cannot hold")
        items.append(Item(box.name, box.dtype, box.offsets, box.sizes, begin, box.num_bytes))
        begin += box.num_bytes
    return tuple(items)


def _entry_name(item: Item) -> str:
    """Returns the name in the file: the tensor's, and where its parts begin if it is not the first of them."""
    return f"{item.name}[{','.join(map(str, item.offsets))}]" if any(item.offsets) else item.name


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
