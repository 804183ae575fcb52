"""torch's elastic agent in this process: which failures start the ranks again, what is said then, how the job ended.

torchrun and `accelerate launch` both run this agent. It starts ranks again after any exit code but 0; here a bad
config, a stop on request and a fault that another start cannot mend end the job instead.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import torch.distributed.launcher.api as launcher
import torch.distributed.run as torchrun
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError, RendezvousTimeoutError

from launch.logs import AgentLogs, RankLogs
from trainer.cli import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_USAGE
from trainer.faults.fault import Fault, read_first
from trainer.files import read_summary
from trainer.system import LAUNCHER_VARIABLE

logger = logging.getLogger("lockstep")

_SURVIVOR_SECONDS = 10  # which the ranks that are left get to end by themselves when one has failed
_STOPPING_SECONDS = 30  # the same when one has stopped on request: they are on their way
_NEWS_SECONDS = 2.0  # which a signal, or another machine's agent at the next meeting, may come after this one's ranks
_KILLED = "most likely the system was out of memory, or somebody killed it"


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Args:
        code: its exit code.
        told_to_stop: whether a signal to the launcher asked for the end.
        error: of the rank that failed first; None where nothing failed, or the ranks have said all.
        rank: that failed first on this machine, if one did.
        is_own: whether what failed was on this machine, and not only elsewhere.
        has_met: whether the machines have met, so that there were ranks.
    """

    code: int
    told_to_stop: bool = False
    error: str | None = None
    rank: int | None = None
    is_own: bool = True
    has_met: bool = True


def run_agent(command: Sequence[str], run_dir: Path, logs: RankLogs, is_over: Callable[[], object]) -> Outcome:
    """Runs `torchrun ...` or `accelerate launch ...` in this process, until its job has ended for good.

    Args:
        command: the launcher's command line.
        run_dir: of the run, where ranks write down their faults.
        logs: what becomes of the ranks' output.
        is_over: called after a failure; what is true ends the job, whatever restarts are left.
    """
    # The agent's reports of failed workers repeat what the workers said. Each of its loggers has a level.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    job = _Job(run_dir, is_over)
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    try:
        with _our_agent(job, logs):
            _launch(command)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        is_own = job.is_own_failure(codes)
        return Outcome(_exit_code(codes), error=job.explain(codes), rank=job.first_rank(codes), is_own=is_own)
    except SignalException as request:
        code = EXIT_STOPPED if job.is_between else _exit_code_of_stopped(job.codes, request.sigval)
        return Outcome(code, told_to_stop=True)
    except KeyboardInterrupt:  # before there was a rank
        return Outcome(EXIT_FAILED, told_to_stop=True)
    except (RendezvousError, DistError) as error:  # DistError: a machine is lost between meeting and starting
        return Outcome(EXIT_FAILED, error=job.explain_parting(error), is_own=False, has_met=not job.is_between)
    finally:
        end_descendants()
        logs.close()
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
    known = {known.value: known.name for known in signal.Signals}  # most real-time signals have no name
    text = f"{who} was ended by {known.get(number, f'signal {number}')}"
    return f"{text}; {_KILLED}" if number == signal.SIGKILL else text


class _Job:
    """What the agent is told of a job, and what it finds out."""

    def __init__(self, run_dir: Path, is_over: Callable[[], object]) -> None:
        self.is_over = is_over
        self.started = time.time()  # the ranks of now
        self.is_between = True  # whether there are no ranks, and are to be: at first, and after some have failed
        # Exit codes by rank; a negative one is the signal that it died of.
        self.first: dict[int, int] = {}  # of the ranks that had failed before the agent ended the others
        self.codes: dict[int, int] = {}  # of all, once the agent has ended them
        self._run_dir = run_dir

    def is_final(self, codes: Mapping[int, int]) -> bool:
        """Tells whether starting again is no use, or not wanted, after ranks have failed with these codes."""
        if _exit_code(codes) != EXIT_FAILED:
            return True
        fault = self._fault()
        return (fault is not None and not fault.restart) or bool(self.is_over())

    def explain(self, codes: Mapping[int, int]) -> str | None:
        """Returns the first rank's real error in one line; None after a stop or a bad config, which are explained."""
        if _exit_code(codes) != EXIT_FAILED:
            return None
        fault = self._fault()
        if fault is not None and fault.kind != "lost":
            return str(fault)
        rank = self.first_rank(codes)
        code = self._by_rank(codes)[rank]
        if code < 0:
            return explain_signal(f"rank {rank}", -code)
        return str(fault) if fault is not None else f"rank {rank} failed, and said why"

    def is_own_failure(self, codes: Mapping[int, int]) -> bool:
        """Tells whether a rank on this machine has failed by itself, and not because of a request or of others."""
        code = _exit_code(codes)
        if code != EXIT_FAILED:
            return code != EXIT_STOPPED
        fault = self._fault()
        return fault is None or fault.rank in codes

    def was_stopped_by_signal(self) -> bool:
        """Tells whether the ranks have stopped because of a signal to one of them, and not of the file STOP."""
        return str(read_summary(self._run_dir).get("stopped_by")).startswith("SIG")

    def first_rank(self, codes: Mapping[int, int]) -> int:
        """Returns the rank on this machine that failed first."""
        first = self.first or codes
        fault = self._fault()
        if fault is not None:
            # Survivors may die of signals. They may end before a rank with an error, which has more to say.
            ended = self._by_rank(codes) if fault.kind == "error" else first
            if ended.get(fault.rank, 0) != 0:
                return fault.rank
        if EXIT_USAGE in first.values():
            return min(rank for rank, code in first.items() if code == EXIT_USAGE)
        # A rank that dies of a signal leaves no word, and its peers fail as they lose it: it is the reason.
        return min(first, key=lambda rank: (first[rank] >= 0, first[rank] == -signal.SIGTERM, rank))

    def explain_parting(self, error: RendezvousError | DistError) -> str:
        """Returns in one line why this machine could not meet the others, or not any more."""
        fault, is_closed = self._fault(), isinstance(error, RendezvousClosedError)
        if fault is not None and (is_closed or not fault.restart):  # for which another machine's agent ended the job
            return str(fault)
        if is_closed:
            return "another machine has ended the job, and said why"
        if isinstance(error, RendezvousTimeoutError):
            return "not enough machines came to the rendezvous in time; did the others start, and can they reach it?"
        return "the first machine, where the others meet, cannot be reached (any more)"

    def _by_rank(self, codes: Mapping[int, int]) -> dict[int, int]:
        """Returns the codes of all ranks here; of those that failed first what they ended with by themselves."""
        return {**codes, **self.first}

    def _fault(self) -> Fault | None:
        return read_first(self._run_dir, since=self.started)


class _Agent(LocalElasticAgent):
    """Ends a job that it is no use to start again, says so before it starts one again, and waits for nobody long.

    torch's documentation names the methods that are overridden here as those by which an agent is adapted.
    """

    def __init__(self, job: _Job, logs: RankLogs, **options: Any) -> None:
        super().__init__(**{**options, "logs_specs": AgentLogs(logs)})
        self._job = job

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._job.started, self._job.first, self._job.codes = time.time(), {}, {}
        started = super()._start_workers(worker_group)
        self._job.is_between = False
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        assert self._pcontext is not None
        ended = {worker_group.workers[i].global_rank: _code_of(pid) for i, pid in self._pcontext.pids().items()}
        first = {rank: code for rank, code in ended.items() if code}
        if first:
            self._job.first = first
            # torch ends the other ranks in the same way, but gives 30 seconds to those that do not react.
            self._shutdown(timeout=_STOPPING_SECONDS if EXIT_STOPPED in first.values() else _SURVIVOR_SECONDS)
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
            if not self._job.is_own_failure(codes) and self._others_go_on(codes):
                self._job.is_between = True
                logger.info("restarting: the machines of this job have changed")
                self._restart_workers(worker_group)
                return RunResult(state=WorkerState.HEALTHY)
            if self._job.is_final(codes):
                raise ChildFailedError(name=worker_group.spec.get_entrypoint_name(), failures=result.failures)
            if self._remaining_restarts > 0:
                number = worker_group.spec.max_restarts - self._remaining_restarts + 1
                error = self._job.explain(codes)
                self._job.is_between = True
                logger.info("restarting (%d of %d): %s", number, worker_group.spec.max_restarts, error)
        return result

    def _others_go_on(self, codes: Mapping[int, int]) -> bool:
        """Tells whether this machine's ranks have ended because others left or came, and the job continues.

        Where somebody comes, or another machine's ranks have failed, agents stop their ranks and wait for all others
        at the next meeting. A machine that is told to leave stops all ranks, which may come here before the news.
        """
        spec = self._worker_group.spec
        settings = getattr(spec.rdzv_handler, "settings", None)  # one machine alone meets nobody
        if settings is None or settings.max_nodes == 1:
            return False
        end = time.monotonic() + _NEWS_SECONDS
        while spec.rdzv_handler.num_nodes_waiting() == 0:
            if time.monotonic() > end:
                is_elastic = settings.min_nodes < self._worker_group.group_world_size
                return is_elastic and _exit_code(codes) == EXIT_STOPPED and self._job.was_stopped_by_signal()
            time.sleep(0.1)  # a signal to this agent ends the wait
        return True

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        super()._shutdown(death_sig, timeout)
        if self._pcontext is not None:
            handlers = cast(SubprocessContext, self._pcontext).subprocess_handlers
            codes = {i: handler.proc.returncode for i, handler in handlers.items()}
            self._job.codes = {i: code for i, code in codes.items() if code is not None}


@contextmanager
def _our_agent(job: _Job, logs: RankLogs) -> Iterator[None]:
    """Has torchrun and accelerate make our agent: they offer no other way to choose one."""
    theirs = launcher.LocalElasticAgent
    launcher.LocalElasticAgent = partial(_Agent, job, logs)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        launcher.LocalElasticAgent = theirs  # type: ignore[misc]


def _launch(command: Sequence[str]) -> None:
    if command[0] == "torchrun":
        torchrun.run(torchrun.parse_args(command[1:]))
    else:
        from accelerate.commands.launch import launch_command, launch_command_parser

        launch_command(launch_command_parser().parse_args(command[2:]))


def _code_of(pid: int) -> int | None:
    """Returns the exit code of a child that has ended, and leaves it to be waited for."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # waited for already
        return None
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _exit_code(codes: Mapping[int, int]) -> int:
    """Returns one exit code for all ranks: those that lost a failing peer end in 1, whatever it had."""
    found = set(codes.values())
    if EXIT_USAGE in found:
        return EXIT_USAGE
    # The agent ends with SIGTERM what is left when the first rank has gone.
    return EXIT_STOPPED if EXIT_STOPPED in found and found <= {EXIT_STOPPED, -signal.SIGTERM} else EXIT_FAILED


def _exit_code_of_stopped(codes: Mapping[int, int], request: signal.Signals) -> int:
    """Returns one exit code for all ranks of a job that got a signal, which ends those that have not begun to train."""
    found = set(codes.values())
    if found == {EXIT_FINISHED}:
        return EXIT_FINISHED
    return EXIT_STOPPED if found and found <= {EXIT_STOPPED, -request} else _exit_code(codes)
