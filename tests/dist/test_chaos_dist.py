"""`python -m launch chaos`: a job that is broken again and again ends the same, and one that does not is found out."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteConfig, nightly
from launching import Job, alive, run
from run_results import records, summary

from trainer.faults.plan import read_notes, starts_file

pytestmark = pytest.mark.alone

CHAOS = [sys.executable, "-m", "launch", "chaos", "--processes", "2", "--hang-timeout", "4"]
SEED = "1730"  # with which a rank is killed, and then a checkpoint damaged
TIMEOUT = 500
NORMED = {"name": "vectors_model:Normed", "args": {"dropout": 0.2}}


def config(write_config: WriteConfig, **changes: Any) -> Path:
    return write_config(
        **{
            "data__train__args__length": 600,
            "data__workers": 1,
            "model": NORMED,
            "optim": {"name": "adamw", "lr": 0.01, "ema": {"decay": 0.9}},
            "train": {"steps": 100_000, "batch_size": 12, "micro_batch_size": 3},
            "eval": {"every": 50},
            "checkpoint__every": 20,
            **changes,
        }
    )


@nightly
@pytest.mark.timeout(600)
def test_a_job_under_faults_ends_as_in_peace(write_config: WriteConfig, tmp_path: Path) -> None:
    folder, file = tmp_path / "chaos", tmp_path / "report.json"
    options = ["--minutes", "0.4", "--every", "4", "--seed", SEED, "--folder", str(folder), "--json", str(file)]
    done = run([*CHAOS, "--config", str(config(write_config)), *options], tmp_path, TIMEOUT, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert report == json.loads((folder / "report.json").read_text())
    assert (report["same"], report["differences"], report["problem"]) == (True, [], None)
    faults = report["faults"]
    assert faults, done.stderr
    last = read_notes(starts_file(folder / "plan.json"))[-1]["time"]
    for fault in faults:
        assert (fault["back_after"] is None) == (fault["action"] == "delay" or fault["time"] > last), fault
    for action, sums in report["by_action"].items():
        assert sums["count"] == sum(fault["action"] == action for fault in faults)
        assert action in done.stdout
    for name in ("chaos", "quiet"):
        assert summary(folder / name)["step"] == report["step"]
        assert records(folder / name)[-1]["step"] == report["step"]
    assert report["runs"]["quiet"]["num_attempts"] == 1
    assert report["runs"]["chaos"]["num_attempts"] >= 2
    assert f"step {report['step']} is the same as in peace, bit for bit" in done.stdout
    assert not (tmp_path / "run").exists()  # the user's own


@nightly
@pytest.mark.timeout(600)
def test_a_job_that_does_not_repeat_itself_is_found_out(write_config: WriteConfig, tmp_path: Path) -> None:
    data = {"name": "fickle:Fickle", "args": {"length": 600}}
    options = ["--minutes", "0.02", "--every", "600", "--folder", "chaos"]
    file = config(write_config, data__train=data)
    done = run([*CHAOS, "--config", str(file), *options], tmp_path, TIMEOUT, OMP_NUM_THREADS="1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "is NOT the same as in peace:\n  " in done.stdout
    report = json.loads((tmp_path / "chaos" / "report.json").read_text())
    assert (report["same"], report["faults"], report["problem"]) == (False, [], None)
    for start in ("tensor model.", "tensor optimizer.", "loss of step 1: "):
        assert any(difference.startswith(start) for difference in report["differences"]), start


@nightly
@pytest.mark.timeout(600)
def test_a_job_that_comes_to_its_own_end(write_config: WriteConfig, tmp_path: Path) -> None:
    file = config(write_config, train={"steps": 50, "batch_size": 12})
    command = [*CHAOS, "--processes", "1", "--config", str(file), "--every", "600", "run.name=short"]
    done = run(command, tmp_path, TIMEOUT, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "runs" / "short-chaos" / "report.json").read_text())
    assert (report["same"], report["step"], report["processes"]) == (True, 50, 1)
    assert [told["status"] for told in report["runs"].values()] == ["finished", "finished"]


def test_ctrl_c_leaves_nothing_behind(write_config: WriteConfig, tmp_path: Path) -> None:
    job = Job([*CHAOS, "--config", str(config(write_config))], tmp_path, OMP_NUM_THREADS="1")
    job.wait_for(lambda said: "training begins" in said)
    family = job.family()
    assert len(family) >= 3
    job.signal(signal.SIGINT, group=True)
    assert job.end() == 1
    assert job.output().endswith("interrupted\n")
    assert alive(family) == []


@nightly
def test_what_the_ranks_cannot_use_is_a_usage_error(write_config: WriteConfig, tmp_path: Path) -> None:
    file = config(write_config, data__train__name="vectors:refuses")
    done = run([*CHAOS, "--config", str(file)], tmp_path, TIMEOUT, OMP_NUM_THREADS="1")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "no comparison: " in done.stdout
    assert "these do not go together" in done.stdout
