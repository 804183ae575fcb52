"""What runs that were interrupted must look like at their end, and how they are interrupted by force."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from conftest import REPOSITORY, SUPPORT, Outcome, Train, WriteConfig
from launching import Job, alive, environment
from run_results import checkpoint, records, summary, tensors

_BY_CLOCK = {"time", "goodput", "train/mfu", "train/straggler_wait"}


def is_measured(key: str) -> bool:
    """Tells whether a value is measured, and so never twice the same."""
    return key in _BY_CLOCK or key.startswith(("time/", "memory/", "system/")) or "_per_second" in key


_OF_THE_ATTEMPT = {"wandb_id"}


def assert_same_end(run: Path, quiet: Path, note: str = "", aside: Collection[str] = ()) -> None:
    """Asserts that two runs ended bit for bit alike: every tensor, every plain value and every record of theirs.

    Args:
        run: the one that was interrupted.
        quiet: the one that was not.
        note: shown where they differ.
        aside: damaged checkpoints that are still there; nothing else may be left.
    """
    found, expected = summary(run), summary(quiet)
    assert found["status"] == expected["status"] == "finished", note
    step = expected["step"]
    assert found["step"] == step, note
    ours, theirs = checkpoint(run, step).manifest, checkpoint(quiet, step).manifest
    known = {key for key in asdict(theirs.progress) if key not in _OF_THE_ATTEMPT}
    assert {k: asdict(ours.progress)[k] for k in known} == {k: asdict(theirs.progress)[k] for k in known}, note
    assert ours.values == theirs.values, note
    a, b = tensors(run, step, ""), tensors(quiet, step, "")
    assert a.keys() == b.keys(), note
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == [], note
    assert reported(run) == reported(quiet), note
    assert leftovers(run) == set(aside), note


def interrupted(train: Train, write_config: WriteConfig, tmp_path: Path, reads: int, **changes: Any) -> None:
    """Runs once to the end in `whole`, and in `run` with an interruption while sample number `reads` is read."""
    assert train("--config", write_config("whole.yaml", run__dir=str(tmp_path / "whole"), **changes)).code == 0
    data = {"name": "vectors:Interrupting", "args": {"length": 60, "after": reads}}
    assert train("--config", write_config("first.yaml", data__train=data, **changes)).code == 75
    allowed = {"checkpoint__allow_changes": ["data.train"]}
    assert train("--config", write_config("second.yaml", **changes, **allowed)).code == 0


def reported(run: Path) -> list[dict[str, Any]]:
    """Returns the records of a run without what a clock measured."""
    return [{key: value for key, value in record.items() if not is_measured(key)} for record in records(run)]


def leftovers(run: Path) -> set[str]:
    """Returns what is in the run folder and is neither a result nor a good checkpoint."""
    found = {path.name for pattern in ("checkpoints/*", "checkpoints/step-*/*") for path in run.glob(pattern)}
    return {name for name in found if name.startswith((".", "damaged-"))} | {path.name for path in run.glob(".*")}


def ranks_of(job: Job) -> list[psutil.Process]:
    """Returns the training processes of a job, without their loader workers."""
    first = psutil.Process(job.process.pid)
    if _trains(first):
        return [first]  # a single process takes its launcher's place
    return [child for child in first.children() if _trains(child)]


def _trains(process: psutil.Process) -> bool:
    try:
        return any(os.path.basename(argument) == "train.py" for argument in process.cmdline()[:3])
    except psutil.Error:
        return False


def kill(job: Job, whole: bool, choice: random.Random) -> str:
    """Kills a whole job, launcher and all, or one rank of it, and waits until nothing of it is left.

    Returns:
        What was killed; `nothing` where the job had ended already.
    """
    family = job.family()
    if job.process.poll() is not None:
        return "nothing"
    if whole:
        killed, what = [psutil.Process(job.process.pid), *family], "all"
    else:
        ranks = ranks_of(job)
        if not ranks:  # ended in this moment
            return "nothing"
        index = choice.randrange(len(ranks))
        killed, what = [ranks[index]], f"rank {index} of {len(ranks)}"
    for process in killed:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    job.end()
    assert alive(family) == [], f"after {what} was killed"
    return what


class TrainServer:
    """Runs `train.py`, a thread per rank, in processes that start in no time, and end as violently as they like.

    Args:
        folder: for what they say.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = self._started()

    def __enter__(self) -> TrainServer:
        return self

    def __exit__(self, *details: object) -> None:
        self._end()

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(SUPPORT / "train_server.py")],
            env=environment(OMP_NUM_THREADS="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _end(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def train(
        self,
        *arguments: str | Path,
        ranks: int = 1,
        folder: Path = REPOSITORY,
        variables: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Runs `train.py` with these arguments to its end, in this folder, on so many ranks and without a launcher.

        Returns:
            The code of the rank that ended worst (a negative one is the signal that it died of), and what all said.
        """
        out, err = self._folder / "out", self._folder / "err"
        for file in (out, err):
            file.unlink(missing_ok=True)
        request = {"arguments": [str(a) for a in arguments], "ranks": ranks, "out": str(out), "err": str(err)}
        request["folder"] = str(folder)
        request["variables"] = dict(variables or {})
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            codes = json.loads(self._process.stdout.readline())
        except BaseException:  # a test that takes too long: its ranks shall not trouble the next one
            self._end()
            self._process = self._started()
            raise
        return Outcome(min(codes) or max(codes), out.read_text(), err.read_text())
