"""What NVIDIA's driver tells of a GPU beyond what torch knows: clocks, reasons to be slow, errors, links.

NVML's Python bindings (`nvidia-ml-py`) need no CUDA. Older cards and virtual ones lack many of its figures; what a card
does not tell is None, which is not the same as zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from launch.doctor.verdicts import Skip, Values

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
    with suppress(Skip):
        return _text(_bindings().nvmlSystemGetDriverVersion())
    return None


def read(device: torch.device) -> Values:
    """Returns what there is to know of a GPU at this moment.

    Raises:
        Skip: NVML, or this GPU in it, cannot be reached.
    """
    nvml = _bindings()
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID((uuid if uuid[3:4] == "-" else f"GPU-{uuid}").encode())
    except nvml.NVMLError as error:
        raise Skip(f"NVML does not know this GPU: {error}") from None

    def ask(question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(handle, *arguments)
        except nvml.NVMLError:  # not supported by this card, or not for this user
            return None

    reasons = ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
    remapped = ask(nvml.nvmlDeviceGetRemappedRows)
    links = [ask(nvml.nvmlDeviceGetNvLinkState, link) for link in range(_MAX_LINKS)]
    ecc = ask(nvml.nvmlDeviceGetEccMode)
    return {
        "sm_clock_mhz": ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        "max_sm_clock_mhz": ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        "temperature": ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        "slowdown_temperature": ask(nvml.nvmlDeviceGetTemperatureThreshold, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
        "power_w": _scaled(ask(nvml.nvmlDeviceGetPowerUsage), 1e-3),
        "power_limit_w": _scaled(ask(nvml.nvmlDeviceGetEnforcedPowerLimit), 1e-3),
        "reasons": None if reasons is None else [text for bit, text in REASONS.items() if reasons & bit],
        "ecc": None if ecc is None else bool(ecc[0]),
        "uncorrected_errors": ask(
            nvml.nvmlDeviceGetTotalEccErrors, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
        "corrected_errors": ask(
            nvml.nvmlDeviceGetTotalEccErrors, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_VOLATILE_ECC
        ),
        "remapping_pending": None if remapped is None else bool(remapped[2]),
        "remapping_failed": None if remapped is None else bool(remapped[3]),
        "nvlinks": None if all(state is None for state in links) else sum(bool(state) for state in links),
    }


def _bindings() -> Any:
    try:
        import pynvml
    except ImportError:
        raise Skip("NVML's Python bindings are not installed (pip install nvidia-ml-py)") from None
    try:
        pynvml.nvmlInit()  # counts; a second time is nothing
    except pynvml.NVMLError as error:
        raise Skip(f"NVML does not start: {error}") from None
    return pynvml


def _scaled(value: Any, factor: float) -> float | None:
    return None if value is None else round(value * factor, 1)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
