"""The checkpoint benchmark and the soak: their parts work, and the soak would notice a difference."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from conftest import REPOSITORY, Train, WriteConfig, nightly
from launching import run

from benchmarks import checkpoint, soak
from benchmarks.checkpoint_methods import Cost
from benchmarks.rounds import MOST_FOREIGN_CORES
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
