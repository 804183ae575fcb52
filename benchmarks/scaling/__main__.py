"""`python -m benchmarks.scaling`: checks, simulates and estimates, and writes `benchmarks/results/scaling-cpu.json`.

python -m benchmarks.scaling --json FILE --plot FILE
python -m benchmarks.scaling --json FILE --parts estimate  # the others stay as they are there
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scaling import constants, jobs
from benchmarks.scaling.check import Setup, check
from benchmarks.scaling.jobs import Job, Machine
from benchmarks.scaling.report import plot, table
from benchmarks.telling import REPOSITORY, describe, write

PARTS = ("estimate", "check", "simulate")
NUM_GPUS = (8, 64, 1024, 16384)
SIMULATED: dict[str, tuple[int, ...]] = {
    "sampler": (8, 1024, 16384),
    "layout": (8, 1024, 16384),
    "manifest": (8, 64, 1024, 16384),
    "planner": (8, 64, 1024),
}
TINY_SIMULATED: dict[str, tuple[int, ...]] = dict.fromkeys(SIMULATED, (8,))
SENSITIVE_AT = 1024
TINY_SETUP = Setup("shufflenet_v2_x0_5", 2, 32, (2**12, 2**20), rounds=2, num_steps=1)


def estimates(known: dict[str, constants.Constant]) -> dict[str, Any]:
    """Returns what the model says of all jobs, and how that depends on what was assumed."""
    network = constants.network(known)
    machine = Machine.from_constants(known, network)
    small = jobs.resnet50("imagenet_resnet50", 32, known)
    large = jobs.resnet50("imagenet_resnet50_16epochs", 512, known)
    sharded, hybrid = jobs.vit_h("fsdp", known), jobs.vit_h("hsdp", known)
    rows = [_row(job, num_gpus, machine) for job in (small, large, sharded, hybrid) for num_gpus in NUM_GPUS]
    recipes = [
        _row(job, num_gpus, machine, job.batch_size)
        for job in (small, large, sharded, hybrid)
        for num_gpus in NUM_GPUS
        if job.batch_size % num_gpus == 0 and job.batch_size // num_gpus >= jobs.LEAST_MICRO_BATCH
    ]
    half = dataclasses.replace(network, between=network.between / 2)
    changes = {
        "as above": machine,
        "GPUs twice as fast": dataclasses.replace(machine, speed=2.0),
        "GPUs half as fast": dataclasses.replace(machine, speed=0.5),
        "half of the bandwidth between nodes": dataclasses.replace(machine, network=half),
        "steps spread by 0.5%": dataclasses.replace(machine, spread=0.005),
        "steps spread by 2%": dataclasses.replace(machine, spread=0.02),
        "30 s to start again": dataclasses.replace(machine, restart=30.0),
        "10 minutes to start again": dataclasses.replace(machine, restart=600.0),
        "a checkpoint stalls for 1 s": dataclasses.replace(machine, stall=1.0),
        "three times as many failures": dataclasses.replace(machine, mtbf=machine.mtbf / 3),
    }
    sensitivity = [
        {"change": name, **{job.name: jobs.estimate(job, SENSITIVE_AT, of).overall for job in (large, sharded, hybrid)}}
        for name, of in changes.items()
    ]
    return {
        "constants": [dataclasses.asdict(constant) for constant in known.values()],
        "scaled": rows,
        "recipes": recipes,
        "sensitivity": {"gpus": SENSITIVE_AT, "rows": sensitivity},
    }


def _row(job: Job, num_gpus: int, machine: Machine, batch_size: int | None = None) -> dict[str, Any]:
    found = jobs.estimate(job, num_gpus, machine, batch_size)
    return {
        "job": job.name,
        **dataclasses.asdict(found),
        "efficiency": found.efficiency,
        "overall": found.overall,
    }


def simulate(numbers_by_part: dict[str, tuple[int, ...]]) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Runs each part for each number of ranks, in a process of its own, and yields all that there is so far."""
    found: dict[str, list[dict[str, Any]]] = {}
    for part, numbers in numbers_by_part.items():
        for num_ranks in numbers:
            sys.stderr.write(f"{part} of {num_ranks} ranks\n")
            command = [sys.executable, "-m", "benchmarks.scaling.simulated", part, str(num_ranks)]
            done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
            found.setdefault(part, []).append(json.loads(done.stdout))
            yield found


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the result goes; read with --markdown")
    parser.add_argument("--markdown", action="store_true", help="measure nothing: print the tables of --json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to do; default: all")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the estimates, to an .svg file")
    parser.add_argument("--ranks", type=int, default=3, metavar="N", help="processes of the check: 1 to N")
    parser.add_argument("--rounds", type=int, default=Setup.rounds)
    parser.add_argument(
        "--mbits",
        type=float,
        nargs="*",
        default=[1000.0, 5000.0],
        help="of the network between two hosts, which only root has; none: no hosts",
    )
    parser.add_argument("--tiny", action="store_true", help="a check that all parts run: measures nothing of interest")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    """Does the parts that are asked for, and writes all that is known after each entry: what is cut short leaves that.

    Each part has an environment and settings of its own, for it may be of another day.
    """
    parts: dict[str, Any] = {}
    if set(options.parts) != set(PARTS) and options.json.exists():
        parts = json.loads(options.json.read_text(encoding="utf-8"))["parts"]
    environment = describe("benchmarks.scaling", options.given, ["torchvision"], "cpu")

    def write_part(name: str, settings: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        parts[name] = {"environment": environment, "settings": {"tiny": options.tiny, **settings}, **found}
        is_quick = any(part["settings"]["tiny"] for part in parts.values())
        result = {**({"quick": True} if is_quick else {}), "parts": parts}
        write(result, options.json)
        return result

    result: dict[str, Any] = {"parts": parts}
    if "estimate" in options.parts:
        settings: dict[str, Any] = {"least_micro_batch": jobs.LEAST_MICRO_BATCH}
        result = write_part("estimate", settings, estimates(constants.read()))
    if "check" in options.parts:
        setup = TINY_SETUP if options.tiny else dataclasses.replace(Setup(), rounds=options.rounds)
        settings = {"setup": dataclasses.asdict(setup), "mbits": options.mbits}
        entries: list[dict[str, Any]] = []
        for entry in check(setup, options.ranks, options.mbits):
            entries.append(entry)
            result = write_part("check", settings, {"entries": entries})
    if "simulate" in options.parts:
        numbers = TINY_SIMULATED if options.tiny else SIMULATED
        for found in simulate(numbers):
            result = write_part("simulate", {"ranks": numbers}, {"found": found})
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 without what it needs, 1 where an entry failed that this machine should have."""
    options = _arguments(arguments)
    options.given = arguments
    result = json.loads(options.json.read_text(encoding="utf-8")) if options.markdown else _run(options)
    sys.stdout.write(table(result))
    if options.plot is not None:
        try:
            plot(result, options.plot)
        except ImportError:
            sys.stderr.write("--plot needs matplotlib, which is not installed: pip install matplotlib\n")
            return 2
    entries = result["parts"].get("check", {}).get("entries", [])
    return int(any("problem" in entry and not entry["is_left_out"] for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
