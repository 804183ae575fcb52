"""Rules about samples on their way to the device: workers, the cost of loading, copies, memory of workers."""

from __future__ import annotations

import itertools
import math

from trainer.advice.measured import Advice, Measured, Setting, line, percent, speed_up

_WAIT = 0.08  # of the time waiting for data; less is hardly worth a change
_COPIES = 0.05  # of the time waiting for copies: there should be none, as they run beside the step
_LEAST_GAIN = 0.05  # expected of other numbers of workers, else cheaper loading is advised
_HEADROOM = 1.3  # loads vary, and a queue that runs just full runs empty now and then
_MOST_WORKERS = 64  # per rank; each takes memory
_LEAST_CORE = 0.02  # of a core that a worker keeps busy, however much it waits
_EVEN = 0.85  # of the step's time: workers that need less of it on average are enough, and wait only at times
_GROWTH_REPORTS = 5  # over which memory must have grown each time: a cache that fills stops at some point
_GROWTH_BYTES = 64 * 2**20  # less is nothing to worry about
_GROWTH_SHARE = 0.1  # of what they had, for the same reason


def data_wait(measured: Measured) -> Advice | None:
    """The step waits for batches."""
    wait, copies = measured.share("data_wait"), measured.share("h2d")
    if wait < _WAIT or wait < copies or measured.loading.mode not in ("host", "device_decode"):
        return None
    loading = measured.loading
    begin = f"The device waited {percent(wait)} of the time for data."
    busy = _busy_seconds(measured)
    is_uneven = loading.num_workers > 0 and loading.seconds / loading.num_workers < _EVEN * busy
    if is_uneven:
        return _deeper_queue(measured, begin)
    found = _more_workers(measured)
    if found is None:
        return _cheaper_loading(measured, begin)
    workers, gain = found
    settings: dict[str, Setting] = {"data.workers": workers}
    text = f"{begin} {_who_delivers(measured)}, the model can take {_rate(measured, busy)}: set {line(settings)}"
    return Advice("data_wait", f"{text} ({_room(measured, workers)})", settings, gain, wait)


def copies(measured: Measured) -> Advice | None:
    """The step waits for copies to the device."""
    share, wait, loading = measured.share("h2d"), measured.share("data_wait"), measured.loading
    if share < _COPIES or wait > share or loading.mode == "made_on_device":
        return None
    begin = f"Copies of batches to the device took {percent(share)} of the time."
    if loading.num_workers == 0 and loading.mode != "resident":
        found = _more_workers(measured)
        if found is not None:
            settings: dict[str, Setting] = {"data.workers": found[0]}
            text = f"{begin} They run in the thread of the step, and beside it where workers load: set {line(settings)}"
            return Advice("copies", f"{text} ({_room(measured, found[0])})", settings, found[1], share)
    if "resident" in loading.alternatives:
        settings = {"data.feed": "resident"}
        text = f"{begin} The data fits on the device: set {line(settings)}"
        return Advice("copies", text, settings, speed_up(share), share)
    text = (
        f"{begin} They run beside the step and take longer than it: let samples be smaller, such as pictures in uint8 "
        "that are normalised on the device (data.normalize)."
    )
    return Advice("copies", f"{text} At most {percent(speed_up(share))} are to be gained.", {}, None, share)


def loader_memory(measured: Measured) -> Advice | None:
    """Workers take more and more memory."""
    series = measured.loading.worker_bytes
    if len(series) <= _GROWTH_REPORTS:
        return None
    (first_at, first), (last_at, last) = series[-_GROWTH_REPORTS - 1], series[-1]
    recent = [size for _, size in series[-_GROWTH_REPORTS - 1 :]]
    grows = all(after > before for before, after in itertools.pairwise(recent))
    begun_at, begun = series[0]
    growth = last - begun
    if not grows or growth < max(_GROWTH_BYTES, _GROWTH_SHARE * begun):
        return None
    per_hour = (last - first) / max(last_at - first_at, 1e-9) * 3600
    gib = 2**30
    text = (
        f"Loader workers grew from {begun / gib:.2f} to {last / gib:.2f} GiB in {_span(last_at - begun_at)}, "
        f"{per_hour / gib:.1f} GiB an hour. Reading a Python object writes its count of references, which copies the "
        "page that a worker shares with the others: keep lists of names and labels as numpy arrays, and collect "
        "nothing in __getitem__. It costs no speed until memory runs out."
    )
    return Advice("loader_memory", text, {}, None, at_stake=0.9)  # all of the run, in the end


def _busy_seconds(measured: Measured) -> float:
    """Returns the seconds per micro-batch in which a rank does not wait for data or copies."""
    return measured.micro_batch_seconds * max(1 - measured.share("data_wait") - measured.share("h2d"), 0.01)


def _more_workers(measured: Measured) -> tuple[int, float] | None:
    """Returns how many workers would do, and the speed-up: what a step then takes is the longest of

    what it takes without waiting, what its workers take to load a micro-batch, what its copies take, and what the cores
    of the rank take for all of that.
    """
    loading, host = measured.loading, measured.host
    if loading.seconds <= 0:
        return None
    now, busy = measured.micro_batch_seconds, _busy_seconds(measured)
    copied = measured.share("h2d") * now
    threads = min(host.num_threads, host.num_cores)
    by_cores = (busy * threads + loading.cpu_seconds) / host.num_cores
    least = max(busy, copied, by_cores)
    workers = min(max(math.ceil(_HEADROOM * loading.seconds / least), 1), _MOST_WORKERS)
    gain = now / max(least, loading.seconds / workers) - 1
    if workers <= loading.num_workers or gain < _LEAST_GAIN:
        return None
    return workers, gain


def _deeper_queue(measured: Measured, begin: str) -> Advice:
    loading = measured.loading
    settings: dict[str, Setting] = {"data.prefetch_factor": 4 * loading.prefetch_factor}
    text = (
        f"{begin} On average {_who_delivers(measured)}, and the model can take "
        f"{_rate(measured, _busy_seconds(measured))}, but some batches take much longer than others: let more of them "
        f"wait, {line(settings)}. The gain depends on how they are spread, and is at most "
        f"{percent(speed_up(measured.share('data_wait')))}."
    )
    return Advice("data_wait", text, settings, None, measured.share("data_wait"))


def _cheaper_loading(measured: Measured, begin: str) -> Advice:
    wait, loading = measured.share("data_wait"), measured.loading
    text = f"{begin} {_who_delivers(measured)}, the model can take {_rate(measured, _busy_seconds(measured))}, "
    text += f"and no core of {measured.host.num_cores} is left for more workers: "
    settings: dict[str, Setting] = {}
    if "resident" in loading.alternatives:
        settings = {"data.feed": "resident"}
        text += f"keep the data on the device, {line(settings)}."
    elif "device_decode" in loading.alternatives:
        settings = {"data.feed": "device_decode"}
        text += f"let the GPU decode, {line(settings)}."
    elif "cache" in loading.alternatives:
        settings = {"data.cache.path": "cache"}
        text += f"pack smaller pictures once, {line(settings)} (a folder on a local disk)."
    else:
        text += "make reading a sample cheaper, or give each process more cores."
    text += f" How much depends on the samples; at most {percent(speed_up(wait))} are to be gained."
    return Advice("data_wait", text, settings, None, wait)


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
