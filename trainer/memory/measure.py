"""The memory that a piece of code takes on a CPU, as torch's own profiler counts it.

Owns no model of memory: this is what predictions are compared with.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def measure_cpu_peak(run: Callable[[], None]) -> int:
    """Returns the most bytes of CPU tensors alive at once in `run()`, beyond those that were alive before it.

    Tensors that live on the CPU only; temporary memory inside of kernels counts where torch's allocator gives it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):  # stable: equal times keep their order
        live += event.nbytes()
        peak = max(peak, live)
    return peak
