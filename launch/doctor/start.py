"""Starting the doctor's ranks as a run's are started, and the exit code: 0, or 1 where something fails."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launch import local
from launch.doctor.agreed import FOLDER_VARIABLE, RANK_SCRIPT, verdict_file
from launch.starting import LaunchPlan, run_script
from trainer.config import Config


def plan_here(arguments: Sequence[str], config: Config, script: str = RANK_SCRIPT) -> LaunchPlan:
    """Returns what starts the ranks of this machine alone.

    Args:
        arguments: of the ranks' script.
        config: what they come to.
        script: that every rank runs.
    """
    return local.plan(arguments, without_restarts(config), script)


def without_restarts(config: Config) -> Config:
    """Returns the config for starting the ranks: they are started once."""
    return config.model_copy(update={"launch": config.launch.model_copy(update={"max_restarts": 0})})


def run(plan: LaunchPlan) -> int:
    """Runs this machine's ranks and returns the verdict where rank 0 is among them, else how they ended."""
    with tempfile.TemporaryDirectory(prefix="lockstep-doctor-") as name:
        os.environ[FOLDER_VARIABLE] = name
        verdict = verdict_file(Path(name))
        code = run_script(plan, Path(name), explains_failure=verdict.exists)
        return int(verdict.read_text()) if verdict.exists() else code
