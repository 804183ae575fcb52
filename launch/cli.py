"""`python -m launch TARGET`: arguments and exit codes. Each target is a module of its own.

The config is read and checked here, before anything is started, so that a mistake in it costs a second.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cli import EXIT_FAILED, EXIT_FINISHED, add_config_arguments, run_command, show_problems
from trainer.config import Config, load_config
from trainer.config_launch import DEFAULT_PORT
from trainer.errors import UserError
from trainer.imports import without_collector

if TYPE_CHECKING:
    from launch.starting import LaunchPlan


_JOIN_MARGIN = 60  # seconds that starting Python may take on one machine more than on another


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts a job and returns the exit code of the training: 0, 2, 75 or 1, as `train.py`."""
    width = max(map(len, _TARGETS)) + 2
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description="Start training jobs.\n\ntargets:\n"
        + "\n".join(f"  {name:<{width}}{purpose}" for name, (_, purpose) in _TARGETS.items()),
        epilog="`python -m launch TARGET --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", choices=list(_TARGETS), metavar="TARGET", help="one of the above")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="--config FILE [section.key=value ...]")
    options = parser.parse_args(arguments)
    target = _TARGETS[options.target][0]
    return run_command(lambda: target(options.rest), log_to_stderr=options.target != "local")


def _doctor(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch doctor",
        description="Look for what would end a run or make it slow, on every rank that it would have: versions, "
        "devices, limits, speed of devices, links and disks. Without a config, what needs none.",
        epilog="exit codes: 0 nothing fails, 1 something does, 2 bad config or usage",
    )
    from launch.doctor.agreed import BARE, Request, add_arguments

    add_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--hosts", metavar="A,B,C", help="on these, as ssh takes them (default: on this machine)")
    which.add_argument("--hostfile", metavar="F", help="on these, a host per line")
    which.add_argument("--slurm", action="store_true", help="in this Slurm allocation, or in one that is asked for")
    options, config = _read(parser, arguments, default_config=str(BARE))
    is_here = options.hosts is None and options.hostfile is None and not options.slurm
    if is_here and options.nodes is not None:
        parser.error("--nodes needs --hosts, --hostfile or --slurm")
    if options.timeout <= 0:
        parser.error(f"--timeout must be more than 0 (got {options.timeout:g})")
    request = Request(options.config, tuple(options.overrides), config, options.timeout, options.json)
    with without_collector():
        from launch.doctor import start

    if options.slurm:
        return start.on_slurm(request, arguments, options.dry_run)
    if not is_here:
        return start.on_hosts(request, _names(options.hosts), options.hostfile, options.dry_run)
    plan = start.plan_here(request)
    return _show(plan) if options.dry_run else start.run(plan, config)


def _plan(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch plan",
        description="Predict the memory of a run on a device that need not be here, and find the settings that fit.",
        epilog="exit codes: 0 the config fits as it is, 1 it does not, 2 bad config or usage",
    )
    add_config_arguments(parser)
    parser.add_argument("--device", metavar="NAME", help="such as h100-80g, a100-40g or 24GiB; default: the GPU here")
    parser.add_argument("--processes", type=int, metavar="N", help="processes together; default: one per GPU")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory over one step: .png, .svg or .html")
    parser.add_argument("--input", metavar="SHAPE", help="of a sample, such as 3x224x224, where the data is not here")
    parser.add_argument("--num-classes", type=int, metavar="N", help="labels of that data")
    options = parser.parse_intermixed_args(arguments)
    shape = None if options.input is None else re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", options.input)
    if options.input is not None and shape is None:
        parser.error(f"--input must be like 3x224x224 (got {options.input})")
    for name in ("processes", "num_classes"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1 (got {value})")
    config = load_config(options.config, options.overrides)
    with without_collector():
        from launch import plan

    sizes = None if shape is None else tuple(map(int, options.input.split("x")))
    try:
        return plan.run(config, options.device, options.processes, options.plot, sizes, options.num_classes)
    except UserError as error:
        raise UserError(*(config.locate(problem) for problem in error.problems)) from None


def _local(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch local", description="Start a job on this machine.")
    options, config = _read(parser, arguments, has_nodes=False)
    with without_collector():
        from launch import local, starting

    plan = local.plan(["--config", options.config, *options.overrides], config)
    if options.dry_run:
        return _show(plan)
    return starting.run(plan, config)


def _hosts(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch hosts",
        description="Start a job on machines that ssh reaches without a password, after checks on all of them.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--hosts", metavar="A,B,C", help="as ssh takes them (default: launch.hosts.names)")
    which.add_argument("--hostfile", metavar="F", help="a host per line (default: launch.hosts.hostfile)")
    options, config = _read(parser, arguments)
    from launch import hosts

    names = hosts.choose_names(_names(options.hosts), options.hostfile, config)
    launch = hosts.HostsLaunch(names, options.config, options.overrides, config)
    return launch.show() if options.dry_run else launch.run()


def _kubernetes(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch kubernetes",
        description="Write the manifests of a job, for `kubectl apply -f -`. Nothing is started or asked here.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write them there (default: standard output)")
    options, config = _read(parser, arguments)
    if options.output is not None and options.dry_run:
        parser.error("--dry-run prints, --output writes a file: leave one of them out")
    from launch import kubernetes

    try:
        text = kubernetes.render(config)
        if options.output is None:
            sys.stdout.write(text)
        else:
            options.output.write_text(text)
    except UserError as error:
        raise UserError(*map(config.locate, error.problems)) from None
    except OSError as error:
        raise UserError(f"--output {options.output}: {error.strerror or error}") from None
    return EXIT_FINISHED


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _slurm(arguments: Sequence[str]) -> int:
    if arguments[:1] in (["status"], ["cancel"]):
        return _slurm_job(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m launch slurm",
        description="Submit a job to Slurm, or run it in the allocation that this is typed in.",
        epilog="`python -m launch slurm status RUN_DIR` shows the state of a run's job; `python -m launch slurm cancel "
        "RUN_DIR` stops it with a checkpoint and takes it out of Slurm",
    )
    watched = parser.add_mutually_exclusive_group()
    watched.add_argument(
        "--follow", action="store_true", help="show the job's output until it ends; the exit code is the training's"
    )
    watched.add_argument("--wait", action="store_true", help="the same, silently")
    options, config = _read(parser, arguments)
    from launch import slurm

    given = {"dry_run": options.dry_run, "follow": options.follow, "wait": options.wait}
    return slurm.run(config, options.config, options.overrides, **given)


def _slurm_job(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch slurm")
    parser.add_argument("action", choices=["status", "cancel"])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run folder, such as runs/digits")
    options = parser.parse_args(arguments)
    from launch import slurm_watch

    return {"status": slurm_watch.status, "cancel": slurm_watch.cancel}[options.action](options.run_dir)


def _agent(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch agent",
        description="Start this machine's part of a job on several. The same command on each, but for --node-rank.",
    )
    parser.add_argument(
        "--node-rank", type=int, required=True, metavar="R", help="0 where machines meet, then 1, 2, ..."
    )
    parser.add_argument(
        "--rendezvous", required=True, metavar="HOST[:PORT]", help="where they meet: machine 0, as the others reach it"
    )
    parser.add_argument("--job", required=True, metavar="NAME", help="the same on all machines, new for every start")
    parser.add_argument("--address", metavar="IP", help="of this machine, as the others reach it (default: found out)")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--leash", action="store_true", help="end when stdin does; a line with a signal's name there is obeyed"
    )
    kinds.add_argument(
        "--replaceable",
        action="store_true",
        help="whoever starts this machine starts it again: exit code 75, not 1, where another one has failed",
    )
    parser.add_argument("--doctor", action="store_true", help="run the doctor's ranks instead of a training's")
    from launch.doctor.agreed import RANK_SCRIPT, Request, add_arguments

    add_arguments(parser)
    options, config = _read(parser, arguments)
    if options.doctor and options.replaceable:
        parser.error("--doctor runs once, so that nobody starts it again: leave out --replaceable")
    if not options.doctor and (options.json is not None or options.timeout != parser.get_default("timeout")):
        parser.error("--json and --timeout are for --doctor")
    host, _, number = options.rendezvous.rpartition(":")
    if not number.isdigit():
        host, number = options.rendezvous, ""
    with without_collector():
        from launch import node, starting

    port = int(number or config.launch.port or DEFAULT_PORT)
    # Whoever promised GPUs to this machine says so in a place of its own.
    promised = config.launch.kubernetes.gpus_per_node if options.replaceable else os.environ.get("SLURM_GPUS_ON_NODE")
    num_gpus = int(text) if (text := str(promised)).isdigit() else 0
    place = node.Place(options.node_rank, host.strip("[]"), port, options.job, options.address, num_gpus)
    called = ["--config", options.config, *options.overrides]
    run: Callable[[LaunchPlan, Config], int] = starting.run
    if options.doctor:
        from launch.doctor import start

        request = Request(options.config, tuple(options.overrides), config, options.timeout, options.json)
        place, run = replace(place, join_seconds=int(options.timeout) + _JOIN_MARGIN), start.run
        plan = node.plan(place, [*request.options, *called], config, RANK_SCRIPT)
    else:
        try:
            plan = node.plan(place, called, config)
        except UserError as error:
            if not options.replaceable:
                raise
            show_problems(error)  # of this machine; the next one may do better
            return EXIT_FAILED
    if options.dry_run:
        return _show(plan)
    if options.replaceable:
        return node.run_replaceable(plan, place, config)
    return node.run_on_leash(plan, config, run) if options.leash else run(plan, config)


def _show(plan: LaunchPlan) -> int:
    variables = [f"{name}={value}" for name, value in plan.environment.items()]
    sys.stdout.write(shlex.join([*variables, *plan.command]) + "\n")
    return EXIT_FINISHED


def _read(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    has_nodes: bool = True,
    default_config: str | None = None,
) -> tuple[argparse.Namespace, Config]:
    """Adds the options that all targets have, reads them, and lays them on the config as overrides."""
    add_config_arguments(parser, default_config)
    parser.add_argument(
        "--processes",
        type=int,
        metavar="P",
        help="on each machine (default: launch.processes, else one per GPU, or one on the CPU)",
    )
    if has_nodes:
        parser.add_argument(
            "--nodes", metavar="N", help="machines, such as 4, or 1:4 for at least 1 (default: launch.nodes)"
        )
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
    options = parser.parse_intermixed_args(arguments)
    if options.processes is not None:
        options.overrides.append(f"launch.processes={options.processes}")
    if has_nodes and options.nodes is not None:
        options.overrides.append(f"launch.nodes={options.nodes}")
    return options, load_config(options.config, options.overrides).of_trial(os.environ)


def _chaos(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch chaos",
        description="Run a copy of a job on this machine while its processes are killed, stopped and held up and its "
        "checkpoints are damaged; then run it in peace, and compare the two bit for bit. The run folder of the job "
        "itself is not touched.",
        epilog="exit codes: 0 both are the same, 1 they are not or the job gave up, 2 bad config or usage",
    )
    add_config_arguments(parser)
    parser.add_argument("--processes", type=int, metavar="N", help="default: one per GPU, or one on the CPU")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="of faults (default: 10)")
    parser.add_argument(
        "--every", type=float, default=60.0, metavar="SECONDS", help="between faults, on average (default: 60)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the faults (default: 0)")
    parser.add_argument("--hang-timeout", type=float, default=20.0, metavar="SECONDS", help="default: 20")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for both runs (default: runs/<run.name>-chaos)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    options = parser.parse_intermixed_args(arguments)
    if options.processes is not None and options.processes < 1:
        parser.error(f"--processes must be at least 1 (got {options.processes})")
    for name, most in (("minutes", 1200), ("every", 72_000), ("hang_timeout", 72_000)):
        value = getattr(options, name)
        if not 0 < value <= most:
            parser.error(f"--{name.replace('_', '-')} must be more than 0 and at most {most} (got {value:g})")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder")
    config = load_config(options.config, options.overrides)
    with without_collector():
        from launch import chaos

    settings = chaos.Settings(
        file=options.config,
        overrides=options.overrides,
        processes=options.processes,
        minutes=options.minutes,
        every=options.every,
        seed=options.seed,
        folder=(options.folder or Path("runs", f"{config.run.name}-chaos")).resolve(),
        hang_timeout=options.hang_timeout,
    )
    return chaos.run(settings, options.json)


_TARGETS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "local": (_local, "this machine, on all its GPUs or CPU processes"),
    "hosts": (_hosts, "several machines, over ssh"),
    "slurm": (_slurm, "a batch job on a Slurm cluster, or in the allocation that this is typed in"),
    "kubernetes": (_kubernetes, "write manifests for kubectl"),
    "agent": (_agent, "this machine's part of a job on several, which the other targets run there"),
    "doctor": (_doctor, "measure the machines of a run before it, and name what is wrong or slow"),
    "plan": (_plan, "start nothing, predict the memory it takes"),
    "chaos": (_chaos, "break a copy of the job for some minutes, and see whether it comes out the same"),
}
