"""The checkpoint benchmark and the soak: their parts work, and the soak would notice a difference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY, Train, WriteConfig
from launching import environment

from benchmarks import soak
from trainer.checkpoint.storage import LocalStorage


def test_the_benchmark_measures_every_method(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--model", "mobilenet_v3_small", "--rounds", "1"]
    command += ["--step-seconds", "0.1", "--folder", str(tmp_path / "files"), "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["seconds"]) == {
        "lockstep, bare",
        "lockstep, overlapped",
        "torch.save",
        "torch.save and fsync",
        "accelerator.save_state",
        "DCP async_save",
    }
    assert all(0 < cost["stall"] <= cost["total"] for cost in found["seconds"].values())
    assert found["bytes"] > 20e6
    assert not (tmp_path / "files").exists()


def test_the_soak_finds_what_is_different(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        file = write_config(f"{name}.yaml", run__dir=str(tmp_path / name), run__seed=seed)
        assert train("--config", file).code == 0
    assert soak.differences(tmp_path / "a", tmp_path / "b") == []
    told = soak.differences(tmp_path / "c", tmp_path / "a")
    assert "loss of step 1" in told
    assert "model.layers.1.weight" in told
    LocalStorage(tmp_path / "b" / "checkpoints").remove("step-00000010")
    assert soak.differences(tmp_path / "b", tmp_path / "a") == ["step 5 instead of 10"]


def test_the_soaks_config_is_a_good_one(tmp_path: Path, train: Train) -> None:
    file = soak._write(tmp_path / "run", steps=2, checkpoint_every=1)
    assert train("--config", file).code == 0
    assert soak.last_step(tmp_path / "run") == 2
