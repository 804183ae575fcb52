"""How ranks reach each other: clocks, all-reduce over all of them, and bandwidth between pairs.

NCCL between GPUs, gloo between CPUs and for what has to be agreed on. Every rank goes through the same list of
exchanges in the same order, and a pair's machines take part in no other pair meanwhile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise, permutations

import torch
import torch.distributed as dist

from launch.doctor.devices import timed
from launch.doctor.situation import Situation
from launch.doctor.verdicts import (
    TRANSFER,
    Finding,
    Judgement,
    Place,
    Reading,
    Values,
    Verdict,
    find_slow,
    span,
)

_NEVER = 100  # times as long as a check may take
_CLOCK_ROUNDS = 10
_CLOCK_WARN = 1.0  # seconds
_CLOCK_TOLERANCE = 5.0  # without a config
_SIZES = (1 << 10, 32 << 10, 1 << 20, 16 << 20, 64 << 20)  # bytes
_SECONDS_PER_SIZE, _MOST_REPEATS = 0.4, 20
_TOO_SLOW = 3.0  # seconds that the next size would take, which is then left out
_CHUNKS = (64 << 10, 1 << 20, 16 << 20)  # bytes from rank to rank
_LONG = 1.0  # seconds that the next size would take, which is then left out
_CHUNK_REPEATS = 5
_MOST_HOSTS = 64  # of which every pair is tried; of more, neighbours
_SLOW_LINK = 100e6  # bytes per second between machines: gigabit Ethernet has 118


# ---- connecting ---------------------------------------------------------------------------------------------------


def connect(situation: Situation) -> Values:
    """Builds the process group of all ranks, and has each meet all others."""
    backend = "cpu:gloo,cuda:nccl" if situation.is_on_gpu else "gloo"
    began = time.perf_counter()
    dist.init_process_group(
        backend,
        store=situation.meeting.part("group"),
        rank=situation.place.rank,
        world_size=situation.num_ranks,
        # NCCL's watchdog would end the process, and the report with it; what stalls is left behind without it.
        timeout=timedelta(seconds=situation.patience * (_NEVER if situation.is_on_gpu else 1)),
        device_id=situation.device if situation.is_on_gpu else None,
    )
    dist.all_reduce(torch.zeros(1))
    if situation.is_on_gpu:
        dist.all_reduce(torch.zeros(1, device=situation.device))
        torch.cuda.synchronize(situation.device)
    return {"backend": "nccl" if situation.is_on_gpu else "gloo", "seconds": time.perf_counter() - began}


def judge_connect(readings: Sequence[Reading]) -> Judgement:
    """There is nothing to judge: ranks that cannot connect have no reading."""
    values = readings[0].values
    return Judgement(f"{values['backend']}, {max(r.values['seconds'] for r in readings):.1f} s until all had met")


# ---- clocks -------------------------------------------------------------------------------------------------------


def measure_clock(situation: Situation) -> Values:
    """Returns how far this machine's clock is ahead of rank 0's, and how sure that is: half the quickest round trip."""
    rank, config = situation.place.rank, situation.config
    tolerance = config.launch.hosts.clock_tolerance.seconds if config is not None else _CLOCK_TOLERANCE
    values: Values = {"ahead": 0.0, "uncertainty": 0.0, "tolerance": tolerance}
    stamp = torch.zeros(1, dtype=torch.float64)
    for place in situation.hosts[1:]:
        if rank == 0:
            situation.now(f"the clock of rank {place.rank}")
            for _ in range(_CLOCK_ROUNDS):
                dist.recv(stamp, place.rank)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), place.rank)
        elif rank == place.rank:
            trips = []
            for _ in range(_CLOCK_ROUNDS):
                asked = time.time()
                dist.send(stamp, 0)
                dist.recv(stamp, 0)
                answered = time.time()
                trips.append((answered - asked, (asked + answered) / 2 - float(stamp)))
            trip, ahead = min(trips)
            values.update(ahead=ahead, uncertainty=trip / 2)
    dist.barrier()
    return values


def judge_clock(readings: Sequence[Reading]) -> Judgement:
    """Wants clocks to be together: logs, file times and certificates rely on them."""
    findings = []
    readings = [reading for reading in readings if reading.place.is_first]
    for reading in readings:
        ahead, tolerance = reading.values["ahead"], reading.values["tolerance"]
        if abs(ahead) > min(_CLOCK_WARN, tolerance):
            verdict = Verdict.FAIL if abs(ahead) > tolerance else Verdict.WARN
            way = "ahead of" if ahead > 0 else "behind"
            message = f"{reading.place.host}: its clock is {abs(ahead):.2f} s {way} that of {readings[0].place.host}"
            findings.append(Finding(verdict, message, "start chrony or another NTP client there"))
    if len(readings) == 1:
        return Judgement("one machine, one clock")
    most = max(abs(r.values["ahead"]) for r in readings)
    return Judgement(f"at most {1e3 * most:.1f} ms apart", tuple(findings))


# ---- all ranks ----------------------------------------------------------------------------------------------------


def measure_all_reduce(situation: Situation) -> Values:
    """Returns how long sums over all ranks take, by size; of every repetition the time of the slowest rank."""
    results: list[Values] = []
    for size, following in pairwise([*_SIZES, 0]):
        situation.now(f"all-reduce of {size} bytes")
        data = torch.zeros(size // 4, device=situation.device)
        dist.all_reduce(data)
        first = _longest(timed(lambda: dist.all_reduce(data), situation.device))  # noqa: B023
        repeats = int(min(max(_SECONDS_PER_SIZE / first, 1), _MOST_REPEATS))
        times = [_longest(timed(lambda: dist.all_reduce(data), situation.device)) for _ in range(repeats)]  # noqa: B023
        seconds = statistics.median(times)
        carried = 2 * (situation.num_ranks - 1) / situation.num_ranks * size  # by each rank's link, in a ring
        results.append({"bytes": size, "seconds": seconds, "bus_gb_s": carried / seconds / 1e9, "repeats": repeats})
        if seconds * following / size > _TOO_SLOW:
            break
    return {"sizes": results, "left_out": [size for size in _SIZES if size > results[-1]["bytes"]]}


def _longest(seconds: float) -> float:
    """Returns the longest of all ranks' times, on every rank."""
    longest = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)


def judge_all_reduce(readings: Sequence[Reading]) -> Judgement:
    """Gives latency and bandwidth; all ranks take part in each, so that there are no peers to compare with."""
    sizes = readings[0].values["sizes"]
    least, most = sizes[0], sizes[-1]
    latency = f"{1e6 * least['seconds']:.0f} us for {_size(least['bytes'])}"
    summary = f"{latency}, {_speed(1e9 * most['bus_gb_s'])} for {_size(most['bytes'])}"
    left_out = readings[0].values["left_out"]
    if not left_out:
        return Judgement(summary)
    message = f"a sum of {_size(most['bytes'])} over all ranks takes {most['seconds']:.1f} s; larger ones were left out"
    return Judgement(summary, (Finding(Verdict.WARN, message, "see which pair is slow"),))


# ---- pairs --------------------------------------------------------------------------------------------------------


def pairs_of(places: Sequence[Place]) -> list[tuple[int, int]]:
    """Returns who sends to whom: neighbouring ranks, and the first ranks of all machines, both ways."""
    ranks = [place.rank for place in places]
    ring = list(pairwise([*ranks, ranks[0]]))
    firsts = [place.rank for place in places if place.is_first]
    hosts = list(permutations(firsts, 2)) if len(firsts) <= _MOST_HOSTS else list(pairwise([*firsts, firsts[0]]))
    both = [*ring, *[(b, a) for a, b in ring], *hosts, *[(b, a) for a, b in hosts]]
    return [pair for pair in dict.fromkeys(both) if pair[0] != pair[1]]


def rounds_of(pairs: Sequence[tuple[int, int]], places: Sequence[Place]) -> list[list[tuple[int, int]]]:
    """Returns pairs in rounds, in each of which a machine takes part in one pair at most."""
    node = {place.rank: place.node for place in places}
    rounds: list[tuple[set[int], list[tuple[int, int]]]] = []
    for pair in pairs:
        machines = {node[rank] for rank in pair}
        for busy, chosen in rounds:
            if not busy & machines:
                busy |= machines
                chosen.append(pair)
                break
        else:
            rounds.append((machines, [pair]))
    return [chosen for _, chosen in rounds]


def measure_pairs(situation: Situation) -> Values:
    """Returns bandwidth and latency from this rank to others."""
    rank, found = situation.place.rank, []
    by_rank = {place.rank: place for place in situation.places}
    for chosen in rounds_of(pairs_of(situation.places), situation.places):
        for sender, receiver in chosen:
            if rank in (sender, receiver):
                situation.now(f"rank {sender} sends to rank {receiver}")
                if rank == receiver:
                    _receive(situation, sender)
                    continue
                to = by_rank[receiver]
                is_inside = to.node == situation.place.node
                found.append({"to": str(to), "rank": receiver, "is_inside": is_inside, **_send(situation, receiver)})
        situation.now("the end of a round of pairs")
        dist.barrier()
    return {"pairs": found}


def _send(situation: Situation, receiver: int) -> Values:
    latency = min(_one_way(situation, receiver, 4) for _ in range(_CHUNK_REPEATS))
    for size, following in pairwise([*_CHUNKS, 0]):
        times = [_one_way(situation, receiver, size) for _ in range(_CHUNK_REPEATS)]
        seconds = min(times)
        if seconds * following / size > _LONG:
            break
    dist.send(torch.zeros(1, dtype=torch.int64), receiver)
    return {"bytes": size, "seconds": seconds, "bytes_per_s": size / seconds, "round_trip": latency}


def _one_way(situation: Situation, receiver: int, size: int) -> float:
    """Sends so many bytes, and returns the time until they are acknowledged."""
    dist.send(torch.tensor([size]), receiver)  # on gloo: what comes
    data = torch.zeros(size // 4, device=situation.device)
    answer = torch.zeros(1, device=situation.device)

    def exchange() -> None:
        dist.send(data, receiver)
        dist.recv(answer, receiver)

    return timed(exchange, situation.device)


def _receive(situation: Situation, sender: int) -> None:
    answer = torch.zeros(1, device=situation.device)
    size = torch.zeros(1, dtype=torch.int64)
    while True:
        dist.recv(size, sender)
        if not int(size):
            return
        data = torch.empty(int(size) // 4, device=situation.device)
        dist.recv(data, sender)
        dist.send(answer, sender)


def judge_pairs(readings: Sequence[Reading]) -> Judgement:
    """Compares pairs on one machine with each other, and pairs of machines with each other."""
    inside: dict[str, float] = {}
    between: dict[str, float] = {}
    for reading in readings:
        for pair in reading.values["pairs"]:
            (inside if pair["is_inside"] else between)[f"{reading.place} -> {pair['to']}"] = pair["bytes_per_s"]
    findings = []
    is_on_cpu = all(reading.place.device == "cpu" for reading in readings)
    for rates, hint in (
        (inside, "nvidia-smi topo -m there, and what else runs on these cores"),
        (between, "cable, switch port and interface of these two machines"),
    ):
        for pair_text, found in sorted(find_slow(rates, TRANSFER).items(), key=lambda item: item[1].rate):
            less = f"{found.percent}% less than its peers' {_speed(found.peers)}"
            # Between CPU processes of a machine there is no cable: how fast that is says how busy its cores are.
            verdict = Verdict.WARN if rates is inside and is_on_cpu else found.verdict
            findings.append(Finding(verdict, f"{pair_text}: {_speed(found.rate)}, {less}", hint))
    slow = find_slow(between, TRANSFER)
    for pair_text, rate in between.items():
        if rate < _SLOW_LINK and pair_text not in slow:
            message = f"{pair_text}: {_speed(rate)}; gradients will wait for that"
            findings.append(Finding(Verdict.WARN, message, "launch.interface chooses another network"))
    texts = [
        f"{len(rates)} {where} at {span(list(rates.values()), _speed)}"
        for where, rates in (("on a machine", inside), ("between machines", between))
        if rates
    ]
    return Judgement(", ".join(texts), tuple(findings))


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"


def _speed(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.2f} MB/s"
