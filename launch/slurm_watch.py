"""Jobs that were submitted: the note of one in its run folder, following and waiting for it, its state, its end."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from launch import slurm_jobs
from launch.slurm_jobs import NoAnswerError, Record
from launch.slurm_script import CANCEL_SIGNAL
from trainer.cli import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_USAGE
from trainer.config import Config
from trainer.errors import UserError
from trainer.files import read_summary, write_json

logger = logging.getLogger("lockstep")

_Answer = TypeVar("_Answer")
_NOTE = "slurm.json"
_LOOK_SECONDS, _SELDOM_SECONDS = 2.0, 15.0  # between questions to Slurm: at first, and when nothing happens for long
_UNANSWERED_SECONDS = 5.0  # between questions that Slurm does not answer
_READ_SECONDS = 0.3  # between looks into the output
_SETTLE_SECONDS = 3.0  # after which an end that is none, as that of a node that fails, has become a new start
_REMOVAL_SECONDS = 60.0  # which Slurm gets to end what it was told to


@dataclass(frozen=True)
class Submission:
    """What `<run folder>/launch/slurm.json` says of the last job that was submitted for the run.

    Args:
        job: for Slurm's commands: 12, or 12_3 for a task of an array.
        script: its file.
        stop_seconds: that the run may take to end once it was asked to.
        tasks: run folders of an array's tasks, by number.
        output_is_ours: whether the output is in the run folder; else `launch.slurm.extra` has put it elsewhere.
    """

    job: str
    script: str
    stop_seconds: int
    tasks: dict[int, str]
    output_is_ours: bool

    def write(self, folder: Path) -> None:
        """Writes the note into a run folder."""
        write_json(folder / "launch" / _NOTE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Submission | None:
        """Returns the note in a run folder; None where there is none."""
        try:
            found = json.loads((folder / "launch" / _NOTE).read_text(encoding="utf-8"))
            tasks = {int(task): str(path) for task, path in found["tasks"].items()}
            seconds, is_ours = int(found["stop_seconds"]), bool(found["output_is_ours"])
            return cls(str(found["job"]), str(found["script"]), seconds, tasks, is_ours)
        except (OSError, ValueError, KeyError, AttributeError):
            return None

    def running(self) -> list[Record]:
        """Returns what of it runs or waits."""
        return slurm_jobs.find_running(self.job, self.script)

    def folder_of(self, record: Record, folder: Path) -> Path:
        """Returns the run folder of a task."""
        number = record.job.rpartition("_")[2]
        return Path(self.tasks[int(number)]) if number.isdigit() and int(number) in self.tasks else folder

    def output_of(self, record: Record, folder: Path) -> Path:
        """Returns the file of a task's output. Slurm shows a wrong one where there is a percent sign in the path."""
        if self.output_is_ours and "[" not in record.job:
            return self.folder_of(record, folder) / "launch" / f"slurm-{record.job}.out"
        return Path(record.output)


class _Output:
    """The growing output of a job, or of a task of an array, whose lines get its number in front."""

    def __init__(self, file: Path, prefix: str) -> None:
        self._file = file
        self._prefix = prefix.encode()
        self._offset = 0
        self._partial = b""

    def show(self, to_the_end: bool = False) -> None:
        try:
            with open(self._file, "rb") as stream:
                stream.seek(self._offset)
                chunk = stream.read()
        except OSError:
            return
        self._offset += len(chunk)
        whole, newline, self._partial = (self._partial + chunk).rpartition(b"\n")
        text = whole + newline
        if to_the_end and self._partial:
            text, self._partial = text + self._partial + b"\n", b""
        if self._prefix:
            text = b"".join(self._prefix + line for line in text.splitlines(keepends=True))
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()


class Watch:
    """Waits for a job until it has ended for good.

    Args:
        submission: the job.
        folder: its run folder.
        config: of the run.
        shows: whether to show its output, and to say what it waits for.
    """

    def __init__(self, submission: Submission, folder: Path, config: Config, shows: bool) -> None:
        self._submission = submission
        self._folder = folder
        self._config = config
        self._shows = shows
        self._outputs: dict[str, _Output] = {}
        self._said: dict[str, str] = {}
        self._codes: dict[str, int] = {}
        self._is_answered = True

    def run(self) -> int:
        """Returns the exit code of the training; of an array, that of the task that ended worst."""
        looked, pause, ended = 0.0, _LOOK_SECONDS, 0.0
        while True:
            if time.monotonic() - looked >= pause:
                records = self._look()
                looked = time.monotonic()
                if records is None:  # not an end: nothing is known
                    ended, pause = 0.0, _SELDOM_SECONDS
                    continue
                news = [self._tell(record) for record in records]
                pause = _LOOK_SECONDS if any(news) else min(_SELDOM_SECONDS, 1.1 * pause)
                if all(record.has_ended for record in records):
                    if ended and time.monotonic() - ended >= _SETTLE_SECONDS:
                        break
                    ended, pause = ended or time.monotonic(), _LOOK_SECONDS
                else:
                    ended = 0.0
            self._show()
            time.sleep(_READ_SECONDS)
        self._show(to_the_end=True)
        for record in records:
            self._codes[record.job] = _exit_code(record, self._submission.folder_of(record, self._folder))
        codes = self._codes.values() if self._codes else [_code_of(read_summary(self._folder))]
        worst_first = (EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED)
        return next((code for code in worst_first if code in codes), EXIT_FINISHED)

    def _look(self) -> list[Record] | None:
        """Returns what Slurm says, and None where it does not answer: jobs go on without it."""
        try:
            records = slurm_jobs.find(self._submission.job)
        except NoAnswerError as error:
            if self._is_answered:
                logger.warning("%s; asking again until Slurm answers", error)
            self._is_answered = False
            return None
        if not self._is_answered:
            logger.info("Slurm answers again")
            self._is_answered = True
        for record in records:  # Slurm may forget it later on
            if record.has_ended:
                self._codes[record.job] = _exit_code(record, self._submission.folder_of(record, self._folder))
        return records

    def _tell(self, record: Record) -> bool:
        """Says what is new, and whether something is."""
        text = f"job {record.job}: {describe(record)}"
        is_new = self._said.get(record.job) != text
        self._said[record.job] = text
        if is_new and self._shows:
            self._show()
            logger.info("%s", text)
            with suppress(NoAnswerError):
                if record.waits and (problem := slurm_jobs.never_runs(record, self._config)) is not None:
                    logger.warning("job %s: %s", record.job, problem)
        is_task = "_" in record.job
        if record.job not in self._outputs and not record.waits:
            prefix = f"[{record.job.rpartition('_')[2]}] " if is_task else ""
            self._outputs[record.job] = _Output(self._submission.output_of(record, self._folder), prefix)
        return is_new

    def _show(self, to_the_end: bool = False) -> None:
        if self._shows:
            for output in self._outputs.values():
                output.show(to_the_end)


def describe(record: Record) -> str:
    """Returns the state of a job in a few words."""
    if record.waits:
        again = f", to start again (number {record.num_requeues})" if record.num_requeues else ""
        return f"pending{again} ({slurm_jobs.explain_wait(record)})"
    where = f" on {record.nodes}" if record.nodes else ""
    if record.has_ended:
        code = "" if record.exit_code is None else f", exit code {record.exit_code}"
        return f"{record.state.lower()}{code}"
    return f"{record.state.lower()}{where}"


def status(folder: Path) -> int:
    """Prints the state of the run's job, and of the run.

    Raises:
        UserError: no job was submitted for this run folder, or Slurm cannot be asked.
    """
    submission = _submission(folder)
    records = slurm_jobs.find(submission.job)
    lines = []
    for record in records:
        time_used = f", {record.run_time}" if not record.waits else ""
        again = f", started again {_times(record.num_requeues)}" if record.num_requeues and not record.waits else ""
        lines.append(f"job     {record.job}: {describe(record)}{time_used}{again}")
        lines.append(f"output  {submission.output_of(record, folder)}")
        lines += [f"run     {line}" for line in _run(record, submission.folder_of(record, folder))]
    if not records:
        lines.append(f"job     {submission.job}: has ended; Slurm does not know it any more")
        folders = [Path(path) for path in submission.tasks.values()] or [folder]
        lines += [f"run     {line}" for path in folders for line in _run(None, path)]
    sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_FINISHED


def cancel(folder: Path) -> int:
    """Asks the run's job to stop with a checkpoint, and removes from Slurm what has not ended after its time of grace.

    Raises:
        UserError: no job was submitted for this run folder, or Slurm does not obey.
    """
    submission = _submission(folder)
    records = submission.running()
    if not records:
        sys.stdout.write(f"job {submission.job} has ended already: nothing runs, nothing waits\n")
        return EXIT_FINISHED
    waiting = [record for record in records if record.waits]
    if waiting:  # first: one that ends may let another begin
        _order("scancel", "--state=PENDING", *[record.job for record in waiting])
        for record in waiting:
            sys.stdout.write(f"job {record.job} was waiting: removed\n")
    running = [record for record in records if not record.waits]
    for record in running:
        sys.stdout.write(f"job {record.job} is asked to stop with a checkpoint (up to {submission.stop_seconds} s)\n")
        sys.stdout.flush()
        # Where it has just ended there is nothing to signal.
        slurm_jobs.call("scancel", "--batch", f"--signal={CANCEL_SIGNAL}", record.job)
    # A job that was about to be queued again is taken out of the queue there.
    left = _wait_for_end(submission, submission.stop_seconds if running else 0)
    if left:
        _order("scancel", *[record.job for record in left])
        left = _wait_for_end(submission, _REMOVAL_SECONDS)
    if left:
        names = ", ".join(f"{record.job} ({record.state.lower()})" for record in left)
        raise UserError(f"Slurm has not ended {names} in {_REMOVAL_SECONDS:.0f} s; see `scontrol show job`")
    for record in running:
        path = submission.folder_of(record, folder)
        sys.stdout.write(f"job {record.job}: {_how_it_ended(submission, record, path)}\n")
    sys.stdout.write("nothing of it runs or waits any more\n")
    return EXIT_FINISHED


def _how_it_ended(submission: Submission, record: Record, folder: Path) -> str:
    now = _patiently(lambda: slurm_jobs.find(record.job))
    code = now[0].exit_code if now else None
    summary = read_summary(folder)
    if code == EXIT_STOPPED and summary.get("status") == "stopped":
        return f"stopped with a checkpoint at step {summary['step']}; the same command goes on from there"
    if code == EXIT_STOPPED:
        return "stopped before it had begun to train"
    if code == EXIT_FINISHED and summary.get("status") == "finished":
        return "finished before it could be stopped"
    if code is None:
        return f"ended by force, as it had not ended in {submission.stop_seconds} s; its last checkpoint stands"
    return f"ended with exit code {code}"


def _wait_for_end(submission: Submission, seconds: float) -> list[Record]:
    """Waits for the end of what runs and returns what is left. What waits in the queue does not end by itself."""
    end = time.monotonic() + seconds
    while True:
        left = _patiently(submission.running)
        if not left or time.monotonic() >= end or all(record.waits for record in left):
            return left
        time.sleep(1)


def _patiently(question: Callable[[], _Answer]) -> _Answer:
    """Asks until Slurm answers."""
    is_answered = True
    while True:
        try:
            return question()
        except NoAnswerError as error:
            if is_answered:
                logger.warning("%s; asking again until Slurm answers", error)
            is_answered = False
            time.sleep(_UNANSWERED_SECONDS)


def _order(*command: str) -> None:
    answer = slurm_jobs.call(*command)
    if answer.returncode and "Invalid job id" not in answer.stderr and "already completing" not in answer.stderr:
        raise UserError(f"{command[0]}: {slurm_jobs.first_line(answer.stderr)}")


def _submission(folder: Path) -> Submission:
    slurm_jobs.need("scontrol")
    submission = Submission.read(folder)
    if submission is None:
        raise UserError(f"no Slurm job was submitted for a run in '{folder}': there is no launch/{_NOTE} in it")
    return submission


def _run(record: Record | None, folder: Path) -> Sequence[str]:
    """Returns how far the run has come, in lines."""
    summary = read_summary(folder)
    step = _last_step(folder)
    if record is not None and not record.has_ended:
        return [f"{folder}: at step {step}" if step is not None else f"{folder}: has not trained yet"]
    if not summary:
        return [f"{folder}: has left no summary" + (f"; last seen at step {step}" if step is not None else "")]
    by = f" by {summary['stopped_by']}" if summary.get("stopped_by") else ""
    error = f": {summary['error']}" if summary.get("error") else ""
    at = f"step {summary.get('step')} of {summary.get('total_steps')}"
    early = ", early" if summary.get("stopped_early") else ""
    return [f"{folder}: {summary.get('status')}{by} at {at}{early}{error}"]


def _last_step(folder: Path) -> int | None:
    try:
        with open(folder / "metrics.jsonl", "rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 65536))
            lines = stream.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # a line that is being written
            continue
    return None


def _exit_code(record: Record, folder: Path) -> int:
    """Returns the exit code of the training of a job that has ended."""
    if record.state not in ("COMPLETED", "FAILED") or record.exit_code is None:  # Slurm has ended the script
        return _code_of(read_summary(folder))
    return record.exit_code if record.exit_code in (EXIT_FINISHED, EXIT_USAGE, EXIT_STOPPED) else EXIT_FAILED


def _code_of(summary: dict[str, Any]) -> int:
    return {"finished": EXIT_FINISHED, "stopped": EXIT_STOPPED}.get(summary.get("status", ""), EXIT_FAILED)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"
