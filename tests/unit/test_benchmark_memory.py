"""Benchmarks of memory policies and of speed switches: short runs, and the tables of what they write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NIGHTLY, REPOSITORY, nightly
from launching import run
from torch import nn

from benchmarks import memory, switch_list, switches
from benchmarks.memory import Taken, measure_peak
from benchmarks.rounds import MOST_FOREIGN_CORES, Timing, compare
from benchmarks.switch_list import Switch, Workload, as_text

MIB = 2**20


def _cells(table: str) -> list[list[str]]:
    """Returns the rows of a Markdown table below its head; all have the same number of cells."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


@nightly
def test_the_memory_benchmark_measures_every_policy_of_every_model(tmp_path: Path) -> None:
    file = tmp_path / "results" / "memory.json"
    policies = [policy for policy in memory.DEFAULT_POLICIES if policy != "auto-50"]  # what so small a model cannot
    command = [sys.executable, "-m", "benchmarks.memory", "--tiny", "--json", str(file), "--policies", *policies]
    ended = run(command, REPOSITORY)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(file.read_text())
    expected = [(model, policy) for model in memory.TINY_MODELS for policy in policies]
    assert [(entry["model"], entry["policy"]) for entry in result["entries"]] == expected
    by_policy = {entry["policy"]: entry for entry in result["entries"]}
    for entry in result["entries"]:
        assert entry["problem"] is None
        assert entry["peak_bytes"] > 0
        assert entry["seconds"]["median"] > 0
        assert len(entry["rounds"]) == 1
    assert by_policy["none"]["memory_ratio"] == by_policy["none"]["time_ratio"]["median"] == 1
    assert by_policy["full"]["peak_bytes"] < by_policy["every_2"]["peak_bytes"] < by_policy["none"]["peak_bytes"]
    assert by_policy["every_2"]["num_blocks"] == {"full": 2, "none": 2}
    assert {"torch", "torchvision", "accelerate"} == set(result["environment"]["packages"])
    assert [row[:2] for row in _cells(ended.stdout)] == [[model, f"`{policy}`"] for model, policy in expected]
    assert memory.table(result) == ended.stdout


@nightly
def test_the_switches_benchmark_measures_every_switch_or_says_why_not(tmp_path: Path) -> None:
    """Those of each kind; with LOCKSTEP_NIGHTLY=1 all of them."""
    file = tmp_path / "switches.json"
    only = ("",) if NIGHTLY else ("model.compile", "clip_grad_norm_", "backends", "parallel.static_graph")
    command = [sys.executable, "-m", "benchmarks.switches", "--tiny", "--json", str(file), "--only", *only]
    ended = run(command, REPOSITORY)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(file.read_text())
    chosen = [s for s in switch_list.switches("cpu", tiny=True) if s.path.startswith(only)]
    expected = [(s.path, as_text(value)) for s in chosen for value in s.values]
    assert [(entry["switch"], entry["value"]) for entry in result["entries"]] == expected
    left_out = {entry["switch"] for entry in result["entries"] if entry["is_left_out"]}
    assert left_out == {"model.compile_mode", "backends.cudnn_tf32", "backends.cudnn_benchmark"}
    for entry in result["entries"]:
        if entry["is_left_out"]:
            assert entry["problem"] == "needs an NVIDIA GPU"
            assert entry["seconds"] is None
        else:
            assert entry["problem"] is None
            assert entry["first_seconds"] > 0
            assert entry["time_ratio"]["median"] > 0
            assert (entry["time_ratio"]["median"] == 1) == (entry["value"] == entry["compared_with"])
    assert [row[:2] for row in _cells(ended.stdout)] == [[f"`{switch}`", f"`{value}`"] for switch, value in expected]
    assert switches.table(result) == ended.stdout


def test_all_switches_are_settings_with_these_values() -> None:
    from trainer.config_devices import BackendsConfig, ParallelConfig
    from trainer.config_model import ModelConfig, OptimConfig

    sections: dict[str, Any] = {
        "model": ModelConfig,
        "optim": OptimConfig,
        "backends": BackendsConfig,
        "parallel": ParallelConfig,
    }
    given: dict[str, dict[str, Any]] = {"model": {"name": "resnet18"}, "optim": {"name": "adamw", "lr": 0.1}}
    for device_type in ("cpu", "cuda"):
        for switch in switch_list.switches(device_type, tiny=False):
            for value in switch.values:
                if switch.section in sections:
                    values = {**given.get(switch.section, {}), **switch.fixed, switch.key: value}
                    assert getattr(sections[switch.section].model_validate(values), switch.key) == value


def test_switches_of_several_gpus_are_left_out_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    reasons = {s.path: s.lacks for s in switch_list.switches("cuda", tiny=False)}
    assert reasons["parallel.bucket_mb"] == "needs 2 GPUs"
    assert reasons["backends.cudnn_benchmark"] is None


def test_peaks_are_measured_above_what_was_there() -> None:
    there_before = torch.ones(MIB)
    kept: list[torch.Tensor] = []

    def allocate() -> None:
        first = there_before + 1  # 4 MiB
        second = first + 1  # 8 MiB
        del first
        kept.append(second + 1)  # 8 MiB
        del second
        kept.append(there_before[: MIB // 4] + 1)  # 5 MiB

    assert 8 * MIB <= measure_peak(allocate, torch.device("cpu")) < 8.1 * MIB


def test_copies_share_parameters_and_gradients_but_not_buffers() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)))
    copied = memory._checkpointed(model, {"0": "full"})
    copied(torch.randn(3, 4)).sum().backward()
    own, others = dict(model.named_buffers()), dict(copied.named_buffers())
    assert own["0.1.num_batches_tracked"] == 0
    assert others["0.1.num_batches_tracked"] == 1
    assert all(a is b for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    assert all(p.grad is not None for p in model[0].parameters())


def test_times_are_compared_within_quiet_rounds() -> None:
    loaded = MOST_FOREIGN_CORES + 0.1
    yardstick = [Timing(1.0, 1, 0.0), Timing(2.0, 1, 0.0), Timing(1.0, 1, loaded)]
    taken = [Timing(2.0, 1, 0.0), Timing(9.0, 1, loaded), Timing(3.0, 1, 0.0)]
    compared = compare(taken, yardstick, keep_loaded=False)
    assert compared["seconds"] == {"median": 2.5, "min": 2.0, "max": 3.0}
    assert compared["time_ratio"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert compared["dropped_rounds"] == 1
    assert compare(taken, yardstick, keep_loaded=True)["time_ratio"] == {"median": 3.0, "min": 2.0, "max": 4.5}
    assert compare([], yardstick, keep_loaded=False)["time_ratio"] is None


def _environment() -> dict[str, Any]:
    packages = {"torch": "2.15.0"}
    environment = {"cpu": "Chip", "cores": 2, "python": "3.11", "date": "2026-11-24T01:02:03", "commit": "a" * 40}
    environment["command"] = "python -m benchmarks.memory"
    return {**environment, "packages": packages, "gpu": None, "cuda": None}


def _result() -> dict[str, Any]:
    quiet, loaded = Timing(1.5, 1, 0.0), Timing(1.5, 1, 1.0)
    taken = {
        "none": Taken(200 * MIB, {"a": "none"}, [Timing(1.0, 1, 0.0)]),
        "full": Taken(50 * MIB, {"a": "full"}, [quiet]),
        "selective": Taken(80 * MIB, {"a": "selective"}, [loaded]),
        "auto": Taken(problem="nothing fits"),
    }
    entries = memory.summarize("resnet18", taken, keep_loaded=False)
    settings = {"batch_size": 8, "image_size": 224, "precision": "float32", "num_threads": 2, "rounds": 1}
    settings |= {"num_runs": 1, "keep_loaded": False}
    result: dict[str, Any] = {"environment": _environment(), "settings": settings, "entries": entries}
    return json.loads(json.dumps(result))


def test_the_memory_table_shows_what_failed_and_what_was_not_quiet() -> None:
    result = _result()
    rows = {row[1]: row[3:] for row in _cells(memory.table(result))}
    assert rows["`full`"] == ["1 full", "50", "0.25", "1500", "1500 to 1500", "1.50", "1.50 to 1.50"]
    assert rows["`selective`"] == ["1 selective", "80", "0.40", "-", "no quiet round", "", ""]
    assert rows["`auto`"] == ["", "-", "", "-", "nothing fits", "", ""]
    assert "1 of 3 dropped for other load" in memory.table(result)


def test_the_plot_is_the_same_file_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    memory.plot(_result(), tmp_path / "one.svg")
    memory.plot(_result(), tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_the_yardsticks_of_a_budget_are_measured_too() -> None:
    assert memory._chosen(["auto-50"]) == ("none", "auto-50")
    assert memory._chosen(["auto"]) == ("none", "full", "auto")


def test_a_value_that_fails_leaves_the_others_in() -> None:
    workload = Workload("small_cnn", "small_cnn", {"in_channels": 3}, batch_size=2, image_size=16)
    switch = Switch("optim.implementation", ("for_loop", "slow"), workload, "step of adamw")
    setup = switches.Setup("cpu", 1, 1, 1, torch.get_num_threads(), 0, tiny=True)
    taken = switches.measure(switch, setup)
    assert taken["for_loop"].problem is None
    assert "slow" in (taken["slow"].problem or "")
    failed = switches.summarize(switch, taken, keep_loaded=True)[1]
    assert failed["seconds"] is failed["time_ratio"] is None
    assert not failed["is_left_out"]
