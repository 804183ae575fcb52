"""A command line that starts processes of `train.py` on this machine, and running it to its end.

torchrun and `accelerate launch` run inside this process (`launch.agent`), so that their outcome becomes our exit code
and nothing they started outlives them. With `launch.max_restarts` torch's agent starts a failed job again; with
`memory.on_oom: shrink` a job that ran out of memory is started again from here. What the command line is, the targets
decide: `launch.local` for this machine alone, `launch.node` for one of several.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from launch.agent import Outcome, end_descendants, explain_signal, run_agent
from launch.logs import RankLogs
from launch.stopping import SIGNALS, shutdown_seconds
from trainer.cli import EXIT_FAILED, EXIT_USAGE
from trainer.config import Config
from trainer.data.tuning import cores_of_a_rank
from trainer.errors import UserError
from trainer.memory.shrink import Shrink, read_shrink
from trainer.system import die_with_parent

logger = logging.getLogger("lockstep")

_REUNION_SECONDS = 120.0  # for machines to meet again after one has run out of memory
TRAIN_SCRIPT = str(Path(__file__).resolve().parent.parent / "train.py")


@dataclass(frozen=True)
class LaunchPlan:
    """A command line, as a person could type it."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def after(self, record: Shrink) -> LaunchPlan:
        """Returns the same for a start after a shrink: agents cannot meet again under a name that was closed.

        The new name is the same on all machines, also on one that has been replaced in the meantime.
        """
        command = list(self.command)
        if "--rdzv-id" in command:
            command[command.index("--rdzv-id") + 1] += f".{record.time:.0f}"
        return replace(self, command=command)


def count_gpus(config: Config) -> int:
    """Returns how many GPUs, or other accelerators, the job's processes will see here."""
    os.environ.update(config.launch.environment)  # CUDA_VISIBLE_DEVICES may be there
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def count_processes(wanted: int | None, num_gpus: int) -> int:
    """Returns how many processes to start here.

    Args:
        wanted: None for one per GPU, or one where there is no GPU.
        num_gpus: on this machine.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    if wanted and num_gpus and wanted > num_gpus:
        raise UserError(f"{wanted} processes: this machine has {num_gpus} GPUs")
    return wanted or num_gpus or 1


def agent_variables(config: Config, num_processes: int, num_gpus: int) -> dict[str, str]:
    """Returns the variables of an agent that starts so many processes; accelerate has no options for these."""
    variables = {
        "PET_SIGNALS_TO_HANDLE": ",".join(SIGNALS),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(shutdown_seconds(config)),
    }
    if not num_gpus:
        threads = cores_of_a_rank(num_processes)
        variables["ACCELERATE_USE_CPU"] = "true"
        variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    return {**variables, **config.launch.environment}


def run(plan: LaunchPlan, config: Config, code_of_others: int = EXIT_FAILED) -> int:
    """Runs a plan to its end and returns the exit code of the training.

    With `memory.on_oom: shrink` the plan runs again as long as it fails for want of memory and has left a smaller
    micro-batch than before, which ends at the latest when a micro-batch is one sample.

    Args:
        plan: what to run.
        config: of the run.
        code_of_others: the exit code where another machine has failed, or this one was told to stop too early or too
            late to do so in order.
    """
    os.environ.update(plan.environment)
    logs = RankLogs(config.run_dir)
    patience = 0.0
    while True:
        before = read_shrink(config.run_dir) if config.memory.on_oom == "shrink" else None
        command = plan.command if before is None else plan.after(before).command
        outcome = _run_once(command, config.run_dir, logs, is_over=partial(_shrunk, config, before))
        if not outcome.has_met and not outcome.told_to_stop and time.monotonic() < patience:
            # The first machine's agent was still in the meeting that another one has ended, and is on its way.
            time.sleep(1)
            continue
        record = _shrunk(config, before)
        if outcome.code != EXIT_FAILED or outcome.told_to_stop or record is None:
            break
        if config.checkpoint.resume == "never":
            from trainer.checkpoint.folder import open_folder  # late: a second of imports that no launcher needs

            if open_folder(config).steps():
                logger.info("not started again, as checkpoint.resume is never")
                break
        logger.info(
            "rank %d ran out of memory at step %d: starting again with train.micro_batch_size %d instead of %d",
            record.rank,
            record.step,
            record.micro_batch_size,
            record.was,
        )
        patience = time.monotonic() + _REUNION_SECONDS
    _show_failure(outcome, logs)
    if outcome.code == EXIT_FAILED and (outcome.told_to_stop or not outcome.is_own):
        return code_of_others
    return outcome.code


def run_script(plan: LaunchPlan, folder: Path, explains_failure: Callable[[], bool]) -> int:
    """Runs a plan of another script than `train.py`, once, and returns its exit code.

    Args:
        plan: of the script.
        folder: for its output.
        explains_failure: tells afterwards whether the script has said itself why it failed.
    """
    os.environ.update(plan.environment)
    logs = RankLogs(folder)
    outcome = _run_once(plan.command, folder, logs, is_over=lambda: False)
    if not explains_failure():
        _show_failure(outcome, logs)
    return outcome.code


def _run_once(command: Sequence[str], run_dir: Path, logs: RankLogs, is_over: Callable[[], object]) -> Outcome:
    if command[0] == sys.executable:
        return _run_child(command, logs)
    return run_agent(command, run_dir, logs, is_over)


def _show_failure(outcome: Outcome, logs: RankLogs) -> None:
    if outcome.rank is not None and outcome.code in (EXIT_FAILED, EXIT_USAGE):
        logs.show_end(outcome.rank)
    if outcome.error is not None:
        sys.stderr.write(f"error: {outcome.error}\n")


def _shrunk(config: Config, before: Shrink | None) -> Shrink | None:
    """Returns the smaller micro-batch that a job which began with `before` has left for the next one, if any."""
    record = read_shrink(config.run_dir) if config.memory.on_oom == "shrink" else None
    return record if record is not None and record.follows(before) else None


def _run_child(command: Sequence[str], logs: RankLogs) -> Outcome:
    """Runs one process, as torchrun does: in a session of its own, with the stop signals passed on."""
    process: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in map(signal.Signals.__getitem__, SIGNALS)}
    output = logs.open(rank=0)
    try:
        orphan = die_with_parent if sys.platform == "linux" else None
        with open(output.stdout, "wb") as stdout, open(output.stderr, "wb") as stderr:
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, start_new_session=True, preexec_fn=orphan)
        for number in received:  # while it was being started
            process.send_signal(number)
        code = process.wait()
    finally:
        end_descendants()
        logs.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    error = explain_signal("the training", -code) if code < 0 else None
    return Outcome(code if code >= 0 else EXIT_FAILED, told_to_stop=bool(received), error=error)
