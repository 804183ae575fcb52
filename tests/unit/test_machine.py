"""What a machine tells of itself, and how several ranks' figures become one."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from trainer.telemetry.machine import Machine
from trainer.telemetry.memory import MemoryUse, own_memory_bytes
from trainer.telemetry.observer import Observation, Observer, rank_record


def observed(rank: int, local_rank: int, machine: dict[str, float] | None, **seconds: float) -> Observation:
    parts = dict.fromkeys(("data_wait", "h2d", "forward", "backward", "communication", "optimizer"), 0.0)
    parts |= dict.fromkeys(("checkpoint", "evaluation", "host"), 0.0) | seconds
    return Observation(
        f"node{rank // 2}", local_rank, parts, None, 0.1 * rank, MemoryUse(rank, None, 2**30), None, 0, machine
    )


def observer() -> Observer:
    import torch

    from trainer.telemetry.stopwatch import Stopwatch

    runtime: Any = types.SimpleNamespace(device=torch.device("cpu"), rank=1, local_rank=1)
    return Observer(runtime, types.SimpleNamespace(copy_wait_seconds=0.0), Stopwatch(runtime.device))  # type: ignore[arg-type]


def test_figures_of_two_machines_with_two_ranks_each() -> None:
    seen = [
        observed(0, 0, {"cpu_percent": 10.0}, forward=3.0, communication=1.0),
        observed(1, 1, None, forward=2.0, communication=2.0),
        observed(2, 0, {"cpu_percent": 30.0}, forward=4.0),
        observed(3, 1, None, forward=1.0, communication=1.0, data_wait=2.0),
    ]
    watching = observer()
    figures = watching.figures(seen)
    assert figures["system/0/cpu_percent"] == 10
    assert figures["system/1/cpu_percent"] == 30
    assert figures["time/communication"] == pytest.approx((1 / 4 + 2 / 4 + 0 + 1 / 4) / 4)
    assert figures["time/data_wait"] == pytest.approx(2 / 4 / 4)
    assert figures["memory/peak_gib"] == 1
    assert "memory/reserved_gib" not in figures
    split = watching.time_split(to_the_end=False)
    assert split is not None
    assert split["forward"] == pytest.approx(10 / 16)
    record = rank_record(seen)
    assert record["hosts"] == ["node0", "node0", "node1", "node1"]
    assert record["communication"] == [0.25, 0.5, 0, 0.25]


def test_machines_of_the_same_name_are_two() -> None:
    seen = [observed(0, 0, {"cpu_percent": 10.0}), observed(1, 0, {"cpu_percent": 30.0})]  # both are called node0
    figures = observer().figures(seen)
    assert (figures["system/0/cpu_percent"], figures["system/1/cpu_percent"]) == (10, 30)


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("trainer.telemetry.machine.time.monotonic", lambda: now)
    machine = Machine()
    assert machine.sample() is None  # nothing is known yet
    now = 1.0
    figures = machine.sample()
    assert figures is not None
    assert set(figures) >= {"cpu_percent", "memory_percent", "sent_mib_per_second", "received_mib_per_second"}
    now = 9.0
    assert machine.sample() is None
    now = 11.0
    assert machine.sample() is not None


def test_gpus_tell_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML itself needs a driver; this stands in for its bindings."""

    class NVMLError(Exception):
        pass

    def refuses(*_: Any) -> Any:
        raise NVMLError("not supported")

    nvml: Any = types.ModuleType("pynvml")
    nvml.NVMLError, nvml.nvmlInit, nvml.nvmlDeviceGetCount = NVMLError, lambda: None, lambda: 2
    nvml.nvmlDeviceGetHandleByIndex, nvml.NVML_TEMPERATURE_GPU = lambda index: index, 0
    nvml.nvmlDeviceGetUtilizationRates = lambda handle: types.SimpleNamespace(gpu=50 + handle)
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(used=20, total=80)
    nvml.nvmlDeviceGetPowerUsage = lambda handle: 123_400
    nvml.nvmlDeviceGetTemperature = refuses
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    now = 0.0
    monkeypatch.setattr("trainer.telemetry.machine.time.monotonic", lambda: now)
    machine = Machine()
    now = 1.0
    figures = machine.sample()
    assert figures is not None
    of_gpus = {name: value for name, value in figures.items() if name.startswith("gpu")}
    assert of_gpus == {
        "gpu0_percent": 50,
        "gpu0_memory_percent": 25,
        "gpu0_power_w": pytest.approx(123.4),
        "gpu1_percent": 51,
        "gpu1_memory_percent": 25,
        "gpu1_power_w": pytest.approx(123.4),
    }


def test_memory_of_another_process() -> None:
    import os

    assert (own_memory_bytes(os.getpid()) or 0) > 2**20
    assert own_memory_bytes(2**22 + 1) is None
