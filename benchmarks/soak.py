"""A soak: one long run that is killed again and again, against the same run left in peace.

`python -m benchmarks.soak --minutes 60 --kill-every 60 --json FILE` trains the digits twice at the same time: once in
peace, and once under SIGKILL of all its processes, at random instants, started again each time. At the end every tensor
of the last checkpoint, every plain value and every logged loss must be the same, bit for bit. The result is written
every minute, so that a soak that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.commands import new_parser, show_again
from benchmarks.telling import REPOSITORY, describe, markdown_table, origin, write
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.storage import LocalStorage
from trainer.comparing import checkpoint_differences, logged_differences
from trainer.errors import UserError

_CALIBRATION_SECONDS = 40
_SHARE_OF_STEPS = 0.8  # of the time; the rest goes into starting again and into steps done twice


def config(run_dir: Path, steps: int, checkpoint_every: int) -> dict[str, Any]:
    """Returns a run with everything in it that makes an exact resume hard."""
    return {
        "run": {"name": "soak", "dir": str(run_dir)},
        "data": {
            "train": {"name": "digits", "args": {"split": "train"}},
            "eval": {"name": "digits", "args": {"split": "eval"}},
            "transforms": {"train": [{"name": "RandomAffine", "args": {"degrees": 10, "translate": [0.1, 0.1]}}]},
            "workers": 1,
        },
        "model": {"name": "mlp", "args": {"in_features": 64, "hidden": [256, 256], "dropout": 0.2}},
        "precision": "fp16",
        "optim": {"name": "adamw", "lr": 1e-3, "ema": {"decay": 0.999}},
        "train": {"steps": steps, "batch_size": 96, "micro_batch_size": 48},
        "eval": {"every": 5 * checkpoint_every},
        "log": {"every": 1},
        "checkpoint": {"every": checkpoint_every, "keep": 2},
        "tracking": {"trackers": []},
    }


@dataclass
class Report:
    """What the soak found, as it is written to JSON."""

    environment: dict[str, Any]
    processes: int
    steps: int
    checkpoint_every: int
    seed: int
    is_finished: bool = False
    is_same: bool | None = None
    differences: list[str] = field(default_factory=list)
    minutes: float = 0.0
    num_kills: int = 0
    num_starts: int = 0
    steps_lost: list[int] = field(default_factory=list)  # done, and not in the checkpoint that the next start took
    damaged: list[str] = field(default_factory=list)  # checkpoints that were skipped
    exit_codes: list[int] = field(default_factory=list)

    def write(self, file: Path) -> None:
        """Writes what is known so far."""
        write(asdict(self), file)


class Attempt:
    """One start of a run, by `python -m launch local`."""

    def __init__(self, file: Path, processes: int) -> None:
        self.log = file.with_suffix(".log")
        command = [sys.executable, "-m", "launch", "local", "--config", str(file), "--processes", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        with open(self.log, "ab") as log:
            self.begin = log.tell()
            self.process = subprocess.Popen(
                command, cwd=file.parent, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def output(self) -> str:
        """Returns what this attempt has said."""
        with open(self.log, "rb") as log:
            log.seek(self.begin)
            return log.read().decode(errors="replace")

    def kill(self) -> None:
        """Kills all its processes at once, and waits until they are gone."""
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        for process in [psutil.Process(self.process.pid), *family]:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        psutil.wait_procs(family, timeout=30)


def last_step(run_dir: Path) -> int:
    """Returns the last step that was logged."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4000))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):  # half a line
            continue
    return 0


def differences(run: Path, quiet: Path) -> list[str]:
    """Returns what is not the same at the end of two runs, bit for bit."""
    folders = [CheckpointFolder(LocalStorage(folder / "checkpoints"), keep=2) for folder in (run, quiet)]
    told = logged_differences(run / "metrics.jsonl", quiet / "metrics.jsonl")
    return told + checkpoint_differences(*(folder.newest() for folder in folders))


def calibrate(folder: Path, processes: int, checkpoint_every: int) -> float:
    """Returns steps per second of two runs beside each other."""
    attempts, runs = [], [folder / f"calibration-{i}" for i in range(2)]
    for run in runs:
        attempts.append(Attempt(_write(run, 10**6, checkpoint_every), processes))
    while min(last_step(run) for run in runs) < 5:
        if any(attempt.process.poll() is not None for attempt in attempts):
            raise SystemExit(attempts[0].output())
        time.sleep(0.2)
    before, started = last_step(runs[0]), time.monotonic()
    time.sleep(_CALIBRATION_SECONDS)
    rate = (last_step(runs[0]) - before) / (time.monotonic() - started)
    for attempt in attempts:
        attempt.kill()
    return rate


def _write(run_dir: Path, steps: int, checkpoint_every: int) -> Path:
    file = run_dir.with_suffix(".yaml")
    settings = config(run_dir, steps, checkpoint_every)
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return file


def soak(options: argparse.Namespace, report: Report) -> None:
    """Runs both to their end and fills the report."""
    choice = random.Random(report.seed)
    quiet_dir, run_dir = options.folder / "quiet", options.folder / "killed"
    quiet = Attempt(_write(quiet_dir, report.steps, report.checkpoint_every), options.processes)
    file = _write(run_dir, report.steps, report.checkpoint_every)
    started = time.monotonic()
    while True:
        attempt = Attempt(file, options.processes)
        report.num_starts += 1
        before = last_step(run_dir)
        kill_at = time.monotonic() + options.kill_every * choice.uniform(0.5, 1.5)
        while attempt.process.poll() is None and time.monotonic() < kill_at:
            time.sleep(0.05)
        report.minutes = (time.monotonic() - started) / 60
        said = attempt.output()
        report.damaged += [line for line in said.splitlines() if line.startswith("skipped the checkpoint")]
        continued = [line for line in said.splitlines() if line.startswith("continuing from step ")]
        if report.num_starts > 1 and continued:
            report.steps_lost.append(before - int(continued[0].split()[3]))
        if attempt.process.poll() is not None:
            report.exit_codes.append(attempt.process.returncode)
            if attempt.process.returncode != 0:
                report.differences = [f"ended with exit code {attempt.process.returncode}", *said.splitlines()[-3:]]
            break
        attempt.kill()
        report.num_kills += 1
        sys.stderr.write(f"{report.minutes:5.1f} min: kill {report.num_kills}, step {last_step(run_dir)}\n")
        report.write(options.json)
    if quiet.process.wait() != 0:
        report.differences.append(f"the run in peace ended with exit code {quiet.process.returncode}")
    if not report.differences:
        try:
            report.differences = differences(run_dir, quiet_dir)
        except UserError as error:
            report.differences = [str(error)]
    report.is_finished, report.is_same = True, not report.differences


def table(result: Mapping[str, Any]) -> str:
    """Returns the Markdown table of a result."""
    lost = result["steps_lost"]
    rows = [
        ["", "soak"],
        ["---", "---:"],
        ["minutes", f"{result['minutes']:.1f}"],
        ["steps", f"{result['steps']:,}"],
        ["kills", str(result["num_kills"])],
        ["steps lost per kill, mean and most", f"{sum(lost) / len(lost):.0f} and {max(lost)}" if lost else "-"],
        ["steps between checkpoints", str(result["checkpoint_every"])],
        ["the same, bit for bit", "yes" if result["is_same"] else "no"],
    ]
    return markdown_table(rows, [f"{result['processes']} process", *origin(result)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 where both runs ended the same."""
    parser = new_parser("benchmarks.soak", __doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="about how long the run that is killed takes")
    parser.add_argument("--kill-every", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0, help="of the instants of the kills")
    parser.add_argument("--folder", type=Path, required=True, help="for both runs; must not exist")
    options = parser.parse_args(arguments)
    if options.markdown:
        return show_again(options.json, table)
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True)
    rate = calibrate(options.folder, options.processes, options.checkpoint_every)
    steps = max(options.checkpoint_every, int(options.minutes * 60 * rate * _SHARE_OF_STEPS))
    sys.stderr.write(f"{rate:.1f} steps/s beside each other: {steps} steps\n")
    report = Report(
        environment=describe("benchmarks.soak", arguments, ["accelerate"]),
        processes=options.processes,
        steps=steps,
        checkpoint_every=options.checkpoint_every,
        seed=options.seed,
    )
    soak(options, report)
    report.write(options.json)
    sys.stdout.write(table(asdict(report)))
    return 0 if report.is_same else 1


if __name__ == "__main__":
    sys.exit(main())
