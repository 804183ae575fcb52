"""Rules about several ranks: exchanges that computing does not hide, and a rank that the others wait for."""

from __future__ import annotations

import math

from trainer.advice.measured import Advice, Measured, Setting, line, percent, speed_up

_EXCHANGE = 0.12  # of the time, not hidden behind backward
_COMPRESSIBLE = 2**20  # bytes: an exchange of less waits for answers and not for bytes
_BUCKETS = 8  # with so many, one eighth of the exchange is left when backward is over
_SECOND_BEST = 0.5  # of the best gain, with which a change that has no other effect is preferred
_FULL = 0.9  # of the memory target


def communication(measured: Measured) -> Advice | None:
    """Exchanges take long, and not because a rank is late."""
    exchange = measured.exchange
    if exchange.num_ranks == 1 or exchange.share < _EXCHANGE:
        return None
    ways = [_smaller_buckets, _compressed] if exchange.strategy == "ddp" else [_kept_gathered, _within_machines]
    found = [said for way in ways if (said := way(measured)) is not None]
    if found:
        # The first way costs nothing but memory: the second must be much better.
        best = max(said.rank for said in found)
        return next(said for said in found if said.rank >= _SECOND_BEST * best)
    text = (
        f"{_begin(measured)} What is left is a faster network (`python -m launch doctor` measures this one), or fewer "
        "exchanges: a larger train.batch_size, in more micro-batches, which changes the optimisation."
    )
    return Advice("communication", text, {}, None, exchange.share / 2)


def straggler(measured: Measured) -> Advice | None:
    """One rank makes the others wait."""
    slow = measured.exchange.straggler
    if slow is None:
        return None
    hosts, waits = measured.exchange.hosts, measured.exchange.data_wait
    host = f" on {hosts[slow.rank]}" if slow.rank < len(hosts) and hosts[slow.rank] else ""
    text = (
        f"Rank {slow.rank}{host} takes {1000 * slow.seconds:.0f} ms to the exchange of gradients, the others "
        f"{1000 * slow.others:.0f} ms: all wait for it, {percent(slow.share)} of the time. "
    )
    if slow.rank < len(waits) and waits[slow.rank] - min(waits) > slow.share / 2:
        text += f"It waits for its data {percent(waits[slow.rank])} of the time: look at its disk and its cores. "
    text += "`python -m launch doctor` compares the machines."
    return Advice("straggler", text, {}, speed_up(slow.share), slow.share)


def _begin(measured: Measured) -> str:
    exchange = measured.exchange
    what = "gradients" if exchange.strategy == "ddp" else "parameters and gradients"
    text = f"Exchanging {what} ({_mib(exchange.gradient_bytes)} a step) took {percent(exchange.share)} of the time, "
    return text + "not hidden behind computing."


def _smaller_buckets(measured: Measured) -> Advice | None:
    """An exchange begins when a bucket is full: with one or two buckets that is when backward ends."""
    exchange = measured.exchange
    buckets = max(math.ceil(exchange.gradient_bytes / (exchange.bucket_mb * 2**20)), 1)
    if buckets >= _BUCKETS or exchange.gradient_bytes < _BUCKETS * _COMPRESSIBLE:
        return None
    size = max(math.ceil(exchange.gradient_bytes / 2**20 / _BUCKETS), 1)
    after = math.ceil(exchange.gradient_bytes / (size * 2**20))
    whole = exchange.share * buckets  # where backward hides all but the last bucket, this is all of the exchange
    whole = exchange.share if buckets == 1 else min(whole, exchange.share + measured.share("backward"))
    hidden = measured.share("backward") / measured.batch.num_micro_batches * (after - 1) / after
    left = max(whole / after, whole - hidden)
    saved = exchange.share - left
    if saved <= 0.02:
        return None
    settings: dict[str, Setting] = {"parallel.bucket_mb": size}
    there = "one piece" if buckets == 1 else f"{buckets} pieces"
    text = f"{_begin(measured)} They travel in {there}, and each once it is whole: set {line(settings)}."
    return Advice("communication", text, settings, speed_up(saved), exchange.share)


def _compressed(measured: Measured) -> Advice | None:
    exchange = measured.exchange
    if exchange.compression != "none" or exchange.gradient_bytes < _COMPRESSIBLE:
        return None
    settings: dict[str, Setting] = {"parallel.gradient_compression": "bf16"}
    text = f"{_begin(measured)} Send half the bytes: set {line(settings)}, whose sums are less exact."
    # Half of what is exchanged is saved, hidden or not, so that at least half of what is not hidden is.
    return Advice("communication", text, settings, speed_up(exchange.share / 2), exchange.share)


def _kept_gathered(measured: Measured) -> Advice | None:
    exchange, memory, count = measured.exchange, measured.memory, measured.batch.num_micro_batches
    if not exchange.reshard_after_forward or memory.peak + exchange.parameter_bytes > _FULL * memory.target:
        return None
    settings: dict[str, Setting] = {"parallel.reshard_after_forward": False}
    # Parameters travel twice per micro-batch, for forward and for backward, and gradients once per step.
    saved = exchange.share * count / (2 * count + 1)
    text = f"{_begin(measured)} There is memory to keep parameters from forward to backward: set {line(settings)}."
    return Advice("communication", text, settings, speed_up(saved), exchange.share)


def _within_machines(measured: Measured) -> Advice | None:
    exchange = measured.exchange
    if exchange.strategy != "fsdp" or exchange.num_nodes == 1 or exchange.num_ranks == exchange.num_nodes:
        return None
    settings: dict[str, Setting] = {"parallel.strategy": "hsdp"}
    text = (
        f"{_begin(measured)} Let each machine have a copy of the model, so that parameters stay within it: set "
        f"{line(settings)}, which takes {exchange.num_nodes} times the memory for shares. The gain depends on how "
        "much slower the network between machines is than that within them."
    )
    return Advice("communication", text, settings, None, exchange.share)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
