"""Starting the doctor's ranks as a run's are started, and its exit code: 0, or 1 where something fails."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launch import local
from launch.starting import LaunchPlan, run_once
from trainer.cli import EXIT_FAILED
from trainer.config import Config

BARE = Path(__file__).with_name("bare.yaml")  # stands in for a config where none is given
RANK_SCRIPT = str(Path(__file__).with_name("rank.py"))
FOLDER_VARIABLE = "LOCKSTEP_DOCTOR_FOLDER"  # where a machine's ranks leave the verdict for whoever started them
DEFAULT_TIMEOUT = 60.0


def is_bare(file: str) -> bool:
    """Tells whether a config is the stand-in."""
    return Path(file).resolve() == BARE


def default_json(file: str, config: Config) -> Path:
    """Returns where the report goes."""
    return Path("doctor.json") if is_bare(file) else config.run_dir / "doctor.json"


def without_restarts(config: Config) -> Config:
    """Returns the config for starting the ranks: they are started once."""
    return config.model_copy(update={"launch": config.launch.model_copy(update={"max_restarts": 0})})


def plan_here(arguments: Sequence[str], config: Config, script: str = RANK_SCRIPT) -> LaunchPlan:
    """Returns what starts the ranks of this machine alone.

    Args:
        arguments: of the ranks' script.
        config: what they come to.
        script: that every rank runs.
    """
    return local.plan(arguments, without_restarts(config), script)


def run(plan: LaunchPlan) -> int:
    """Runs this machine's ranks and returns the exit code: the verdict where rank 0 is here, else whether all ended."""
    folder = Path(tempfile.mkdtemp(prefix="lockstep-doctor-"))
    os.environ[FOLDER_VARIABLE] = str(folder)
    outcome = run_once(plan, folder)
    verdict = verdict_file(folder, 0)
    if verdict.exists():
        code = int(verdict.read_text())
        shutil.rmtree(folder, ignore_errors=True)
        return code
    if outcome.error is not None:
        sys.stderr.write(f"the output of the ranks is in {folder / 'logs'}\nerror: {outcome.error}\n")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome.code if outcome.error is None else EXIT_FAILED


def verdict_file(folder: Path, rank: int) -> Path:
    """Returns where a rank leaves the exit code that all have agreed on."""
    return folder / f"verdict-{rank}"
