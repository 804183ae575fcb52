"""Several processes on this machine: GPUs through `accelerate launch`, CPU processes through torchrun.

`accelerate launch` starts several processes only where there are GPUs; on the CPU it silently starts one.
Both launchers run inside this process (`launch.agent`), so that their outcome becomes our exit code and nothing they
started outlives them. With `launch.max_restarts` torch's agent starts a failed job again; with
`memory.on_oom: shrink` a job that ran out of memory is started again from here.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from launch.agent import Outcome, end_descendants, explain_signal, run_agent
from trainer.cli import EXIT_FAILED
from trainer.config import Config
from trainer.errors import UserError
from trainer.memory.shrink import Shrink, read_shrink
from trainer.system import die_with_parent

logger = logging.getLogger("lockstep")

_TRAIN_SCRIPT = Path(__file__).resolve().parent.parent / "train.py"
_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")  # passed on to the ranks
_SHUTDOWN_SECONDS = 30  # which ranks have after a signal before they are killed, at least
_SHUTDOWN_MARGIN = 15  # beyond faults.grace


@dataclass(frozen=True)
class LaunchPlan:
    """A command line, as a person could type it."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def plan(num_processes: int | None, arguments: Sequence[str], config: Config) -> LaunchPlan:
    """Chooses what starts `num_processes` processes of `train.py` here.

    Args:
        num_processes: None for one per GPU, or one where there is no GPU.
        arguments: what `train.py` is called with.
        config: what these arguments come to.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    num_gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    count = num_processes or num_gpus or 1
    if num_gpus and count > num_gpus:
        raise UserError(f"--processes {count}: this machine has {num_gpus} GPUs")
    script = [str(_TRAIN_SCRIPT), *arguments]
    restarts = config.launch.max_restarts
    if count == 1 and not restarts:
        return LaunchPlan([sys.executable, *script])
    # Variables, as accelerate has no such options.
    shutdown = max(_SHUTDOWN_SECONDS, math.ceil(config.faults.grace.seconds) + _SHUTDOWN_MARGIN)
    variables = {"PET_SIGNALS_TO_HANDLE": ",".join(_SIGNALS), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(shutdown)}
    if num_gpus and count > 1:
        options = ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1"]
        options += ["--mixed_precision", config.precision, "--dynamo_backend", "no", "--main_process_port", "0"]
        options += ["--max_restarts", str(restarts)] if restarts else []
        return LaunchPlan(["accelerate", "launch", *options, *script], variables)
    if not num_gpus:
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        variables["ACCELERATE_USE_CPU"] = "true"
        variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    options = ["--standalone", "--nproc-per-node", str(count)]
    options += ["--max-restarts", str(restarts)] if restarts else []
    return LaunchPlan(["torchrun", *options, *script], variables)


def run(plan: LaunchPlan, config: Config) -> int:
    """Runs a plan to its end and returns the exit code of the training.

    With `memory.on_oom: shrink` the plan runs again as long as it fails for want of memory and has left a smaller
    micro-batch than before, which ends at the latest when a micro-batch is one sample.
    """
    os.environ.update(plan.environment)
    is_alone = plan.command[0] == sys.executable
    if is_alone and config.memory.on_oom != "shrink":
        os.execv(sys.executable, plan.command)  # one process needs no launcher; signals and codes are its own
    while True:
        before = read_shrink(config.run_dir)
        if is_alone:
            outcome = _run_child(plan.command)
        else:
            outcome = run_agent(plan.command, config.run_dir, is_over=partial(_shrunk, config, before))
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
    if outcome.error is not None:
        sys.stderr.write(f"error: {outcome.error}\n")
    return outcome.code


def _shrunk(config: Config, before: Shrink | None) -> Shrink | None:
    """Returns the smaller micro-batch that a job which began with `before` has left for the next one, if any."""
    record = read_shrink(config.run_dir) if config.memory.on_oom == "shrink" else None
    return record if record is not None and record.follows(before) else None


def _run_child(command: Sequence[str]) -> Outcome:
    """Runs one process, as torchrun does: in a session of its own, with the stop signals passed on."""
    process: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in map(signal.Signals.__getitem__, _SIGNALS)}
    try:
        orphan = die_with_parent if sys.platform == "linux" else None
        process = subprocess.Popen(command, start_new_session=True, preexec_fn=orphan)
        for number in received:  # while it was being started
            process.send_signal(number)
        code = process.wait()
    finally:
        end_descendants()
        for number, handler in previous.items():
            signal.signal(number, handler)
    error = explain_signal("the training", -code) if code < 0 else None
    return Outcome(code if code >= 0 else EXIT_FAILED, told_to_stop=bool(received), error=error)
