"""`python -m launch slurm`: writes the batch script, submits it, or runs it in the allocation that we are in.

The script is `launch.slurm_script`, what Slurm says `launch.slurm_jobs`, and what comes after the submission
`launch.slurm_watch`. Imports no torch: a job is submitted in a second.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from launch import slurm_jobs
from launch.slurm_script import (
    Allocation,
    Options,
    array_tasks,
    run_folder,
    sbatch_options,
    script,
    stop_seconds,
    task_folder,
)
from launch.slurm_watch import Submission, Watch
from trainer.cli import EXIT_FAILED, EXIT_FINISHED
from trainer.config import Config
from trainer.errors import UserError
from trainer.faults.stopping import REPEAT_SECONDS
from trainer.files import replacing

logger = logging.getLogger("lockstep")

_SCRIPT, _SCRIPT_HERE = "slurm.sh", "slurm-here.sh"
_FIRST_LOOK_SECONDS = 4.0  # in which Slurm says of most jobs whether they can run at all
_VAGUE = ("None", "", "PartitionConfig")  # reasons to wait that Slurm makes clearer in a moment
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def run(config: Config, config_file: str, overrides: Sequence[str], *, dry_run: bool, follow: bool, wait: bool) -> int:
    """Submits a job, or runs it where we are inside an allocation.

    Args:
        config: the run.
        config_file: its file.
        overrides: that win over the file.
        dry_run: only print the script.
        follow: show the job's output until it has ended.
        wait: wait for its end.

    Returns:
        The exit code of the training, where it was waited for; else 0.

    Raises:
        UserError: Slurm refuses the job, could never run it, or is not here; or one of this run is in Slurm already.
    """
    try:
        allocation = allocation_of(config)
        text = script(config, config_file, overrides, allocation)
        if dry_run:
            sys.stdout.write(text)
            return EXIT_FINISHED
        slurm_jobs.need("srun" if allocation else "sbatch")
        _check_bash(text)
        _refuse_second(config)
        if allocation is not None:
            return run_here(_write(run_folder(config), _SCRIPT_HERE, text))
        submission = _submit(config, text)
    except UserError as error:
        raise UserError(*(config.locate(problem) for problem in error.problems)) from None
    if not follow and not wait:
        return EXIT_FINISHED
    try:
        return Watch(submission, run_folder(config), config, shows=follow).run()
    except KeyboardInterrupt:
        sys.stderr.write(f"\njob {submission.job} goes on; {_how_to_cancel(config)} ends it\n")
        return EXIT_FAILED


def allocation_of(config: Config) -> Allocation | None:
    """Returns the allocation that we are in; None outside.

    Raises:
        UserError: it is smaller than what the run asks for, or an array is asked for in it.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return None
    given, nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1")), config.launch.nodes
    if nodes.least > given:
        raise UserError(f"{nodes}: this allocation has {given} (job {os.environ['SLURM_JOB_ID']})", path="launch.nodes")
    if config.launch.slurm.array is not None:
        message = "an allocation that exists runs one job; submit an array from outside"
        raise UserError(message, path="launch.slurm.array")
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return Allocation(min(nodes.most, given), int(gpus) if gpus.isdigit() else None)


def _check_bash(text: str) -> None:
    """Has bash read the script, parts of which are the user's."""
    answer = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    if answer.returncode:
        told = re.sub(r"^bash: line (\d+): ", r"line \1 of the script: ", answer.stderr.splitlines()[0])
        raise UserError(f"bash cannot read launch.slurm.setup or launch.slurm.container: {told}", path="launch.slurm")


def _refuse_second(config: Config) -> None:
    """Refuses to start a run that a job runs already, or is to run."""
    tasks = [None] if config.launch.slurm.array is None else array_tasks(config.launch.slurm.array)
    own = os.environ.get("SLURM_JOB_ID")
    asked: set[str] = set()
    for folder in (task_folder(config, task) for task in tasks):
        note = Submission.read(folder)
        if note is None or note.job in asked or note.job == own:
            continue
        asked.add(note.job)
        if running := note.running():
            state = "waits" if all(record.waits for record in running) else "runs"
            message = f"job {note.job} {state} already for the run in '{folder}'"
            raise UserError(f"{message}; `python -m launch slurm cancel {folder}` ends it", path="run.dir")


def _submit(config: Config, text: str) -> Submission:
    folder = run_folder(config)
    file = _write(folder, _SCRIPT, text)
    tasks = {} if config.launch.slurm.array is None else _task_folders(config)
    for path in tasks.values():
        Path(path, "launch").mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for the output
    options = sbatch_options(config)
    answer = slurm_jobs.call("sbatch", "--parsable", str(file), environment=_environment(options))
    if answer.returncode:
        raise slurm_jobs.refusal(answer.stderr, config)
    job = answer.stdout.strip().partition(";")[0]
    is_ours = "output" not in config.launch.slurm.extra
    submission = Submission(job, str(file), stop_seconds(config), tasks, is_ours)
    submission.write(folder)
    output: Path | str
    for task, path in tasks.items():
        replace(submission, job=f"{job}_{task}", tasks={}).write(Path(path))
    try:
        output = _first_look(submission, config)
    except slurm_jobs.NoAnswerError as error:  # the job is Slurm's by now
        logger.warning("job %s: how it stands is not known: %s", job, error)
        output = "(see scontrol show job)"
    sys.stdout.write(f"job {job} submitted\nscript  {file}\noutput  {output}\n")
    sys.stdout.write(f"`python -m launch slurm status {_shown(config)}` shows its state, `cancel` ends it\n")
    sys.stdout.flush()
    return submission


def _first_look(submission: Submission, config: Config) -> Path | str:
    """Waits a moment for what Slurm makes of a job that it has accepted. Returns where its output will be.

    Raises:
        UserError: it could never run; it is taken back then.
        NoAnswerError: Slurm has accepted the job, and does not answer any more.
    """
    end = time.monotonic() + _FIRST_LOOK_SECONDS
    while True:
        records = slurm_jobs.find(submission.job)
        waiting = [record for record in records if record.waits]
        if all(record.reason not in _VAGUE for record in waiting) or time.monotonic() > end:
            break
        time.sleep(0.3)
    for record in waiting:
        if (problem := slurm_jobs.never_runs(record, config)) is not None:
            slurm_jobs.call("scancel", submission.job)
            raise problem
    if waiting:
        logger.info("job %s waits: %s", waiting[0].job, slurm_jobs.explain_wait(waiting[0]))
    return submission.output_of(records[-1], run_folder(config)) if records else "(see scontrol show job)"


def run_here(file: Path) -> int:
    """Runs a script in the allocation. The first signal asks the run to stop, a later one ends it."""
    process: subprocess.Popen[bytes] | None = None
    asked: list[float] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if process is None or (asked and now - asked[0] < REPEAT_SECONDS):
            return
        process.send_signal(signal.SIGINT if asked else signal.SIGUSR1)  # see the traps in the script
        asked.append(now)

    previous = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        # Of a session of its own: the terminal's Ctrl-C comes to us alone.
        process = subprocess.Popen(["bash", str(file)], start_new_session=True)
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _write(folder: Path, name: str, text: str) -> Path:
    """Writes a script at once: bash may be reading the one before."""
    file = folder / "launch" / name
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as staged:
            staged.write_text(text, encoding="utf-8")
            staged.chmod(0o755)
    except OSError as error:
        raise UserError(f"cannot write to '{file.parent}': {error.strerror}", path="run.dir") from error
    return file


def _task_folders(config: Config) -> dict[int, str]:
    array = config.launch.slurm.array
    assert array is not None
    return {task: str(task_folder(config, task)) for task in array_tasks(array)}


def _environment(options: Options) -> dict[str, str]:
    """Returns the environment for sbatch, without variables that would win over the script's own options."""
    names = {"time": "TIMELIMIT", "array": "ARRAY_INX"}
    ours = {f"SBATCH_{names.get(option, option.upper().replace('-', '_'))}" for option in options}
    if ours & {"SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"}:
        ours |= {"SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"}
    return {name: value for name, value in os.environ.items() if name not in ours}


def _shown(config: Config) -> str:
    return str(config.run_dir)


def _how_to_cancel(config: Config) -> str:
    return f"`python -m launch slurm cancel {_shown(config)}`"
