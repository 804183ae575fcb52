"""Everything that may go wrong in a week, one after the other, on two and three ranks through the real launcher.

The faults are injected (`trainer.faults.injection`). A start takes seconds, so that many of them befall one job, each
in a step of its own, and the job goes on after each; what is asserted of each is a test of its own, and at its end the
job must be bit for bit what it is in peace. `LOCKSTEP_NIGHTLY=1` adds those that are much like others.
`LOCKSTEP_FAULTS_JSON=FILE` keeps what was measured; docs/reliability.md has a table.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import NIGHTLY, tiny_config
from launching import Job, alive
from resuming import TrainServer, assert_same_end
from run_results import summary

from trainer.faults.fault import FIRST, Fault
from trainer.faults.plan import VARIABLE, Event, done_file, read_notes, write_plan
from trainer.goodput import read_attempts

pytestmark = [pytest.mark.alone, pytest.mark.timeout(1800)]  # a story is told in the first of its tests

SAVED_EVERY, EVALUATED_EVERY, APART, HANG_SECONDS = 4, 6, 6, 8
WHOLE = NIGHTLY or "LOCKSTEP_FAULTS_JSON" in os.environ


@dataclass(frozen=True)
class Case:
    """One fault, and what must come of it.

    Args:
        name: for a person.
        action: what is injected.
        rank: into which rank.
        says: found in what the job says.
        place: where; None for the beginning of a step.
        seconds: the most from the deed to the next attempt, or to the end of the job.
        back: from which checkpoint it goes on, of those that were complete at the deed: 1 for the newest.
        blames: whether `first.json` must name that rank.
        nightly: whether it is left out in a quick run.
        options: of the event.
    """

    name: str
    action: str
    rank: int
    says: str
    place: str | None = None
    seconds: float = 10.0
    back: int = 1
    blames: bool = True
    nightly: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Story:
    """One job, and all that befalls it.

    Args:
        name: of the story.
        cases: in order; each in a step of its own.
        ranks: processes.
        restarts: `launch.max_restarts` per case.
        code: exit code of the job at each case.
        changes: of the config.
        same: whether the end is that of a run in peace.
    """

    name: str
    cases: tuple[Case, ...]
    ranks: int = 2
    restarts: int = 1
    code: int = 0
    changes: dict[str, Any] = field(default_factory=dict)
    same: bool = True

    @property
    def told(self) -> tuple[Case, ...]:
        """The cases of today."""
        return tuple(case for case in self.cases if WHOLE or not case.nightly)


def killed(name: str, rank: int, place: str, **more: Any) -> Case:
    return Case(f"SIGKILL {name}", "kill", rank, f"rank {rank} was ended by SIGKILL", place, **more)


def hangs(name: str, action: str, rank: int, says: str, place: str = "forward", **more: Any) -> Case:
    return Case(name, action, rank, says, place, seconds=HANG_SECONDS + 10, **more)


def damaged(name: str, action: str, **more: Any) -> Case:
    return Case(name, action, 0, "skipped the checkpoint of step", "forward", back=2, **more)


def stop(name: str, action: str, rank: int, says: str, place: str = "forward", **more: Any) -> Case:
    # Ranks that do not stop are killed after 45 s.
    return Case(name, action, rank, f"stopping +because of {says}", place, seconds=40, blames=False, **more)


LATER = {"after_seconds": 0.1, "step": None}  # not at the first start
DEATHS = (
    killed("while starting", 1, "building", blames=False, options={"step": None}),  # before it has reported once
    killed("while loading a batch", 1, "loading a batch", seconds=20),  # to the next deed, after a whole start
    killed("while restoring", 0, "restoring a checkpoint", options=LATER, nightly=True),
    killed("of rank 0, in forward", 0, "forward", nightly=True),
    killed("in an evaluation", 1, "evaluation", nightly=True),
    killed("while saving", 1, "saving a checkpoint", nightly=True),
    killed("in the optimizer's step", 1, "optimizer", nightly=True),
    Case(
        "SIGKILL of all ranks",
        "kill-all",
        0,
        "rank [01] was ended by SIGKILL",
        "backward",
        blames=False,
        seconds=20,
        nightly=True,
    ),
    Case("an exception", "raise", 1, r"rank 1 on \S+, step \d+ \(forward\): RuntimeError: .*; samples \d+", "forward"),
    Case(
        "an exception in rank 0's evaluation",
        "raise",
        0,
        r"rank 0 on \S+, step \d+ \(evaluation\): RuntimeError",
        "evaluation",
        nightly=True,
    ),
    Case(
        "out of memory", "oom", 1, r"rank 1 on \S+, step \d+ \(backward\): OutOfMemoryError", "backward", nightly=True
    ),
    Case("os._exit(3)", "exit", 1, "restarting .*rank 1", "forward", nightly=True),
    Case("a segmentation fault", "segfault", 1, "rank 1 was ended by SIGSEGV", "forward", nightly=True),
    Case("a loader worker is killed", "kill-worker", 1, r"rank 1 .*WorkerDied: loader worker 0", nightly=True),
    damaged("bits of the newest checkpoint flip, SIGKILL", "corrupt-checkpoint"),
    damaged("a file of it is cut in half, SIGKILL", "truncate-checkpoint", nightly=True),
    damaged("a file of it is gone, SIGKILL", "remove-checkpoint-file", nightly=True),
    hangs(
        "a rank sleeps while loading",
        "hang",
        1,
        r"rank 1 on \S+, step \d+ \(loading a batch\)",
        "loading a batch",
        nightly=True,
    ),
    hangs("rank 0 sleeps in forward", "hang", 0, r"rank 0 on \S+, step \d+ \(forward\)", nightly=True),
    hangs("a rank sleeps with Python's lock held", "hang-with-gil", 1, r"rank 1 on \S+, step \d+ \(forward\)"),
    hangs("SIGSTOP", "stop", 1, r"rank 1 on \S+, step \d+", nightly=True),
    hangs("SIGSTOP of rank 0", "stop", 0, r"rank 0 on \S+, step \d+", nightly=True),
    hangs(
        "a loader worker is stopped", "stop-worker", 1, r"rank 1 on \S+, step \d+ \((loading|evaluation)", nightly=True
    ),
)
ON_THREE = (
    killed("in backward, of one of three", 2, "backward", nightly=True),
    Case(
        "an exception, one of three",
        "raise",
        1,
        r"rank 1 on \S+, step \d+ \(optimizer\): Run",
        "optimizer",
        nightly=True,
    ),
    hangs(
        "a rank of three sleeps in an evaluation",
        "hang",
        2,
        r"rank 2 on \S+, step \d+ \(evaluation\)",
        "evaluation",
        nightly=True,
    ),
    hangs("SIGSTOP, of one of three", "stop", 1, r"rank 1 on \S+, step \d+", nightly=True),
)
STOPS = (
    stop("SIGTERM to a rank", "signal:SIGTERM", 0, "SIGTERM on rank 0", nightly=True),
    stop("SIGINT to a rank", "signal:SIGINT", 1, "SIGINT on rank 1", nightly=True),
    stop("SIGUSR1 to a rank", "signal:SIGUSR1", 1, "SIGUSR1 on rank 1", nightly=True),
    stop("SIGTERM to the launcher", "signal-launcher:SIGTERM", 0, "SIGTERM on rank", nightly=True),
    stop("SIGUSR1 to the launcher", "signal-launcher:SIGUSR1", 0, "SIGUSR1 on rank"),
    stop("SIGINT to the launcher", "signal-launcher:SIGINT", 0, "SIGINT on rank", nightly=True),
    stop("SIGTERM in an evaluation", "signal:SIGTERM", 1, "SIGTERM on rank 1", "evaluation", nightly=True),
    stop("SIGTERM within a long step", "signal:SIGTERM", 1, "SIGTERM on rank 1", "backward"),
    stop("the file STOP", "stop-file", 1, "the file STOP on rank 0", nightly=True),
)
STORIES = (
    Story("deaths and hangs", DEATHS, changes={"data__workers": 1}),
    Story("of three", ON_THREE, ranks=3),
    Story("stops", STOPS, code=75, changes={"train__micro_batch_size": 2}),
    Story(
        "skip",
        (
            Case("NaN, skip", "nan", 1, "step 30: the loss of rank 1 is nan", blames=False, nightly=True),
            Case(
                "infinite gradient, skip",
                "inf-gradient",
                0,
                "step 36: the norm of the gradients",
                blames=False,
                nightly=True,
            ),
        ),
        changes={"faults__non_finite": "skip"},
        same=False,
    ),
    Story(
        "rollback",
        (
            Case("NaN, rollback", "nan", 1, "leaving out the batch of step 30", blames=False, nightly=True),
            Case("a spike, rollback", "spike", 1, "leaving out the batch of step 36", blames=False, nightly=True),
        ),
        changes={"faults__non_finite": "rollback", "faults__spike_factor": 50.0},
        same=False,
    ),
    Story(
        "NaN stops it",
        (Case("NaN, stop", "nan", 1, "error: rank 1 .*: the loss of rank 1 is nan", nightly=True),),
        code=1,
    ),
    Story(
        "no restart left",
        (Case("an exception, no restart left", "raise", 1, r"error: rank 1 on .*RuntimeError", "forward"),),
        restarts=0,
        code=1,
    ),
    Story(
        "bad data",
        (Case("bad data on one rank", "raise-user-error", 1, "error: ", "loading a batch", nightly=True),),
        code=2,
    ),
    Story(
        "a slow rank",
        (
            Case(
                "a slow rank",
                "delay",
                1,
                r"rank 1 takes .* it costs \d+% of each step",
                blames=False,
                options={"seconds": 0.3, "times": 8},
                nightly=True,  # tests/dist/test_advice_dist.py has one
            ),
        ),
    ),
)
FIRST_STEP = {"skip": 30, "rollback": 30}  # a spike needs losses to compare with


@dataclass
class Told:
    """What came of a story: what was said, and per case the figures, or why there are none."""

    output: str
    figures: dict[str, dict[str, Any]]
    problems: dict[str, list[str]]
    end: str = ""  # what is wrong with the end of the run


def config_file(story: Story, folder: Path, name: str) -> Path:
    steps = max(events(story)[-1].step or 0, 20) + (60 if story.name == "stops" else 8)
    changes = {
        "model": {"name": "vectors_model:Normed", "args": {"dropout": 0.2}},
        "data__train": {"name": "slow:Steady", "args": {"length": 120, "seconds": 0.01}},
        "optim": {"name": "adamw", "lr": 0.01, "clip_norm": 1.0},
        "train__steps": steps,
        "train__epochs": None,
        "eval": {"every": EVALUATED_EVERY, "batch_size": 2},
        "checkpoint": {"every": SAVED_EVERY, "keep": 3},
        "log": {"every": 4},
        "faults__hang_timeout": HANG_SECONDS,
        "launch__max_restarts": story.restarts * len(story.told),
        **story.changes,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tiny_config(folder / name, **changes)))
    return file


def events(story: Story) -> list[Event]:
    """Returns an event per case, in steps that are evaluated, so that each place is reached in them."""
    first = FIRST_STEP.get(story.name, 2 * APART)
    steps = iter(range(first, 10_000, APART))
    planned = []
    for case in story.told:
        options = {"step": None, **case.options}
        if "step" not in case.options:
            options["step"] = next(steps)
        planned.append(Event(case.action, rank=case.rank, place=case.place, **options))
    return planned


class Commits:
    """When each checkpoint of a run was complete, which a save in the background may be long after its step.

    Look often: a checkpoint is removed once `checkpoint.keep` newer ones are there.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoints"
        self._times: dict[int, float] = {}

    def look(self) -> None:
        for folder in self.folder.glob("step-*"):
            with contextlib.suppress(FileNotFoundError):  # removed in this moment
                self._times.setdefault(int(folder.name[5:]), folder.stat().st_ctime)  # of its renaming

    def before(self, moment: float) -> list[int]:
        """Returns the steps of those that were complete at a moment, newest first."""
        return sorted((step for step, time in self._times.items() if time < moment), reverse=True)


def launch(config: Path, ranks: int, commits: Commits, **variables: str) -> tuple[int, str, list[str]]:
    """Runs a job to its end; returns its exit code, what it said, and which of its processes are left."""
    arguments = ["--config", str(config), "--processes", str(ranks)]
    command = [sys.executable, "-m", "launch", "local", *arguments]
    job = Job(command, config.parent, OMP_NUM_THREADS="1", **variables)
    family: dict[int, psutil.Process] = {}
    deadline = time.monotonic() + 900
    while job.process.poll() is None:
        assert time.monotonic() < deadline, job.output()
        family.update({process.pid: process for process in job.family()})
        commits.look()
        time.sleep(0.25)  # to look takes time itself
    commits.look()
    return job.end(), job.output(), alive(list(family.values()), within=5)


def tell(story: Story, folder: Path, server: TrainServer) -> Told:
    """Has a job go through a story."""
    config, plan, run = config_file(story, folder, "run"), folder / "plan.json", folder / "run"
    planned = events(story)
    write_plan(plan, run, planned)
    output, ends = "", []
    starts = len(story.told) if story.code == 75 else 1
    left: list[str] = []
    codes = []
    commits = Commits(run)
    for _ in range(starts):
        code, said, still_there = launch(config, story.ranks, commits, **{VARIABLE: str(plan)})
        output += said
        codes.append(code)
        left += still_there
        ends.append(time.time())
    told = Told(output, {}, {})
    attempts = read_attempts(run / "attempts.json")
    deeds = {record["event"]: record for record in read_notes(done_file(plan))}
    for number, case in enumerate(story.told):
        problems = told.problems[case.name] = []
        code = codes[min(number, starts - 1)]
        if code != story.code:
            problems.append(f"exit code {code}")
        if left:
            problems.append(f"left behind: {left}")
        if not re.search(case.says, output):
            problems.append(f"nobody says {case.says!r}")
        if number not in deeds:
            problems.append("it did not happen")
            continue
        when, step = deeds[number]["time"], deeds[number]["step"]
        next_attempt = next((attempt for attempt in attempts if attempt.started > when), None)
        # An attempt that ends before its first step leaves no record but its own fault.
        later = [deed["time"] for deed in deeds.values()] + [attempt.started for attempt in attempts] + ends
        ended = min(moment for moment in later if moment > when)
        lost = 0
        if next_attempt is not None and story.code == 0:
            lost = max(step - (case.place != "evaluation") - next_attempt.first_step, 0)
            complete = commits.before(when)
            if next_attempt.first_step < (complete[case.back - 1] if len(complete) >= case.back else 0):
                problems.append(f"goes on from step {next_attempt.first_step}, with checkpoints of steps {complete}")
        # A save may be under way at the deed; the one before it has ended, as it began the next.
        if lost > (case.back + 1) * SAVED_EVERY:
            problems.append(f"{lost} steps are lost")
        goes_on = (story.code == 0 and not story.same) or case.action == "delay"
        if ended - when > case.seconds and not goes_on:
            problems.append(f"took {ended - when:.1f} s")
        if case.blames and not blamed(run, case.rank, when, ended):
            problems.append(f"nothing blames rank {case.rank}")
        told.figures[case.name] = {
            "name": case.name,
            "ranks": story.ranks,
            "code": code,
            "seconds": None if goes_on else round(ended - when, 1),
            "lost": lost,
        }
    if story.code in (1, 2, 75):
        done = server.train("--config", config_file(story, folder, "run"), ranks=story.ranks)
        told.output += done.out + done.err
        told.end = "" if done.code == 0 else f"the next start ends with {done.code}"
    return told


def blamed(run: Path, rank: int, since: float, until: float) -> bool:
    """Tells whether a fault of that time was put down to a rank, with the stacks of another one."""
    for file in run.glob(f"faults/attempt-*/{FIRST}"):
        fault = Fault.from_json(file.read_bytes())
        if since - 1 <= fault.time <= until + 1 and fault.rank == rank:
            return any(file.parent.glob("rank-*.txt"))
    return False


class Stories:
    """What came of each story, and where; told when asked for."""

    def __init__(self, server: TrainServer, factory: pytest.TempPathFactory) -> None:
        self.server = server
        self.factory = factory
        self.told: dict[str, tuple[Told, Path]] = {}

    def __getitem__(self, story: Story) -> tuple[Told, Path]:
        if story.name not in self.told:
            folder = self.factory.mktemp(story.name.replace(" ", "-").replace("'", ""))
            self.told[story.name] = tell(story, folder, self.server), folder
        return self.told[story.name]


@pytest.fixture(scope="module")
def stories(server: TrainServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stories]:
    stories = Stories(server, tmp_path_factory)
    yield stories
    if file := os.environ.get("LOCKSTEP_FAULTS_JSON"):
        found = [figures for story, _ in stories.told.values() for figures in story.figures.values()]
        Path(file).write_text(json.dumps({"cases": found}, indent=2) + "\n")


ALL = [pytest.param(story, case, id=case.name) for story in STORIES for case in story.told]


def test_there_are_enough() -> None:
    assert sum(len(story.cases) for story in STORIES) >= 40  # nightly
    assert len(ALL) >= 8  # of each kind, in CI; bad numbers have tests of their own
    assert len({case.name for story in STORIES for case in story.cases}) == sum(len(story.cases) for story in STORIES)


@pytest.mark.parametrize(("story", "case"), ALL)
def test_fault(story: Story, case: Case, stories: Stories) -> None:
    told, _ = stories[story]
    assert told.problems[case.name] == [], told.output


@pytest.mark.parametrize("story", [story for story in STORIES if story.told], ids=lambda story: story.name)
def test_the_end_is_that_of_a_run_in_peace(story: Story, stories: Stories, server: TrainServer) -> None:
    told, folder = stories[story]
    assert told.end == "", told.output
    assert summary(folder / "run")["status"] == "finished", told.output
    if not story.same:
        return
    quiet = server.train("--config", config_file(story, folder, "quiet"), ranks=story.ranks)
    assert quiet.code == 0, quiet.out + quiet.err
    aside = [path.name for path in (folder / "run" / "checkpoints").glob("damaged-*")]
    assert len(aside) == sum(case.action.endswith(("-checkpoint", "-checkpoint-file")) for case in story.told)
    assert_same_end(folder / "run", folder / "quiet", told.output, aside)
