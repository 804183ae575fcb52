"""Killed in every phase of a save: a good checkpoint is there, and the run goes on as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Train, WriteConfig, nightly, tiny_config
from killing_saves import PHASES
from resuming import TrainServer, assert_same_end

from trainer.checkpoint.folder import open_folder
from trainer.config import load_config

# Every phase once, with an earlier checkpoint to go back to; and some in the first save of all.
CASES = [*((phase, 2) for phase in PHASES if phase != "before the file"), ("in a file", 1), ("before the rename", 1)]
# Where a kill leaves most behind: a file half written, an old checkpoint half removed, and no checkpoint yet.
IN_CI = [("in a file", 2), ("while removing", 2), ("in a file", 1)]


def changes(run: Path, **others: Any) -> dict[str, Any]:
    return {
        "run__dir": str(run),
        "model": {"name": "vectors_model:Normed", "args": {"dropout": 0.2}},
        "train": {"steps": 12, "batch_size": 12},
        "eval": {"every": 2},
        "checkpoint": {"every": 2, "keep": 1},
        **others,
    }


@pytest.fixture(scope="module")
def train(server: TrainServer) -> Train:
    """Runs `train.py` in a process that may be killed."""
    return server.train


@pytest.fixture(scope="module")
def quiet(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("quiet")
    (folder / "quiet.yaml").write_text(yaml.safe_dump(tiny_config(folder, **changes(folder / "run"))))
    assert train("--config", folder / "quiet.yaml").code == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("phase", "time"), [pytest.param(*case, marks=[nightly] * (case not in IN_CI)) for case in CASES]
)
def test_killed_in_every_phase(
    phase: str, time: int, quiet: Path, train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    killing = {"length": 60, "phase": phase, "time": time, "folder": str(tmp_path)}
    file = write_config(**changes(run, data__train={"name": "killing_saves:Killing", "args": killing}))
    died = train("--config", file)
    assert died.code == -signal.SIGKILL, died
    folder = open_folder(load_config(str(file)))
    if time > 1:
        assert folder.newest().step > 0
    else:
        assert folder.steps() == []
    code, out, err = train("--config", file)
    assert (code, err) == (0, "")
    assert ("continuing from step" in out) == (time > 1)
    assert_same_end(run, quiet)
