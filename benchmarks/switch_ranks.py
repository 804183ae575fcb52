"""Switches of several processes, measured in one job of torchrun: `benchmarks.switches` starts it and reads its answer.

Of all ranks the slowest is what counts, and what the others did is no foreign load.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.rounds import Timing, waiting_for
from benchmarks.switch_list import NUM_RANKS, Switch, Workload, as_text
from benchmarks.switches import Setup, Taken, build, loss, make_batch, measure_values
from benchmarks.telling import REPOSITORY
from trainer.config import Config
from trainer.config_model import OptimConfig
from trainer.optim import build_optimizer
from trainer.runtime import Runtime

TIMEOUT = 900  # seconds, of the processes of torchrun


def measure_ranks(chosen: Sequence[Switch], setup: Setup) -> list[dict[str, Taken]]:
    """Measures switches of several processes in one job of torchrun."""
    failed = [{as_text(value): Taken() for value in switch.values} for switch in chosen]
    with tempfile.TemporaryDirectory(prefix="lockstep-switches-") as folder:
        asked, answered = Path(folder) / "asked.json", Path(folder) / "answered.json"
        asked.write_text(json.dumps({"setup": asdict(setup), "switches": [asdict(s) for s in chosen]}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
        command += ["-m", "benchmarks.switch_ranks", str(asked), str(answered)]
        threads = {"OMP_NUM_THREADS": str(max(setup.num_threads // NUM_RANKS, 1))}
        try:
            ended = subprocess.run(
                command, cwd=REPOSITORY, env={**os.environ, **threads}, timeout=TIMEOUT, check=False, stdout=sys.stderr
            )
            problem = f"torchrun ended with code {ended.returncode}" if ended.returncode else None
        except subprocess.TimeoutExpired:
            problem = f"not done after {TIMEOUT} s"
        if problem is None:
            answer = json.loads(answered.read_text(encoding="utf-8"))
            return [{name: _read_taken(entry) for name, entry in taken.items()} for taken in answer]
    for taken in failed:
        for entry in taken.values():
            entry.problem = problem
    return failed


def _read_taken(entry: Mapping[str, Any]) -> Taken:
    return Taken(entry["first_seconds"], [Timing(**timing) for timing in entry["times"]], entry["problem"])


def run_as_rank(asked: Path, answered: Path) -> None:
    """One of the processes that torchrun started: rank 0 writes what was measured."""
    request = json.loads(asked.read_text(encoding="utf-8"))
    setup = Setup(**request["setup"])
    answer = []
    runtimes: list[Runtime] = []
    for values in request["switches"]:
        switch = Switch(**{**values, "values": tuple(values["values"]), "workload": Workload(**values["workload"])})
        taken = _measure_between_ranks(switch, setup, runtimes)
        for name, own in taken.items():
            own.times = [_of_all_ranks(timings) for timings in zip(*runtimes[-1].gather(own.times), strict=True)]
            own.problem = next((p for p in runtimes[-1].gather(own.problem) if p), None)
            taken[name] = own
        answer.append({name: asdict(entry) for name, entry in taken.items()})
        for runtime in runtimes:
            runtime.accelerator.free_memory()
        gc.collect()
    if runtimes[-1].is_main:
        answered.write_text(json.dumps(answer), encoding="utf-8")
    runtimes[-1].close()


def _of_all_ranks(timings: Sequence[Timing]) -> Timing:
    first, *others = timings
    return Timing(
        seconds=max(timing.seconds for timing in timings),
        own_cores=sum(timing.own_cores for timing in timings),
        foreign_cores=max(0.0, first.foreign_cores - sum(timing.own_cores for timing in others)),
    )


def _measure_between_ranks(switch: Switch, setup: Setup, runtimes: list[Runtime]) -> dict[str, Taken]:
    batch = make_batch(switch.workload, setup.device)

    def prepare(value: Any) -> Callable[[], object]:
        runtime = Runtime(_config(switch, value))
        runtimes.append(runtime)
        bare, _ = build(switch, setup, {})
        bare_optimizer = build_optimizer(
            OptimConfig.model_validate({"name": "sgd", "lr": 1e-6}), bare, setup.device_type
        )
        model, optimizer = runtime.prepare(bare, bare_optimizer)
        model.train()

        def run() -> None:
            runtime.backward(loss(model, batch, switch.workload))
            optimizer.zero_grad()

        return run

    def wait() -> None:
        waiting_for(setup.device)()
        if runtimes:
            runtimes[-1].barrier()

    return measure_values(switch, setup, prepare, wait)


def _config(switch: Switch, value: Any) -> Config:
    """Returns a whole config, of which only what concerns several processes is used."""
    return Config.model_validate(
        {
            "run": {"name": "switches"},
            "data": {"train": {"name": "synthetic"}},
            "model": {"name": switch.workload.model, "args": switch.workload.args},
            "optim": {"name": "sgd", "lr": 1e-6},
            "precision": "bf16" if switch.workload.precision == "bf16" else "no",
            "parallel": {switch.key: value},
            "train": {"steps": 1, "batch_size": NUM_RANKS * switch.workload.batch_size},
        }
    )


if __name__ == "__main__":
    run_as_rank(*map(Path, sys.argv[1:]))
