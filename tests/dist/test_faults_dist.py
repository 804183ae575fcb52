"""Everything that may go wrong in a week, one after the other, on two and three ranks through the real launcher.

Each case is injected (`trainer.faults.injection`), and for each is measured how long it takes from the deed to the next
attempt, or to the end of the job. `LOCKSTEP_FAULTS_JSON=FILE` keeps the figures; docs/reliability.md has a table.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteConfig
from launching import Job, alive
from resuming import assert_same_end
from run_results import summary

from trainer.faults.fault import read_first
from trainer.faults.plan import VARIABLE, Event, done_file, read_notes, write_plan
from trainer.goodput import read_attempts

STEPS, SAVED_EVERY, HANG_SECONDS = 20, 4, 4


@dataclass(frozen=True)
class Case:
    """One kind of fault, and what must come of it.

    Args:
        name: for a person.
        events: what is injected.
        says: found in what the job says.
        ranks: processes.
        restarts: `launch.max_restarts`.
        code: exit code of the job.
        seconds: the most from the (last) deed to the next attempt, or to the end of the job.
        lost: the most steps that are made again.
        rank: whom the fault is blamed on; None where nobody is, or nobody says.
        same: whether the end is that of a run in peace.
        changes: of the config.
        aside: damaged checkpoints that are left.
    """

    name: str
    events: tuple[Event, ...]
    says: str
    ranks: int = 2
    restarts: int = 1
    code: int = 0
    seconds: float = 10.0
    lost: int = SAVED_EVERY
    rank: int | None = None
    same: bool = True
    changes: dict[str, Any] = field(default_factory=dict)
    aside: tuple[str, ...] = ()


def dies(name: str, action: str, rank: int, says: str, **options: Any) -> Case:
    """A rank that dies in step 10, after two saves."""
    place, step = options.pop("place", "forward"), options.pop("step", 10)
    return Case(name, (Event(action, rank=rank, step=step, place=place),), says, rank=rank, **options)


def hangs(name: str, action: str, rank: int, says: str, **options: Any) -> Case:
    return dies(name, action, rank, says, seconds=HANG_SECONDS + 10.0, **options)


def stops(name: str, action: str, rank: int, says: str, **options: Any) -> Case:
    """A request to stop in step 10, after which the same command trains to the end."""
    place, step = options.pop("place", None), options.pop("step", 10)
    event = Event(action, rank=rank, step=step, place=place)
    return Case(name, (event,), rf"stopping +because of {says}", code=75, lost=0, **options)


def numbers(name: str, action: str, policy: str, says: str, **options: Any) -> Case:
    faults = {"faults__non_finite": policy, "faults__spike_factor": 50.0 if action == "spike" else None}
    changes = {**faults, "optim__clip_norm": 1.0, "train": {"steps": 40, "batch_size": 12}}
    event = Event(action, rank=1, step=30)
    return Case(name, (event,), says, changes=changes, same=False, **options)


KILLED = "rank {} was ended by SIGKILL"
WORKERS = {"data__workers": 1}
IN_EVALUATION = {"eval": {"every": 10, "batch_size": 2}}
ACCUMULATING = {"train": {"steps": STEPS, "batch_size": 12, "micro_batch_size": 1}}

CASES = [
    # ---- a rank dies ----
    dies("SIGKILL while loading a batch", "kill", 1, KILLED.format(1), place="loading a batch"),
    dies("SIGKILL of rank 0 in forward", "kill", 0, KILLED.format(0)),
    dies("SIGKILL in backward", "kill", 2, KILLED.format(2), place="backward", ranks=3),
    dies("SIGKILL in evaluation", "kill", 1, KILLED.format(1), place="evaluation", changes=IN_EVALUATION),
    dies("SIGKILL while saving", "kill", 1, KILLED.format(1), place="saving a checkpoint", step=8),
    dies("SIGKILL while starting", "kill", 1, KILLED.format(1), place="building", step=1),
    Case(
        "SIGKILL, and again while restoring",
        (Event("kill", rank=1, step=10), Event("kill", rank=0, place="restoring a checkpoint", step=5)),
        KILLED.format(0),
        restarts=2,
        rank=0,
    ),
    dies("SIGKILL of all ranks", "kill-all", 0, KILLED.format("[01]")),
    dies("an exception", "raise", 1, r"rank 1 on \S+, step 10 \(forward\): RuntimeError: .*; samples \d+"),
    dies(
        "an exception of rank 0 in evaluation",
        "raise",
        0,
        r"rank 0 on \S+, step 10 \(evaluation\): RuntimeError",
        place="evaluation",
        changes=IN_EVALUATION,
    ),
    dies("out of memory", "oom", 1, r"rank 1 .*step 10 \(backward\): OutOfMemoryError", place="backward", ranks=3),
    dies("os._exit", "exit", 1, "rank 1"),
    dies("a segmentation fault", "segfault", 1, "rank 1 was ended by SIGSEGV"),
    dies("a loader worker is killed", "kill-worker", 1, r"rank 1 .*WorkerDied: loader worker 0", changes=WORKERS),
    dies("an exception, and no restart left", "raise", 1, r"error: rank 1 on .*RuntimeError", restarts=0, code=1),
    dies("SIGKILL, and no restart left", "kill", 1, f"error: {KILLED.format(1)}", restarts=0, code=1),
    dies("bad data on one rank", "raise-user-error", 1, "error: ", code=2),
    # ---- a rank hangs ----
    hangs("hangs while loading", "hang", 1, r"rank 1 on \S+, step 10 \(loading a batch\)", place="loading a batch"),
    hangs("rank 0 hangs in forward", "hang", 0, r"rank 0 on \S+, step 10 \(forward\)"),
    hangs(
        "hangs in evaluation",
        "hang",
        2,
        r"rank 2 on \S+, step 10 \(evaluation\)",
        place="evaluation",
        ranks=3,
        changes=IN_EVALUATION,
    ),
    hangs("hangs with Python's lock held", "hang-with-gil", 1, r"rank 1 on \S+, step 10"),
    hangs("SIGSTOP", "stop", 1, r"rank 1 on \S+, step 10"),
    hangs("SIGSTOP of rank 0", "stop", 0, r"rank 0 on \S+, step \d+"),
    hangs(
        "a loader worker hangs",
        "stop-worker",
        1,
        r"rank 1 on \S+, step \d+ \(loading a batch\).*sample \d+",
        changes=WORKERS,
    ),
    # ---- a checkpoint is damaged, and the run killed ----
    dies(
        "bits of a checkpoint flip",
        "corrupt-checkpoint",
        0,
        "put aside",
        lost=2 * SAVED_EVERY,
        step=10,
        aside=("damaged-step-00000008",),
    ),
    dies(
        "half a checkpoint is gone",
        "truncate-checkpoint",
        0,
        "put aside",
        lost=2 * SAVED_EVERY,
        step=10,
        aside=("damaged-step-00000008",),
    ),
    dies(
        "a file of a checkpoint is gone",
        "remove-checkpoint-file",
        0,
        "put aside",
        lost=2 * SAVED_EVERY,
        step=10,
        aside=("damaged-step-00000008",),
    ),
    # ---- requests to stop ----
    stops("SIGTERM to a rank", "signal:SIGTERM", 0, "SIGTERM on rank 0"),
    stops("SIGINT to a rank", "signal:SIGINT", 1, "SIGINT on rank 1"),
    stops("SIGUSR1 to a rank", "signal:SIGUSR1", 2, "SIGUSR1 on rank 2", ranks=3),
    stops("SIGTERM to the launcher", "signal-launcher:SIGTERM", 0, "SIGTERM on rank"),
    stops("SIGUSR1 to the launcher", "signal-launcher:SIGUSR1", 0, "SIGUSR1 on rank"),
    stops("Ctrl-C to the launcher", "signal-launcher:SIGINT", 0, "SIGINT on rank"),
    stops("the file STOP", "stop-file", 1, "the file STOP on rank 0"),
    stops("SIGTERM in evaluation", "signal:SIGTERM", 1, "SIGTERM", place="evaluation", changes=IN_EVALUATION),
    stops("SIGTERM within a long step", "signal:SIGTERM", 1, "SIGTERM", place="backward", changes=ACCUMULATING),
    # ---- numbers ----
    numbers("NaN, stop", "nan", "stop", "error: rank 1 .*step 30: the loss of rank 1 is nan", code=1),
    numbers("NaN, skip", "nan", "skip", "step 30: the loss of rank 1 is nan"),
    numbers("NaN, rollback", "nan", "rollback", "going back to step 28, and leaving out the batch of step 30"),
    numbers("an infinite gradient, skip", "inf-gradient", "skip", "step 30: the norm of the gradients is"),
    numbers("a spike, rollback", "spike", "rollback", "step 30: the loss jumped to"),
    # ---- a slow rank ----
    Case(
        "a slow rank",
        (Event("delay", rank=1, step=6, seconds=0.3, times=8),),
        r"rank 1 takes .* it costs \d+% of each step",
    ),
]


@pytest.fixture(scope="module")
def figures() -> Iterator[list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []
    yield found
    if file := os.environ.get("LOCKSTEP_FAULTS_JSON"):
        Path(file).write_text(json.dumps({"cases": found}, indent=2) + "\n")


def config_of(case: Case, write_config: WriteConfig, name: str = "run", restarts: int | None = None) -> Path:
    changes = {
        "run__dir": str(write_config().parent / name),
        "model": {"name": "vectors_model:Normed", "args": {"dropout": 0.2}},
        "data__train": {"name": "slow:Steady", "args": {"length": 120, "seconds": 0.015}},
        "train": {"steps": STEPS, "batch_size": 12},
        "eval": {"every": "9999 epochs"},
        "checkpoint": {"every": SAVED_EVERY},
        "log": {"every": 4},
        "faults__hang_timeout": HANG_SECONDS,
        "launch__max_restarts": case.restarts if restarts is None else restarts,
        **case.changes,
    }
    return write_config(f"{name}.yaml", **changes)


def launch(config: Path, ranks: int, **variables: str) -> Job:
    arguments = ["--config", str(config), "--processes", str(ranks)]
    return Job([sys.executable, "-m", "launch", "local", *arguments], config.parent, OMP_NUM_THREADS="1", **variables)


@pytest.fixture(scope="module")
def quiet_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


def quiet(case: Case, write_config: WriteConfig, runs: dict[str, Path]) -> Path:
    """Returns the folder of a run in peace, of the same kind."""
    kind = json.dumps([case.ranks, case.changes], sort_keys=True)
    if kind not in runs:
        config = config_of(case, write_config, "quiet", restarts=0)
        job = launch(config, case.ranks)
        assert job.end() == 0, job.output()
        runs[kind] = config.parent / "quiet"
    return runs[kind]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fault(
    case: Case,
    write_config: WriteConfig,
    tmp_path: Path,
    quiet_runs: dict[str, Path],
    figures: list[dict[str, Any]],
) -> None:
    config, run = config_of(case, write_config), tmp_path / "run"
    write_plan(tmp_path / "plan.json", run, case.events)
    job = launch(config, case.ranks, **{VARIABLE: str(tmp_path / "plan.json")})
    family = []
    while job.process.poll() is None:
        family += [process for process in job.family() if process not in family]
        time.sleep(0.05)
    over = time.time()
    code, output = job.end(), job.output()
    assert code == case.code, output
    assert re.search(case.says, output), output
    assert alive(family) == [], output
    deeds = read_notes(done_file(tmp_path / "plan.json"))
    assert len(deeds) >= len(case.events), output
    attempts = read_attempts(run / "attempts.json")
    fault = read_first(run)
    if case.rank is not None:
        assert fault is not None, output
        assert fault.rank == case.rank or "of all" in case.name
    last = deeds[-1]
    restarted = [attempt for attempt in attempts if attempt.started > last["time"]]
    seconds = (restarted[0].started if restarted else over) - last["time"]
    if case.code in (0, 1) and case.rank is not None:
        assert seconds < case.seconds, output
    lost = max((last["step"] - 1 - attempt.first_step for attempt in restarted), default=0)
    assert lost <= case.lost, attempts
    if case.code == 75:
        step = summary(run)["step"]
        assert (run / "checkpoints" / f"step-{step:08d}").is_dir(), output
        assert not (run / "STOP").exists()
        again = launch(config, case.ranks)
        assert again.end() == 0, again.output()
        assert f"continuing from step {step}" in again.output()
    elif case.code != 0:
        again = launch(config, case.ranks)
        assert again.end() == 0, again.output()
    assert summary(run)["status"] == "finished"
    if case.same:
        assert_same_end(run, quiet(case, write_config, quiet_runs), output, case.aside)
    figures.append(
        {"name": case.name, "ranks": case.ranks, "code": code, "seconds": round(seconds, 1), "lost": max(lost, 0)}
    )
