"""Where tensors are in the files of all ranks: the rule that shards follow, or a list of parts; and that as JSON.

Owns what the manifest says of tensors. Who writes which part is decided in `trainer.checkpoint.layout`.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Part(NamedTuple):
    """A box of a tensor, in row-major order, in a file.

    Args:
        offsets: of the box in the whole tensor, per dimension.
        sizes: of the box, per dimension.
        file: name of the file.
        begin: first byte in the file; None where the file's own header tells.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int | None = None

    def overlaps(self, offsets: Sequence[int], sizes: Sequence[int]) -> bool:
        """Tells whether it has elements of another box of the tensor."""
        bounds = zip(self.offsets, self.sizes, offsets, sizes, strict=True)
        return all(max(mine, other) < min(mine + size, other + other_size) for mine, size, other, other_size in bounds)


class Shards(NamedTuple):
    """What ranks hold of a tensor that is cut along a dimension as `torch.chunk` cuts it, each in its rank's file.

    Args:
        dim: the dimension.
        ranks: which rank has the first shard, the second, and so on: one range after the other.
    """

    dim: int
    ranks: tuple[range, ...]

    @property
    def num_shards(self) -> int:
        return sum(map(len, self.ranks))

    def box(self, shape: Sequence[int], index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns offsets and sizes of a shard in a tensor of that shape; the last ones may be empty."""
        most = self._most(shape)
        first = min(index * most, shape[self.dim])
        size = min(most, shape[self.dim] - first)
        offsets = (0,) * self.dim + (first,) + (0,) * (len(shape) - self.dim - 1)
        return offsets, (*shape[: self.dim], size, *shape[self.dim + 1 :])

    def parts(self, shape: Sequence[int], offset: int, size: int) -> Iterator[Part]:
        """Yields the shards that have something of a range along `dim`, in their order, and no others."""
        most = self._most(shape)
        if size == 0 or math.prod(shape) == 0:
            return
        for index in range(offset // most, (offset + size - 1) // most + 1):
            yield Part(*self.box(shape, index), file_of_rank(self._rank(index)))

    def _most(self, shape: Sequence[int]) -> int:
        return -(-shape[self.dim] // self.num_shards)

    def _rank(self, index: int) -> int:
        for ranks in self.ranks:
            if index < len(ranks):
                return ranks[index]
            index -= len(ranks)
        raise IndexError(index)


@dataclass(frozen=True)
class TensorRecord:
    """A whole tensor and where its parts are.

    Args:
        dtype: torch's name, such as `float32`.
        shape: of the whole.
        parts: each of its parts; none where there are shards, or where it has no elements.
        shards: the rule that its parts follow. However many there are, the record is as long.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    shards: Shards | None = None

    def parts_of(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[Part]:
        """Returns the parts that have something of a box of the tensor."""
        if self.shards is not None:
            return list(self.shards.parts(self.shape, offsets[self.shards.dim], sizes[self.shards.dim]))
        return [part for part in self.parts if part.overlaps(offsets, sizes)]


@dataclass(frozen=True)
class OwnTensors:
    """What each of some ranks has to itself, whole and in its own file.

    Args:
        ranks: that have the same.
        forms: type and shape, by a name that follows `ranks.R.`, such as `generator.torch`.
    """

    ranks: tuple[range, ...]
    forms: dict[str, tuple[str, tuple[int, ...]]]


class TensorTable(Mapping[str, TensorRecord]):
    """Tensors by name, such as `model.conv1.weight`, in the model's order; those of single ranks come last.

    Not changed once it is there. Its text is as long for many ranks as for few where shards follow the rule. It is the
    same in every save, and made once.

    Args:
        shared: what is not of a single rank.
        own: what is.
    """

    def __init__(self, shared: Mapping[str, TensorRecord], own: Sequence[OwnTensors] = ()) -> None:
        self.shared = dict(shared)
        self.own = tuple(own)

    def __getitem__(self, name: str) -> TensorRecord:
        if name in self.shared:
            return self.shared[name]
        rank, suffix = _rank_and_suffix(name)
        forms = self._own_forms(rank)
        if suffix not in forms:
            raise KeyError(name)
        dtype, shape = forms[suffix]
        return TensorRecord(dtype, shape, (Part((0,) * len(shape), shape, file_of_rank(rank)),))

    def __iter__(self) -> Iterator[str]:
        yield from self.shared
        ranks = sorted((rank, own) for own in self.own for ranks in own.ranks for rank in ranks)
        for rank, own in ranks:
            yield from (own_name(rank, suffix) for suffix in own.forms)

    def __len__(self) -> int:
        return len(self.shared) + sum(len(ranks) * len(own.forms) for own in self.own for ranks in own.ranks)

    def own_names(self, rank: int) -> list[str]:
        """Returns the names of what a rank has to itself, without `ranks.R.`."""
        return list(self._own_forms(rank))

    def _own_forms(self, rank: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return next((own.forms for own in self.own if any(rank in ranks for ranks in own.ranks)), {})

    @functools.cached_property
    def text(self) -> str:
        """The JSON of all records."""
        return canonical(
            {
                "shared": {name: _record_as_json(record) for name, record in self.shared.items()},
                "own": [[_ranges_as_json(own.ranks), own.forms] for own in self.own],
            }
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TensorTable:
        """Returns the table whose `text` was read as this."""
        shared = {name: _record_from_json(*record) for name, record in content["shared"].items()}
        own = [
            OwnTensors(
                _ranges_from_json(ranks), {name: (dtype, tuple(shape)) for name, (dtype, shape) in forms.items()}
            )
            for ranks, forms in content["own"]
        ]
        return cls(shared, own)


def file_of_rank(rank: int) -> str:
    """Returns the name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def own_name(rank: int, suffix: str) -> str:
    """Returns the name of something that a rank has to itself."""
    return f"ranks.{rank}.{suffix}"


def _rank_and_suffix(name: str) -> tuple[int, str]:
    """Returns the rank that has a tensor to itself, and its name there; -1 where it is no such name."""
    found = re.fullmatch(r"ranks\.(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else (-1, name)


def ranges_of(numbers: Iterable[int]) -> tuple[range, ...]:
    """Returns numbers as ranges, one after the other, each as long as its steps are the same."""
    ranges: list[range] = []
    for number in numbers:
        last = ranges[-1] if ranges else range(0)
        if len(last) == 1 and number > last[0]:
            ranges[-1] = range(last[0], number + 1, number - last[0])
        elif len(last) > 1 and number == last[-1] + last.step:
            ranges[-1] = range(last[0], number + 1, last.step)
        else:
            ranges.append(range(number, number + 1))
    return tuple(ranges)


def _ranges_as_json(ranges: Iterable[range]) -> list[list[int]]:
    return [[each.start, each.stop, each.step] for each in ranges]


def _ranges_from_json(ranges: Iterable[Sequence[int]]) -> tuple[range, ...]:
    return tuple(range(start, stop, step) for start, stop, step in ranges)


def _record_as_json(record: TensorRecord) -> list[Any]:
    if record.shards is None:
        return [record.dtype, record.shape, record.parts]
    return [record.dtype, record.shape, {"dim": record.shards.dim, "ranks": _ranges_as_json(record.shards.ranks)}]


def _record_from_json(dtype: str, shape: Sequence[int], parts: Any) -> TensorRecord:
    if isinstance(parts, dict):
        return TensorRecord(dtype, tuple(shape), shards=Shards(parts["dim"], _ranges_from_json(parts["ranks"])))
    listed = (Part(tuple(offsets), tuple(sizes), file, begin) for offsets, sizes, file, begin in parts)
    return TensorRecord(dtype, tuple(shape), tuple(listed))


def canonical(content: Mapping[str, Any]) -> str:
    """Returns JSON without spaces."""
    return json.dumps(content, separators=(",", ":"))
