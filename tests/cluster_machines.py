"""Several machines on this one, for tests: hosts with their own network and sshd, and a real Slurm on them.

`support/cluster/` has the scripts. Hosts share files and process ids, as machines with a shared disk would, and have
their own network, hostname, /dev/shm and `Hosts.local`. All that runs at a time uses a slot: a number that is in the
names and addresses. Whoever takes a slot first ends what a killed test run left in it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

import launching
import psutil
from conftest import SUPPORT

SCRIPTS = SUPPORT / "cluster"
SLOTS = Path(tempfile.gettempdir()) / "lockstep-cluster"
COUNT = 3  # hosts, and nodes of Slurm
INSTALL = "apt-get install -y --no-install-recommends"
SERVICES = ("sshd", "sshd-session", "sshd-auth", "slurmd", "munged")  # what belongs to a host rather than to a test


def _absent(programs: dict[str, str]) -> str | None:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [program for program in programs if shutil.which(program, path=path) is None]
    packages = dict.fromkeys(package for program in missing for package in programs[program].split())
    return f"no {', '.join(missing)}: {INSTALL} {' '.join(packages)}" if missing else None


@cache
def missing_for_hosts() -> str | None:
    """Returns why this machine cannot have `Hosts`, or None."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "only root can make hosts"
    programs = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "nsenter": "util-linux"}
    if absent := _absent(programs):
        return absent
    trial = "mount -t tmpfs none /mnt && ip link add lockstep-trial type bridge && ip link add type veth"
    command = ["unshare", "--net", "--uts", "--mount", "bash", "-c", trial]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return f"no namespaces, bridges or mounts (a container needs --privileged): {tried.stderr.strip()}"
    return None


@cache
def missing_for_slurm(netns: bool = True) -> str | None:
    """Returns why this machine cannot have `Slurm`, on hosts or not, or None."""
    if sys.platform != "linux":
        return "Slurm is for Linux"
    packages = "slurm-wlm munge slurm-wlm-basic-plugins"
    absent = _absent(dict.fromkeys(("slurmctld", "slurmd", "srun"), packages) | {"munged": "munge"})
    return absent or (missing_for_hosts() if netns else None)


def _script(name: str, *arguments: str | int | Path) -> None:
    command = [str(SCRIPTS / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"


def _clean(number: int) -> None:
    folder = SLOTS / str(number)
    for cluster in ("slurm", "flat"):
        _script("slurm-down", folder / cluster)
    _script("hosts-down", folder / "hosts")
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def slot() -> Iterator[int]:
    """Takes the first free slot, and ends what killed test runs left in any free one."""
    SLOTS.mkdir(exist_ok=True)
    taken: tuple[int, IO[str]] | None = None
    for number in range(10):
        lock = (SLOTS / f"{number}.lock").open("w")  # the kernel unlocks it when we are killed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        _clean(number)
        if taken is None:
            taken = number, lock
        else:
            lock.close()
    assert taken is not None, f"all slots in {SLOTS} are taken"
    with taken[1]:
        try:
            yield taken[0]
        finally:
            _clean(taken[0])


def end_jobs(jobs: list[launching.Job]) -> None:
    while jobs:
        jobs[-1].process.kill()
        jobs.pop().end()


class Hosts:
    """Hosts host1, host2 and so on, numbered from 1, with sshd."""

    def __init__(self, slot: int, count: int = COUNT) -> None:
        self.slot = slot
        self.state = SLOTS / str(slot) / "hosts"
        self.numbers = range(1, count + 1)
        self.names = [f"host{i}" for i in self.numbers]
        self.ssh_config = self.state / "ssh" / "config"
        self.local = self.state / "local"  # on each host a folder of its own
        self.jobs: list[launching.Job] = []
        self.mend()

    @property
    def overrides(self) -> list[str]:
        """How a launcher reaches the hosts, and that no GPU is seen there."""
        options = json.dumps(["-F", str(self.ssh_config)])
        return [f"launch.hosts.ssh_options={options}", 'launch.hosts.setup=["export CUDA_VISIBLE_DEVICES="]']

    def address(self, i: int) -> str:
        return f"10.77.{self.slot}.{i}"

    def command(self, i: int, command: Sequence[str | Path]) -> list[str]:
        """Returns what runs the command on host `i`: in the same folder and environment, as the same process."""
        return [str(SCRIPTS / "hosts-run"), str(self.state), str(i), *map(str, command)]

    def run(
        self, i: int, command: Sequence[str | Path], cwd: Path, timeout: float = launching.TIMEOUT, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on host `i` to its end."""
        return launching.run(self.command(i, command), cwd, timeout, **variables)

    def popen(self, i: int, command: Sequence[str | Path], cwd: Path, **variables: str) -> launching.Job:
        """Starts a command on host `i` in the background."""
        self.jobs.append(launching.Job(self.command(i, command), cwd, **variables))
        return self.jobs[-1]

    def kill(self, i: int) -> None:
        """Ends every process of host `i`, sshd and slurmd too; peers see their connections reset."""
        _script("hosts-fail", self.state, "kill", i)

    def unplug(self, i: int) -> None:
        """Pulls the cable of host `i`: peers see silence."""
        _script("hosts-fail", self.state, "unplug", i)

    def plug(self, i: int) -> None:
        _script("hosts-fail", self.state, "plug", i)

    def _all_processes(self, i: int) -> list[psutil.Process]:
        command = ["ip", "netns", "pids", f"lockstep{self.slot}-host{i}"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        found = []
        for pid in map(int, listed.stdout.split()):
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found

    def processes(self, i: int) -> list[psutil.Process]:
        """Returns the processes on host `i` that are not part of the host itself."""
        anchor = self.state / f"host{i}.pid"
        found = []
        for process in self._all_processes(i):
            with suppress(psutil.NoSuchProcess):
                if process.pid != int(anchor.read_text()) and process.name() not in SERVICES:
                    found.append(process)
        return found

    def left(self, seconds: float = 15.0) -> list[str]:
        """Returns the commands that still run on the hosts after so long, in which what is ending may end."""
        end = time.monotonic() + seconds
        while processes := [process for i in self.numbers for process in self.processes(i)]:
            if time.monotonic() > end:
                return [_command(process) for process in processes]
            time.sleep(0.1)
        return []

    def mend(self) -> None:
        """Ends what still runs on the hosts, and puts back what a test has killed or unplugged."""
        for i in self.numbers:
            while strays := self.processes(i):
                for stray in strays:
                    with suppress(psutil.NoSuchProcess):
                        stray.kill()
                time.sleep(0.02)  # psutil's waiting would take the exit codes of our children
        end_jobs(self.jobs)
        self.mend_machines()

    def mend_machines(self) -> None:
        """Puts back what was killed or unplugged, and leaves what runs."""
        _script("hosts-up", self.state, len(self.names), self.slot)
        _script("ssh-up", self.state)


class Slurm:
    """A real Slurm of nodes numbered from 1: each on the host of its number, or all on 127.0.0.1.

    Its partitions are `main`, whose jobs are requeued after 20 s of grace for those of `high`. A job of `--time=1` with
    `--signal=B:USR1@N` gets USR1 between N + 30 and N seconds before its end, SIGTERM 60 to 90 s after its start, and
    SIGKILL 10 s later. A requeued job waits 6 s; the loss of a node is noticed after 20 to 30.
    """

    def __init__(self, slot: int, hosts: Hosts | None, count: int = COUNT) -> None:
        self.hosts = hosts
        self.state = SLOTS / str(slot) / ("slurm" if hosts else "flat")
        self.port = 17000 + 100 * slot + (0 if hosts else 50)
        self.numbers = range(1, count + 1)
        self.names = [f"{'host' if hosts else 'node'}{i}" for i in self.numbers]
        self.environment = {"SLURM_CONF": str(self.state / "slurm.conf")}
        self.jobs: list[launching.Job] = []
        self.restore_nodes()

    def run(
        self, command: Sequence[str | Path], cwd: Path = Path("/"), timeout: float = launching.TIMEOUT, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command such as srun to its end."""
        return launching.run([*map(str, command)], cwd, timeout, **self.environment, **variables)

    def popen(self, command: Sequence[str | Path], cwd: Path, **variables: str) -> launching.Job:
        """Starts a command such as srun in the background."""
        self.jobs.append(launching.Job([*map(str, command)], cwd, **self.environment, **variables))
        return self.jobs[-1]

    def _ask(self, *command: str | Path, cwd: Path = Path("/"), **variables: str) -> str:
        done = self.run(command, cwd, 30, **variables)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, script: Path, *options: str, cwd: Path | None = None, **variables: str) -> int:
        """Submits a batch script with options of sbatch and returns the id of the job."""
        answer = self._ask("sbatch", "--parsable", *options, script, cwd=cwd or script.parent, **variables)
        return int(answer.split(";")[0])

    def squeue(self) -> dict[int, str]:
        """Returns the state of each job that has not ended."""
        lines = self._ask("squeue", "--noheader", "--format=%A %T").splitlines()
        return {int(number): state for number, state in map(str.split, lines)}

    def job(self, job_id: int) -> dict[str, str]:
        """Returns what `scontrol show job` says: JobState, Restarts, ExitCode, NodeList and so on."""
        return _fields(self._ask("scontrol", "show", "job", "-o", str(job_id)))

    def node(self, i: int) -> dict[str, str]:
        """Returns what `scontrol show node` says: State, Reason and so on."""
        return _fields(self._ask("scontrol", "show", "node", "-o", self.names[i - 1]))

    def wait_for_state(self, job_id: int, states: str | Collection[str], timeout: float = 60) -> dict[str, str]:
        """Waits until a job is in one of these states, and returns `job` of then."""
        wanted = [states] if isinstance(states, str) else states
        end = time.monotonic() + timeout
        while (job := self.job(job_id))["JobState"] not in wanted:
            assert time.monotonic() < end, f"not {wanted} within {timeout} s: {job}"
            time.sleep(0.2)
        return job

    def fail_node(self, i: int) -> None:
        """Ends all that runs on a node, slurmd too."""
        if self.hosts:
            self.hosts.kill(i)
            return
        slurmd = psutil.Process(int((self.state / "run" / f"slurmd.{self.names[i - 1]}.pid").read_text()))
        for process in [slurmd, *self._steps(i)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _steps(self, i: int) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                variables = process.environ()
                ours = variables.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if ours and variables.get("SLURMD_NODENAME") == self.names[i - 1]:
                    found.append(process)
        return found

    def restore_nodes(self) -> None:
        """Starts the daemons of Slurm that do not run and waits until every node can be used."""
        if self.hosts:
            self.hosts.mend_machines()
        _script("slurm-up", self.state, len(self.names), self.port, *([self.hosts.state] if self.hosts else []))

    def mend(self) -> None:
        """Cancels all jobs and restores the nodes."""
        for options in (["--signal=KILL", "--full"], []):
            self.run(["scancel", f"--user={os.getuid()}", *options])
        end_jobs(self.jobs)
        self.restore_nodes()
        end = time.monotonic() + 30
        while jobs := self.squeue():
            assert time.monotonic() < end, f"not cancelled within 30 s: {jobs}"
            time.sleep(0.1)


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline()) or str(process)
    return str(process)


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^| )([A-Za-z][\w:/]*)=(.*?)(?= [A-Za-z][\w:/]*=|\s*$)", line))
