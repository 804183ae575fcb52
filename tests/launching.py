"""Starting real jobs in tests, and seeing that nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from conftest import REPOSITORY, SUPPORT

TIMEOUT = 280  # seconds, after which something hangs


def environment(**variables: str) -> dict[str, str]:
    """Returns the environment of a job: no GPU, no tracker account, the test support modules importable."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "ACCELERATE_", "OMP_", "THP_"))}
    path = os.pathsep.join([str(REPOSITORY), str(SUPPORT)])
    return {**inherited, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "HOME": "/nonexistent", **variables}


def run(command: list[str], cwd: Path, timeout: float = TIMEOUT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=timeout, check=False
    )


def local(config: Path, processes: int, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m launch local` in the config's folder."""
    arguments = ["--config", str(config), "--processes", str(processes), *overrides]
    return run([sys.executable, "-m", "launch", "local", *arguments], config.parent, TIMEOUT, **variables)


def on_processes(count: int, script: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of `support/` on so many processes under torchrun, a thread each, to its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return run([*command, str(SUPPORT / script), *arguments], cwd, 280, OMP_NUM_THREADS="1")  # some compile for minutes


class Job:
    """A job in the background, whose output is watched."""

    def __init__(self, command: list[str], cwd: Path, **variables: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            self.lines.extend(self.process.stdout)

    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, seen: Callable[[str], bool]) -> None:
        """Waits until the output satisfies `seen`."""
        end = time.monotonic() + TIMEOUT
        while not seen(self.output()):
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        """Returns the processes below the job's first one."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def signal(self, number: signal.Signals, group: bool = False) -> None:
        """Sends a signal to the first process, or to its whole group as a terminal's Ctrl-C does."""
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def end(self) -> int:
        """Waits for the exit code."""
        code = self.process.wait(TIMEOUT)
        self._reader.join(10)
        return code


def alive(processes: list[psutil.Process], within: float = 10) -> list[str]:
    """Returns the command lines of those that still run after a moment of grace."""
    _, left = psutil.wait_procs(processes, timeout=within)
    return [" ".join(p.cmdline()) for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
