"""How this process was launched: of how many it is to be one, what its launcher asks for besides, and ending with it.

Owns what is read from the environment and from the launcher's command line. Launching is `launch`.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence

import psutil

from trainer.errors import UserError
from trainer.rendezvous import is_elastic
from trainer.system import LAUNCHER_VARIABLE, die_with_parent


def promised_processes() -> int:
    """Returns how many processes the launcher was asked to start for this job.

    torchrun and our launcher say so in WORLD_SIZE. `accelerate launch --cpu --num_processes 2` starts one
    process and says nothing; then the launcher's own command line tells.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent else []
    except psutil.Error:
        return 1
    if not any(re.search(r"(^|[/\\.])accelerate(-launch)?(\.exe)?$|accelerate[./\\]commands", a) for a in command):
        return 1
    asked = _option(command, "num[_-]processes")
    if asked is None:
        asked = _processes_in_accelerate_config(_option(command, "config[_-]file"), "--cpu" in command)
    return int(asked) if asked.isdigit() else 1


def _option(command: Sequence[str], name: str) -> str | None:
    for argument, following in zip(command, [*command[1:], ""], strict=True):
        match = re.fullmatch(rf"--{name}(?:=(.*))?", argument)
        if match:
            return match[1] or following
    return None


def _processes_in_accelerate_config(file: str | None, on_cpu: bool) -> str:
    """Returns `num_processes` of the config file that `accelerate launch` reads, as it chooses it."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if file is None and (on_cpu or not os.path.isfile(default_config_file)):
        return "1"
    return str(load_config_from_file(file).num_processes)


def wrong_world(promised: int, actual: int) -> str:
    """Returns what is wrong where other than the promised number of processes has started."""
    command = shlex.join(["python", "-m", "launch", "local", *sys.argv[1:], "--processes", str(promised)])
    return (
        f"{promised} processes were asked for and {actual} started: `accelerate launch` starts several processes "
        f"only on GPUs; this works: {command}"
    )


def refuse_foreign_settings(precision: str) -> None:
    """Refuses what accelerate's flags or config file ask for behind the YAML's back.

    Args:
        precision: what the YAML asks for.

    Raises:
        UserError: another precision, a dynamo backend, or another way to distribute a run is asked for.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        raise UserError(
            f"accelerate was launched with mixed precision {asked}, the config says {precision}", path="precision"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError("accelerate was launched with a dynamo backend, which the config does not ask for")
    for variable, what in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if os.environ.get(variable, "false").lower() == "true":
            message = f"accelerate was launched with {what} ({variable}=true), which Lockstep does not run"
            raise UserError(f"{message}; launch without it: the YAML file decides how a run is distributed")


def end_with_agent() -> None:
    """Has this process end with the elastic agent that started it, if one did, and at once if it has ended already.

    A killed agent ends nobody, and the next start would find this process in the run folder.
    """
    if not is_elastic() or sys.platform != "linux":
        return
    die_with_parent()
    launcher = os.environ.get(LAUNCHER_VARIABLE, "")
    if launcher.isdigit() and not psutil.pid_exists(int(launcher)):  # it was killed before that
        os._exit(1)
