"""`python -m launch TARGET`: arguments and exit codes. Each target is a module of its own.

The config is read and checked here, before anything is started, so that a mistake in it costs a second.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from trainer.cli import EXIT_FINISHED, add_config_arguments, run_command
from trainer.config import load_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts a job and returns the exit code of the training: 0, 2, 75 or 1, as `train.py`."""
    parser = argparse.ArgumentParser(
        prog="python -m launch", description="Start training jobs. `python -m launch TARGET --help` tells more."
    )
    parser.add_argument("target", choices=["local"], help="local: this machine, on all its GPUs or CPU processes")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="--config FILE [section.key=value ...]")
    options = parser.parse_args(arguments)
    return run_command(lambda: _local(options.rest))


def _local(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch local", description="Start a job on this machine.")
    add_config_arguments(parser)
    parser.add_argument(
        "--processes", type=int, metavar="N", help="processes to start; default: one per GPU, or one on the CPU"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and start nothing")
    options = parser.parse_intermixed_args(arguments)
    if options.processes is not None and options.processes < 1:
        parser.error(f"--processes must be at least 1 (got {options.processes})")
    config = load_config(options.config, options.overrides)
    from launch import local  # imports torch

    plan = local.plan(options.processes, ["--config", options.config, *options.overrides], config.precision)
    if options.dry_run:
        variables = [f"{name}={value}" for name, value in plan.environment.items()]
        sys.stdout.write(shlex.join([*variables, *plan.command]) + "\n")
        return EXIT_FINISHED
    return local.run(plan, config)
