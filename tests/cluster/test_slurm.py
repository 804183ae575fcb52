"""`python -m launch slurm` on a real Slurm, whose nodes are hosts of their own network."""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_machines import Slurm
from conftest import REPOSITORY, nightly, tiny_config
from launching import Job, local
from resuming import assert_same_end
from run_results import summary

SLOW = {"name": "slow:SlowWhileTold", "args": {"length": 60}}
RARELY = {"log__every": 5, "checkpoint__every": 100, "eval__every": 200}
COMMAND = [sys.executable, "-m", "launch", "slurm"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose name has what shells, and Slurm, read differently."""
    made = tmp_path / 'it\'s 100%j of "it" $HOME'
    made.mkdir()
    return made


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "tiny config.yaml"
    file.write_text(yaml.safe_dump(tiny_config(folder / "run", **changes)))
    return file


def launch(slurm: Slurm, config: Path, *arguments: str) -> Job:
    return slurm.popen([*COMMAND, "--config", config.name, *arguments], config.parent, OMP_NUM_THREADS="1")


def refused(slurm: Slurm, config: Path, *arguments: str) -> str:
    """Returns the one line with which a job is refused, and sees that nothing waits or runs."""
    done = slurm.run([*COMMAND, "--config", config, *arguments], config.parent)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert set(slurm.squeue().values()) <= {"COMPLETING"}
    return done.stderr


def number_of(job: Job) -> int:
    job.wait_for(lambda output: "submitted" in output)
    found = re.search(r"^job (\d+) submitted", job.output(), re.MULTILINE)
    assert found, job.output()
    return int(found[1])


def seen(text: str) -> Callable[[str], bool]:
    return lambda output: text in output


def test_two_nodes_do_what_two_processes_here_do(slurm: Slurm, folder: Path) -> None:
    config = folder / "digits.yaml"
    config.write_text((REPOSITORY / "configs" / "digits.yaml").read_text())
    ours = ["tracking.trackers=[]", "train.epochs=6"]
    job = launch(slurm, config, "--nodes", "2", "--follow", *ours, "run.dir=over there", "launch.slurm.cpus_per_node=2")
    here = local(config, 2, *ours, "run.dir=here")
    assert here.returncode == 0, here.stderr
    assert job.end() == 0, job.output()
    number = number_of(job)
    assert f"job {number}: running on host[1-2]" in job.output()
    assert "eval/accuracy" in job.output()
    assert f"job {number}: completed, exit code 0" in job.output()
    assert_same_end(folder / "over there", folder / "here")
    assert summary(folder / "over there")["num_processes"] == 2
    assert (folder / "over there" / "launch" / f"slurm-{number}.out").exists()


def test_preempted_and_at_its_time_limit_it_goes_on(slurm: Slurm, folder: Path) -> None:
    """Both in one run; it ends bit for bit as one that was left in peace."""
    config = write(folder, train__epochs=80, data__train=SLOW, faults__grace="5 seconds", **RARELY)
    (folder / "slowly").touch()
    job = launch(slurm, config, "--nodes", "2", "--follow", "launch.slurm.time=30")
    number = number_of(job)
    job.wait_for(seen("step 5/"))
    used = slurm.job(number)["RunTime"].split(":")
    seconds = int(used[0]) * 3600 + int(used[1]) * 60 + int(used[2])
    minutes = math.ceil((seconds + 35) / 60)  # Slurm looks at limits every 30 s: it looks once before this one
    assert slurm.run(["scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}"]).returncode == 0
    job.wait_for(lambda output: output.count("requeued: job") == 1)
    assert slurm.run(["scontrol", "update", f"JobId={number}", "TimeLimit=30"]).returncode == 0
    job.wait_for(seen("continuing from step"))
    steps = job.output().count("\nstep ")
    job.wait_for(lambda output: output.count("\nstep ") > steps)
    high = slurm.run(["srun", "--partition=high", "--nodes=3", "--exclusive", "true"])
    assert high.returncode == 0, high.stderr
    (folder / "slowly").unlink()
    assert job.end() == 0, job.output()
    assert job.output().count("requeued: job") == job.output().count("continuing from step") == 2
    assert slurm.job(number)["Restarts"] == "2"
    quiet = local(config, 2, "run.dir=quiet")
    assert quiet.returncode == 0, quiet.stderr
    assert_same_end(folder / "run", folder / "quiet")


@nightly
def test_cancel_leaves_a_checkpoint_and_nothing_else(slurm: Slurm, folder: Path) -> None:
    config = write(folder, train__epochs=1000, data__train=SLOW, **RARELY)
    (folder / "slowly").touch()
    job = launch(slurm, config, "--nodes", "2", "--follow")
    number = number_of(job)
    job.wait_for(seen("step 5/"))
    again = slurm.run([*COMMAND, "--config", config, "--nodes", "2"], folder)
    assert again.returncode == 2
    assert f"job {number} runs already for the run in '{folder / 'run'}'" in again.stderr
    state = slurm.run([*COMMAND, "status", "run"], folder)
    assert re.search(rf"job +{number}: running on host\[1-2\], .*\noutput .*\nrun +run: at step \d+\n", state.stdout)
    done = slurm.run([*COMMAND, "cancel", "run"], folder)
    assert done.returncode == 0, done.stderr
    step = summary(folder / "run")["step"]
    assert f"job {number}: stopped with a checkpoint at step {step}" in done.stdout
    assert job.end() == 75, job.output()
    assert "requeued" not in job.output()
    assert slurm.squeue() == {}
    assert slurm.hosts is not None
    assert slurm.hosts.left(15) == []
    assert (folder / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
    state = slurm.run([*COMMAND, "status", "run"], folder)
    assert "failed, exit code 75" in state.stdout
    assert f"stopped by SIGUSR1 on rank 0 and SIGUSR1 on rank 1 at step {step} of 5000" in state.stdout
    once_more = slurm.run([*COMMAND, "cancel", "run"], folder)
    assert once_more.stdout == f"job {number} has ended already: nothing runs, nothing waits\n"


def test_what_cannot_be_is_one_line(slurm: Slurm, folder: Path) -> None:
    config = write(folder)
    part = "error: command line: launch."
    text = refused(slurm, config, "launch.slurm.partition=hihg")
    assert text.startswith(f"{part}slurm.partition: there is no 'hihg'; this cluster has: high, main; did you mean")
    text = refused(slurm, config, "launch.slurm.gpus_per_node=3")
    assert text == f"{part}slurm.gpus_per_node: 3: a node of the default partition has at most 2 GPUs\n"
    text = refused(slurm, config, "launch.slurm.cpus_per_node=9")
    assert text == f"{part}slurm.cpus_per_node: 9: a node of the default partition has at most 8 cores\n"
    assert f"{part}nodes: 4 " in refused(slurm, config, "--nodes", "4")
    assert f"{part}slurm.constraint: fast" in refused(slurm, config, "launch.slurm.constraint=fast")
    text = refused(slurm, config, "launch.slurm.extra={frobnicate: 3}")
    assert text == f"{part}slurm.extra.frobnicate: sbatch has no such option\n"


def test_what_slurm_accepts_and_would_never_run(slurm: Slurm, folder: Path) -> None:
    def partition(setting: str) -> None:
        assert slurm.run(["scontrol", "update", "PartitionName=main", setting]).returncode == 0

    config = write(folder)
    partition("MaxTime=10")
    try:
        text = refused(slurm, config, "launch.slurm.time=1:00:00")
    finally:
        partition("MaxTime=UNLIMITED")
    assert text.startswith("error: command line: launch.slurm.time: 1:00:00 is more than the partition allows")
    assert "(PartitionTimeLimit); the cluster has main: time limit 10:00" in text
    partition("State=DOWN")
    try:
        done = slurm.run([*COMMAND, "--config", config], folder)
        assert done.returncode == 0
        assert "waits: PartitionDown: the partition takes no jobs at the moment" in done.stderr
        state = slurm.run([*COMMAND, "status", "run"], folder)
        assert "pending (PartitionDown: " in state.stdout
        assert "waiting: removed\n" in slurm.run([*COMMAND, "cancel", "run"], folder).stdout
        assert slurm.squeue() == {}
    finally:
        partition("State=UP")


@nightly
def test_inside_an_allocation(slurm: Slurm, folder: Path) -> None:
    config = write(folder, train__epochs=1000, data__train=SLOW, **RARELY)
    (folder / "slowly").touch()
    inner = [*COMMAND, "--config", config.name, "--nodes"]
    salloc = ["salloc", "--nodes=2", "--ntasks=2"]
    too_many = slurm.run([*salloc, *inner, "3"], folder)
    assert too_many.returncode == 2
    assert "launch.nodes: 3: this allocation has 2" in too_many.stderr
    job = slurm.popen([*salloc, "bash", "-c", f"echo $$; exec {shlex.join([*inner, '2'])}"], folder)
    job.wait_for(seen("step 5/"))
    assert set(slurm.squeue().values()) == {"RUNNING"}
    assert len(slurm.squeue()) == 1
    pid = next(int(line) for line in job.lines if line.strip().isdigit())
    os.kill(pid, signal.SIGINT)
    assert job.end() == 75, job.output()
    assert summary(folder / "run")["status"] == "stopped"
    assert slurm.hosts is not None
    assert slurm.hosts.left(15) == []


@nightly
def test_an_array_of_two(slurm: Slurm, folder: Path) -> None:
    config = write(folder, run__seed=10)
    array = ["launch.slurm.array=0-1", "log.every=1"]
    job = launch(slurm, config, "--wait", *array, "checkpoint.dir=saved here")
    assert job.end() == 0, job.output()
    number = number_of(job)
    losses = []
    for task in (0, 1):
        run = folder / f"run-{task}"
        assert summary(run)["status"] == "finished"
        resolved = yaml.safe_load((run / "config.yaml").read_text())["run"]
        assert resolved == {"name": f"tiny-{task}", "dir": str(run), "seed": 10 + task}
        assert list((folder / f"saved here-{task}").glob("step-*"))
        assert (run / "launch" / f"slurm-{number}_{task}.out").exists()
        losses.append((run / "metrics.jsonl").read_text())
    assert losses[0] != losses[1]
    state = slurm.run([*COMMAND, "status", "run"], folder)
    assert f"{number}_0: completed" in state.stdout
    assert f"{number}_1: completed" in state.stdout
    assert f"{number}_0" not in slurm.run([*COMMAND, "status", "run-1"], folder).stdout


@nightly
def test_the_others_go_on_when_a_node_is_lost(slurm: Slurm, folder: Path) -> None:
    config = write(folder, train__epochs=80, data__train=SLOW, **{**RARELY, "checkpoint__every": 5})
    (folder / "slowly").touch()
    job = launch(slurm, config, "--nodes", "1:2", "--follow", "launch.max_restarts=3")
    number = number_of(job)
    job.wait_for(seen("step 10/"))
    assert slurm.job(number)["NodeList"] == "host[1-2]"
    slurm.fail_node(2)
    job.wait_for(seen("continuing from step"))
    end = time.monotonic() + 60
    while "DOWN" not in slurm.node(2)["State"]:  # Slurm has seen it, too
        assert time.monotonic() < end
        time.sleep(0.5)
    (folder / "slowly").unlink()
    assert job.end() == 0, job.output()
    assert summary(folder / "run")["status"] == "finished"
    assert summary(folder / "run")["num_processes"] == 1
    assert slurm.job(number)["Restarts"] == "0"


@nightly
def test_without_its_first_node_it_starts_again(slurm: Slurm, folder: Path) -> None:
    config = write(folder, train__epochs=80, data__train=SLOW, **{**RARELY, "checkpoint__every": 5})
    (folder / "slowly").touch()
    job = launch(slurm, config, "--nodes", "1:2", "--follow", "launch.max_restarts=3")
    number = number_of(job)
    job.wait_for(seen("step 10/"))
    slurm.fail_node(1)
    (folder / "slowly").unlink()
    job.wait_for(seen("continuing from step"))
    assert job.end() == 0, job.output()
    assert slurm.job(number)["Restarts"] == "1"
