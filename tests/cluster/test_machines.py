"""What the other tests of this tier stand on: hosts, sshd, Slurm, and that nothing is left of them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cluster_machines
import psutil
import pytest
from cluster_machines import SLOTS, Hosts, Slurm
from conftest import nightly
from launching import alive

LISTEN = """
import socket
server = socket.create_server(("0.0.0.0", 29000))
print("listening", flush=True)
connection, _ = server.accept()
while data := connection.recv(100):
    connection.sendall(data)
"""
SPEAK = """
import socket, sys
connection = socket.create_connection(("host2", 29000))
connection.settimeout(1)
for line in sys.stdin:
    connection.sendall(line.encode())
    try:
        print("heard", connection.recv(100).decode().strip() or "the end", flush=True)
    except (TimeoutError, ConnectionError) as error:
        print(type(error).__name__, flush=True)
"""


def batch(folder: Path, body: str) -> Path:
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\n{body}\n")
    return script


def written(file: Path) -> str:
    """Waits until a job has written something."""
    end = time.monotonic() + 30
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return file.read_text()


def test_ssh_from_here_and_between_hosts(hosts: Hosts, tmp_path: Path) -> None:
    ssh = ["ssh", "-F", str(hosts.ssh_config)]
    for name in hosts.names:
        here = subprocess.run([*ssh, name, "hostname"], capture_output=True, text=True, check=True)
        there = hosts.run(1, [*ssh, name, "hostname"], tmp_path)
        assert here.stdout == there.stdout == f"{name}\n"


@nightly
def test_a_host_has_its_own_network_shared_memory_and_local_folder(hosts: Hosts, tmp_path: Path) -> None:
    for i, folder in ((1, Path("/dev/shm")), (1, hosts.local)):
        assert hosts.run(i, ["touch", folder / "lockstep-mark"], tmp_path).returncode == 0
        assert hosts.run(2, ["test", "-e", folder / "lockstep-mark"], tmp_path).returncode == 1
        assert not (folder / "lockstep-mark").exists()
    addresses = hosts.run(2, ["ip", "-brief", "address"], tmp_path).stdout
    assert hosts.address(2) in addresses
    assert hosts.address(1) not in addresses


def conversation(hosts: Hosts, folder: Path) -> subprocess.Popen[str]:
    listener = hosts.popen(2, [sys.executable, "-c", LISTEN], folder)
    listener.wait_for(lambda output: "listening" in output)
    return subprocess.Popen(
        hosts.command(1, [sys.executable, "-u", "-c", SPEAK]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def say(speaker: subprocess.Popen[str], word: str) -> str:
    assert speaker.stdin is not None
    assert speaker.stdout is not None
    speaker.stdin.write(f"{word}\n")
    speaker.stdin.flush()
    return speaker.stdout.readline().strip()


@nightly
def test_an_unplugged_host_is_silent(hosts: Hosts, tmp_path: Path) -> None:
    with conversation(hosts, tmp_path) as speaker:
        assert say(speaker, "one") == "heard one"
        hosts.unplug(2)
        assert say(speaker, "two") == "TimeoutError"
        assert len(hosts.processes(2)) == 1
        hosts.plug(2)
        end = time.monotonic() + 20  # TCP sends again what was lost
        while (answer := say(speaker, "three")) == "TimeoutError":
            assert time.monotonic() < end
        assert answer == "heard two"
        speaker.kill()


@nightly
def test_a_killed_host_is_reset_and_mended(hosts: Hosts, tmp_path: Path) -> None:
    with conversation(hosts, tmp_path) as speaker:
        assert say(speaker, "one") == "heard one"
        hosts.kill(2)
        assert say(speaker, "two") in ("heard the end", "ConnectionResetError")
        assert not hosts.processes(2)
        hosts.unplug(3)
        hosts.mend()
        assert speaker.wait(10) == -signal.SIGKILL  # it ran on host1
    test_ssh_from_here_and_between_hosts(hosts, tmp_path)


def test_a_step_runs_on_two_nodes(slurm: Slurm, tmp_path: Path) -> None:
    done = slurm.run(["srun", "--nodes=2", "--ntasks-per-node=1", "hostname"], tmp_path)
    assert sorted(done.stdout.split()) == ["host1", "host2"], done.stderr
    assert set(slurm.squeue().values()) <= {"COMPLETING"}


@nightly
def test_a_job_is_requeued(slurm: Slurm, tmp_path: Path) -> None:
    script = batch(
        tmp_path,
        'echo "try ${SLURM_RESTART_COUNT:-0}"; [ "$SLURM_RESTART_COUNT" = 1 ] || scontrol requeue $SLURM_JOB_ID',
    )
    job_id = slurm.submit(script, "--open-mode=append", "--output=out")
    job = slurm.wait_for_state(job_id, "COMPLETED")
    assert job["Restarts"] == "1"
    assert re.findall(r"^try \d", (tmp_path / "out").read_text(), re.M) == ["try 0", "try 1"]


@nightly
def test_a_job_is_preempted_after_a_signal(slurm: Slurm, tmp_path: Path) -> None:
    script = batch(tmp_path, 'trap "echo told; exit 0" USR1; echo begun; sleep 100 & wait')
    every_node = ("--nodes=3", "--exclusive")
    slurm.submit(script, *every_node, "--signal=B:USR1@10", "--output=out")
    written(tmp_path / "out")
    high = slurm.submit(batch(tmp_path, "true"), *every_node, "--partition=high")
    slurm.wait_for_state(high, "COMPLETED")
    assert (tmp_path / "out").read_text().startswith("begun\ntold\n")  # slurmstepd may add that the job has gone


@nightly
def test_a_failed_node_comes_back(slurm: Slurm, tmp_path: Path) -> None:
    job_id = slurm.submit(batch(tmp_path, "sleep 100"), "--nodelist=host2")
    slurm.wait_for_state(job_id, "RUNNING")
    slurm.fail_node(2)
    assert slurm.run(["srun", "--nodelist=host1", "hostname"]).stdout == "host1\n"
    slurm.restore_nodes()
    slurm.wait_for_state(job_id, ["PENDING", "RUNNING"])


@pytest.fixture
def flat(machines_slot: int) -> Slurm:
    if reason := cluster_machines.missing_for_slurm(netns=False):
        pytest.skip(reason)
    return Slurm(machines_slot, None)


@nightly
def test_nodes_without_hosts(flat: Slurm, tmp_path: Path) -> None:
    show = ["srun", "--nodes=2", "--ntasks-per-node=1", "printenv", "SLURMD_NODENAME"]
    assert sorted(flat.run(show, tmp_path).stdout.split()) == ["node1", "node2"]
    flat.submit(batch(tmp_path, "echo $$; sleep 100"), "--nodelist=node2", "--output=out")
    job = psutil.Process(int(written(tmp_path / "out")))
    flat.fail_node(2)
    assert not alive([job])
    flat.mend()
    assert sorted(flat.run(show, tmp_path).stdout.split()) == ["node1", "node2"]


LEAVE = """
import os, signal, sys
from pathlib import Path
from cluster_machines import Hosts, Slurm, slot
with slot() as number:
    hosts = Hosts(number)
    slurm = Slurm(number, hosts)
    flat = Slurm(number, None)
    for cluster in (slurm, flat):
        cluster.submit(Path("job.sh"), "--nodes=2")
    hosts.popen(3, ["sleep", "12345"], Path("."))
    print("slot", number, flush=True)
    if sys.argv[1:] == ["killed"]:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def remains(number: int) -> list[str]:
    """Returns what there is of a slot's processes, namespaces, links, mounts and files."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *(f"{k}={v}" for k, v in process.environ().items())]
        except psutil.Error:
            continue
        found += [f"process {process}" for word in words if f"{SLOTS}/{number}/" in word]
    for command in (["ip", "netns", "list"], ["ip", "-oneline", "link"]):
        listed = subprocess.run(command, capture_output=True, text=True, check=True)
        found += [line for line in listed.stdout.splitlines() if re.search(rf"\blockstep{number}\b", line)]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if f"lockstep{number}-" in line]
    return found + [str(path) for path in SLOTS.glob(str(number))]


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_nothing_is_left(end: str, slurm: Slurm, tmp_path: Path) -> None:
    batch(tmp_path, "sleep 100")
    left = slurm.run([sys.executable, "-c", LEAVE, end], tmp_path, PYTHONPATH=":".join(sys.path))
    number = int(left.stdout.split()[1])
    if end == "killed":
        assert left.returncode == -signal.SIGKILL
        assert remains(number)
        with cluster_machines.slot():
            pass
    else:
        assert left.returncode == 0, left.stderr
    assert remains(number) == []
