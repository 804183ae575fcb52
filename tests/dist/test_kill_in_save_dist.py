"""Two ranks, killed in a save or with a damaged checkpoint: they go on together, as if undisturbed."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Outcome, WriteConfig, nightly, tiny_config
from resuming import TrainServer, assert_same_end

from trainer.checkpoint.folder import open_folder
from trainer.config import load_config

TrainOnTwo = Callable[[Path], Outcome]


def changes(run: Path, **others: Any) -> dict[str, Any]:
    return {
        "run__dir": str(run),
        "model": {"name": "vectors_model:Normed", "args": {"dropout": 0.2}},
        "train": {"steps": 12, "batch_size": 12},
        "eval": {"every": 2},
        "checkpoint": {"every": 2, "keep_every": 2},
        **others,
    }


@pytest.fixture(scope="module")
def train(server: TrainServer) -> TrainOnTwo:
    """Runs `train.py` on two ranks."""
    return lambda file: server.train("--config", file, ranks=2)


@pytest.fixture(scope="module")
def quiet(train: TrainOnTwo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs, with all of its checkpoints."""
    folder = tmp_path_factory.mktemp("quiet")
    file = folder / "quiet.yaml"
    file.write_text(yaml.safe_dump(tiny_config(folder, **changes(folder / "run"))))
    done = train(file)
    assert done.code == 0, done
    return folder / "run"


@pytest.mark.parametrize(
    ("phase", "rank", "everybody"),
    [
        ("before the file", 1, False),  # rank 0 has written its own, or is about to
        pytest.param("after the file", 0, False, marks=nightly),
        ("before the rename", 0, True),
    ],
)
def test_killed_between_the_files_of_ranks(
    phase: str, rank: int, everybody: bool, quiet: Path, train: TrainOnTwo, write_config: WriteConfig, tmp_path: Path
) -> None:
    killing = {"phase": phase, "time": 2, "folder": str(tmp_path), "rank": rank, "everybody": everybody}
    data = {"name": "killing_saves:Killing", "args": {"length": 60, **killing}}
    file = write_config(**changes(tmp_path / "run", data__train=data))
    died = train(file)
    assert died.code == -signal.SIGKILL, died
    assert (tmp_path / "killed").exists()
    assert open_folder(load_config(str(file))).newest().step == 2
    done = train(file)
    assert done.code == 0, done
    assert "continuing from step 2" in done.out
    assert_same_end(tmp_path / "run", quiet)


def test_damage_that_one_rank_sees(quiet: Path, train: TrainOnTwo, write_config: WriteConfig, tmp_path: Path) -> None:
    """Each rank checks a part of the files. What one of them says is everybody's choice."""
    run = shutil.copytree(quiet, tmp_path / "run", symlinks=True)
    for step in (10, 12):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    file = run / "checkpoints" / "step-00000008" / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    done = train(write_config(**changes(run)))
    assert done.code == 0, done
    said = [line for line in (done.out + done.err).splitlines() if line.startswith("skipped")]
    assert len(said) == 1
    where = run / "checkpoints" / "damaged-step-00000008"
    reason = f"rank 1: {file.name} does not match its checksum"
    assert said[0] == f"skipped the checkpoint of step 8: {reason} (now {where})"
    assert re.search("continuing from step 6 ", done.out)
    assert_same_end(run, quiet, aside=[where.name])
