"""One rank of very many costs what one of few does: by counting, never by time."""

from __future__ import annotations

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
from benchmarks.scaling.simulated import Simulated, shapes, sharded_state, told_by
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint.layout import Layout, Told, make_layout, spread
from trainer.checkpoint.manifest import Manifest, Progress

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
        sizes[num_ranks] = len(layout.items), len(layout.header), len(pickle.dumps(ranks.told))
    assert all(many <= few for few, many in zip(sizes[FEW], sizes[MANY], strict=True))


@pytest.mark.parametrize("rank", few([0, 1, 5, 15], 1))
def test_what_is_told_without_a_state_is_what_is_told_with_one(rank: int) -> None:
    whole = shapes(SMALL)
    others = [told_by(whole, other, 16) for other in range(1, 16)] if rank == 0 else []
    ranks = Simulated(rank, 16, others)
    with sharded_state(whole, rank, 16) as state:
        make_layout(state, ranks)
    assert ranks.told == told_by(whole, rank, 16)


def _of_16(others: range = range(1, 16)) -> Layout:
    whole = shapes(SMALL)
    with sharded_state(whole, 0, 16) as state:
        return make_layout(state, Simulated(0, 16, [told_by(whole, rank, 16) for rank in others]))


def test_a_manifest_of_many_ranks_reads_back_and_its_tensors_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = _of_16()
    manifest = Manifest(Progress(step=1), {}, 1, 16, {}, layout.tensors, {})
    data = manifest.to_bytes()
    assert Manifest.from_bytes(data) == manifest
    encode, encoded = manifests._canonical, []

    def counted(content: Any) -> str:
        encoded.append(encode(content))
        return encoded[-1]

    monkeypatch.setattr(manifests, "_canonical", counted)
    again = replace(manifest, progress=Progress(step=2)).to_bytes()
    assert sum(map(len, encoded)) < 2000 < len(again) / 10
    assert Manifest.from_bytes(again).tensors == layout.tensors


@pytest.mark.parametrize(
    ("shape", "parts", "says"),
    [
        ((4,), [((), ())], "do not make up the whole"),
        ((), [((), ()), ((), ())], "do not make up the whole"),
        (None, [((0,), (2,))], "rank 0 has no 'x'"),
    ],
)
def test_what_ranks_disagree_about_is_an_error_on_all(shape: Any, parts: Any, says: str) -> None:
    told = Told("rank-00001.safetensors", [("x", offsets, sizes, 0) for offsets, sizes in parts], {}, None)
    state = {} if shape is None else {"x": torch.zeros(shape)}
    with pytest.raises(ValueError, match=says):
        make_layout(state, Simulated(0, 2, [told]))


def test_a_part_that_nobody_has_is_missed() -> None:
    with pytest.raises(ValueError, match=r"the parts of 'model\.\S+' do not make up the whole of it"):
        _of_16(range(2, 16))


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


def test_what_all_ranks_hold_is_written_by_one_of_them_evenly() -> None:
    state = {"a": torch.zeros(8), "b": torch.zeros(4), "c": torch.zeros(4), "empty": torch.zeros(0)}
    layouts = _together([{**state, f"ranks.{rank}.own": torch.zeros(1)} for rank in range(2)])
    assert all(isinstance(layout, Layout) for layout in layouts)
    names = [[item.name for item in layout.items] for layout in layouts]  # type: ignore[union-attr]
    assert names == [["a", "ranks.0.own"], ["b", "c", "ranks.1.own"]]
    assert list(layouts[0].tensors) == [*state, "ranks.0.own", "ranks.1.own"]  # type: ignore[union-attr]


def test_what_only_some_ranks_hold_is_written_by_one_that_does() -> None:
    """Such as the optimizer's state of a parameter that a rank never used."""
    states = [{"a": torch.zeros(8)}, {"a": torch.zeros(8), "b": torch.zeros(2)}, {"b": torch.zeros(2)}]
    layouts = _together(states)
    names = [[item.name for item in layout.items] for layout in layouts]  # type: ignore[union-attr]
    assert sorted(name for of_rank in names for name in of_rank) == ["a", "b"]
    assert all(name in states[rank] for rank, of_rank in enumerate(names) for name in of_rank)
    assert list(layouts[0].tensors) == ["a", "b"]  # type: ignore[union-attr]


def test_each_shard_is_written_by_one_of_its_copies() -> None:
    """HSDP on two nodes of two ranks."""
    states = []
    for rank in range(4):
        mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), _init_backend=False, _rank=rank)
        local = torch.zeros(3, 2)
        state: dict[str, torch.Tensor] = {}
        for name in ("a", "b"):
            state[name] = DTensor.from_local(
                local, mesh, [Replicate(), Shard(0)], run_check=False, shape=torch.Size((6, 2)), stride=(2, 1)
            )
        states.append(state)
    layouts = _together(states)
    written = [[(item.name, item.offsets) for item in layout.items] for layout in layouts]  # type: ignore[union-attr]
    assert written == [[("a", (0, 0))], [("a", (3, 0))], [("b", (0, 0))], [("b", (3, 0))]]


def test_a_type_that_one_rank_cannot_write_is_everybodys_problem() -> None:
    states = [
        {f"ranks.{rank}.own": torch.zeros(1, dtype=dtype)} for rank, dtype in enumerate((torch.int8, torch.cfloat))
    ]
    told = _together(states)
    assert told[0] == told[1] == "'ranks.1.own' has type torch.complex64, which a checkpoint cannot hold"
