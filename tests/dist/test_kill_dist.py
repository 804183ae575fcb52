"""Killed at any instant and started again: bit for bit the run that nobody disturbed.

Nightly. LOCKSTEP_KILL_SEED repeats the instants of a failure, as far as a clock can.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteConfig, nightly
from launching import TIMEOUT, Job
from resuming import TrainServer, assert_same_end, kill
from run_results import losses, summary

pytestmark = pytest.mark.alone

LAUNCH = [sys.executable, "-m", "launch", "local"]
KILLS = 5  # of each kind of run
STEPS = 100

NORMED = {"name": "vectors_model:Normed", "args": {"dropout": 0.2}}
MLP = {"name": "mlp", "args": {"in_features": 8, "hidden": [16], "dropout": 0.2}}
HUGE = {"name": "vectors:Huge", "args": {"length": 600}}
EMA = {"ema": {"decay": 0.9}}
MOMENTUM = {"name": "sgd", "lr": 1e-4, "args": {"momentum": 0.9}, **EMA}
OVERFLOWS = {"precision": "fp16", "data__train": HUGE, "optim": MOMENTUM}

# What differs from `config`, and the number of ranks.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {**OVERFLOWS, "data__workers": 2}),
    "2 ranks": (2, {"model": NORMED, "data__workers": 1}),
    "2 ranks, fsdp": (2, {"parallel__strategy": "fsdp", "checkpoint__async_save": False}),
    "1 rank, waiting": (1, {"model": NORMED, "data__workers": 1, "checkpoint__async_save": False}),
    "2 ranks, waiting": (2, {"model": NORMED, "checkpoint__async_save": False, "precision": "bf16"}),
    "2 ranks, fp16": (2, {**OVERFLOWS, "data__workers": 1}),
    "2 ranks, fsdp, behind": (2, {"parallel__strategy": "fsdp", "data__workers": 1}),
}


def config(write_config: WriteConfig, file: str, run: Path, **changes: Any) -> Path:
    """A run in which something is saved, evaluated or accumulated at any time."""
    return write_config(
        file,
        **{
            "run__dir": str(run),
            "data__train__args__length": 600,
            "model": MLP,
            "optim": {"name": "adamw", "lr": 0.01, "clip_norm": 1.0, **EMA},
            "schedule": {"name": "cosine"},
            "train": {"steps": STEPS, "batch_size": 12, "micro_batch_size": 2},
            "eval": {"every": 7},
            "checkpoint__every": 3,
            **changes,
        },
    )


@nightly  # tests/dist/test_faults_dist.py kills at given instants
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_instants_equals_undisturbed(
    name: str, server: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    ranks, changes = RUNS[name]
    quiet, run = tmp_path / "quiet", tmp_path / "run"
    done = server.train("--config", config(write_config, "quiet.yaml", quiet, **changes), ranks=ranks)
    assert done.code == 0, done.out + done.err
    assert list(losses(quiet)) == list(range(1, STEPS + 1))
    if changes.get("precision") == "fp16":
        assert summary(quiet)["skipped_steps"] > 0

    seed = int(os.environ.get("LOCKSTEP_KILL_SEED") or random.SystemRandom().randrange(2**32))
    choice = random.Random(seed)
    told = [f"LOCKSTEP_KILL_SEED={seed}"]
    command = [*LAUNCH, "--config", str(config(write_config, "run.yaml", run, **changes)), "--processes", str(ranks)]
    for i in range(KILLS):  # each in a part of the run of its own, so that every one of them meets a run on its way
        step = choice.randint(max(1, i * STEPS // KILLS), (i + 1) * STEPS // KILLS - 1)
        later, whole = choice.uniform(0, 0.1), ranks == 1 or choice.random() < 0.5
        job = Job(command, tmp_path, OMP_NUM_THREADS="1")
        wait_for_step(job, run, step)
        time.sleep(later)
        what = kill(job, whole, choice)
        told.append(f"{what} at step {last_step(run)} ({step} + {later:.3f} s)")
    done = server.train("--config", tmp_path / "run.yaml", ranks=ranks)
    assert done.code == 0, "\n".join([*told, done.out, done.err])
    assert_same_end(run, quiet, "; ".join(told))


def last_step(run: Path) -> int:
    """Returns the last step that was reported; the file may end in half a line."""
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(job: Job, run: Path, step: int) -> None:
    end = time.monotonic() + TIMEOUT
    while last_step(run) < step:
        assert job.process.poll() is None, job.output()
        assert time.monotonic() < end, job.output()
        time.sleep(0.002)
