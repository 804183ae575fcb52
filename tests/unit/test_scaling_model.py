"""The model of scaling against closed forms and limits."""

from __future__ import annotations

import math

import pytest

from benchmarks.scaling import constants, jobs, model
from benchmarks.scaling.check import Line
from benchmarks.scaling.jobs import Job, Machine
from benchmarks.scaling.model import Bucket, Compute, Exchange, Network, Part, Protocol

FREE = Protocol("ring", 1.0, math.inf, 0.0, 0.0, 0.0, 0.0)
RING = Protocol("ring", 1.0, math.inf, 1e-6, 2e-6, 3e-6, 5e-6)
TREE = Protocol("tree", 0.5, math.inf, 4e-6, 1e-6, 1e-6, 7e-6)


def network(*protocols: Protocol, inside: float = 100e9, between: float = 10e9) -> Network:
    return Network(8, inside, between, protocols)


def test_one_rank_exchanges_nothing() -> None:
    assert network(RING).all_reduce(1e9, 1) == network(RING).gather(1e9, 1) == 0


@pytest.mark.parametrize("num_ranks", [2, 5, 8])
def test_a_ring_inside_of_a_node(num_ranks: int) -> None:
    latency, amount = 1e-6 + 2 * (num_ranks - 1) * 2e-6, 2 * (num_ranks - 1) / num_ranks
    assert network(RING).all_reduce(1e9, num_ranks) == pytest.approx(latency + amount * 1e9 / 100e9)
    latency = 1e-6 + (num_ranks - 1) * 2e-6
    assert network(RING).gather(1e9, num_ranks) == pytest.approx(latency + amount / 2 * 1e9 / 100e9)


def test_a_ring_over_nodes_is_as_fast_as_the_slower_links() -> None:
    """Eight cards of 10 GB/s are slower than NVLink of 100; cards of 50 GB/s are not."""
    slow = network(FREE).all_reduce(1e9, 1024)
    assert slow == pytest.approx(2 * 1023 / 1024 * 1e9 / 80e9)
    assert network(FREE, between=50e9).all_reduce(1e9, 1024) == pytest.approx(2 * 1023 / 1024 * 1e9 / 100e9)


def test_latency_over_nodes_grows_with_ranks_in_a_ring_and_with_their_logarithm_in_a_tree() -> None:
    ring, tree = network(RING), network(TREE)
    assert ring.all_reduce(0, 64) == pytest.approx(1e-6 + (2 * 63 - 2 * 8) * 3e-6 + 2 * 8 * 5e-6)
    assert ring.gather(0, 64) == pytest.approx(1e-6 + (63 - 7) * 3e-6 + 7 * 5e-6)
    assert tree.all_reduce(0, 64) == pytest.approx(4e-6 + 2 * (7 * 1e-6 + 3 * 7e-6))
    both = network(RING, TREE)
    assert both.all_reduce(0, 1024) == tree.all_reduce(0, 1024)
    assert both.all_reduce(10e9, 16) == ring.all_reduce(10e9, 16)


def test_ranks_on_nodes_of_their_own() -> None:
    alone = network(FREE).of_one_per_node()
    assert alone.all_reduce(1e9, 4) == pytest.approx(2 * 3 / 4 * 1e9 / 10e9)


# ---- steps -------------------------------------------------------------------------------------------------------


def test_buckets_close_when_they_are_full_and_the_first_is_small() -> None:
    parts = [Part(2**18, 0.4), Part(2**18, 0.3), Part(2**18, 0.2), Part(2**17, 0.1)]  # 1 MiB each, the last half of it
    buckets = model.make_buckets(parts, 10.0, 2 * 2**20)
    assert [bucket.num_bytes for bucket in buckets] == [3 * 2**19, 2**21]
    assert [bucket.ready for bucket in buckets] == pytest.approx([3.0, 10.0])


def test_what_ddp_hides() -> None:
    buckets = [Bucket(10, 2.0), Bucket(10, 6.0), Bucket(10, 10.0)]
    assert model.exposed_by_ddp(buckets, 10.0, lambda size: 1.0) == 1.0  # the last one only
    assert model.exposed_by_ddp(buckets, 10.0, lambda size: 5.0) == 2 + 3 * 5 - 10
    assert model.exposed_by_ddp(buckets, 10.0, lambda size: 0.0) == 0.0


def _fsdp(gather: float, reduce: float, is_last: bool = True) -> float:
    blocks = [Part(1, 0.25)] * 4
    exchange = Exchange(lambda n: gather * (n > 0), lambda n: reduce * (n > 0))
    return model.fsdp_seconds(Part(0, 0.0), blocks, Compute(4.0, 8.0), exchange, is_last)


def test_fsdp_hides_what_fits_behind_a_block() -> None:
    assert _fsdp(0, 0) == 12
    # The first block of forward and of backward cannot be gathered ahead, nor the last gradients be reduced behind.
    assert _fsdp(0.5, 0.5) == pytest.approx(12 + 0.5 + 0.5 + 0.5)
    assert _fsdp(0.5, 0.5, is_last=False) == pytest.approx(12 + 0.5 + 0.5)


def test_fsdp_is_as_fast_as_its_link_where_that_is_slower() -> None:
    assert _fsdp(10, 0) == pytest.approx(8 * 10 + 1 + 2 - 0, abs=2)
    assert _fsdp(10, 10) == pytest.approx(12 * 10, abs=5)


def _job(strategy: str) -> Job:
    parts = tuple(Part(10**6, 0.25) for _ in range(4))
    return Job("a", strategy, Part(0, 0.0), parts, 1e-3, 2e-3, 16, 1024, 25e6)  # type: ignore[arg-type]


def _machine(net: Network, spread: float = 0.0, mtbf: float = math.inf) -> Machine:
    return Machine(net, 1.0, spread, 0.0, 0.0, mtbf)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("num_ranks", [1, 8, 1024])
def test_an_infinitely_fast_network_exposes_nothing(strategy: str, num_ranks: int) -> None:
    net = network(FREE, inside=math.inf, between=math.inf)
    found = jobs.estimate(_job(strategy), num_ranks, _machine(net))
    assert found.exposed == pytest.approx(0.0, abs=1e-12)
    assert found.efficiency == pytest.approx(1.0)
    assert found.batch_size == 16 * num_ranks


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
def test_one_rank_is_as_fast_as_one(strategy: str) -> None:
    found = jobs.estimate(_job(strategy), 1, _machine(network(RING), spread=0.1))
    assert (found.exposed, found.slowest, found.compute) == (0, 0, pytest.approx(16 * 3e-3))


def test_the_recipes_batch_is_accumulated_or_refused() -> None:
    machine = _machine(network(RING))
    found = jobs.estimate(_job("ddp"), 8, machine, 1024)
    assert found.compute == pytest.approx(128 * 3e-3)
    assert found.exposed == jobs.estimate(_job("ddp"), 8, machine).exposed  # once a step
    with pytest.raises(ValueError, match="1024 samples do not split over 3 GPUs"):
        jobs.estimate(_job("ddp"), 3, machine, 1024)


def test_copies_per_node_wait_less_than_one_share_among_all() -> None:
    machine = _machine(constants.network(constants.read()))
    one, copies = (jobs.estimate(_job(strategy), 1024, machine) for strategy in ("fsdp", "hsdp"))
    assert copies.exposed < one.exposed
    assert jobs.estimate(_job("fsdp"), 8, machine) == jobs.estimate(_job("hsdp"), 8, machine)


# ---- the slowest rank, and runs ----------------------------------------------------------------------------------


def test_the_slowest_of_a_few() -> None:
    """The mean largest of two and of three normal draws, in closed form."""
    assert model.expected_maximum(1) == 0
    assert model.expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-4)
    assert model.expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-4)
    assert model.expected_maximum(16384) < math.sqrt(2 * math.log(16384))  # which it never exceeds


@pytest.mark.parametrize(("stall", "mtbf"), [(0.02, 1e4), (1.0, 1e5), (60.0, 1e4)])
def test_the_best_interval_is_the_best(stall: float, mtbf: float) -> None:
    best = model.optimal_interval(stall, mtbf)
    assert best == pytest.approx(math.sqrt(2 * stall * mtbf), rel=0.15)  # Young's
    here = model.goodput(best, stall, 100.0, mtbf)
    assert all(model.goodput(best * factor, stall, 100.0, mtbf) < here for factor in (0.5, 0.8, 1.25, 2))


def test_goodput_in_its_limits() -> None:
    assert model.goodput(100, 0, 50, math.inf) == 1
    assert model.goodput(90, 10, 50, math.inf) == pytest.approx(0.9)
    rare = 1e9  # each failure loses half an interval and a restart
    lost = 1 - model.goodput(1000, 0, 50, rare)
    assert lost == pytest.approx((500 + 50) / rare, rel=1e-3)
    assert model.goodput(1e6, 0, 0, 100) == 0


# ---- what it is fed with -----------------------------------------------------------------------------------------


def test_every_constant_says_how_it_is_known() -> None:
    known = constants.read()
    assert {constant.kind for constant in known.values()} == {"measured", "published", "assumed"}
    for constant in known.values():
        assert constant.value > 0
        assert constant.shown
        assert constant.source
        assert constant.kind != "published" or "http" in constant.source, constant.name
        assert constant.kind != "measured" or ".json" in constant.source, constant.name


def test_models_are_counted_whole() -> None:
    parts, flops = jobs.leaf_parts("resnet50")
    assert sum(part.num_parameters for part in parts) == 25_557_032  # torchvision's
    assert flops / 2 == pytest.approx(4.09e9, rel=1e-3)
    root, blocks, flops = jobs.block_parts("vit_h_14")
    assert len(blocks) == 32
    assert root.num_parameters + sum(block.num_parameters for block in blocks) == 632_045_800
    assert root.work + sum(block.work for block in blocks) == pytest.approx(1)
    assert flops / 2 == pytest.approx(167.3e9, rel=1e-3)


def test_a_line_goes_through_what_is_on_a_line() -> None:
    sizes = [1e3, 1e5, 1e7]
    line = Line.through(sizes, [1e-4 + size / 1e9 for size in sizes])
    assert (line.latency, line.bandwidth) == (pytest.approx(1e-4), pytest.approx(1e9))
