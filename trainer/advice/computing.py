"""Rules about computing: a host that is slower than its device, memory that lies idle, work that is done twice."""

from __future__ import annotations

from trainer.advice.measured import Advice, Measured, Memory, Setting, line, percent, speed_up

_OVERHEAD = 0.3  # of the time, starting operations on a CPU; more work in each would be for free
_MOST_WAIT = 0.3  # of the time, for data: with more, that is what to change first
_LEAST_GAIN = 0.05  # of a larger micro-batch
_IDLE_MEMORY = 0.5  # of `memory.target`: with less in use there is room for much more
_RECOMPUTING = 0.04  # of the time, at least, computing again what memory has room for
_FULL = 0.9  # of the target, where a figure is an estimate


def host_bound(measured: Measured) -> Advice | None:
    """The host takes as long to start operations as they take."""
    host, batch = measured.host, measured.batch
    if measured.compiles or measured.share("data_wait") > _MOST_WAIT:
        return None
    overhead = _overhead_share(measured)
    if not (host.is_behind if measured.device == "cuda" else overhead >= _OVERHEAD):
        return None
    if measured.device == "cuda":
        begin = "The GPU had nothing left to do when steps began: the host takes longer to start operations than they "
        begin += "take."
    else:
        begin = f"Starting {host.num_operations:,} small operations for each micro-batch took {percent(overhead)} of "
        begin += "the time."
    larger = _largest_that_fits(measured)
    if larger > batch.micro_batch_size:
        gain = gain_of_micro_batch(measured, larger)
        if gain is None or gain >= _LEAST_GAIN:
            settings: dict[str, Setting] = {"train.micro_batch_size": larger}
            text = f"{begin} Larger micro-batches need fewer: set {line(settings)}{_about_batchnorm(measured)}."
            if gain is None:
                text += " How much faster that is depends on how busy the GPU is, which is not known here."
            return Advice("host_bound", text, settings, gain, 0.2)
    settings = {"model.compile": "blocks" if measured.memory.num_blocks > 1 else "model"}
    text = f"{begin} Let torch.compile merge them: set {line(settings)}. What it can merge is known only afterwards."
    return Advice("host_bound", text, settings, None, overhead if measured.device != "cuda" else 0.2)


def micro_batch(measured: Measured) -> Advice | None:
    """There is memory for a larger micro-batch, and something that it saves."""
    memory, batch = measured.memory, measured.batch
    if batch.num_micro_batches == 1 or not _is_idle(memory):
        return None
    larger = _largest_that_fits(measured)
    if larger <= batch.micro_batch_size:
        return None
    gain = gain_of_micro_batch(measured, larger)
    if gain is not None and gain < _LEAST_GAIN:
        return None
    if gain is None and measured.device != "cuda":
        return None  # a CPU is as fast with few samples as with many, but for what was counted
    settings: dict[str, Setting] = {"train.micro_batch_size": larger}
    text = (
        f"A step takes {percent(memory.peak / memory.target)} of the memory that it may take, and splits its batch "
        f"into {batch.num_micro_batches}: set {line(settings)}{_about_batchnorm(measured)}."
    )
    if gain is None:
        text += " GPUs compute large batches faster; by how much, only a try can tell."
    return Advice("micro_batch", text, settings, gain, 0.1)


def recomputation(measured: Measured) -> Advice | None:
    """Backward computes again what there is memory to keep."""
    memory = measured.memory
    if memory.checkpointing == "none" or not _is_idle(memory) or memory.recomputed == 0.0:
        return None
    # Computing the blocks again takes as long as computing them took; nearly all of a forward is in blocks.
    again = measured.share("forward") * (memory.recomputed if memory.recomputed is not None else 1.0)
    if again < _RECOMPUTING:
        return None
    # Each block keeps at most what one block holds while it is computed again.
    kept = memory.fixed + max(memory.num_blocks, 1) * (memory.peak - memory.fixed)
    fits = kept <= _FULL * memory.target
    if not fits and (memory.checkpointing == "auto" or not memory.is_planned):
        return None  # it has found what is best already, or is not to be had
    settings: dict[str, Setting] = {"memory.checkpointing": "none" if fits else "auto"}
    begin = (
        f"A step takes {percent(memory.peak / memory.target)} of the memory that it may take, and computes "
        f"activations again in backward (memory.checkpointing={memory.checkpointing})"
    )
    if fits and memory.recomputed is not None:
        text = f"{begin}, which took {percent(again)} of the time: set {line(settings)}."
        return Advice("recomputation", text, settings, speed_up(again), again)
    text = f"{begin}: set {line(settings)}, "
    text += "which is at most " if fits else "which recomputes only what does not fit, and is at most "
    text += f"{percent(speed_up(again))} faster."
    return Advice("recomputation", text, settings, None, again / 2)


def gain_of_micro_batch(measured: Measured, larger: int) -> float | None:
    """Returns the speed-up of a larger micro-batch; None where it is not known.

    The samples of a step stay the same; fewer micro-batches save what each costs however small it is: starting its
    operations, and with a sharded model the exchange of its parameters.
    """
    batch, host, exchange = measured.batch, measured.host, measured.exchange
    before = batch.num_micro_batches
    after = max(before * batch.micro_batch_size // larger, 1)
    if measured.device == "cuda":
        # What the GPU computes in a step, which then still takes its time, is not known where the host is behind.
        is_known = exchange.strategy != "ddp" and not host.is_behind
        return speed_up(_exchanged_again(measured, before, after)) if is_known else None
    if not host.num_operations:
        return None
    return speed_up(_overhead_share(measured) * (1 - after / before) + _exchanged_again(measured, before, after))


def _exchanged_again(measured: Measured, before: int, after: int) -> float:
    """Returns the share of the time that a sharded model's exchanges take less with fewer micro-batches."""
    exchange = measured.exchange
    if exchange.strategy == "ddp":
        return 0.0
    gathers = 2 if exchange.reshard_after_forward else 1  # per micro-batch; gradients travel once
    return exchange.share * (1 - (gathers * after + 1) / (gathers * before + 1))


def _overhead_share(measured: Measured) -> float:
    """Returns the share of the time that starting operations takes, on a CPU."""
    host = measured.host
    return min(host.num_operations * host.operation_seconds / measured.micro_batch_seconds, 0.95)


def _is_idle(memory: Memory) -> bool:
    return 0 < memory.peak < _IDLE_MEMORY * memory.target


def _largest_that_fits(measured: Measured) -> int:
    """Returns the largest micro-batch that surely fits: all that is not known to be fixed grows with it."""
    memory, batch = measured.memory, measured.batch
    per_sample = (memory.peak - memory.fixed) / batch.micro_batch_size
    fitting = [size for size in batch.sizes if memory.fixed + size * per_sample <= _FULL * memory.target]
    return max(fitting, default=batch.micro_batch_size)


def _about_batchnorm(measured: Measured) -> str:
    return " (its BatchNorm then sees more samples at once)" if measured.batch.has_batchnorm else ""
