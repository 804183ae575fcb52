"""NVIDIA's driver, asked about GPUs through NVML's Python bindings (`nvidia-ml-py`), which need no CUDA.

Owns reaching it, and that what a card does not tell is None, which is not the same as zero: older cards, virtual ones
and a user's rights leave many questions open. Which questions are put is the business of whoever asks.
"""

from __future__ import annotations

from typing import Any

import torch


class NoNvml(Exception):
    """NVML, or a GPU in it, cannot be reached; says why."""


class Gpu:
    """A GPU of this machine, as NVML knows it.

    Args:
        nvml: the bindings.
        handle: NVML's own.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    def ask(self, question: str, *arguments: Any) -> Any:
        """Returns what one of NVML's functions says of this GPU; None where it says nothing.

        Args:
            question: the function's name after `nvmlDeviceGet`.
            arguments: after the GPU; text is the name of one of NVML's constants, after `NVML_`.
        """
        constants = [getattr(self._nvml, f"NVML_{a}") if isinstance(a, str) else a for a in arguments]
        try:
            return getattr(self._nvml, f"nvmlDeviceGet{question}")(self._handle, *constants)
        except self._nvml.NVMLError:  # not supported by this card, or not for this user
            return None

    def watts(self) -> float | None:
        """Returns the power that it takes now."""
        milliwatts = self.ask("PowerUsage")
        return None if milliwatts is None else milliwatts / 1000

    def celsius(self) -> int | None:
        """Returns its temperature."""
        return self.ask("Temperature", "TEMPERATURE_GPU")


def bindings() -> Any:
    """Returns NVML's bindings, started.

    Raises:
        NoNvml: they are not installed, or there is no driver.
    """
    try:
        import pynvml
    except ImportError:
        raise NoNvml("NVML's Python bindings are not installed (pip install nvidia-ml-py)") from None
    try:
        pynvml.nvmlInit()  # counts; a second time is nothing
    except pynvml.NVMLError as error:
        raise NoNvml(f"NVML does not start: {error}") from None
    return pynvml


def all_gpus() -> list[Gpu]:
    """Returns the GPUs of this machine, whichever of them this job may use.

    Raises:
        NoNvml: they cannot be reached.
    """
    nvml = bindings()
    try:
        return [Gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        raise NoNvml(f"NVML does not list the GPUs: {error}") from None


def gpu_of(device: torch.device) -> Gpu:
    """Returns the GPU that torch calls `device`; NVML may have another number for it.

    Raises:
        NoNvml: it cannot be reached.
    """
    nvml = bindings()
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    name = uuid if uuid[3:4] == "-" else f"GPU-{uuid}"  # a part of one is called MIG-...
    try:
        return Gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(name.encode()))
    except nvml.NVMLError as error:
        raise NoNvml(f"NVML does not know this GPU: {error}") from None
