"""One rank of several runs out of memory, through the real launcher."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, WriteConfig, nightly
from launching import Job, alive, local, run
from run_results import summary

pytestmark = pytest.mark.alone

LAUNCH = [sys.executable, "-m", "launch", "local"]
BIN = Path(sys.executable).parent


def hungry(write_config: WriteConfig, args: dict[str, Any], **changes: Any) -> Path:
    """The tiny run with a model that needs too much."""
    return write_config(model={"name": "hungry:Hungry", "args": args}, **changes)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out-of-memory" / "shrink.json").read_text())


def test_one_rank_of_two_stops_both(write_config: WriteConfig, tmp_path: Path) -> None:
    config = hungry(write_config, {"limit": 4, "rank": 1, "after": 2}, data__workers=1)
    job = Job([*LAUNCH, "--config", str(config), "--processes", "2"], tmp_path)
    family: dict[int, psutil.Process] = {}
    seen: float | None = None
    while job.process.poll() is None:
        family.update({p.pid: p for p in job.family()})
        if seen is None and "ran out of memory" in job.output():
            seen = time.monotonic()
        time.sleep(0.1)
    ended = time.monotonic()
    assert ended - (seen or ended) < 10  # it may end between two looks
    assert job.end() == 1
    assert len(family) >= 2 + 2
    assert alive(list(family.values()), within=3) == []
    output = job.output()
    assert output.count("ran out of memory") == 1
    assert "error: rank 1 ran out of memory in step 3, micro-batch 1 of 1 (forward)" in output
    assert "Traceback" not in output
    assert "try      train.micro_batch_size=3 " in output
    folder = tmp_path / "run" / "out-of-memory"
    assert [file.name for file in folder.iterdir()] == ["rank-1.json"]
    assert summary(tmp_path / "run")["status"] == "failed"


@nightly
def test_two_shrinking_processes_start_again_by_themselves(write_config: WriteConfig, tmp_path: Path) -> None:
    args = {"limit": 3, "rank": 1, "after": 6}
    done = local(hungry(write_config, args, memory={"on_oom": "shrink"}), 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("starting again") == 1
    line = "rank 1 ran out of memory at step 7: starting again with train.micro_batch_size 3 instead of 6"
    assert line in done.stdout
    assert "train.micro_batch_size: 3 instead of 6, which ran out of memory at step 7" in done.stdout
    assert "continuing from step 5 " in done.stdout
    assert "batch      12 = 2 processes x 3 x 2 micro-batches" in done.stdout
    assert (tmp_path / "run" / "logs" / "rank-1.log").read_text().count("error: rank 1 ran out of memory") == 1
    found = record(tmp_path / "run")
    assert (found["micro_batch_size"], found["was"], found["configured"], found["attempt"]) == (3, 6, None, 1)
    assert summary(tmp_path / "run")["status"] == "finished"
    assert "micro_batch_size: null" in (tmp_path / "run" / "config.yaml").read_text()


@nightly
def test_a_shrinking_process_costs_no_restart(write_config: WriteConfig, tmp_path: Path) -> None:
    shrinking = {"memory": {"on_oom": "shrink"}, "launch__max_restarts": 1}
    done = local(hungry(write_config, {"limit": 6, "after": 6}, **shrinking), 1)
    assert done.returncode == 0, done.stderr
    assert "starting again with train.micro_batch_size 6 instead of 12" in done.stdout
    assert "restarting" not in done.stdout
    assert "continuing from step 5 " in done.stdout
    assert summary(tmp_path / "run")["status"] == "finished"


@nightly
def test_torchrun_starts_again_with_less(write_config: WriteConfig, tmp_path: Path) -> None:
    config = hungry(write_config, {"limit": 4, "rank": 1}, memory={"on_oom": "shrink"})
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--max-restarts", "1", str(REPOSITORY / "train.py")]
    done = run([*command, "--config", str(config)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train.micro_batch_size: 3 instead of 6, which ran out of memory at step 1" in done.stdout
    assert summary(tmp_path / "run")["status"] == "finished"


def long_run(write_config: WriteConfig) -> Path:
    every = {"every": "9999 epochs"}
    return hungry(
        write_config,
        {"limit": 99},
        memory={"on_oom": "shrink"},
        data__train__args__length=4800,
        train={"epochs": 50, "batch_size": 12},
        eval=every,
        checkpoint=every,
        log={"every": 20},
    )


@nightly
@pytest.mark.parametrize(("number", "to_group"), [(signal.SIGINT, True), (signal.SIGUSR1, False)])
def test_a_stop_signal_reaches_one_shrinking_process(
    number: signal.Signals, to_group: bool, write_config: WriteConfig, tmp_path: Path
) -> None:
    job = Job([*LAUNCH, "--config", str(long_run(write_config)), "--processes", "1"], tmp_path)
    job.wait_for(lambda output: "step 40/" in output)
    family = job.family()
    assert family
    job.signal(number, group=to_group)  # Ctrl-C in a terminal, or what a cluster sends
    assert job.end() == 75, job.output()
    assert alive(family) == []
    assert summary(tmp_path / "run")["status"] == "stopped"


@nightly
def test_one_shrinking_process_does_not_outlive_its_launcher(write_config: WriteConfig, tmp_path: Path) -> None:
    job = Job([*LAUNCH, "--config", str(long_run(write_config)), "--processes", "1"], tmp_path)
    job.wait_for(lambda output: "step 40/" in output)
    family = job.family()
    assert family
    job.signal(signal.SIGKILL)
    job.end()
    assert alive(family, within=3) == []
