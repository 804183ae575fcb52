"""What a machine does while it trains: cores, memory, network, GPUs. One process per machine asks.

NVIDIA's GPUs are asked through `trainer.telemetry.nvml`, where that can be; what a card does not tell is left out.
"""

from __future__ import annotations

import logging
import time

import psutil

from trainer.telemetry.nvml import Gpu, NoNvml, all_gpus

logger = logging.getLogger("lockstep")

PERIOD_SECONDS = 10.0  # between two samples at least: reports may come many times a second
_LEAST_SECONDS = 0.1  # that the kernel's counters need to say something; so that short runs have a sample, too
_MIB = 2**20


class Machine:
    """Samples this machine, from one report to the next."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first call begins the time that the next one is about
        self._sent, self._received = _network_bytes()
        self._since = time.monotonic()
        self._period = _LEAST_SECONDS  # until the first sample
        self._gpus = _gpus()

    def sample(self) -> dict[str, float] | None:
        """Returns figures by name for the time since the last sample; None while that is too short."""
        now = time.monotonic()
        seconds = now - self._since
        if seconds < self._period:
            return None
        sent, received = _network_bytes()
        figures = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_percent": psutil.virtual_memory().percent,
            "sent_mib_per_second": (sent - self._sent) / _MIB / seconds,
            "received_mib_per_second": (received - self._received) / _MIB / seconds,
        }
        for number, gpu in enumerate(self._gpus):
            figures |= {f"gpu{number}_{name}": value for name, value in _gpu_figures(gpu).items()}
        self._sent, self._received, self._since, self._period = sent, received, now, PERIOD_SECONDS
        return figures


def _network_bytes() -> tuple[int, int]:
    counters = psutil.net_io_counters(nowrap=False)
    return (counters.bytes_sent, counters.bytes_recv) if counters is not None else (0, 0)


def _gpus() -> list[Gpu]:
    try:
        return all_gpus()
    except NoNvml as reason:
        logger.debug("GPUs are not sampled: %s", reason)
        return []


def _gpu_figures(gpu: Gpu) -> dict[str, float]:
    utilisation, memory = gpu.ask("UtilizationRates"), gpu.ask("MemoryInfo")
    figures = {
        "percent": None if utilisation is None else utilisation.gpu,
        "memory_percent": None if memory is None else 100 * memory.used / memory.total,
        "power_w": gpu.watts(),
        "temperature": gpu.celsius(),
    }
    return {name: float(value) for name, value in figures.items() if value is not None}
