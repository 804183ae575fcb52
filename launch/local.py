"""Several processes on this machine: GPUs through `accelerate launch`, CPU processes through torchrun.

`accelerate launch` starts several processes only where there are GPUs; on the CPU it silently starts one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launch.starting import TRAIN_SCRIPT, LaunchPlan, agent_variables, count_gpus, count_processes
from trainer.config import Config


def plan(arguments: Sequence[str], config: Config, script: str = TRAIN_SCRIPT) -> LaunchPlan:
    """Chooses what starts processes here.

    Args:
        arguments: what the script is called with.
        config: what these arguments come to.
        script: that every process runs.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    num_gpus = count_gpus(config)
    count = count_processes(config.launch.processes, num_gpus)
    called = [script, *arguments]
    restarts = config.launch.max_restarts
    if count == 1 and not restarts:
        return LaunchPlan([sys.executable, *called], dict(config.launch.environment))
    variables = agent_variables(config, count, num_gpus)
    if num_gpus and count > 1:
        options = ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1"]
        options += ["--mixed_precision", config.precision, "--dynamo_backend", "no", "--main_process_port", "0"]
        options += ["--max_restarts", str(restarts)] if restarts else []
        return LaunchPlan(["accelerate", "launch", *options, *called], variables)
    options = ["--standalone", "--nproc-per-node", str(count)]
    options += ["--max-restarts", str(restarts)] if restarts else []
    return LaunchPlan(["torchrun", *options, *called], variables)
