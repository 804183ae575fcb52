"""Rules about samples on their way to the device: workers, the cost of loading, copies, memory of workers."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from trainer.advice.measured import Advice, Measured, Setting, line, percent, speed_up
from trainer.units import format_bytes

_WAIT = 0.08  # of the time waiting for data; less is hardly worth a change
_COPIES = 0.05  # of the time waiting for copies: there should be none, as they run beside the step
_LEAST_GAIN = 0.05  # expected of other numbers of workers, else cheaper loading is advised
_HEADROOM = 1.3  # loads vary, and a queue that runs just full runs empty now and then
_MOST_WORKERS = 64  # per rank
_WORKER_BYTES = 256 * 2**20  # of a worker, where there is none to look at
_MOST_PREFETCHED = 16  # micro-batches per worker: a queue deeper than that hides no sample that is so slow
_OF_FREE = 0.8  # of the memory that is free now, which more workers and deeper queues may take
_FULL = 0.9  # of what is free of `memory.target`, where a figure is an estimate
_LEAST_CORE = 0.02  # of a core that a worker keeps busy, however much it waits
_EVEN = 0.85  # of the step's time: workers that need less of it on average are enough, and wait only at times
_LEAST_AT_STAKE = 0.02  # of what costs nothing yet
_GROWTH_REPORTS = 5  # over which memory must have grown each time: a cache that fills stops at some point
_GROWTH_BYTES = 64 * 2**20  # of all workers; less is nothing to worry about
_GROWTH_SHARE = 0.1  # of what they had, for the same reason
_RECENT_GROWTH = 0.125  # of the growth that is worth a word: so much of it in these reports, or it comes to an end


def data_wait(measured: Measured) -> Advice | None:
    """The step waits for batches."""
    wait, copies = measured.share("data_wait"), measured.share("h2d")
    loading = measured.loading
    if wait < _WAIT or wait < copies or loading.mode not in ("host", "device_decode") or loading.seconds <= 0:
        return None
    begin = f"The device waited {percent(wait)} of the time for data."
    busy = _busy_seconds(measured)
    is_uneven = loading.num_workers > 0 and loading.seconds / loading.num_workers < _EVEN * busy
    if is_uneven:
        return _deeper_queue(measured, begin)
    found = _more_workers(measured)
    if not found.is_worth_it(loading.num_workers):
        return _cheaper_loading(measured, begin, found.limit)
    settings: dict[str, Setting] = {"data.workers": found.number}
    text = f"{begin} {_who_delivers(measured)}, the model can take {_rate(measured, busy)}: set {line(settings)}"
    return Advice("data_wait", f"{text} ({_room(measured, found.number)})", settings, found.gain, wait)


def copies(measured: Measured) -> Advice | None:
    """The step waits for copies to the device."""
    share, wait, loading = measured.share("h2d"), measured.share("data_wait"), measured.loading
    if share < _COPIES or wait > share or loading.mode == "made_on_device":
        return None
    begin = f"Copies of batches to the device took {percent(share)} of the time."
    if loading.num_workers == 0 and loading.mode != "resident" and loading.seconds > 0:
        found = _more_workers(measured)
        if found.is_worth_it(0):
            settings: dict[str, Setting] = {"data.workers": found.number}
            text = f"{begin} They run in the thread of the step, and beside it where workers load: set {line(settings)}"
            return Advice("copies", f"{text} ({_room(measured, found.number)})", settings, found.gain, share)
    if _fits_on_device(measured):
        settings = {"data.feed": "resident"}
        text = f"{begin} The data fits on the device, {_on_device(measured)}: set {line(settings)}"
        return Advice("copies", text, settings, speed_up(share), share)
    text = (
        f"{begin} They run beside the step and take longer than it: let samples be smaller, such as pictures in uint8 "
        "that are normalised on the device (data.normalize)."
    )
    return Advice("copies", f"{text} At most {percent(speed_up(share))} are to be gained.", {}, None, share)


def loader_memory(measured: Measured) -> Advice | None:
    """Workers take more and more memory."""
    loading = measured.loading
    series = [(at, size * loading.num_workers) for at, size in loading.worker_bytes]
    if len(series) <= _GROWTH_REPORTS:
        return None
    (begun_at, begun), (first_at, first), (last_at, last) = series[0], series[-_GROWTH_REPORTS - 1], series[-1]
    recent = [size for _, size in series[-_GROWTH_REPORTS - 1 :]]
    grows = all(after > before for before, after in itertools.pairwise(recent))
    worth_a_word = max(_GROWTH_BYTES, _GROWTH_SHARE * begun)
    if not grows or last - begun < worth_a_word or last - first < _RECENT_GROWTH * worth_a_word:
        return None
    per_second = (last - first) / max(last_at - first_at, 1e-3)
    in_all = per_second * measured.run_length("minutes") * 60
    free = measured.host.free_memory
    fills = free is not None and in_all > free + (last - begun)
    text = (
        f"Loader workers grew from {format_bytes(begun)} to {format_bytes(last)} in {_span(last_at - begun_at)}, "
        f"{format_bytes(3600 * per_second)} an hour. Reading a Python object writes its count of references, which "
        "copies the page that a worker shares with the others: keep lists of names and labels as numpy arrays, and "
        "collect nothing in __getitem__. "
    )
    text += (
        "At this rate a run of this length fills the memory." if fills else "It costs no speed until memory runs out."
    )
    return Advice("loader_memory", text, {}, None, at_stake=0.9 if fills else _LEAST_AT_STAKE)


def _busy_seconds(measured: Measured) -> float:
    """Returns the seconds per micro-batch in which a rank does not wait for data or copies."""
    return measured.micro_batch_seconds * max(1 - measured.share("data_wait") - measured.share("h2d"), 0.01)


@dataclass(frozen=True)
class _Workers:
    """How many workers would do.

    Args:
        number: as many as there is room for.
        gain: the speed-up with them.
        limit: why more would be of no use.
    """

    number: int
    gain: float
    limit: str

    def is_worth_it(self, num_now: int) -> bool:
        """Tells whether so many are worth a change."""
        return self.number > num_now and self.gain >= _LEAST_GAIN


def _more_workers(measured: Measured) -> _Workers:
    """Returns how many workers would do, and the speed-up: what a step then takes is the longest of

    what it takes without waiting, what its workers take to load a micro-batch, what its copies take, and what the cores
    of the rank take for all of that.
    """
    loading, host = measured.loading, measured.host
    now, busy = measured.micro_batch_seconds, _busy_seconds(measured)
    copied = measured.share("h2d") * now
    threads = min(host.num_threads, host.num_cores)
    # Threads of one operation wait for one another: a step whose threads have every core is as slow as the one that
    # shares its core with a worker. Measured on two cores: nothing is gained.
    spare = host.num_cores - threads
    by_cores = loading.cpu_seconds / spare if spare else busy + loading.cpu_seconds
    least = max(busy, copied, by_cores)
    wanted = max(math.ceil(_HEADROOM * loading.seconds / least), 1)
    affordable = _affordable_workers(measured)
    workers = min(wanted, _MOST_WORKERS, affordable)
    gain = now / max(least, loading.seconds / max(workers, 1)) - 1
    if workers < wanted:
        limit = "the host has no memory for more workers" if workers == affordable else f"{workers} workers are many"
    elif least == by_cores:
        limit = f"no core of {host.num_cores} is left for more workers"
    else:
        limit = "more workers would hardly be faster"
    return _Workers(workers, gain, limit)


def _affordable_workers(measured: Measured) -> int:
    """Returns how many workers the host has memory for, those that are there included."""
    loading, free = measured.loading, measured.host.free_memory
    if free is None:
        return loading.num_workers + _MOST_WORKERS
    one = loading.bytes_per_worker or _WORKER_BYTES
    return loading.num_workers + int(_OF_FREE * free / (one + loading.prefetch_factor * loading.batch_bytes + 1))


def _deeper_queue(measured: Measured, begin: str) -> Advice | None:
    loading, free = measured.loading, measured.host.free_memory
    factor = min(4 * loading.prefetch_factor, _MOST_PREFETCHED)
    size = loading.batch_bytes * loading.num_workers * factor
    if factor <= loading.prefetch_factor or (free is not None and size > _OF_FREE * free):
        return None
    settings: dict[str, Setting] = {"data.prefetch_factor": factor}
    text = (
        f"{begin} On average {_who_delivers(measured)}, and the model can take "
        f"{_rate(measured, _busy_seconds(measured))}, but some batches take much longer than others: let more of them "
        f"wait, {line(settings)}. "
    )
    if size:
        kind = "pinned" if measured.device == "cuda" else "shared"
        where = "" if measured.exchange.num_ranks == 1 else " on each rank"
        text += f"They take up to {format_bytes(size)} of {kind} host memory{where}. "
    text += (
        "The gain depends on how the slow ones are spread, and is at most "
        f"{percent(speed_up(measured.share('data_wait')))}."
    )
    return Advice("data_wait", text, settings, None, measured.share("data_wait"))


def _cheaper_loading(measured: Measured, begin: str, limit: str) -> Advice:
    wait, loading = measured.share("data_wait"), measured.loading
    text = f"{begin} {_who_delivers(measured)}, the model can take {_rate(measured, _busy_seconds(measured))}, "
    text += f"and {limit}: "
    settings: dict[str, Setting] = {}
    if _fits_on_device(measured):
        settings = {"data.feed": "resident"}
        text += f"keep the data on the device, {_on_device(measured)}, {line(settings)}."
    elif "device_decode" in loading.alternatives:
        settings = {"data.feed": "device_decode"}
        text += f"let the GPU decode, {line(settings)}."
    elif "cache" in loading.alternatives:
        settings = {"data.cache.path": "cache"}
        text += f"pack smaller pictures once, {line(settings)} (a folder on a local disk)."
    else:
        text += "make reading a sample cheaper."
    text += f" How much depends on the samples; at most {percent(speed_up(wait))} are to be gained."
    return Advice("data_wait", text, settings, None, wait)


def _fits_on_device(measured: Measured) -> bool:
    """Tells whether the data fits into what a step leaves of the memory that it may take."""
    loading, memory = measured.loading, measured.memory
    return "resident" in loading.alternatives and loading.resident_bytes <= _FULL * (memory.target - memory.peak)


def _on_device(measured: Measured) -> str:
    free = measured.memory.target - measured.memory.peak
    return f"{format_bytes(measured.loading.resident_bytes)} of {format_bytes(free)} that steps leave free"


def _who_delivers(measured: Measured) -> str:
    loading, workers = measured.loading, measured.loading.num_workers
    where = "" if measured.exchange.num_ranks == 1 else " on each rank"
    if workers == 0:
        busy = _busy_seconds(measured)
        return f"Loading in the thread of the step leaves {_rate(measured, busy + loading.seconds)}{where}"
    who = "1 worker" if workers == 1 else f"{workers} workers"
    return f"{who}{where} deliver{'s' if workers == 1 else ''} {_rate(measured, loading.seconds / workers)}"


def _room(measured: Measured, workers: int) -> str:
    """Says what more workers would run on."""
    loading, host = measured.loading, measured.host
    core = max(loading.cpu_seconds / loading.seconds, _LEAST_CORE)
    free = math.floor(host.num_cores - min(host.num_threads, host.num_cores) - loading.num_workers * core + 0.1)
    if free >= workers - loading.num_workers:
        return "1 core is free" if free == 1 else f"{free} cores are free"
    if core < 0.5:
        return f"a worker waits {percent(1 - core)} of the time, and all need {workers * core:.1f} of a core"
    return f"sharing {host.num_cores} cores with the step"


def _rate(measured: Measured, seconds: float) -> str:
    rate = measured.batch.micro_batch_size / seconds
    return f"{rate:,.0f} samples/s" if rate >= 10 else f"{rate:.1f} samples/s"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
