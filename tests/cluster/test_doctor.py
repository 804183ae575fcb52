"""The doctor on hosts with sshd and in a Slurm allocation: a slow link, a folder that is not shared, a lost host."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cluster_machines import Hosts, Slurm
from conftest import WriteConfig, nightly
from launching import run

DOCTOR = [sys.executable, "-m", "launch", "doctor"]


def checks(file: Path) -> dict[str, Any]:
    return {check["name"]: check for check in json.loads(file.read_text())["checks"]}


def failures(check: dict[str, Any]) -> list[str]:
    return [finding["message"] for finding in check["findings"] if finding["verdict"] == "fail"]


@contextmanager
def slow_cable(hosts: Hosts, i: int, rate: str) -> Iterator[None]:
    """Lets host `i` send no faster than this; what it is sent comes as before."""
    ip = ["ip", "netns", "exec", f"lockstep{hosts.slot}-host{i}", "tc", "qdisc"]
    shape = ["tbf", "rate", rate, "burst", "256kbit", "latency", "500ms"]
    tried = subprocess.run([*ip, "add", "dev", "eth0", "root", *shape], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"this kernel shapes no traffic: {tried.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run([*ip, "del", "dev", "eth0", "root"], check=True)


@nightly
def test_a_slow_link_and_a_folder_of_one_host_alone_are_named(
    hosts: Hosts, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = str(write_config(run__dir=str(hosts.local / "run")))  # which is another one on each host
    arguments = ["--config", config, "--hosts", "host1,host2", "--processes", "1", "--json", "found.json"]
    with slow_cable(hosts, 2, "100mbit"):
        done = run([*DOCTOR, *arguments, *hosts.overrides], tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    found = checks(tmp_path / "found.json")
    (slow,) = failures(found["pairs"])
    assert slow.startswith("host2 rank 1 cpu -> host1 rank 0 cpu: ")
    (rate,) = [pair["bytes_per_s"] for pair in found["pairs"]["ranks"][1]["values"]["pairs"]]
    assert 5e6 < rate < 13e6
    assert {message.partition(":")[0] for message in failures(found["run folder"])} == {"host1", "host2"}
    assert f"error: pairs on {slow}" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    # All that does not depend on how busy this machine is.
    good = ("ranks", "versions", "open files", "/dev/shm", "ports", "connecting", "clocks", "checkpoint")
    assert {name: found[name]["verdict"] for name in good} == dict.fromkeys(good, "ok")
    assert {rank["host"] for rank in found["matmul"]["ranks"]} == {"host1", "host2"}
    assert abs(found["clocks"]["ranks"][1]["values"]["ahead"]) < 1
    assert not any(hosts.processes(i) for i in hosts.numbers)


@nightly
def test_a_host_that_does_not_answer_is_named(hosts: Hosts, tmp_path: Path) -> None:
    hosts.unplug(2)
    done = run([*DOCTOR, "--hosts", "host1,host2", *hosts.overrides], tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: host2")


@nightly
def test_in_an_allocation_that_is_asked_for(slurm: Slurm, write_config: WriteConfig, tmp_path: Path) -> None:
    config = str(write_config())
    arguments = ["--config", config, "--slurm", "--nodes", "2", "--processes", "1", "launch.slurm.partition=main"]
    done = slurm.run([*DOCTOR, *arguments], tmp_path, CUDA_VISIBLE_DEVICES="")
    found = checks(tmp_path / "run" / "doctor.json")
    failed = {name for name, check in found.items() if check["verdict"] == "fail"}
    assert failed <= {"matmul", "pairs"}, done.stdout
    assert done.returncode == (1 if failed else 0), done.stderr
    assert {rank["host"] for rank in found["pairs"]["ranks"]} == {"host1", "host2"}
    assert found["run folder"]["summary"].endswith("is the same on 2 machines")
    assert slurm.squeue() == {} or set(slurm.squeue().values()) == {"COMPLETING"}
