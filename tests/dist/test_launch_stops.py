"""Runs of several processes that are stopped, by Ctrl-C, by a signal and by an error, through the real launcher."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import WriteConfig, nightly
from launching import Job, alive, local
from run_results import losses, summary, weights

pytestmark = pytest.mark.alone

LAUNCH = [sys.executable, "-m", "launch", "local"]


def long_config(write_config: WriteConfig, **changes: Any) -> Path:
    """A run of many slow enough steps, checkpointed only when it stops."""
    every = {"every": "9999 epochs"}
    return write_config(
        **{
            "data__train__args__length": 4800,
            "train": {"epochs": 50, "batch_size": 12},
            "eval": every,
            "checkpoint": every,
            "log": {"every": 20},
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("processes", "number", "to_group", "workers"),
    [
        pytest.param(1, signal.SIGINT, True, 2, marks=nightly),
        (2, signal.SIGINT, True, 2),  # Ctrl-C in a terminal
    ],
)
def test_stopping_leaves_a_checkpoint_and_no_process(
    processes: int, number: signal.Signals, to_group: bool, workers: int, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = long_config(write_config, data__workers=workers)
    job = Job([*LAUNCH, "--config", str(config), "--processes", str(processes)], tmp_path)
    job.wait_for(lambda output: "step 40/" in output)
    family = job.family()
    assert len(family) >= (processes if processes > 1 else 0) + processes * workers
    job.signal(number, group=to_group)
    assert job.end() == 75, job.output()
    assert alive(family) == []
    assert "Traceback" not in job.output()
    found = summary(tmp_path / "run")
    assert found["status"] == "stopped"
    assert (tmp_path / "run" / "checkpoints" / f"step-{found['step']:08d}").is_dir()


def test_two_ctrl_c_end_at_once_and_leave_no_process(write_config: WriteConfig, tmp_path: Path) -> None:
    config = long_config(write_config, data__train={"name": "slow:Sleepy", "args": {"length": 4800, "after": 200}})
    job = Job([*LAUNCH, "--config", str(config), "--processes", "2"], tmp_path)
    job.wait_for(lambda output: (tmp_path / "asleep").exists())
    family = job.family()
    job.signal(signal.SIGINT)
    time.sleep(3)
    assert job.process.poll() is None  # it waits for a step that does not end
    job.signal(signal.SIGINT)
    assert job.end() == 1
    assert alive(family) == []


@nightly
def test_a_second_ctrl_c_ends_one_process_at_once(write_config: WriteConfig, tmp_path: Path) -> None:
    config = long_config(write_config, data__train={"name": "slow:Sleepy", "args": {"length": 4800, "after": 200}})
    job = Job([*LAUNCH, "--config", str(config), "--processes", "1"], tmp_path)
    job.wait_for(lambda output: (tmp_path / "asleep").exists())
    job.signal(signal.SIGINT)
    job.signal(signal.SIGINT)  # the same request, delivered twice
    time.sleep(1.5)
    assert job.process.poll() is None
    job.signal(signal.SIGINT)
    assert job.end() == 1


def test_workers_of_a_failed_job_do_not_outlive_it(write_config: WriteConfig, tmp_path: Path) -> None:
    data = {"name": "slow:BuggyWhileOthersSleep", "args": {"length": 40}}
    config = write_config(data__eval=data, data__workers=2, eval={"batch_size": 1})
    job = Job([*LAUNCH, "--config", str(config), "--processes", "2"], tmp_path)
    family: dict[int, psutil.Process] = {}
    while job.process.poll() is None:
        family.update({p.pid: p for p in job.family()})
        time.sleep(0.05)
    assert job.end() == 1
    assert "a bug of the user's" in job.output()
    assert len(family) >= 2 + 2 * 2
    assert alive(list(family.values()), within=3) == []


@nightly  # as the stops of test_faults_dist.py
def test_interrupted_on_two_ranks_equals_uninterrupted(write_config: WriteConfig, tmp_path: Path) -> None:
    """SIGTERM in mid-epoch, then the same command again: bit for bit the same, with workers, dropout, BatchNorm."""
    changes = {
        "data__train__args__length": 600,
        "data__workers": 1,
        "train": {"epochs": 3, "batch_size": 12},
        "log": {"every": 1},
        "schedule": {"name": "cosine"},
        "model": {"name": "vectors_model:Normed", "args": {"dropout": 0.2}},
    }
    whole = write_config("whole.yaml", run__dir=str(tmp_path / "whole"), **changes)
    assert local(whole, 2).returncode == 0
    config = write_config(**changes)
    job = Job([*LAUNCH, "--config", str(config), "--processes", "2"], tmp_path)
    job.wait_for(lambda output: "step 33/" in output)
    job.signal(signal.SIGTERM)
    assert job.end() == 75, job.output()
    stopped = summary(tmp_path / "run")["step"]
    assert 33 <= stopped < 150
    assert stopped % 50  # within an epoch
    done = local(config, 2)
    assert done.returncode == 0, done.stderr
    assert f"continuing from step {stopped}" in done.stdout
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "run", 150), weights(tmp_path / "whole", 150)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
