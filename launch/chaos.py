"""`python -m launch chaos`: the user's own job under faults, and beside it the same job in peace.

A copy of the run, in a folder of its own, is killed, stopped, held up and robbed of checkpoints for some minutes by a
plan of faults (`trainer.faults.plan`), and brings itself back each time. Then it is asked to stop, started once more,
and ended after a step or two. The same job in peace ends with that very step, and both must be the same to the last
bit. Owns the plan and the two jobs; what is told of them is `launch.chaos_report`. How a job survives is not here.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch

from launch.agent import end_descendants
from launch.chaos_report import CHAOS, QUIET, Report, Suffered
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.storage import LocalStorage
from trainer.cli import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_USAGE
from trainer.comparing import checkpoint_differences, logged_differences
from trainer.config import Config, load_config
from trainer.errors import UserError, one_line_text
from trainer.faults.judging import AFTER_STEP, WITHIN_A_STEP
from trainer.faults.plan import (
    MOST_SECONDS_VALID,
    VARIABLE,
    Event,
    done_file,
    read_notes,
    starts_file,
    write_plan,
)
from trainer.files import read_summary
from trainer.system import adopt_orphans, die_with_parent

logger = logging.getLogger("lockstep")

_PLAN = "plan.json"  # its presence says that a folder is ours to empty
_PLACES = (*WITHIN_A_STEP, AFTER_STEP)  # in every step
_LEAST_KEPT = 3  # checkpoints: one of them gets damaged
_RESTARTS = 100_000
_POLL_SECONDS = 0.2
_STOP_SECONDS = 60.0  # which a job may take to stop, besides faults.grace and the time of a hang
_MOST_DELAY = 5.0  # seconds
_EXTRA_VALID = 3600.0  # seconds for which plans hold, beyond what is planned
_ROUNDS = 10  # of killing what is left
_PATIENCE = 6.0  # hang timeouts; a first step is given five
_LAST_STEPS = 2  # that the attempt after the last fault makes


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Args:
        file: of the config.
        overrides: the user's.
        processes: None for one per GPU, or one where there is no GPU.
        minutes: of faults, from the first step on.
        every: seconds between two faults in which the run is there, on average.
        seed: of the faults.
        folder: for both runs, the plans and the report.
        hang_timeout: seconds, in place of faults.hang_timeout.
    """

    file: str
    overrides: Sequence[str]
    processes: int | None
    minutes: float
    every: float
    seed: int
    folder: Path
    hang_timeout: float

    def run_dir(self, name: str) -> Path:
        """Returns the folder of one of the two runs."""
        return self.folder / name


class _Failed(Exception):
    """One of the jobs does not do what it must; says why."""


def settings_of_run(config: Config, settings: Settings, name: str) -> list[str]:
    """Returns the overrides of one of the two runs, the user's own first."""
    return [
        *settings.overrides,
        f"run.dir={json.dumps(str(settings.run_dir(name)))}",
        "tracking.trackers=[]",
        "checkpoint.dir=null",
        "checkpoint.resume=auto",
        f"checkpoint.keep={max(config.checkpoint.keep, _LEAST_KEPT)}",
        f"launch.max_restarts={_RESTARTS if name == CHAOS else 0}",
        f"faults.hang_timeout={settings.hang_timeout:g}",
    ]


def draw_events(seed: int, seconds: float, every: float, processes: int) -> list[Event]:
    """Returns faults at random instants, which a run must get over without a trace.

    Every kind comes once before any comes again.

    Args:
        seed: which ones.
        seconds: for which there are to be enough of them.
        every: seconds between two, on average, not counting those in which the run is not there.
        processes: ranks.
    """
    choice = random.Random(seed)
    kinds = ["kill", "hang", "delay", "corrupt-checkpoint"]
    if processes > 1:
        # A process that is alone, and stopped, has nobody who would notice.
        kinds += ["kill-all", "stop"]
    events: list[Event] = []
    bag: list[str] = []
    while sum(event.after_seconds or 0 for event in events) < seconds:
        bag = bag or choice.sample(kinds, len(kinds))
        action = bag.pop()
        events.append(
            Event(
                action,
                rank=choice.randrange(processes),
                place=choice.choice(_PLACES),
                after_seconds=round(every * choice.uniform(0.5, 1.5), 3),
                in_turn=True,  # what is due while the run is down must not all come at once when it is back
                seconds=round(min(_MOST_DELAY, every / 4) * choice.uniform(0.2, 1), 3) if action == "delay" else 0.0,
                times=choice.randint(1, 3) if action == "delay" else 1,
            )
        )
    return events


def run(settings: Settings, json_file: Path | None) -> int:
    """Does it all, and returns the exit code: 0 where both runs are the same, 1 where they are not, 2 for bad usage.

    Raises:
        UserError: the folder holds something else, or the config is bad.
    """
    config = load_config(settings.file, settings.overrides)
    for name in (CHAOS, QUIET):
        load_config(settings.file, settings_of_run(config, settings, name))
    _prepare(settings, config)
    num_gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    processes = settings.processes or num_gpus or 1
    report = Report(settings.file, processes, settings.seed)
    with _nothing_left_behind():
        code = EXIT_FAILED
        try:
            end = _suffer(settings, config, report)
            _compare(end, settings, config, report)
            code = EXIT_FINISHED if report.same else EXIT_FAILED
        except _Failed as error:
            report.problem = str(error)
        except UserError as error:  # what a job said
            report.problem, code = one_line_text(error), EXIT_USAGE
    for file in (settings.folder / "report.json", json_file):
        if file is not None:
            file.write_text(report.to_json(), encoding="utf-8")
    sys.stdout.write(report.table())
    return code


def _prepare(settings: Settings, config: Config) -> None:
    """Makes the folder, without what an earlier call left in it.

    Raises:
        UserError: the folder is not ours, or is the user's own run.
    """
    folder = settings.folder
    own = config.run_dir.resolve()
    if any(own.is_relative_to(settings.run_dir(name)) for name in (CHAOS, QUIET)):
        raise UserError(f"--folder {folder}: the run itself is in it, and is not to be touched")
    try:
        if folder.exists() and not (folder / _PLAN).exists() and any(folder.iterdir()):
            raise UserError(f"--folder {folder}: it holds something else; choose another one")
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CHAOS, QUIET):
            if settings.run_dir(name).exists():
                shutil.rmtree(settings.run_dir(name))
            _log(settings, name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--folder {folder}: {error.strerror}") from error


def _log(settings: Settings, name: str) -> Path:
    return settings.folder / f"{name}.log"


# ---- the two runs -----------------------------------------------------------------------------------------


def _suffer(settings: Settings, config: Config, report: Report) -> int | None:
    """Runs the job under faults. Returns the step that it was ended with; None where it came to its own end."""
    plan, seconds = settings.folder / _PLAN, 60 * settings.minutes
    events = draw_events(settings.seed, seconds, settings.every, report.processes)
    write_plan(plan, settings.run_dir(CHAOS), events, seconds_valid=seconds + _EXTRA_VALID)
    message = "faults for %g minutes, about %g s after one another, on %d processes"
    logger.info(message, settings.minutes, settings.every, report.processes)
    began = time.time()
    job, follower = _Job(settings, config, CHAOS, plan), _Follower(plan, report.faults)
    while (code := job.code()) is None and follower.seconds() < seconds:
        time.sleep(_POLL_SECONDS)
        follower.look()
        if follower.silence() > _PATIENCE * settings.hang_timeout + _STOP_SECONDS:
            raise _Failed(f"{report.faults[-1]}, and the job has not come back for {follower.silence():.0f} s")
    follower.look()
    report.minutes = follower.seconds() / 60
    if code is None:
        logger.info("asking the job to stop")
        code = job.stop(config.faults.grace.seconds + settings.hang_timeout + _STOP_SECONDS)
    elif code == EXIT_USAGE and not report.faults:
        raise UserError(*job.problems())
    elif code not in (EXIT_FINISHED, EXIT_STOPPED):
        raise _Failed(f"the job under faults gave up with exit code {code}: {job.last_words()}")
    told = _told(settings.run_dir(CHAOS), began)
    step = None
    if code != EXIT_FINISHED:
        # A request to stop that comes while it starts just ends it. From whatever checkpoint there is, it goes on.
        step = _newest_step(settings.run_dir(CHAOS)) + _LAST_STEPS
        logger.info("starting it for the last time, up to step %d", step)
        plan = _run_up_to(step, settings, config, CHAOS)
        for start in read_notes(starts_file(plan)):  # none where the end had been reached already
            follower.last_start(start["step"])
    # With the goodput of before the last start, unless the job was asked to stop before it had begun again.
    had_begun = told["status"] in ("stopped", "finished")
    report.runs[CHAOS] = told if had_begun else _told(settings.run_dir(CHAOS), began)
    return step


def _compare(end: int | None, settings: Settings, config: Config, report: Report) -> None:
    """Runs the job in peace up to the same step, or to its own end as well, and compares."""
    ours, theirs = (settings.run_dir(name) for name in (CHAOS, QUIET))
    step = report.step = _newest_step(ours)
    logger.info("the same in peace, up to step %d", step)
    began = time.time()
    _run_up_to(end, settings, config, QUIET)
    report.runs[QUIET] = _told(theirs, began)
    if (other := _newest_step(theirs)) != step:
        raise _Failed(f"the job in peace ended with step {other} instead of {step}")
    report.differences = [
        *checkpoint_differences(*(_checkpoints(run_dir).open(step) for run_dir in (ours, theirs))),
        *logged_differences(ours / "metrics.jsonl", theirs / "metrics.jsonl"),
    ]
    report.same = not report.differences


def _run_up_to(step: int | None, settings: Settings, config: Config, name: str) -> Path:
    """Runs a job to its own end, or to the end of a step if that is before. Returns the plan by which it did.

    Raises:
        _Failed: it ended otherwise.
    """
    plan = settings.folder / f"{name}-end.json"
    events = [Event("stop-at", step=step)] if step is not None else []
    write_plan(plan, settings.run_dir(name), events, seconds_valid=MOST_SECONDS_VALID)
    job = _Job(settings, config, name, plan, "launch.max_restarts=0")
    code = job.wait()
    if code not in (EXIT_FINISHED, EXIT_STOPPED):
        raise _Failed(f"without faults, the job ended with exit code {code}: {job.last_words()}")
    return plan


def _checkpoints(run_dir: Path) -> CheckpointFolder:
    return CheckpointFolder(LocalStorage(run_dir / "checkpoints"), keep=1)


def _newest_step(run_dir: Path) -> int:
    try:
        return _checkpoints(run_dir).newest().step
    except UserError:
        return 0


def _told(run_dir: Path, began: float) -> dict[str, Any]:
    """Returns what a run says of itself, and its seconds since it began."""
    summary = read_summary(run_dir)
    keys = ("status", "goodput", "goodput_seconds", "num_attempts")
    return {"seconds": round(time.time() - began, 3), **{key: summary.get(key) for key in keys}}


class _Job:
    """A start of `python -m launch local`, which ends with this process.

    Args:
        settings: of all.
        config: the user's.
        name: of the run.
        plan: of its faults.
        more: overrides for this start only.
    """

    def __init__(self, settings: Settings, config: Config, name: str, plan: Path, *more: str) -> None:
        command = [sys.executable, "-m", "launch", "local", "--config", settings.file]
        command += ["--processes", str(settings.processes)] if settings.processes is not None else []
        self._log = _log(settings, name)
        with open(self._log, "ab") as log:
            self._begin = log.tell()
            self._process = subprocess.Popen(
                [*command, *settings_of_run(config, settings, name), *more],
                env={**os.environ, VARIABLE: str(plan)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for us, who end it
                preexec_fn=partial(die_with_parent, signal.SIGTERM) if sys.platform == "linux" else None,
            )

    def code(self) -> int | None:
        """Returns its exit code; None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Waits for its end, and returns its exit code."""
        return self._process.wait()

    def stop(self, seconds: float) -> int:
        """Asks it to stop, and returns its exit code; what has not ended after so many seconds is killed."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            logger.warning("it has not stopped within %.0f s, and is killed", seconds)
            end_descendants()
            return self._process.wait()

    def problems(self) -> list[str]:
        """Returns the errors that it told of."""
        lines = [line.removeprefix("error: ") for line in self._said() if line.startswith("error: ")]
        return lines or [self.last_words()]

    def last_words(self) -> str:
        """Returns the last line that it said."""
        return (self._said() or ["nothing was said"])[-1]

    def _said(self) -> list[str]:
        with open(self._log, "rb") as log:
            log.seek(self._begin)
            lines = log.read().decode(errors="replace").splitlines()
        return [line for line in lines if line.strip()]


class _Follower:
    """Watches what a plan does to a run, says so, and counts what it costs.

    Args:
        plan: its file.
        faults: filled, in order.
    """

    def __init__(self, plan: Path, faults: list[Suffered]) -> None:
        self._plan = plan
        self._faults = faults
        self._began: float | None = None
        self._num_starts = 0

    def look(self) -> None:
        """Takes in what is new."""
        starts = read_notes(starts_file(self._plan))[self._num_starts :]
        notes = read_notes(done_file(self._plan))[len(self._faults) :]
        for note in sorted([*starts, *notes], key=lambda note: note["time"]):
            if "action" in note:
                fault = Suffered(*(note[key] for key in ("action", "rank", "step", "place", "time", "attempt")))
                self._faults.append(fault)
                self._tell(fault.time, str(fault))
            else:
                self._num_starts += 1
                self._start(note["step"], note["time"], note["attempt"])

    def last_start(self, step: int) -> None:
        """Takes in from where the attempt after the last fault went on. When it did is our doing."""
        for fault in self._open():
            fault.lose(step)

    def _start(self, step: int, now: float, attempt: str) -> None:
        if self._began is None:
            self._began = now
            logger.info("training begins")
            return
        for fault in self._open():
            if fault.attempt != attempt:
                fault.lose(step)
                fault.back_after = round(now - fault.time, 3)
        self._tell(now, f"training goes on with step {step}")

    def _open(self) -> list[Suffered]:
        """Returns the faults after which the job has not come back yet."""
        return [fault for fault in self._faults if fault.needs_start and fault.back_after is None]

    def _tell(self, now: float, what: str) -> None:
        logger.info("%6.1f s: %s", now - (self._began or now), what)

    def seconds(self) -> float:
        """Returns the seconds since the first step began; 0 before."""
        return time.time() - self._began if self._began is not None else 0.0

    def silence(self) -> float:
        """Returns for how many seconds the job has been gone after the last fault, if it is."""
        return max((time.time() - fault.time for fault in self._open()[-1:]), default=0.0)


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """Ends everything that was started below this process, however this ends."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    adopt_orphans()
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # nothing interrupts this
        for _ in range(_ROUNDS):  # the children of those that have just ended come to us
            if psutil.Process().children():
                end_descendants()
        for number, handler in previous.items():
            signal.signal(number, handler)
