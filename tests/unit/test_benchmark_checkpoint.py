"""The benchmarks of checkpoints and the soak: their parts work, and the soak would notice a difference."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, Train, WriteConfig, nightly
from launching import run

from benchmarks import checkpoint, restore, soak
from benchmarks.checkpoint_methods import Cost, Job
from benchmarks.rounds import MOST_FOREIGN_CORES, Timing
from trainer.checkpoint.storage import LocalStorage


@nightly
def test_the_benchmark_measures_every_method(tmp_path: Path) -> None:
    file = tmp_path / "results" / "checkpoint.json"
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--tiny", "--folder", str(tmp_path / "saves")]
    ended = run([*command, "--json", str(file)], REPOSITORY)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(file.read_text())
    assert [entry["name"] for entry in result["entries"]] == list(checkpoint.NAMES)
    for entry in result["entries"]:
        assert 0 < entry["stall"]["median"] <= entry["total"]["median"]
        assert (entry["warm_up"] is None) == entry["name"].startswith("lockstep")
    assert result["reads_back"]
    assert result["bytes"] > 10e6
    assert all(bar["ratio"] > 0 for bar in result["bars"])
    assert checkpoint.table(result) == ended.stdout
    assert not (tmp_path / "saves").exists()


@nightly
def test_the_benchmark_of_restoring_measures_every_way(tmp_path: Path) -> None:
    file = tmp_path / "restore.json"
    command = [sys.executable, "-m", "benchmarks.restore", "--tiny", "--folder", str(tmp_path / "saves")]
    ended = run([*command, "--json", str(file)], REPOSITORY)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(file.read_text())
    assert [(e["name"], e["where"]) for e in result["entries"]] == list(
        product(restore.NAMES, (restore.COLD, restore.CACHED))
    )
    assert all(entry["seconds"]["median"] > 0 for entry in result["entries"])
    assert restore.table(result) == ended.stdout
    assert not (tmp_path / "saves").exists()


def test_restores_are_compared_with_torch_load_of_the_same_round_and_place() -> None:
    seconds = {name: 1.0 + number for number, name in enumerate(restore.NAMES)}
    taken = {
        (name, where): [Timing(times * seconds[name] * slow, 1.0, 0.0) for slow in (1, 10)]
        for name in restore.NAMES
        for where, times in ((restore.COLD, 1.0), (restore.CACHED, 0.5))
    }
    for entry in restore.summarize(taken, keep_loaded=False):
        assert entry["time_ratio"]["min"] == entry["time_ratio"]["max"] == seconds[entry["name"]] / 3


def test_a_restore_of_other_values_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "save_state", lambda *_: None)
    monkeypatch.setattr(restore, "plain_dcp", lambda *_: None)
    restores = restore.Restores(Job("squeezenet1_1", torch.device("cpu")), "squeezenet1_1", tmp_path / "saves")
    for name in ("lockstep", restore.TORCH_LOAD):
        assert restores.measure(name, restore.COLD).seconds > 0
    with torch.no_grad():
        next(restores.source.model.parameters()).add_(1)
    for name in ("lockstep", restore.TORCH_LOAD):
        with pytest.raises(RuntimeError, match=f"{name} does not put back what was saved"):
            restores.measure(name, restore.CACHED)


def _entry(name: str, stall: float | None, total: float) -> dict[str, Any]:
    spread = {"median": total, "min": total, "max": total}
    return {"name": name, "stall": stall and {"median": stall}, "total": spread}


def test_bars_are_ratios_of_medians() -> None:
    entries = [_entry(checkpoint.BARE, 0.5, 12.0), _entry(checkpoint.OVERLAPPED, None, 12.0)]
    entries += [_entry(checkpoint.TORCH_SAVE, 4.0, 4.0), _entry(checkpoint.DCP, 1.0, 10.0)]
    bare, overlapped, total = checkpoint.compare(entries)
    assert (bare["ratio"], bare["is_met"]) == (0.125, False)
    assert (overlapped["ratio"], overlapped["is_met"]) == (None, False)
    assert (total["ratio"], total["is_met"]) == (1.2, True)


def test_loaded_saves_are_dropped() -> None:
    rounds = checkpoint.Rounds.__new__(checkpoint.Rounds)
    rounds.costs = {"ours": [Cost(1, 2, 0.0), Cost(9, 9, MOST_FOREIGN_CORES + 0.1)]}
    rounds.warm_ups = {}
    (entry,) = checkpoint.summarize(rounds, keep_loaded=False)
    assert (entry["stall"]["median"], entry["dropped_rounds"]) == (1, 1)
    (entry,) = checkpoint.summarize(rounds, keep_loaded=True)
    assert (entry["stall"]["median"], entry["dropped_rounds"]) == (5, 0)


def test_the_soak_finds_what_is_different(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        file = write_config(f"{name}.yaml", run__dir=str(tmp_path / name), run__seed=seed)
        assert train("--config", file).code == 0
    assert soak.differences(tmp_path / "a", tmp_path / "b") == []
    told = soak.differences(tmp_path / "c", tmp_path / "a")
    assert any(difference.startswith("loss of step 1: ") for difference in told)
    assert "tensor model.layers.1.weight" in told
    LocalStorage(tmp_path / "b" / "checkpoints").remove("step-00000010")
    assert soak.differences(tmp_path / "b", tmp_path / "a") == ["step 5 instead of 10"]


def test_the_soaks_config_is_a_good_one(tmp_path: Path, train: Train) -> None:
    file = soak._write(tmp_path / "run", steps=2, checkpoint_every=1)
    assert train("--config", file).code == 0
    assert soak.last_step(tmp_path / "run") == 2
