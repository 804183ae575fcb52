"""What NVIDIA's driver tells of a GPU beyond what torch knows: clocks, reasons to be slow, errors, links.

Owns the questions; they are put through `trainer.telemetry.nvml`.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

from launch.doctor.verdicts import Skip, Values
from trainer.telemetry.nvml import NoNvml, bindings, gpu_of

# Bits of NVML's reasons to run below the highest clock. A power cap is what a busy card usually runs into.
REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "too hot (driver)",
    0x40: "too hot (hardware)",
    0x80: "power brake of the machine",
}
_MAX_LINKS = 18


def driver_version() -> str | None:
    """Returns the version of NVIDIA's driver."""
    with suppress(OSError):
        found = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[1]
    with suppress(NoNvml):
        version = bindings().nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else str(version)
    return None


def read(device: torch.device) -> Values:
    """Returns what there is to know of a GPU at this moment; None for what it does not tell.

    Raises:
        Skip: NVML, or this GPU in it, cannot be reached.
    """
    try:
        gpu = gpu_of(device)
    except NoNvml as reason:
        raise Skip(str(reason)) from None
    ask = gpu.ask
    reasons, remapped, ecc = ask("CurrentClocksThrottleReasons"), ask("RemappedRows"), ask("EccMode")
    links = [ask("NvLinkState", link) for link in range(_MAX_LINKS)]
    watts, most_milliwatts = gpu.watts(), ask("EnforcedPowerLimit")
    return {
        "sm_clock_mhz": ask("ClockInfo", "CLOCK_SM"),
        "max_sm_clock_mhz": ask("MaxClockInfo", "CLOCK_SM"),
        "temperature": gpu.celsius(),
        "slowdown_temperature": ask("TemperatureThreshold", "TEMPERATURE_THRESHOLD_SLOWDOWN"),
        "power_w": None if watts is None else round(watts, 1),
        "power_limit_w": None if most_milliwatts is None else round(most_milliwatts / 1000, 1),
        "reasons": None if reasons is None else [text for bit, text in REASONS.items() if reasons & bit],
        "ecc": None if ecc is None else bool(ecc[0]),
        "uncorrected_errors": ask("TotalEccErrors", "MEMORY_ERROR_TYPE_UNCORRECTED", "VOLATILE_ECC"),
        "corrected_errors": ask("TotalEccErrors", "MEMORY_ERROR_TYPE_CORRECTED", "VOLATILE_ECC"),
        "remapping_pending": None if remapped is None else bool(remapped[2]),
        "remapping_failed": None if remapped is None else bool(remapped[3]),
        "nvlinks": None if all(state is None for state in links) else sum(bool(state) for state in links),
    }
