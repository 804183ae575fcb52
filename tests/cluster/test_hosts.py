"""`python -m launch hosts` over real sshd: two and three hosts train; hosts leave, come back and fail."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cluster_machines import Hosts, end_jobs
from conftest import REPOSITORY, SUPPORT, Train, WriteConfig, nightly
from launching import Job
from run_results import losses, records, summary

from trainer.faults.plan import VARIABLE, Event, write_plan

LOST_SECONDS = 60  # within which a job that cannot go on says so
STEPS = 150


def launch(hosts: Hosts, config: Path, names: Sequence[str], *options: str) -> Job:
    """Starts a job on these hosts, from outside of them, and notes when each line of its output came."""
    arguments = ["--config", str(config), "--hosts", ",".join(names), *options, *hosts.overrides]
    hosts.jobs.append(Job([sys.executable, "-m", "launch", "hosts", *arguments], config.parent))
    return hosts.jobs[-1]


def steady(write_config: WriteConfig, steps: int = STEPS, seconds: float = 0.002, **changes: Any) -> Path:
    """A run whose steps take about 12 times `seconds`, however many ranks there are, and that saves often."""
    return write_config(
        **{
            "data__train": {"name": "slow:Steady", "args": {"length": 4800, "seconds": seconds}},
            "train": {"steps": steps, "batch_size": 12},
            "model__args__dropout": 0.0,  # which depends on the ranks
            "eval": {"every": "9999 epochs"},
            "checkpoint": {"every": 10},
            "log": {"every": 10},
            "launch__environment": {"OMP_NUM_THREADS": "1"},
            **changes,
        }
    )


def last_line(job: Job) -> str:
    return job.output().splitlines()[-1]


def reached(job: Job, step: int, times: int = 1) -> None:
    """Waits until the job has reported that step, or a later one, so often."""

    def seen(output: str) -> bool:
        return sum(int(number) >= step for number in re.findall(r"\| step (\d+)/", output)) >= times

    job.wait_for(seen)


def waits_for(job: Job, text: str) -> float:
    """Waits until the job has said something, and returns how long that took."""
    begun = time.monotonic()
    job.wait_for(lambda output: text in output)
    return time.monotonic() - begun


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=nightly)])
def test_hosts_train_as_one_process_does(
    count: int, hosts: Hosts, write_config: WriteConfig, train: Train, tmp_path: Path
) -> None:
    config = write_config(model__args__dropout=0.0, train={"epochs": 3, "batch_size": 12})
    assert train("--config", config, f"run.dir={tmp_path / 'alone'}").code == 0
    job = launch(hosts, config, hosts.names[:count], "--processes", "1")
    assert job.end() == 0, job.output()
    assert f"host1 | device     {count} x cpu" in job.output()
    assert "host2 | step" not in job.output()
    assert summary(tmp_path / "run")["status"] == "finished"
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    assert "on host2" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    told = {key for record in records(tmp_path / "run") for key in record}
    assert {f"system/{node}/cpu_percent" for node in range(count)} <= told  # every machine tells what it does
    assert hosts.left() == []


def test_everything_that_is_wrong_is_said_at_once(hosts: Hosts, write_config: WriteConfig, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for name in ("launch", "trainer"):
        shutil.copytree(REPOSITORY / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "train.py", other)
    (other / "trainer" / "loop.py").write_text("# another one")
    late = "import runpy, sys, time; now = time.time; time.time = lambda: now() - 90; del sys.argv[0]"
    late += "; sys.argv[0:1] = []; runpy.run_module('launch.host_facts', run_name='__main__')"
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
case $(hostname) in
  host2) exec {sys.executable} -c "{late}" ;;
  host3) cd {other}; PYTHONPATH={other}:{SUPPORT} exec {sys.executable} "$@" ;;
esac
exec {sys.executable} "$@"
"""
    )
    python.chmod(0o755)
    config = write_config(run__dir=str(hosts.local / "run"), launch__hosts__python=str(python))
    job = launch(hosts, config, [*hosts.names, "host9"])
    assert job.end() == 2, job.output()
    lines = job.output().splitlines()
    assert all(line.startswith("error: host") for line in lines), lines
    found = "\n".join(lines)
    assert re.search(r"error: host2: its clock is (89|90)\.\d s behind the others", found)
    assert "error: host3: other code than here: trainer/loop.py" in found
    assert f"error: host2: {hosts.local}/run is not shared: a file that host1 wrote is not seen" in found
    assert f"error: host3: {hosts.local}/run is not shared" in found
    assert "error: host9: cannot be reached: ssh: Could not resolve hostname host9" in found
    assert len(lines) == 5
    assert hosts.left() == []


@nightly
def test_a_port_that_is_taken_or_out_of_reach(hosts: Hosts, write_config: WriteConfig, tmp_path: Path) -> None:
    space = f"lockstep{hosts.slot}-host2"
    block = ["ip", "-n", space, "route", "add", "unreachable", f"{hosts.address(1)}/32"]
    subprocess.run(block, check=True)
    try:
        job = launch(hosts, write_config(), ["host1", "host2"])
        assert job.end() == 2, job.output()
    finally:
        subprocess.run([*block[:4], "del", *block[5:]], check=True)
    assert re.search(rf"error: host2: cannot connect to host1 at port \d+: {hosts.address(1)}: ", job.output())

    listen = "import socket; s = socket.create_server(('', 29400)); print('listening', flush=True); s.accept()"
    listener = hosts.popen(1, [sys.executable, "-c", listen], tmp_path)
    listener.wait_for(lambda output: "listening" in output)
    job = launch(hosts, write_config(launch__port=29400), ["host1", "host2"])
    assert job.end() == 2, job.output()
    assert job.output() == "error: host1: Address already in use (launch.port 29400)\n"
    end_jobs(hosts.jobs)


@nightly
def test_a_crash_is_shown_with_its_host(hosts: Hosts, write_config: WriteConfig, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    write_plan(plan, tmp_path / "run", [Event("raise", rank=1, step=20)], 600)
    variables = {"OMP_NUM_THREADS": "1", VARIABLE: str(plan)}
    job = launch(hosts, steady(write_config, launch__environment=variables), ["host1", "host2"])
    assert job.end() == 1, job.output()
    assert "host2 | Traceback (most recent call last):" in job.output()
    assert re.match(r"error: rank 1 on host2, step 20 .*: RuntimeError: ", last_line(job)), job.output()
    assert hosts.left() == []


@nightly
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_and_going_on(number: signal.Signals, hosts: Hosts, write_config: WriteConfig, tmp_path: Path) -> None:
    config = steady(write_config, steps=60, seconds=0.02)
    job = launch(hosts, config, ["host1", "host2"])
    reached(job, 10)
    job.signal(number, group=number == signal.SIGINT)
    assert job.end() == 75, job.output()
    assert summary(tmp_path / "run")["status"] == "stopped"
    assert hosts.left() == []
    if number == signal.SIGTERM:
        job = launch(hosts, config, ["host1", "host2"])
        assert job.end() == 0, job.output()
        assert "continuing from step" in job.output()


@nightly
def test_a_lost_host_ends_a_job_of_a_fixed_size(hosts: Hosts, write_config: WriteConfig) -> None:
    job = launch(hosts, steady(write_config, steps=5000), ["host1", "host2"])
    reached(job, 10)
    hosts.unplug(2)
    unplugged = time.monotonic()
    assert job.end() == 1, job.output()
    assert time.monotonic() - unplugged < LOST_SECONDS
    assert last_line(job).startswith("error: host2 was lost: "), job.output()
    hosts.plug(2)
    assert hosts.left(LOST_SECONDS) == []


@nightly
def test_others_go_on_without_a_lost_host_and_take_it_back(
    hosts: Hosts, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = steady(write_config, steps=5000, launch__max_restarts=5)
    job = launch(hosts, config, hosts.names, "--nodes", "1:3")
    job.wait_for(lambda output: "3 x cpu" in output)
    reached(job, 10)
    hosts.unplug(3)
    job.wait_for(lambda output: "host3 is lost" in output)
    job.wait_for(lambda output: "2 x cpu" in output.partition("3 x cpu")[2])
    hosts.plug(3)
    job.wait_for(lambda output: "host3 answers again: it joins" in output)
    job.wait_for(lambda output: "3 x cpu" in output.rpartition("host3 answers again")[2])
    (tmp_path / "run" / "STOP").touch()
    assert job.end() == 75, job.output()
    assert hosts.left() == []


@pytest.mark.parametrize("how", ["kill", pytest.param("unplug", marks=nightly)])
def test_the_first_host_is_lost(how: str, hosts: Hosts, write_config: WriteConfig, tmp_path: Path) -> None:
    config = steady(write_config, steps=5000, launch__max_restarts=2)
    job = launch(hosts, config, hosts.names, "--nodes", "1:3")
    reached(job, 10)
    getattr(hosts, how)(1)
    job.wait_for(lambda output: "starting again (1 of 2): host1 was lost" in output)
    job.wait_for(lambda output: "host2 | device     2 x cpu" in output)
    job.signal(signal.SIGTERM)
    assert job.end() == 75, job.output()
    assert summary(tmp_path / "run")["status"] == "stopped"
    assert "host1 does not answer" in job.output()
    if how == "kill":
        assert hosts.left() == []


@nightly
def test_a_job_of_a_fixed_size_waits_for_a_lost_host(hosts: Hosts, write_config: WriteConfig) -> None:
    config = steady(write_config, steps=300, launch__max_restarts=1)
    job = launch(hosts, config, ["host1", "host2"])
    reached(job, 30)
    hosts.unplug(2)
    job.wait_for(lambda output: "waiting 300 s for host2" in output)
    hosts.plug(2)
    assert job.end() == 0, job.output()
    assert "starting again (1 of 1): host2 was lost" in job.output()
    assert "continuing from step" in job.output()
    assert hosts.left() == []


@nightly
def test_it_does_not_wait_for_ever(hosts: Hosts, write_config: WriteConfig) -> None:
    changes = {"launch__max_restarts": 1, "launch__hosts__return_timeout": 5}
    job = launch(hosts, steady(write_config, steps=5000, **changes), ["host1", "host2"])
    reached(job, 10)
    hosts.kill(2)
    assert job.end() == 1, job.output()
    assert last_line(job).startswith("error: host2 was lost: "), job.output()
    assert hosts.left() == []


@nightly
def test_a_launcher_that_is_killed_leaves_nothing(hosts: Hosts, write_config: WriteConfig, tmp_path: Path) -> None:
    job = launch(hosts, steady(write_config, steps=5000), ["host1", "host2"])
    reached(job, 10)
    job.signal(signal.SIGKILL)
    assert hosts.left(LOST_SECONDS) == []
    assert summary(tmp_path / "run")["status"] == "stopped"


@nightly
def test_a_host_that_is_not_needed_need_not_be_there(hosts: Hosts, write_config: WriteConfig, tmp_path: Path) -> None:
    job = launch(hosts, write_config(), ["host9", "host1", "host2", "host3"], "--nodes", "1:3")
    assert job.end() == 0, job.output()
    assert "using host9, host1, host2; not host3" in job.output()
    assert "host9: cannot be reached: " in job.output()
    assert "host1 | device     2 x cpu" in job.output()
    assert summary(tmp_path / "run")["status"] == "finished"
    assert hosts.left() == []


@nightly
def test_a_second_ctrl_c_ends_it_now(hosts: Hosts, write_config: WriteConfig) -> None:
    job = launch(hosts, steady(write_config, steps=50, seconds=2.0), ["host1", "host2"])
    job.wait_for(lambda output: "run folder" in output)
    job.signal(signal.SIGINT, group=True)
    time.sleep(1.5)
    job.signal(signal.SIGINT, group=True)
    begun = time.monotonic()
    assert job.end() == 1, job.output()
    assert time.monotonic() - begun < 20
    assert hosts.left() == []


@nightly
def test_the_digits(hosts: Hosts, train: Train, tmp_path: Path) -> None:
    config = REPOSITORY / "configs" / "digits.yaml"
    common = ["tracking.trackers=[]", "train.epochs=12", "launch.environment.OMP_NUM_THREADS=1"]
    assert train("--config", config, *common, f"run.dir={tmp_path / 'alone'}").code == 0
    job = launch(hosts, config, hosts.names, *common, f"run.dir={tmp_path / 'run'}")
    assert job.end() == 0, job.output()
    alone, together = (summary(tmp_path / name)["metrics"]["eval/accuracy"] for name in ("alone", "run"))
    assert together == pytest.approx(alone, abs=0.006)


def both(hosts: Hosts, folder: Path, command: list[str], rank: str, **variables: str) -> list[str]:
    """Runs a command on two hosts as a person would, with another rank on each, to a good end."""
    jobs = [
        hosts.popen(i, [str(i - 1) if part == rank else part for part in command], folder, **variables) for i in (1, 2)
    ]
    assert [job.end() for job in jobs] == [0, 0], [job.output() for job in jobs]
    return [job.output() for job in jobs]


@nightly
def test_accelerate_by_hand(hosts: Hosts, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config()
    where = ["--main_process_ip", hosts.address(1), "--main_process_port", "29400"]
    options = ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank", "RANK", *where]
    accelerate = str(Path(sys.executable).parent / "accelerate")
    command = [accelerate, "launch", *options, str(REPOSITORY / "train.py"), "--config", str(config)]
    shown = both(hosts, tmp_path, command, "RANK", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    assert "2 x cpu" in shown[0]
    assert summary(tmp_path / "run")["status"] == "finished"


@nightly
def test_agents_by_hand(hosts: Hosts, write_config: WriteConfig, tmp_path: Path) -> None:
    config = str(write_config())
    options = ["--node-rank", "RANK", "--rendezvous", "host1", "--job", "monday-1", "--nodes", "2"]
    command = [sys.executable, "-m", "launch", "agent", "--config", config, *options]
    assert "2 x cpu" in both(hosts, tmp_path, command, "RANK")[0]
    assert summary(tmp_path / "run")["status"] == "finished"


@nightly
def test_what_a_dry_run_prints_can_be_pasted(hosts: Hosts, write_config: WriteConfig, tmp_path: Path) -> None:
    job = launch(hosts, write_config(), ["host1", "host2"], "--dry-run")
    assert job.end() == 0
    pasted = job.output().partition("# One agent")[2].partition("\n")[2].split("\nwhile ")
    lines = [pasted[0], *(f"while {line}" for line in pasted[1:])]
    assert len(lines) == 2
    jobs = [Job(["bash", "-c", line], tmp_path) for line in lines]
    hosts.jobs += jobs
    assert [job.end() for job in jobs] == [0, 0], [job.output() for job in jobs]
    assert summary(tmp_path / "run")["status"] == "finished"
