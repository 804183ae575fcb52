"""How long a step takes on many ranks, and how much of a run is training: pure functions of a few constants.

    step    = compute + exposed communication + what the slowest rank adds
    run     = steps + stalls of checkpoints + what failures cost

Owns the formulas; constants with their sources are `constants`, the jobs `jobs`. Collectives follow the formulas by
which NCCL chooses its algorithm (NVIDIA/nccl, `src/graph/tuning.cc`, `ncclTopoTuneModel`), without its corrections: a
base latency, a latency per step inside of a node and between nodes, and bytes over the bandwidth of the slowest link on
the way. Seconds, bytes and bytes per second throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

GRADIENT_BYTES = 4  # of a parameter's gradient, which is summed in float32
FIRST_BUCKET_BYTES = 2**20  # torch's DDP: so that the exchange begins early

Algorithm = Literal["ring", "tree"]


# ---- collectives -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """One way to carry out a collective.

    Args:
        algorithm: `ring` passes pieces around; `tree` sums up and hands down, for all-reduce only.
        bandwidth_share: of the link's bandwidth that is data.
        most_bandwidth: bytes per second that it reaches at most.
        base: seconds before the first step.
        inside: seconds of a step inside of a node.
        inside_of_many: the same where there are other nodes, too.
        between: seconds of a step between nodes.
    """

    algorithm: Algorithm
    bandwidth_share: float
    most_bandwidth: float
    base: float
    inside: float
    inside_of_many: float
    between: float


@dataclass(frozen=True)
class Network:
    """What ranks are connected by.

    Args:
        ranks_per_node: GPUs of a machine.
        inside: bytes per second in each direction, of one GPU to the others of its node.
        between: bytes per second in each direction, of one GPU's part of its node's network cards.
        protocols: of which each collective takes the fastest.
    """

    ranks_per_node: int
    inside: float
    between: float
    protocols: tuple[Protocol, ...]

    def all_reduce(self, num_bytes: float, num_ranks: int) -> float:
        """Returns the seconds in which ranks sum up what each has `num_bytes` of.

        A ring sends 2 (n - 1) / n of the bytes over each link (Patarasuk and Yuan, 2009), a tree 2.
        """
        if num_ranks == 1:
            return 0.0
        ways = []
        nodes = self._num_nodes(num_ranks)
        for protocol in self.protocols:
            if protocol.algorithm == "ring":
                latency = self._ring_latency(protocol, num_ranks, 2 * (num_ranks - 1), 2 * nodes)
                amount = 2 * (num_ranks - 1) / num_ranks
            else:
                inside = protocol.inside if nodes == 1 else protocol.inside_of_many
                in_node = min(num_ranks, self.ranks_per_node) - 1
                depth = math.ceil(math.log2(nodes))
                latency = protocol.base + 2 * (in_node * inside + depth * protocol.between)
                amount = 2.0
            ways.append(latency + amount * num_bytes / self._bandwidth(protocol, nodes))
        return min(ways)

    def gather(self, num_bytes: float, num_ranks: int) -> float:
        """Returns the seconds of an all-gather, or of a reduce-scatter, of `num_bytes` in all."""
        if num_ranks == 1:
            return 0.0
        nodes = self._num_nodes(num_ranks)
        amount = (num_ranks - 1) / num_ranks * num_bytes
        return min(
            self._ring_latency(protocol, num_ranks, num_ranks - 1, nodes - 1)
            + amount / self._bandwidth(protocol, nodes)
            for protocol in self.protocols
            if protocol.algorithm == "ring"
        )

    def of_one_per_node(self) -> Network:
        """Returns the network of ranks of which each is on another node: of those that hold the same shard."""
        return replace(self, ranks_per_node=1, inside=self.between)

    def _num_nodes(self, num_ranks: int) -> int:
        return -(-num_ranks // self.ranks_per_node)

    def _bandwidth(self, protocol: Protocol, nodes: int) -> float:
        # Rings leave a node over all of its cards, so the slower of both kinds of link limits all of them.
        link = self.inside if nodes == 1 else min(self.inside, self.between * self.ranks_per_node)
        return min(link * protocol.bandwidth_share, protocol.most_bandwidth)

    def _ring_latency(self, protocol: Protocol, num_ranks: int, steps: int, steps_between: int) -> float:
        if num_ranks <= self.ranks_per_node:
            return protocol.base + steps * protocol.inside
        steps_between = min(steps, steps_between)
        return protocol.base + (steps - steps_between) * protocol.inside_of_many + steps_between * protocol.between


# ---- a step ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of a model that computes and is exchanged as one: a parameter for DDP, a block for FSDP.

    Args:
        num_parameters: that it has.
        work: its share of the model's arithmetic; all shares are 1 together.
    """

    num_parameters: int
    work: float


@dataclass(frozen=True)
class Compute:
    """Seconds of a micro-batch on one rank that waits for nobody."""

    forward: float
    backward: float  # with what it recomputes

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Bucket:
    """Gradients that are exchanged together."""

    num_bytes: int
    ready: float  # seconds after the beginning of backward


def make_buckets(parts: Sequence[Part], backward: float, bucket_bytes: float) -> list[Bucket]:
    """Returns DDP's buckets: from the last part on, each closed by the part that fills it.

    Args:
        parts: in the order of forward.
        backward: seconds of all of it.
        bucket_bytes: `parallel.bucket_mb`, in bytes. The first one is smaller.
    """
    buckets, num_bytes, done, most = [], 0, 0.0, min(FIRST_BUCKET_BYTES, bucket_bytes)
    for part in reversed(parts):
        num_bytes += GRADIENT_BYTES * part.num_parameters
        done += part.work * backward
        if num_bytes >= most:
            buckets.append(Bucket(num_bytes, done))
            num_bytes, most = 0, bucket_bytes
    if num_bytes:
        buckets.append(Bucket(num_bytes, done))
    return buckets


def exposed_by_ddp(buckets: Sequence[Bucket], backward: float, all_reduce: Callable[[float], float]) -> float:
    """Returns how long a step waits for gradients after its backward: buckets go one after the other, as they come."""
    end = 0.0
    for bucket in buckets:
        end = max(end, bucket.ready) + all_reduce(bucket.num_bytes)
    return max(0.0, end - backward)


@dataclass(frozen=True)
class Exchange:
    """What FSDP's collectives take, each as seconds for a part of so many parameters.

    Args:
        gather: whole parameters from shares.
        reduce: shares of gradients from whole ones; with HSDP also the sum over copies.
    """

    gather: Callable[[int], float]
    reduce: Callable[[int], float]


def fsdp_seconds(root: Part, blocks: Sequence[Part], compute: Compute, exchange: Exchange, is_last: bool) -> float:
    """Returns the seconds of a micro-batch under FSDP2.

    A block's parameters are gathered while the block before it computes, in forward and again in backward, and its
    gradients are reduced while the next one computes backward. All of it shares one link, in the order in which it is
    asked for. The root is gathered at the start and kept.

    Args:
        root: all that is in no block; it computes first in forward, last in backward.
        blocks: in the order of forward.
        compute: of all parts.
        exchange: what collectives take.
        is_last: gradients are exchanged; those of an earlier micro-batch are kept whole.
    """
    link = exchange.gather(root.num_parameters)
    device = link + root.work * compute.forward
    asked = 0.0
    for block in blocks:
        link = max(link, asked) + exchange.gather(block.num_parameters)
        asked = max(device, link)  # its computation begins, and asks for the next block
        device = asked + block.work * compute.forward
    asked = device
    waiting: Part | None = None  # its gradients are there, and the block that was asked for before goes first
    for block in reversed(blocks):
        link = max(link, asked) + exchange.gather(block.num_parameters)
        asked = max(device, link)
        if waiting is not None:
            link = max(link, device) + exchange.reduce(waiting.num_parameters)
        device = asked + block.work * compute.backward
        waiting = block if is_last else None
    if waiting is not None:
        link = max(link, device) + exchange.reduce(waiting.num_parameters)
    device += root.work * compute.backward
    if not is_last:
        return device
    return max(link, device) + exchange.reduce(root.num_parameters)


# ---- the slowest rank --------------------------------------------------------------------------------------------


def expected_maximum(num_ranks: int) -> float:
    """Returns by how many standard deviations the slowest of so many equal ranks is behind the mean, on average.

    The mean of the largest of n draws of a normal distribution: the integral of x d(Phi(x)^n), here over its upper
    tail, 1 - Phi^n, minus the lower one.
    """
    if num_ranks == 1:
        return 0.0
    normal, step, reach = NormalDist(), 5e-3, 10.0
    total = 0.0
    for i in range(round(reach / step)):
        x = (i + 0.5) * step
        total += (1 - normal.cdf(x) ** num_ranks) - normal.cdf(-x) ** num_ranks
    return total * step


# ---- a run -------------------------------------------------------------------------------------------------------


def optimal_interval(stall: float, mtbf: float) -> float:
    """Returns the seconds of training between checkpoints that lose least.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006;
    Young's sqrt(2 stall mtbf), 1974, is its first term.

    Args:
        stall: that a checkpoint costs, more than 0.
        mtbf: mean seconds between failures of the whole job.
    """
    if math.isinf(mtbf):
        return math.inf
    if stall >= 2 * mtbf:
        return mtbf
    ratio = stall / (2 * mtbf)
    return math.sqrt(2 * stall * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


def goodput(interval: float, stall: float, restart: float, mtbf: float) -> float:
    """Returns the share of time in which steps are made that are not made again.

    Daly's complete model (2006) of failures at a constant rate, which may also strike while a job
    restarts: mtbf exp(restart / mtbf) (exp((interval + stall) / mtbf) - 1) seconds per interval. Where failures are
    rare, half an interval and a restart are lost by each.

    Args:
        interval: seconds of training between checkpoints.
        stall: that each costs.
        restart: from a failure to training again.
        mtbf: mean seconds between failures of the whole job.
    """
    if math.isinf(mtbf):
        return 1 / (1 + stall / interval)
    exponent = (interval + stall) / mtbf
    if exponent > 700:
        return 0.0
    return interval / (mtbf * math.exp(restart / mtbf) * math.expm1(exponent))
