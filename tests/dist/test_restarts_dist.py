"""Jobs that start again by themselves, through the real launchers: after what, after what not, and what is said."""

from __future__ import annotations

import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, WriteConfig, nightly
from launching import Job, alive, local, run
from resuming import ranks_of
from run_results import summary

from trainer.faults.plan import VARIABLE, Event, write_plan

pytestmark = pytest.mark.alone

TRAIN = str(REPOSITORY / "train.py")
TORCHRUN = str(Path(sys.executable).parent / "torchrun")
KILLED = "was ended by SIGKILL; most likely the system was out of memory, or somebody killed it"
STEPS = 200


def restarting(write_config: WriteConfig, restarts: int, **changes: Any) -> Path:
    """A run of a few seconds that saves often, of ranks that start again so many times."""
    return write_config(
        **{
            "data__train": {"name": "slow:Steady", "args": {"length": 4800, "seconds": 0.001}},
            "train": {"steps": STEPS, "batch_size": 12},
            "eval": {"every": "9999 epochs"},
            "checkpoint": {"every": 10},
            "log": {"every": 10},
            "launch__max_restarts": restarts,
            **changes,
        }
    )


def launch(config: Path, processes: int) -> Job:
    arguments = ["--config", str(config), "--processes", str(processes)]
    return Job([sys.executable, "-m", "launch", "local", *arguments], config.parent, OMP_NUM_THREADS="1")


def rank(job: Job, number: int) -> psutil.Process:
    """Returns the process of a rank."""
    (found,) = [process for process in ranks_of(job) if process.environ()["RANK"] == str(number)]
    return found


def reached(step: int) -> str:
    return f"step {step}/{STEPS}"


def assert_went_on(job: Job, run: Path, times: int = 1) -> None:
    """Asserts that the job ended well, and that its ranks went on from a checkpoint so often."""
    assert job.output().count("continuing from step") == times, job.output()
    assert summary(run)["status"] == "finished"
    assert summary(run)["step"] == STEPS
    assert "Traceback" not in job.output()


@nightly  # tests/dist/test_faults_dist.py has one
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_rank_starts_the_job_again(processes: int, write_config: WriteConfig, tmp_path: Path) -> None:
    job = launch(restarting(write_config, 1), processes)
    job.wait_for(lambda output: reached(20) in output)
    family, killed = job.family(), time.monotonic()
    rank(job, processes - 1).kill()
    job.wait_for(lambda output: "restarting" in output)
    assert time.monotonic() - killed < 5
    assert alive(family, within=0) == []
    assert job.end() == 0, job.output()
    assert f"restarting (1 of 1): rank {processes - 1} {KILLED}" in job.output()
    assert_went_on(job, tmp_path / "run")
    assert summary(tmp_path / "run")["num_processes"] == processes


@nightly
def test_killed_more_often_than_it_may_start_again(write_config: WriteConfig, tmp_path: Path) -> None:
    job = launch(restarting(write_config, 1), 2)
    job.wait_for(lambda output: reached(20) in output)
    rank(job, 0).kill()
    job.wait_for(lambda output: "continuing from step" in output)
    job.wait_for(lambda output: reached(60) in output)
    family = job.family()
    rank(job, 1).kill()
    assert job.end() == 1
    assert f"restarting (1 of 1): rank 0 {KILLED}\n" in job.output()
    assert job.lines[-1] == f"error: rank 1 {KILLED}\n"
    assert alive(family, within=1) == []


@nightly
@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "launcher"),
        (signal.SIGUSR1, "launcher"),
        (signal.SIGUSR1, "rank 1"),
    ],
)
def test_a_stop_is_no_failure(number: signal.Signals, to: str, write_config: WriteConfig, tmp_path: Path) -> None:
    job = launch(restarting(write_config, 2, data__workers=1), 2)
    job.wait_for(lambda output: reached(20) in output)
    family = job.family()
    if to == "launcher":
        job.signal(number)
    else:
        rank(job, 1).send_signal(number)
    assert job.end() == 75, job.output()
    assert alive(family, within=1) == []
    assert "restarting" not in job.output()
    assert "Traceback" not in job.output()
    found = summary(tmp_path / "run")
    assert found["status"] == "stopped"
    assert (tmp_path / "run" / "checkpoints" / f"step-{found['step']:08d}").is_dir()


@nightly
def test_a_stop_while_it_starts_again(write_config: WriteConfig, tmp_path: Path) -> None:
    job = launch(restarting(write_config, 2), 2)
    job.wait_for(lambda output: reached(20) in output)
    rank(job, 1).kill()
    job.wait_for(lambda output: "restarting" in output)
    job.signal(signal.SIGTERM)
    assert job.end() == 75, job.output()
    assert job.output().count("restarting") == 1


def test_ranks_do_not_outlive_a_killed_launcher(write_config: WriteConfig, tmp_path: Path) -> None:
    job = launch(restarting(write_config, 2, data__workers=1), 2)
    job.wait_for(lambda output: reached(20) in output)
    family = job.family()
    job.signal(signal.SIGKILL)
    job.end()
    assert alive(family, within=30) == []


@nightly  # as `bad data` of test_faults_dist.py
def test_bad_input_is_not_tried_again(write_config: WriteConfig) -> None:
    config = restarting(write_config, 2, data__train={"name": "vectors:MissingFile", "args": {"length": 60}})
    done = local(config, 2)
    assert done.returncode == 2, done.stderr
    assert "restarting" not in done.stdout
    (problem,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert re.match(r"error: .*: data.train: .*'seven.npy'", problem)


@nightly  # as `NaN stops it` there
def test_what_starting_again_cannot_mend_is_not_tried_again(write_config: WriteConfig, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    write_plan(plan, tmp_path / "run", [Event("nan", rank=1, step=5)])
    done = local(restarting(write_config, 2), 2, **{VARIABLE: str(plan)})
    assert done.returncode == 1
    assert "restarting" not in done.stdout
    assert re.match(
        r"error: rank 1 on .*, step 5: the loss of rank 1 is nan.*; samples \d+", done.stderr.splitlines()[-1]
    ), done.stderr


@nightly
def test_torchrun_by_hand(write_config: WriteConfig, tmp_path: Path) -> None:
    """Its store outlives the ranks, and it starts again whatever does not end with 0, a stop included."""
    command = [TORCHRUN, "--max-restarts", "3", "--nproc-per-node", "2", TRAIN, "--config"]
    job = Job([*command, str(restarting(write_config, 0))], tmp_path, ACCELERATE_USE_CPU="true")
    job.wait_for(lambda output: reached(20) in output)
    rank(job, 1).kill()
    job.wait_for(lambda output: "continuing from step" in output)
    job.wait_for(lambda output: reached(60) in output)
    rank(job, 1).send_signal(signal.SIGTERM)
    assert job.end() == 0, job.output()
    assert job.output().count("continuing from step") == 1
    assert summary(tmp_path / "run")["status"] == "stopped"


@nightly
def test_torchrun_by_hand_shows_the_first_error_last(write_config: WriteConfig, tmp_path: Path) -> None:
    config = str(write_config(data__train={"name": "vectors:Buggy", "args": {"length": 60}}))
    done = run([TORCHRUN, "--nproc-per-node", "2", TRAIN, "--config", config], tmp_path, ACCELERATE_USE_CPU="true")
    assert done.returncode == 1
    assert "ZeroDivisionError: a bug of the user's" in done.stderr.partition("Root Cause")[2], done.stderr


@nightly
def test_a_lost_host_leaves_the_others_training(write_config: WriteConfig, tmp_path: Path) -> None:
    """Two agents as on two hosts, of which one is killed with its rank: the other goes on alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    patience = "last_call_timeout=3,keep_alive_interval=2,keep_alive_max_attempt=2"
    options = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-conf", patience]
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "job"]
    command = [TORCHRUN, *options, *where, TRAIN, "--config", str(restarting(write_config, 0))]
    variables = {"ACCELERATE_USE_CPU": "true", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    first = Job(command, tmp_path, **variables)
    time.sleep(1)  # so that the first host is the one with the store
    second = Job(command, tmp_path, **variables)
    first.wait_for(lambda output: reached(20) in output)
    lost = [psutil.Process(second.process.pid), *second.family()]
    for process in lost:
        process.kill()
    second.end()
    assert alive(lost) == []
    assert first.end() == 0, first.output()
    assert_went_on(first, tmp_path / "run")
    assert summary(tmp_path / "run")["num_processes"] == 1
