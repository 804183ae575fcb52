"""Starting the doctor's ranks as a run's are started, and the exit code: 0, or 1 where something fails."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.doctor.agreed import FOLDER_VARIABLE, RANK_SCRIPT, Request, is_bare, verdict_file
from trainer.cli import EXIT_FAILED, EXIT_FINISHED, EXIT_USAGE, show_problems
from trainer.config import Config, load_config
from trainer.errors import UserError

if TYPE_CHECKING:
    from launch.starting import LaunchPlan

_ONCE = "launch.max_restarts=0"


def plan_here(request: Request, script: str = RANK_SCRIPT) -> LaunchPlan:
    """Returns what starts the ranks of this machine alone.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    from launch import local

    config = load_config(request.file, [*request.overrides, _ONCE])
    return local.plan([*request.options, "--config", request.file, *request.overrides], config, script)


def run(plan: LaunchPlan, config: Config) -> int:
    """Runs this machine's ranks and returns the verdict where rank 0 is among them, else how they ended."""
    with tempfile.TemporaryDirectory(prefix="lockstep-doctor-") as name:
        os.environ[FOLDER_VARIABLE] = name
        verdict = verdict_file(Path(name))
        from launch.starting import run_script  # imports torch, which whoever asks other machines need not have

        code = run_script(plan, Path(name), explains_failure=verdict.exists)
        return int(verdict.read_text()) if verdict.exists() else code


def on_hosts(request: Request, names: Sequence[str] | None, hostfile: str | None, dry_run: bool) -> int:
    """Runs the ranks on hosts, all of which must come, and returns the exit code.

    Raises:
        UserError: nothing names a host, or there are too few.
    """
    from launch.hosts import HostsLaunch, choose_names

    chosen = choose_names(names, hostfile, request.config)
    wanted = request.config.launch
    count = min(wanted.nodes.most, len(chosen)) if "nodes" in wanted.model_fields_set else len(chosen)
    overrides = [*request.overrides, f"launch.nodes={count}", _ONCE]
    # Where the hosts have the code elsewhere, the stand-in for a config is found from there.
    file = os.path.relpath(request.file) if is_bare(request.file) else request.file
    file = request.file if file.startswith(os.pardir) else file
    launch = HostsLaunch(chosen, file, overrides, load_config(file, overrides), ["--doctor", *request.options])
    if dry_run:
        return launch.show()
    problems: list[str] = []  # that its own checks, which come first, find
    try:
        code = launch.run(in_spite_of=problems)
        if problems:
            raise UserError(*problems)
    except UserError as error:
        show_problems(error)
        return EXIT_FAILED
    return code


def on_slurm(request: Request, arguments: Sequence[str], dry_run: bool) -> int:
    """Runs the ranks in the allocation that we are in, or asks for one and does it there. Returns the exit code.

    Args:
        request: what was asked for.
        arguments: in which way, to be asked again in the allocation.
        dry_run: only print what would be run.

    Raises:
        UserError: Slurm is not here, or the allocation is too small.
    """
    from launch import slurm, slurm_jobs, slurm_script

    overrides = [*request.overrides, "launch.slurm.array=null", _ONCE]
    if "SLURM_JOB_ID" not in os.environ:
        config = load_config(request.file, overrides)
        command = [*slurm_script.salloc(config), sys.executable, "-m", "launch", "doctor", *arguments]
        if dry_run:
            sys.stdout.write(shlex.join(command) + "\n")
            return EXIT_FINISHED
        slurm_jobs.need("salloc")
        code = subprocess.run(command, check=False).returncode
        return code if code in (EXIT_FINISHED, EXIT_USAGE) else EXIT_FAILED
    if "nodes" not in request.config.launch.model_fields_set:
        overrides.append(f"launch.nodes={os.environ.get('SLURM_JOB_NUM_NODES', '1')}")
    config = load_config(request.file, overrides)
    allocation = slurm.allocation_of(config)
    if allocation is not None and config.launch.nodes.is_elastic:  # the doctor waits for all that can come
        overrides.append(f"launch.nodes={allocation.num_nodes}")
        config = load_config(request.file, overrides)
    text = slurm_script.script(config, request.file, overrides, allocation, ["--doctor", *request.options])
    if dry_run:
        sys.stdout.write(text)
        return EXIT_FINISHED
    slurm_jobs.need("srun")
    with tempfile.NamedTemporaryFile("w", prefix="lockstep-doctor-", suffix=".sh") as file:
        file.write(text)
        file.flush()
        return slurm.run_here(Path(file.name))
