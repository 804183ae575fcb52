"""Which rank writes which part of which tensor, and where in its file.

Shards are written by their owners, and what several ranks hold by one of them, evenly; what all hold as a whole, by no
more ranks than it is worth a file. Each rank works out its own part by itself, so that it takes as long and as much
memory on any number of ranks. Rank 0, which writes the manifest, is told of the parts that follow no rule; shards as
`torch.chunk` cuts them do, and all ranks agree on that by a hash. Owns the files' layout: safetensors, one file per
rank, so that other tools can open them, too.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch.distributed.tensor import DTensor, Shard

from trainer.checkpoint.manifest import checksum
from trainer.checkpoint.safetensors_file import TYPE_NAMES, entry_name, header_of
from trainer.checkpoint.tensor_table import (
    OwnTensors,
    Part,
    Shards,
    TensorRecord,
    TensorTable,
    file_of_rank,
    own_name,
    ranges_of,
)
from trainer.errors import one_line_text

T = TypeVar("T")
Form = tuple[torch.dtype, tuple[int, ...]]  # of a whole tensor

_LEAST_SHARE = 16 * 2**20  # bytes of what all ranks hold that a rank writes: a file more is one more for all to open


class Ranks(Protocol):
    """What we need of the processes that train together; `trainer.world.World` is it."""

    rank: int
    num_ranks: int

    def gather(self, value: T) -> list[T]: ...
    def gather_on_main(self, value: T) -> list[T]: ...
    def from_main(self, value: Callable[[], T]) -> T: ...


class Box(NamedTuple):
    """A part of a tensor that this rank writes, from `offsets` on.

    `is_told` where rank 0 has to hear of it, as it follows from no rule that all ranks know.
    """

    name: str
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    is_told: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


class Cut(NamedTuple):
    """How a tensor is cut along `dim`, and for each copy of it the ranks that hold its shards, in their order."""

    dim: int
    copies: tuple[tuple[range, ...], ...]


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
    """What rank 0 is told by a rank.

    Args:
        parts: name, offsets, sizes and first byte of those that follow no rule.
        forms: of the tensors that rank 0 may not have, by name.
        own: of what the rank has to itself, by the name without `ranks.R.`.
        num_bytes: of data in its file.
        error: why it cannot write, or None.
    """

    parts: list[tuple[str, tuple[int, ...], tuple[int, ...], int]]
    forms: dict[str, Form]
    own: dict[str, Form]
    num_bytes: int
    error: str | None


def make_layout(state: Mapping[str, torch.Tensor], ranks: Ranks) -> Layout:
    """Agrees on who writes what; all ranks call it together.

    Args:
        state: name -> tensor or DTensor. Ranks may have names of their own.
        ranks: the processes.

    Raises:
        ValueError: parts are missing or overlap, or a type is one that safetensors does not have. On all ranks.
    """
    prefix = own_name(ranks.rank, "")
    own = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    shared = {name: tensor for name, tensor in state.items() if name not in own}
    boxes, shards, is_same = _boxes_to_write(shared, ranks)
    boxes += [Box(name, tensor.dtype, *box) for name, tensor in own.items() if (box := box_of(tensor)) is not None]
    forms = {} if is_same else {name: _form(tensor) for name, tensor in shared.items()}
    own_forms = {name.removeprefix(prefix): _form(tensor) for name, tensor in own.items()}
    items, header, mine = _lay_out(boxes, forms, own_forms)
    told = ranks.gather_on_main(mine)
    error: str | None = None
    tensors = TensorTable({})
    if ranks.rank == 0:
        error = next((one.error for one in told if one.error is not None), None)
        if error is None:
            tensors = _table({name: _form(tensor) for name, tensor in shared.items()}, shards, told)
            error = _what_is_wrong(tensors, sum(one.num_bytes for one in told))
    error = ranks.from_main(lambda: error)
    if error is not None:
        raise ValueError(error)
    return Layout(file_of_rank(ranks.rank) if items else None, header, items, tensors)


def _lay_out(
    boxes: Iterable[Box], forms: dict[str, Form], own: dict[str, Form]
) -> tuple[tuple[Item, ...], bytes, Told]:
    """Returns what a rank's file holds, how it begins, and what rank 0 is told of it."""
    items: tuple[Item, ...] = ()
    error: str | None = None
    try:
        items = _items(boxes)
    except ValueError as problem:
        error = one_line_text(problem)
    header = header_of([(entry_name(i.name, i.offsets), i.dtype, i.sizes) for i in items], {"format": "pt"})
    to_tell = {box.name for box in boxes if box.is_told}
    parts = [(i.name, i.offsets, i.sizes, len(header) + i.begin) for i in items if i.name in to_tell]
    return items, header, Told(parts, forms, own, sum(item.num_bytes for item in items), error)


def _form(tensor: torch.Tensor) -> Form:
    return tensor.dtype, tuple(tensor.shape)


def _cuts(sharded: Mapping[str, DTensor]) -> dict[str, Cut]:
    """Returns how tensors are cut, of those that one dimension of their mesh cuts as `torch.chunk` does."""
    found: dict[str, Cut] = {}
    copies: dict[tuple[int, int], tuple[tuple[range, ...], ...]] = {}  # by mesh and its dimension that cuts
    for name, tensor in sharded.items():
        along = [(i, placement) for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
        if len(along) != 1 or type(along[0][1]) is not Shard:
            continue
        ((mesh_dim, placement),) = along
        assert isinstance(placement, Shard)
        mesh = tensor.device_mesh
        if (id(mesh), mesh_dim) not in copies:
            lists = mesh.mesh.movedim(mesh_dim, -1).reshape(-1, mesh.size(mesh_dim)).tolist()
            copies[id(mesh), mesh_dim] = tuple(map(ranges_of, lists))
        found[name] = Cut(placement.dim, copies[id(mesh), mesh_dim])
    return found


def box_of(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns offsets and sizes of what this rank has of a tensor; None where it is not of the tensor's mesh."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    if tensor.device_mesh.get_coordinate() is None:
        return None
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(chunk.offsets), tuple(chunk.sizes)


def _boxes_to_write(state: Mapping[str, torch.Tensor], ranks: Ranks) -> tuple[list[Box], dict[str, Shards], bool]:
    """Returns what this rank is to write, the shards that all ranks know, and whether all have the same names."""
    sharded = {name: tensor for name, tensor in state.items() if isinstance(tensor, DTensor)}
    cuts = _cuts(sharded)
    # By the bytes of the whole tensor, which every rank knows: its own part may be smaller than another one's.
    copies = spread((tensor.numel() * tensor.dtype.itemsize, _num_copies(tensor)) for tensor in sharded.values())
    copy_of = dict(zip(sharded, copies, strict=True))
    is_same = len(set(ranks.gather(_hash(state, cuts, copy_of)))) == 1
    if not is_same:  # what a rank chose for itself need not be what others did
        copy_of = dict.fromkeys(sharded, 0)
    writers = _writers({name: t for name, t in state.items() if name not in sharded}, is_same, ranks)
    boxes = []
    for name, tensor in state.items():
        box = box_of(tensor)
        if box is None:
            continue
        is_mine = _copy(tensor) == copy_of[name] if isinstance(tensor, DTensor) else writers[name] == ranks.rank
        if is_mine:
            boxes.append(Box(name, tensor.dtype, *box, is_told=not is_same or name not in cuts))
    by_rule = cuts if is_same else {}
    return boxes, {name: Shards(cut.dim, cut.copies[copy_of[name]]) for name, cut in by_rule.items()}, is_same


def _hash(state: Mapping[str, torch.Tensor], cuts: Mapping[str, Cut], copy_of: Mapping[str, int]) -> str:
    """Returns a hash of all that decides who writes what; the same on all ranks, as a rule."""
    lists = {id(cut.copies): cut.copies for cut in cuts.values()}  # few, and each may be long
    numbers = {key: number for number, key in enumerate(lists)}
    cut_of = {name: (cut.dim, numbers[id(cut.copies)]) for name, cut in cuts.items()}
    forms = [(name, str(t.dtype), tuple(t.shape), cut_of.get(name), copy_of.get(name)) for name, t in state.items()]
    return checksum(repr((list(lists.values()), forms)).encode())


def _num_copies(tensor: DTensor) -> int:
    """Returns how many ranks have the same part of a tensor."""
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod([size for size, placement in sizes if placement.is_replicate()])


def _copy(tensor: DTensor) -> int:
    """Returns which of those this rank is."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    copy = 0
    for place, size, placement in zip(coordinate, tensor.device_mesh.shape, tensor.placements, strict=True):
        if placement.is_replicate():
            copy = copy * size + place
    return copy


def _writers(whole: Mapping[str, torch.Tensor], is_same: bool, ranks: Ranks) -> dict[str, int]:
    """Returns who writes each tensor that ranks hold as a whole, the same on all ranks that hold it."""
    num_bytes = {name: tensor.numel() * tensor.dtype.itemsize for name, tensor in whole.items()}
    if is_same:
        num_writers = min(ranks.num_ranks, 1 + sum(num_bytes.values()) // _LEAST_SHARE)
        chosen = spread((size, num_writers) for size in num_bytes.values())
        return dict(zip(num_bytes, chosen, strict=True))
    # Some rank lacks what others have, such as the optimizer's state of a parameter that it never used.
    held = ranks.gather(num_bytes)
    sizes = {name: size for of_rank in held for name, size in of_rank.items()}
    loads, writers = [0] * ranks.num_ranks, {}
    for name, size in sizes.items():
        writers[name] = min((rank for rank, names in enumerate(held) if name in names), key=loads.__getitem__)
        loads[writers[name]] += size
    return writers


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


def _table(forms: dict[str, Form], shards: Mapping[str, Shards], told: Sequence[Told]) -> TensorTable:
    """Returns all tensors, in the model's order, what only other ranks have last."""
    parts: dict[str, list[Part]] = {}
    own: dict[str, tuple[dict[str, Form], list[int]]] = {}  # what ranks have to themselves, and which have just that
    for rank, one in enumerate(told):
        for name, offsets, sizes, begin in one.parts:
            parts.setdefault(name, []).append(Part(offsets, sizes, file_of_rank(rank), begin))
        for name, form in one.forms.items():
            forms.setdefault(name, form)
        if one.own:
            own.setdefault(repr(one.own), (one.own, []))[1].append(rank)
    shared = {
        name: TensorRecord(_type_name(dtype), shape, tuple(parts.get(name, ())), shards.get(name))
        for name, (dtype, shape) in forms.items()
    }
    return TensorTable(
        shared,
        [
            OwnTensors(ranges_of(ranks), {name: (_type_name(dtype), shape) for name, (dtype, shape) in of_rank.items()})
            for of_rank, ranks in own.values()
        ],
    )


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _what_is_wrong(tensors: TensorTable, num_bytes: int) -> str | None:
    """Tells where parts are missing or overlap.

    Args:
        tensors: all of all ranks.
        num_bytes: of all ranks' files together.
    """
    for name, record in tensors.shared.items():
        if record.shards is None and not _is_whole(record):
            return f"the parts of '{name}' do not make up the whole of it"
    expected = sum(_num_bytes(record.dtype, record.shape) for record in tensors.shared.values())
    for own in tensors.own:
        expected += sum(map(len, own.ranks)) * sum(_num_bytes(*form) for form in own.forms.values())
    if num_bytes != expected:
        return f"ranks would write {num_bytes} bytes of tensors that have {expected}"
    return None


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    itemsize: int = getattr(torch, dtype).itemsize
    return math.prod(shape) * itemsize


def _is_whole(record: TensorRecord) -> bool:
    """Tells whether the listed parts make up the tensor: slices of it along one dimension."""
    parts, shape = record.parts, record.shape
    if len(parts) == 1 and parts[0].sizes == shape:
        return True
    if not parts and math.prod(shape) == 0:
        return True
    if not shape or any(len(part.sizes) != len(shape) for part in parts):
        return False
    dim = next((d for d, size in enumerate(shape) if any(part.sizes[d] != size for part in parts)), 0)
    end = 0
    for part in sorted(parts):
        is_slice = part.sizes[:dim] + part.sizes[dim + 1 :] == shape[:dim] + shape[dim + 1 :]
        if not is_slice or part.offsets[dim] != end:
            return False
        end += part.sizes[dim]
    return end == shape[dim]


def _items(boxes: Iterable[Box]) -> tuple[Item, ...]:
    """Lays out what one rank writes: the widest types first, so that every part is aligned without gaps."""
    writes = [box for box in boxes if math.prod(box.sizes)]  # a rank's shard of a small tensor may be empty
    writes.sort(key=lambda box: -box.dtype.itemsize)
    items, begin = [], 0
    for box in writes:
        if box.dtype not in TYPE_NAMES:
            raise ValueError(f"'{box.name}' has type {box.dtype}, which a checkpoint cannot hold")
        items.append(Item(box.name, box.dtype, box.offsets, box.sizes, begin, box.num_bytes))
        begin += box.num_bytes
    return tuple(items)
