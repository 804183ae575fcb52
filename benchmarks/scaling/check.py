"""The model against measured runs: DDP over gloo with one to three ranks, on this machine and over a slow network.

Measured are all-reduces by size, the step of ranks that compute at the same time and exchange nothing, and the step of
the same ranks under DDP, in turn. The first two feed the model, which predicts the third. Each rank has one thread. On
a CPU an exchange takes the cores that compute, so a step takes at least what both take of them; a GPU has its own
engines for that, and the model of `jobs` lacks this bound.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch.nn.parallel import DistributedDataParallel

from benchmarks.scaling.jobs import leaf_parts
from benchmarks.scaling.model import Compute, expected_maximum, exposed_by_ddp, make_buckets
from benchmarks.telling import REPOSITORY, spread
from trainer.data.tuning import cores_of_a_rank

BUCKET_MB = 25
_TIMEOUT = 100  # seconds, of one entry
_HOSTS = tuple(f"lockstep-{which}-{os.getpid()}" for which in ("near", "far"))
_ADDRESS = "10.78.0.{}"
_PORT = 29611


@dataclass(frozen=True)
class Setup:
    """What each rank runs."""

    model: str = "resnet18"
    batch_size: int = 16
    image_size: int = 64
    sizes: tuple[int, ...] = (2**12, 2**16, 2**20, 2**22, 2**24, 2**25)  # bytes of an all-reduce
    rounds: int = 7
    num_steps: int = 3  # of one kind in a round


@dataclass(frozen=True)
class Line:
    """`latency + num_bytes / bandwidth` seconds."""

    latency: float
    bandwidth: float

    def seconds(self, num_bytes: float) -> float:
        return self.latency + num_bytes / self.bandwidth

    @classmethod
    def through(cls, sizes: Sequence[float], seconds: Sequence[float]) -> Line:
        """Fits a line by least squares of the relative errors, so that small sizes count as much as large ones."""
        weights = [1 / max(s, 1e-9) ** 2 for s in seconds]
        total = sum(weights)
        x = sum(w * size for w, size in zip(weights, sizes, strict=True)) / total
        y = sum(w * s for w, s in zip(weights, seconds, strict=True)) / total
        slope = sum(w * (size - x) * (s - y) for w, size, s in zip(weights, sizes, seconds, strict=True))
        slope /= sum(w * (size - x) ** 2 for w, size in zip(weights, sizes, strict=True))
        slope = max(slope, 1e-15)
        return cls(max(0.0, y - slope * x), 1 / slope)


def predict(setup: Setup, measured: Mapping[str, Any], num_cores: int) -> dict[str, Any]:
    """Returns the seconds of a step that the model expects, their parts, and what bounds the exposed ones.

    The bound is `clock` where buckets and their overlap decide, `cores` where the CPU time of the exchange does: there
    the entry checks nothing of buckets and overlap. It is None without an exchange.

    Args:
        setup: what ran.
        measured: what `run` measured, without DDP's own steps.
        num_cores: of the machine, which all ranks share.
    """
    num_ranks = measured["ranks"]
    compute = Compute(measured["forward"], measured["backward"])
    rest = measured["alone"]["median"] - compute.seconds  # the optimizer
    exposed, bound = 0.0, None
    if num_ranks > 1:
        parts, _ = leaf_parts(setup.model, setup.image_size)
        buckets = make_buckets(parts, compute.backward, BUCKET_MB * 2**20)
        times, busy = (Line(*measured[key]) for key in ("all_reduce_line", "all_reduce_cpu_line"))
        exposed = exposed_by_ddp(buckets, compute.backward, times.seconds)
        on_cores = sum(busy.seconds(bucket.num_bytes) for bucket in buckets) * max(1.0, num_ranks / num_cores)
        exposed, bound = max((exposed, "clock"), (on_cores, "cores"))
    slowest = measured["alone_deviation"] * expected_maximum(num_ranks)
    step = compute.seconds + rest + exposed + slowest
    return {"step": step, "exposed": exposed, "slowest": slowest, "bound": bound}


class NoHosts(RuntimeError):
    """Two hosts cannot be made of this machine, as for anybody but root."""


def check(setup: Setup, max_ranks: int, mbits: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Runs and predicts one to `max_ranks` ranks on this machine, and two hosts at each rate that is asked for.

    Yields:
        an entry as soon as it is measured. One that could not be has a `problem`, and `is_left_out` where this machine
        has no such hosts.
    """
    for num_ranks in range(1, max_ranks + 1):
        yield _entry(f"{num_ranks} on this machine", setup, partial(_on_this_machine, setup, num_ranks))
    for rate in mbits:
        yield _entry(f"2 hosts, {rate:g} Mbit/s", setup, partial(_on_two_hosts, setup, rate))


def _on_this_machine(setup: Setup, num_ranks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return run(setup, [[]] * num_ranks, f"file://{folder}/meeting", {})


def _on_two_hosts(setup: Setup, mbits: float) -> dict[str, Any]:
    with hosts(mbits) as commands:
        return run(setup, commands, f"tcp://{_ADDRESS.format(1)}:{_PORT}", {"GLOO_SOCKET_IFNAME": "eth0"})


def _entry(name: str, setup: Setup, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        measured = measure()
    except RuntimeError as problem:
        sys.stderr.write(f"{name}: {problem}\n")
        return {"name": name, "problem": str(problem), "is_left_out": isinstance(problem, NoHosts)}
    predicted = predict(setup, measured, cores_of_a_rank(1))
    error = predicted["step"] / measured["ddp"]["median"] - 1
    sys.stderr.write(f"{name}: predicted {predicted['step']:.3f} s, measured {measured['ddp']['median']:.3f} s\n")
    return {"name": name, **measured, "predicted": predicted, "error": error}


def run(setup: Setup, prefixes: Sequence[list[str]], meeting: str, variables: Mapping[str, str]) -> dict[str, Any]:
    """Runs as many ranks as there are prefixes of commands, and returns what they measured together.

    Raises:
        RuntimeError: a rank failed, or they took too long.
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables}
    processes = []
    for rank, prefix in enumerate(prefixes):
        order = json.dumps({**asdict(setup), "rank": rank, "num_ranks": len(prefixes), "meeting": meeting})
        command = [*prefix, sys.executable, "-m", "benchmarks.scaling.check", order]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=_TIMEOUT)[0] for process in processes]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"ranks took more than {_TIMEOUT} s") from None
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError(f"ranks ended with {[process.returncode for process in processes]}")
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return found


@contextmanager
def hosts(mbits: float) -> Iterator[list[list[str]]]:
    """Yields how to run commands on two hosts, which are network namespaces with a slow cable between them; for root.

    Raises:
        NoHosts: such hosts cannot be made here.
    """

    def sh(command: str) -> None:
        try:
            subprocess.run(command.split(), capture_output=True, text=True, check=True)
        except FileNotFoundError as error:
            raise NoHosts(f"{error.filename} is not installed") from None
        except subprocess.CalledProcessError as error:
            raise NoHosts(f"{command}: {error.stderr.strip()}") from None

    if os.geteuid():
        raise NoHosts("only root can make two hosts of this machine")
    made: list[str] = []
    try:
        for host in _HOSTS:
            sh(f"ip netns add {host}")
            made.append(host)
        sh(f"ip link add eth0 netns {_HOSTS[0]} type veth peer name eth0 netns {_HOSTS[1]}")
        for number, host in enumerate(_HOSTS, 1):
            sh(f"ip -n {host} addr add {_ADDRESS.format(number)}/24 dev eth0")
            sh(f"ip -n {host} link set eth0 up")
            sh(f"ip -n {host} link set lo up")
            sh(f"tc -n {host} qdisc add dev eth0 root tbf rate {mbits:g}mbit burst 256kb latency 100ms")
        yield [["ip", "netns", "exec", host] for host in _HOSTS]
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "del", host], check=False)


# ---- one rank ----------------------------------------------------------------------------------------------------


class _Steps:
    """Steps of a model under DDP, with and without the exchange."""

    def __init__(self, setup: Setup) -> None:
        torch.manual_seed(0)
        net = torchvision.models.get_model(setup.model)
        self.ddp = DistributedDataParallel(net, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        self.images = torch.randn(setup.batch_size, 3, setup.image_size, setup.image_size)
        self.labels = torch.randint(1000, [setup.batch_size])

    def step(self, exchange: bool) -> tuple[float, float, float]:
        """Returns the seconds of forward, of backward and of the whole step."""
        began = time.perf_counter()
        with nullcontext() if exchange else self.ddp.no_sync():
            loss = torch.nn.functional.cross_entropy(self.ddp(self.images), self.labels)
            forward = time.perf_counter()
            loss.backward()
        backward = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return forward - began, backward - forward, time.perf_counter() - began


def _measure(order: Mapping[str, Any]) -> dict[str, Any]:
    setup = Setup(**{key: order[key] for key in Setup.__dataclass_fields__})
    num_ranks = order["num_ranks"]
    found: dict[str, Any] = {"ranks": num_ranks}
    if num_ranks > 1:
        wall, cpu = _all_reduces(setup)
        found["all_reduce"] = {"sizes": setup.sizes, "seconds": wall, "cpu_seconds": cpu}
        for key, seconds in (("all_reduce_line", wall), ("all_reduce_cpu_line", cpu)):
            line = Line.through(setup.sizes, seconds)
            found[key] = [line.latency, line.bandwidth]
    steps = _Steps(setup)
    for exchange in (True, True, False):  # the second lays out DDP's buckets
        steps.step(exchange)
    alone: list[tuple[float, float, float]] = []
    exchanging: list[float] = []
    for number in range(setup.rounds):
        for exchange in (True, False) if number % 2 else (False, True):
            for _ in range(setup.num_steps):
                dist.barrier()
                taken = steps.step(exchange)
                if exchange:
                    exchanging.append(taken[2])
                else:
                    alone.append(taken)
    found["forward"] = statistics.median(taken[0] for taken in alone)
    found["backward"] = statistics.median(taken[1] for taken in alone)
    found["alone"] = _with_rounds([taken[2] for taken in alone])
    found["alone_deviation"] = _deviation([taken[2] for taken in alone])
    found["ddp"] = _with_rounds(exchanging)
    return found


def _all_reduces(setup: Setup) -> tuple[list[float], list[float]]:
    """Returns the median seconds of an all-reduce of each size, on the clock and of this process's CPU time."""
    wall, cpu = [], []
    for size in setup.sizes:
        data = torch.zeros(size // 4)
        times = []
        for _ in range(setup.rounds + 1):
            dist.barrier()
            before = time.perf_counter(), time.process_time()
            dist.all_reduce(data)
            times.append((time.perf_counter() - before[0], time.process_time() - before[1]))
        wall.append(statistics.median(taken[0] for taken in times[1:]))
        cpu.append(statistics.median(taken[1] for taken in times[1:]))
    return wall, cpu


def _with_rounds(seconds: Sequence[float]) -> dict[str, Any]:
    return {**(spread(seconds) or {}), "rounds": list(seconds)}


def _deviation(seconds: Sequence[float]) -> float:
    """Returns the standard deviation, of the middle half, as one step that the system disturbed would double it."""
    if len(seconds) < 2:
        return 0.0
    low, _, high = statistics.quantiles(seconds, n=4)
    return (high - low) / 1.349


def main() -> None:
    """One rank: measures what it is told to, and prints it."""
    order = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=order["meeting"],
        rank=order["rank"],
        world_size=order["num_ranks"],
        timeout=timedelta(seconds=_TIMEOUT),
    )
    try:
        found = _measure(order)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
