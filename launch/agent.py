"""torch's elastic agent in this process: which failures start the ranks again, what is said then, how the job ended.

torchrun and `accelerate launch` both run this agent. It starts ranks again after any exit code but 0; here a bad
config, a stop on request and a fault that another start cannot mend end the job instead.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch.distributed.launcher.api as launcher
import torch.distributed.run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from trainer.cli import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_USAGE, LAUNCHER_VARIABLE
from trainer.faults.fault import Fault, read_first

logger = logging.getLogger("lockstep")

_SURVIVOR_SECONDS = 10  # which the ranks that are left get to write down what they were doing, after one has failed
_KILLED = "most likely the system was out of memory, or somebody killed it"


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Args:
        code: its exit code.
        told_to_stop: whether a signal to the launcher asked for the end.
        error: of the rank that failed first; None where nothing failed, or the ranks have said all.
    """

    code: int
    told_to_stop: bool = False
    error: str | None = None


def run_agent(command: Sequence[str], run_dir: Path, is_over: Callable[[], bool]) -> Outcome:
    """Runs `torchrun ...` or `accelerate launch ...` in this process, until its job has ended for good.

    Args:
        command: the launcher's command line.
        run_dir: of the run, where ranks write down their faults.
        is_over: called after a failure; True ends the job, whatever restarts are left.
    """
    # The agent's reports of failed workers repeat what the workers said. Each of its loggers has a level.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    job = _Job(run_dir, is_over)
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    try:
        with _our_agent(job):
            _launch(command)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return Outcome(_exit_code(codes.values()), error=job.explain(codes))
    except (SignalException, KeyboardInterrupt):
        return Outcome(_code_of_summary(run_dir, job.launched), told_to_stop=True)
    finally:
        end_descendants()
    return Outcome(EXIT_FINISHED)


def end_descendants() -> None:
    """Kills what is still running below this process, such as ranks after a second Ctrl-C."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=5)


def explain_signal(who: str, number: int) -> str:
    """Returns what to say of a process that died of a signal."""
    text = f"{who} was ended by {signal.Signals(number).name}"
    return f"{text}; {_KILLED}" if number == signal.SIGKILL else text


class _Job:
    """What the agent is told of a job, and what it finds out."""

    def __init__(self, run_dir: Path, is_over: Callable[[], bool]) -> None:
        self.is_over = is_over
        self.launched = self.started = time.time()  # the job, and its ranks of now
        self.failed_first: Collection[int] = ()  # ranks that had ended before the agent ended the others
        self._run_dir = run_dir

    def is_final(self, codes: Mapping[int, int]) -> bool:
        """Tells whether starting again is no use, or not wanted."""
        if _exit_code(codes.values()) != EXIT_FAILED:
            return True
        fault = self._fault()
        return (fault is not None and not fault.restart) or self.is_over()

    def explain(self, codes: Mapping[int, int]) -> str | None:
        """Returns the first rank's real error in one line; None after a stop or a bad config, which are explained.

        Args:
            codes: exit codes by rank, of those that failed; a negative one is the signal that it died of.
        """
        if _exit_code(codes.values()) != EXIT_FAILED:
            return None
        fault = self._fault()
        if fault is not None and fault.kind != "lost":
            return str(fault)
        # A rank that dies of a signal leaves no word, and its peers fail as they lose it: it is the reason.
        first = {rank: code for rank, code in codes.items() if rank in self.failed_first} or codes
        for rank, code in sorted(first.items(), key=lambda item: (item[1] >= 0, item[1] == -signal.SIGTERM, item[0])):
            if code < 0:
                return explain_signal(f"rank {rank}", -code)
            return str(fault) if fault is not None else f"rank {rank} failed, and said why"
        return None if fault is None else str(fault)

    def _fault(self) -> Fault | None:
        return read_first(self._run_dir, since=self.started)


class _Agent(LocalElasticAgent):
    """Ends a job that it is no use to start again, says so before it starts one again, and waits for nobody long."""

    def __init__(self, job: _Job, **options: Any) -> None:
        super().__init__(**options)
        self._job = job

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._job.started = time.time()
        self._job.failed_first = ()
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        assert self._pcontext is not None
        failed = {rank for rank, pid in self._pcontext.pids().items() if _has_failed(pid)}
        if failed:
            self._job.failed_first = {worker_group.workers[rank].global_rank for rank in failed}
            # torch's own ending of the other ranks, which follows, gives those that do not react 30 seconds.
            self._shutdown(timeout=_SURVIVOR_SECONDS)
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
            if self._job.is_final(codes):
                raise ChildFailedError(name=worker_group.spec.get_entrypoint_name(), failures=result.failures)
            if self._remaining_restarts > 0:
                number = worker_group.spec.max_restarts - self._remaining_restarts + 1
                error = self._job.explain(codes)
                logger.info("restarting (%d of %d): %s", number, worker_group.spec.max_restarts, error)
        return result


@contextmanager
def _our_agent(job: _Job) -> Iterator[None]:
    """Has torchrun and accelerate make our agent: they offer no other way to choose one."""
    theirs = launcher.LocalElasticAgent

    def make(**options: Any) -> _Agent:
        return _Agent(job, **options)

    setattr(launcher, "LocalElasticAgent", make)  # noqa: B010
    try:
        yield
    finally:
        setattr(launcher, "LocalElasticAgent", theirs)  # noqa: B010


def _launch(command: Sequence[str]) -> None:
    if command[0] == "torchrun":
        torchrun.run(torchrun.parse_args(command[1:]))
    else:
        from accelerate.commands.launch import launch_command, launch_command_parser

        launch_command(launch_command_parser().parse_args(command[2:]))


def _has_failed(pid: int) -> bool:
    """Tells whether a child has ended in failure, and leaves it to be waited for."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # waited for already
        return False
    return ended is not None and ended.si_status != 0


def _exit_code(codes: Collection[int]) -> int:
    """Returns one exit code for all ranks: ranks that lost a failing peer end in 1, whatever it had."""
    if EXIT_USAGE in codes:
        return EXIT_USAGE
    # The agent ends with SIGTERM what is left when the first rank has gone.
    return EXIT_STOPPED if EXIT_STOPPED in codes and {*codes} <= {EXIT_STOPPED, -signal.SIGTERM} else EXIT_FAILED


def _code_of_summary(run_dir: Path, started: float) -> int:
    """Returns the exit code of a job that was told to stop: its agent no longer knows its workers' codes."""
    summary = run_dir / "summary.json"
    try:
        if summary.stat().st_mtime < started:
            return EXIT_FAILED
        status = json.loads(summary.read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError):
        return EXIT_FAILED
    return {"stopped": EXIT_STOPPED, "finished": EXIT_FINISHED}.get(status, EXIT_FAILED)
