"""One rank of very many costs what one of few does: by counting, never by time."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import few
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from benchmarks.scaling import simulated
from benchmarks.scaling.simulated import Simulated, shapes, sharded_state, told_by_others
from trainer.checkpoint import layout as layouts_of
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint import tensor_table
from trainer.checkpoint.layout import Layout, Told, make_layout, spread
from trainer.checkpoint.manifest import Manifest, Progress
from trainer.checkpoint.reading import parts_to_read
from trainer.checkpoint.tensor_table import Part, Shards, file_of_rank, ranges_of

FEW, MANY = 8, 16384
SMALL = "shufflenet_v2_x0_5"


def test_the_sampler_looks_at_its_own_share() -> None:
    few, many = simulated.sampler(FEW, num_steps=1), simulated.sampler(MANY, num_steps=1)
    assert few["elements"] == many["elements"]
    assert few["elements"] < 20 * simulated.NUM_SAMPLES_OF_RANK
    assert many["order_bytes"] == 8 * many["samples"]


def test_a_ranks_layout_does_not_grow_with_ranks() -> None:
    whole, sizes = shapes(SMALL), {}
    for num_ranks in (FEW, MANY):
        ranks = Simulated(1, num_ranks)
        with sharded_state(whole, 1, num_ranks) as state:
            layout = make_layout(state, ranks)
        assert not layout.tensors
        assert ranks.told.parts == []
        sizes[num_ranks] = len(layout.items), len(layout.header), len(pickle.dumps(ranks.told))
    assert all(many <= few for few, many in zip(sizes[FEW], sizes[MANY], strict=True))


@pytest.mark.parametrize("rank", few([1, 5, 15], 1))
def test_what_is_told_without_a_state_is_what_is_told_with_one(rank: int) -> None:
    whole = shapes(SMALL)
    ranks = Simulated(rank, 16)
    with sharded_state(whole, rank, 16) as state:
        make_layout(state, ranks)
    assert ranks.told == told_by_others(whole, 16)[rank - 1]


def _of(num_ranks: int, others: slice = slice(None)) -> Layout:
    whole = shapes(SMALL)
    with sharded_state(whole, 0, num_ranks) as state:
        return make_layout(state, Simulated(0, num_ranks, told_by_others(whole, num_ranks)[others]))


def test_what_the_manifest_says_of_tensors_does_not_grow_with_ranks() -> None:
    few, many = (len(_of(num_ranks).tensors.text) for num_ranks in (FEW, MANY))
    assert many < 1.1 * few  # some digits more


def test_a_rank_finds_its_parts_among_those_of_all() -> None:
    whole = shapes(SMALL)
    for num_ranks in (FEW, MANY):
        tensors = _of(num_ranks).tensors
        for rank in (1, num_ranks // 2, num_ranks - 1):
            with sharded_state(whole, rank, num_ranks) as state:
                items = make_layout(state, Simulated(rank, num_ranks)).items
                found = list(parts_to_read(tensors, state))
            own = [(name, part.offsets, part.sizes) for name, part in found if part.file == file_of_rank(rank)]
            assert sorted(own) == sorted((item.name, item.offsets, item.sizes) for item in items)
            others = {name: part.file for name, part in found if part.file != file_of_rank(rank)}
            assert others == {name: file_of_rank(0) for name, shape in whole.items() if not shape}  # AdamW's steps


def test_a_manifest_of_many_ranks_reads_back_and_its_tensors_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = _of(16)
    manifest = Manifest(Progress(step=1), {}, 1, 16, {}, layout.tensors, {})
    data = manifest.to_bytes()
    assert Manifest.from_bytes(data) == manifest
    encode, encoded = manifests.canonical, []

    def counted(content: Any) -> str:
        encoded.append(encode(content))
        return encoded[-1]

    for module in (manifests, tensor_table):
        monkeypatch.setattr(module, "canonical", counted)
    again = replace(manifest, progress=Progress(step=2)).to_bytes()
    assert sum(map(len, encoded)) < 2000 < len(again) / 4
    assert Manifest.from_bytes(again).tensors == layout.tensors


@pytest.mark.parametrize(
    ("shape", "parts", "says"),
    [
        ((4,), [((), ())], "do not make up the whole"),
        ((), [((), ()), ((), ())], "do not make up the whole"),
    ],
)
def test_what_ranks_disagree_about_is_an_error_on_all(shape: Any, parts: Any, says: str) -> None:
    told = Told([("x", offsets, sizes, 0) for offsets, sizes in parts], {}, {}, 0, None)
    with pytest.raises(ValueError, match=says):
        make_layout({"x": torch.zeros(shape)}, Simulated(0, 2, [told]))


def test_a_part_that_nobody_writes_is_missed() -> None:
    with pytest.raises(ValueError, match=r"ranks would write \d+ bytes of tensors that have \d+"):
        _of(16, slice(1, None))


def test_pieces_are_spread_evenly() -> None:
    assert spread([(5, 3), (1, 3), (4, 3), (2, 3), (3, 3)]) == [0, 1, 2, 1, 1]
    assert spread([(7, 1), (7, 1)]) == [0, 0]
    assert spread([(1, MANY)] * 5) == [0, 1, 2, 3, 4]


class _Threads:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, num_ranks: int, barrier: threading.Barrier, box: list[Any]) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self._barrier, self._box = barrier, box

    def gather(self, value: Any) -> list[Any]:
        self._box[self.rank] = value
        self._barrier.wait(10)
        gathered = list(self._box)
        self._barrier.wait(10)
        return gathered

    def gather_on_main(self, value: Any) -> list[Any]:
        gathered = self.gather(value)
        return gathered if self.rank == 0 else []

    def from_main(self, value: Callable[[], Any]) -> Any:
        return self.gather(value() if self.rank == 0 else None)[0]


def _together(states: list[dict[str, torch.Tensor]]) -> list[Layout | str]:
    """Returns what each rank made of its state: a layout, or what was wrong."""
    num_ranks = len(states)
    barrier, box = threading.Barrier(num_ranks), [None] * num_ranks
    made: list[Any] = [None] * num_ranks

    def run(rank: int) -> None:
        try:
            made[rank] = make_layout(states[rank], _Threads(rank, num_ranks, barrier, box))
        except ValueError as error:
            made[rank] = str(error)

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


def test_what_all_ranks_hold_is_written_by_one_of_them_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts_of, "_LEAST_SHARE", 32)
    state = {"a": torch.zeros(8), "b": torch.zeros(4), "c": torch.zeros(4), "empty": torch.zeros(0)}
    layouts = _together([{**state, f"ranks.{rank}.own": torch.zeros(1)} for rank in range(2)])
    assert all(isinstance(layout, Layout) for layout in layouts)
    names = [[item.name for item in layout.items] for layout in layouts]  # type: ignore[union-attr]
    assert names == [["a", "ranks.0.own"], ["b", "c", "ranks.1.own"]]
    assert list(layouts[0].tensors) == [*state, "ranks.0.own", "ranks.1.own"]  # type: ignore[union-attr]


def test_what_is_little_is_written_by_few() -> None:
    """Or all ranks would open as many files for it as there are ranks."""
    megabytes = {"one": 1, "two": 2, "fourteen": 14, "a half": 0.5}
    state = {name: torch.empty(int(size * 2**20), dtype=torch.uint8) for name, size in megabytes.items()}
    layouts = _together([dict(state)] * 4)
    names = [[item.name for item in layout.items] for layout in layouts]  # type: ignore[union-attr]
    assert names == [["one", "fourteen"], ["two", "a half"], [], []]  # 17.5 MiB: a second file


def test_what_only_some_ranks_hold_is_written_by_one_that_does() -> None:
    """Such as the optimizer's state of a parameter that a rank never used."""
    states = [{"a": torch.zeros(8)}, {"a": torch.zeros(8), "b": torch.zeros(2)}, {"b": torch.zeros(2)}]
    layouts = _together(states)
    names = [[item.name for item in layout.items] for layout in layouts]  # type: ignore[union-attr]
    assert sorted(name for of_rank in names for name in of_rank) == ["a", "b"]
    assert all(name in states[rank] for rank, of_rank in enumerate(names) for name in of_rank)
    assert list(layouts[0].tensors) == ["a", "b"]  # type: ignore[union-attr]


def test_each_shard_is_written_by_one_of_its_copies() -> None:
    layouts = _together([{"a": _in_pairs(rank), "b": _in_pairs(rank)} for rank in range(4)])
    written = [[(item.name, item.offsets) for item in layout.items] for layout in layouts]  # type: ignore[union-attr]
    assert written == [[("a", (0,))], [("a", (2,))], [("b", (0,))], [("b", (2,))]]
    assert isinstance(layouts[0], Layout)
    shards = {name: record.shards for name, record in layouts[0].tensors.shared.items()}
    assert shards == {"a": Shards(0, (range(2),)), "b": Shards(0, (range(2, 4),))}


def _in_pairs(rank: int) -> DTensor:
    """HSDP on two nodes of two ranks: a tensor of four rows, of which every node has a copy."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), _init_backend=False, _rank=rank)
    placements = [Replicate(), Shard(0)]
    return DTensor.from_local(torch.zeros(2), mesh, placements, run_check=False, shape=torch.Size((4,)), stride=(1,))


def test_what_only_one_copy_has_is_written_by_it() -> None:
    """Such as the optimizer's state of a parameter that one node never used: nothing of `spread` is common then."""
    states = [{"a": _in_pairs(rank), **({"b": _in_pairs(rank)} if rank < 2 else {})} for rank in range(4)]
    layouts = _together(states)  # type: ignore[arg-type]
    assert isinstance(layouts[0], Layout), layouts
    files = {name: [part.file for part in record.parts] for name, record in layouts[0].tensors.shared.items()}
    assert files == {name: [file_of_rank(0), file_of_rank(1)] for name in "ab"}


def _sharded(rank: int, local: torch.Tensor, shape: tuple[int, ...], placement: Any) -> DTensor:
    mesh = DeviceMesh("cpu", torch.arange(2), _init_backend=False, _rank=rank)
    stride = torch.empty(shape).stride()
    return DTensor.from_local(local, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride)


def test_shards_of_unequal_size_follow_the_rule() -> None:
    states = [{"a": _sharded(rank, torch.zeros(3 - rank, 2), (5, 2), Shard(0))} for rank in range(2)]
    layouts = _together(states)  # type: ignore[arg-type]
    assert isinstance(layouts[0], Layout)
    record = layouts[0].tensors["a"]
    assert record.parts == ()
    assert record.parts_of((0, 0), (5, 2)) == [
        Part((0, 0), (3, 2), file_of_rank(0)),
        Part((3, 0), (2, 2), file_of_rank(1)),
    ]
    assert record.parts_of((3, 0), (1, 2)) == [Part((3, 0), (2, 2), file_of_rank(1))]


def test_shards_that_only_some_ranks_know_of_are_told_one_by_one() -> None:
    """Rank 1 has one tensor more, so nothing follows from what each knows."""
    states: list[dict[str, torch.Tensor]] = [
        {"a": _sharded(rank, torch.zeros(2, 2), (4, 2), Shard(0)), **({"b": torch.zeros(3)} if rank else {})}
        for rank in range(2)
    ]
    layouts = _together(states)
    assert isinstance(layouts[0], Layout)
    record = layouts[0].tensors["a"]
    assert record.shards is None
    assert [(part.offsets, part.file) for part in record.parts] == [
        ((0, 0), file_of_rank(0)),
        ((2, 0), file_of_rank(1)),
    ]
    assert record.parts_of((2, 0), (1, 2)) == [record.parts[1]]
    assert layouts[0].tensors["b"].parts[0].file == file_of_rank(1)


def test_shards_that_are_missing_on_a_rank_are_an_error() -> None:
    states: list[dict[str, torch.Tensor]] = [{"a": _sharded(0, torch.zeros(2, 2), (4, 2), Shard(0))}, {}]
    told = _together(states)
    assert told[0] == told[1] == "the parts of 'a' do not make up the whole of it"


def test_a_tensor_that_is_cut_in_two_directions_cannot_be_laid_out() -> None:
    states = []
    for rank in range(4):
        mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), _init_backend=False, _rank=rank)
        placements = [Shard(0), Shard(1)]
        tensor = DTensor.from_local(
            torch.zeros(2, 2), mesh, placements, run_check=False, shape=torch.Size((4, 4)), stride=(4, 1)
        )
        states.append({"a": tensor})
    told = _together(states)  # type: ignore[arg-type]
    assert set(told) == {"the parts of 'a' do not make up the whole of it"}


@pytest.mark.parametrize("shape", [(1,), (7, 3), (64, 2), (3, 64), (2, 0)])
@pytest.mark.parametrize("num_shards", [1, 2, 5, 64])
def test_shards_are_cut_as_torch_cuts_them(shape: tuple[int, ...], num_shards: int) -> None:
    for dim in range(len(shape)):
        shards = Shards(dim, (range(num_shards),))
        whole = torch.arange(math.prod(shape)).view(shape)
        for index, chunk in enumerate(torch.chunk(whole, num_shards, dim)):
            offsets, sizes = shards.box(shape, index)
            assert torch.equal(whole.narrow(dim, offsets[dim], sizes[dim]), chunk)
        boxes = [shards.box(shape, index) for index in range(num_shards)]
        for first in range(shape[dim]):
            for size in range(1, shape[dim] - first + 1):
                parts = list(shards.parts(shape, first, size))
                expected = [
                    b for b in boxes if math.prod(b[1]) and b[0][dim] < first + size and first < b[0][dim] + b[1][dim]
                ]
                assert [(part.offsets, part.sizes) for part in parts] == expected


@pytest.mark.parametrize(
    ("numbers", "ranges"),
    [
        ([], ()),
        ([3], (range(3, 4),)),
        ([0, 1, 2, 3], (range(4),)),
        ([0, 4, 8, 1, 5, 9], (range(0, 9, 4), range(1, 10, 4))),
        ([2, 1, 0], (range(2, 3), range(1, 2), range(1))),
        ([0, 1, 2, 5], (range(3), range(5, 6))),
    ],
)
def test_numbers_are_told_as_ranges(numbers: list[int], ranges: tuple[range, ...]) -> None:
    assert ranges_of(numbers) == ranges
    assert [number for each in ranges for number in each] == numbers


def test_what_ranks_have_to_themselves_is_told_once_for_all_that_have_the_same() -> None:
    states = [{f"ranks.{rank}.{name}": torch.zeros(2) for name in "ab"} for rank in range(3)]
    states[1]["ranks.1.c"] = torch.zeros(1)
    layouts = _together(states)
    assert isinstance(layouts[0], Layout)
    tensors = layouts[0].tensors
    assert [own.ranks for own in tensors.own] == [(range(0, 3, 2),), (range(1, 2),)]
    assert list(tensors) == [name for state in states for name in state]
    assert len(tensors) == 7
    assert tensors.own_names(1) == ["a", "b", "c"]
    assert tensors.own_names(3) == []
    assert tensors["ranks.1.c"].parts == (Part((0,), (1,), file_of_rank(1)),)
    assert "ranks.0.c" not in tensors
    assert "ranks.7.a" not in tensors


def test_a_type_that_one_rank_cannot_write_is_everybodys_problem() -> None:
    states = [
        {f"ranks.{rank}.own": torch.zeros(1, dtype=dtype)} for rank, dtype in enumerate((torch.int8, torch.cfloat))
    ]
    told = _together(states)
    assert told[0] == told[1] == "'ranks.1.own' has type torch.complex64, which a checkpoint cannot hold"
