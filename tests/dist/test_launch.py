"""Every launcher, what it refuses, and what a user sees of it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import NIGHTLY, REPOSITORY, WriteConfig, few, nightly
from launching import environment, local, run
from run_results import summary

TRAIN = str(REPOSITORY / "train.py")
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        pytest.param([str(BIN / "accelerate"), "launch"], 1, marks=nightly),  # as the README's
        pytest.param([str(BIN / "torchrun"), "--nproc-per-node", "2"], 2, marks=nightly),  # what accelerate starts, too
        ([str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"], 2),
    ],
    ids=["accelerate", "torchrun", "accelerate on two"],
)
def test_other_launchers(launcher: list[str], processes: int, write_config: WriteConfig, tmp_path: Path) -> None:
    done = run([*launcher, TRAIN, "--config", str(write_config())], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(tmp_path / "run")["status"] == "finished"
    assert summary(tmp_path / "run")["num_processes"] == processes


@pytest.mark.parametrize(
    "flags", [["--cpu", "--num_processes", "2"], pytest.param(["--cpu", "--num_processes=2"], marks=nightly)]
)
def test_a_launcher_that_starts_too_few_is_refused(flags: list[str], write_config: WriteConfig, tmp_path: Path) -> None:
    config = str(write_config())
    done = run([str(BIN / "accelerate"), "launch", *flags, TRAIN, "--config", config, "run.seed=1"], tmp_path)
    assert "returned non-zero exit status 2" in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "2 processes were asked for and 1 started" in line
    command = line.split("this works: ")[1].split()
    assert command == ["python", "-m", "launch", "local", "--config", config, "run.seed=1", "--processes", "2"]
    assert not (tmp_path / "run").exists()
    done = run([sys.executable, *command[1:], "--dry-run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert " --nproc-per-node 2 " in done.stdout
    if NIGHTLY:
        done = run([sys.executable, *command[1:]], tmp_path)
        assert done.returncode == 0, done.stderr
        assert summary(tmp_path / "run")["num_processes"] == 2


@nightly
def test_too_few_processes_of_an_accelerate_config_file(write_config: WriteConfig, tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n"
        "num_machines: 1\nmachine_rank: 0\nmixed_precision: 'no'\n"
    )
    launcher = [str(BIN / "accelerate"), "launch", "--config_file", str(file)]
    done = run([*launcher, TRAIN, "--config", str(write_config())], tmp_path)
    assert "error: 2 processes were asked for and 1 started" in done.stderr


def test_accelerate_config_with_foreign_plugin_is_refused(write_config: WriteConfig, tmp_path: Path) -> None:
    command = [sys.executable, TRAIN, "--config", str(write_config())]
    done = run(command, tmp_path, ACCELERATE_USE_DEEPSPEED="true")
    assert done.returncode == 2
    assert "DeepSpeed" in done.stderr


@nightly
def test_precision_that_contradicts_the_config_is_refused(write_config: WriteConfig, tmp_path: Path) -> None:
    launcher = [str(BIN / "accelerate"), "launch", "--mixed_precision", "bf16"]
    done = run([*launcher, TRAIN, "--config", str(write_config())], tmp_path)
    assert re.search(r"error: .*: precision: accelerate was launched with mixed precision bf16", done.stderr)
    assert run([*launcher, TRAIN, "--config", str(write_config(precision="bf16"))], tmp_path).returncode == 0


@nightly
def test_progress_bar_on_a_terminal(write_config: WriteConfig, tmp_path: Path) -> None:
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(its_end, (24, 150))
    command = [sys.executable, TRAIN, "--config", str(write_config())]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=its_end, stderr=its_end)
    os.close(its_end)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end was closed
        while chunk := os.read(terminal, 4096):
            shown += chunk
    os.close(terminal)
    assert process.wait(60) == 0
    assert re.search(rb"100%.*10/10 .*loss [\d.]+", shown), shown
    assert re.search(rb"step 10/10 .*eval/accuracy", shown)  # evaluations stay on the screen
    assert not re.search(rb"step \d+/10 .* lr ", shown)  # reports do not


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "config": ({"optim__lr": -1}, [r"error: .*tiny.yaml:\d+: optim.lr: must be greater than 0"]),
    "one rank": ({"data__train__name": "slow:MissingOnRank1"}, [r"error: .*: data.train: rank 1: .*no such mount"]),
    "a sample": ({"data__train__name": "vectors:MissingFile"}, [r"error: .*: data.train: .*'seven.npy'"]),
}


@pytest.mark.parametrize("name", few(BAD, "config", "a sample"))
def test_bad_input_on_two_processes(name: str, write_config: WriteConfig, tmp_path: Path) -> None:
    changes, expected = BAD[name]
    done = local(write_config(**changes), 2)
    assert done.returncode == 2, done.stderr
    problems = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(problems) == len(expected), done.stderr
    for problem, pattern in zip(problems, expected, strict=True):
        assert re.match(pattern, problem)
    assert "Traceback" not in done.stderr
    if name != "a sample":  # in mid-run the other rank says that it lost its peer
        assert done.stderr.splitlines() == problems


@pytest.mark.parametrize("processes", [pytest.param(1, marks=nightly), 2])
def test_the_example(processes: int, tmp_path: Path) -> None:
    """A user's own package, outside the repository."""
    source = REPOSITORY / "examples" / "bring_your_own"
    folder = tmp_path / "elsewhere"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    done = local(folder / "shapes.yaml", processes)
    assert done.returncode == 0, done.stderr
    assert summary(folder / "runs" / "shapes")["metrics"]["eval/accuracy"] >= 0.97


def test_digits_config_is_the_shipped_one() -> None:
    """The other tests lean on a batch that splits over 1, 2 and 3 processes."""
    config = yaml.safe_load((REPOSITORY / "configs" / "digits.yaml").read_text())
    assert config["train"]["batch_size"] % 6 == 0
