"""Several processes on this machine: GPUs through `accelerate launch`, CPU processes through torchrun.

`accelerate launch` starts several processes only where there are GPUs; on the CPU it silently starts one.
Both launchers run inside this process, so that their outcome becomes our exit code and nothing they started
outlives them. With `memory.on_oom: shrink` a job that ran out of memory is started again from here.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed.run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from trainer.checkpoint.folder import open_folder
from trainer.cli import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_USAGE
from trainer.config import Config
from trainer.errors import UserError
from trainer.memory.shrink import read_shrink
from trainer.system import die_with_parent

logger = logging.getLogger("lockstep")

_TRAIN_SCRIPT = Path(__file__).resolve().parent.parent / "train.py"


@dataclass(frozen=True)
class LaunchPlan:
    """A command line, as a person could type it."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def plan(num_processes: int | None, arguments: Sequence[str], precision: str) -> LaunchPlan:
    """Chooses what starts `num_processes` processes of `train.py` here.

    Args:
        num_processes: None for one per GPU, or one where there is no GPU.
        arguments: what `train.py` is called with.
        precision: passed to accelerate, so that both agree.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    num_gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    count = num_processes or num_gpus or 1
    if num_gpus and count > num_gpus:
        raise UserError(f"--processes {count}: this machine has {num_gpus} GPUs")
    script = [str(_TRAIN_SCRIPT), *arguments]
    if count == 1:
        return LaunchPlan([sys.executable, *script])
    if num_gpus:
        options = ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1"]
        options += ["--mixed_precision", precision, "--dynamo_backend", "no", "--main_process_port", "0"]
        return LaunchPlan(["accelerate", "launch", *options, *script])
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    return LaunchPlan(["torchrun", "--standalone", "--nproc-per-node", str(count), *script], variables)


def run(plan: LaunchPlan, config: Config) -> int:
    """Runs a plan to its end and returns the exit code of the training.

    With `memory.on_oom: shrink` the plan runs again as long as it fails for want of memory and has left a smaller
    micro-batch than before, which ends at the latest when a micro-batch is one sample.
    """
    os.environ.update(plan.environment)
    if config.memory.on_oom != "shrink":
        if plan.command[0] == sys.executable:
            os.execv(sys.executable, plan.command)  # one process needs no launcher; signals and codes are its own
        return _run_once(plan, config.run_dir).code
    while True:
        before = read_shrink(config.run_dir)
        outcome = _run_once(plan, config.run_dir)
        record = read_shrink(config.run_dir)
        if outcome.code != EXIT_FAILED or outcome.told_to_stop or record is None or not record.follows(before):
            return outcome.code
        if config.checkpoint.resume == "never" and open_folder(config).steps():
            logger.info("not started again, as checkpoint.resume is never")
            return outcome.code
        logger.info(
            "rank %d ran out of memory at step %d: starting again with train.micro_batch_size %d instead of %d",
            record.rank,
            record.step,
            record.micro_batch_size,
            record.was,
        )


@dataclass(frozen=True)
class _Outcome:
    """How a job ended: its exit code, and whether a signal asked for the end."""

    code: int
    told_to_stop: bool = False


def _run_once(plan: LaunchPlan, run_dir: Path) -> _Outcome:
    if plan.command[0] == sys.executable:
        return _run_child(plan.command)
    # The agent's reports of failed workers repeat what the workers said. Each of its loggers has a level.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    started = time.time()
    try:
        _launch(plan.command)
    except ChildFailedError as error:
        return _Outcome(_exit_code({failure.exitcode for failure in error.failures.values()}))
    except (SignalException, KeyboardInterrupt):
        return _Outcome(_code_of_summary(run_dir, started), told_to_stop=True)
    finally:
        _end_descendants()
    return _Outcome(EXIT_FINISHED)


def _run_child(command: Sequence[str]) -> _Outcome:
    """Runs one process, as torchrun does: in a session of its own, with the stop signals passed on."""
    process: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        orphan = die_with_parent if sys.platform == "linux" else None
        process = subprocess.Popen(command, start_new_session=True, preexec_fn=orphan)
        for number in received:  # while it was being started
            process.send_signal(number)
        code = process.wait()
    finally:
        _end_descendants()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if code < 0:
        sys.stderr.write(f"the training was ended by {signal.Signals(-code).name}\n")
    return _Outcome(code if code >= 0 else EXIT_FAILED, told_to_stop=bool(received))


def _launch(command: Sequence[str]) -> None:
    if command[0] == "torchrun":
        torchrun.run(torchrun.parse_args(command[1:]))
    else:
        from accelerate.commands.launch import launch_command, launch_command_parser

        launch_command(launch_command_parser().parse_args(command[2:]))


def _exit_code(codes: set[int]) -> int:
    """Returns one exit code for all ranks: ranks that lost a failing peer end in 1, whatever it had."""
    if EXIT_USAGE in codes:
        return EXIT_USAGE
    # The agent ends with SIGTERM what is left when the first rank has gone.
    return EXIT_STOPPED if EXIT_STOPPED in codes and codes <= {EXIT_STOPPED, -15} else EXIT_FAILED


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


def _end_descendants() -> None:
    """Kills what is still running below this process, such as ranks after a second Ctrl-C."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=5)
