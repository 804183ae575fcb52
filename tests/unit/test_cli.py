"""The command lines, as programs: what answers without torch, and exit codes."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest
from conftest import REPOSITORY, nightly

# Importing torch raises in a program that starts with this.
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; import runpy; "
CONFIG = "configs/digits.yaml"


def program(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["train.py", "--help"], 0, "--config FILE"),
        (["train.py", "--config", CONFIG, "--print-config"], 0, "batch_size: 96"),
        (["train.py", "--config", CONFIG, "optim.lrr=1"], 2, "error: command line: optim.lrr: unknown key"),
        pytest.param(["train.py", "--config", "none.yaml"], 2, "error: none.yaml: cannot read", marks=nightly),
        pytest.param(["train.py"], 2, "the following arguments are required: --config", marks=nightly),
    ],
)
def test_train_answers_without_torch(arguments: list[str], code: int, shown: str) -> None:
    done = program(WITHOUT_TORCH + "runpy.run_path(sys.argv[0], run_name='__main__')", *arguments)
    assert done.returncode == code, done.stderr
    assert shown in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "code", "shown"),
    [
        ("trainer", ["--help"], 0, "evaluate"),
        pytest.param("trainer", ["export", "--help"], 0, "safetensors", marks=nightly),
        ("trainer", ["schema"], 0, "json-schema.org"),
        pytest.param("trainer", ["report", "none"], 2, "error: 'none' is not a run folder", marks=nightly),
        pytest.param("trainer", [], 2, "required: command", marks=nightly),
        ("launch", ["--help"], 0, "local"),
        pytest.param("launch", ["local", "--help"], 0, "--processes", marks=nightly),
        pytest.param("launch", ["locl"], 2, "invalid choice: 'locl'", marks=nightly),
        ("launch", ["local", "--config", CONFIG, "optim.lr=x"], 2, "error: command line: optim.lr: must be a valid"),
        ("launch", ["local", "--config", CONFIG, "--processes", "0"], 2, "command line: launch.processes: must be"),
    ],
)
def test_modules_answer_without_torch(module: str, arguments: list[str], code: int, shown: str) -> None:
    done = program(
        WITHOUT_TORCH + f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)", "x", *arguments
    )
    assert done.returncode == code, done.stderr
    assert shown in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_overrides_may_stand_anywhere() -> None:
    done = program(
        WITHOUT_TORCH + "runpy.run_path(sys.argv[0], run_name='__main__')",
        *["train.py", "optim.lr=0.25", "--config", CONFIG, "train.epochs=7", "--print-config", "run.seed=3"],
    )
    assert "lr: 0.25" in done.stdout
    assert "epochs: 7" in done.stdout
    assert "seed: 3" in done.stdout


def test_dry_run_prints_a_line_that_can_be_typed() -> None:
    command = ["-m", "launch", "local", "--config", CONFIG, "--processes", "2", "--dry-run"]
    done = subprocess.run(
        [sys.executable, *command, "optim.args={betas: [0.8, 0.9]}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout == (
        "PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=45 "
        "ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 "
        f"{REPOSITORY / 'train.py'} --config {CONFIG} 'optim.args={{betas: [0.8, 0.9]}}' launch.processes=2\n"
    )


@pytest.mark.parametrize("flags", [["--num_processes", "2"], ["--num_processes=2"], ["--num-processes", "2"]])
def test_what_accelerate_was_asked_for(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.launched import promised_processes

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    command = ["python", "/usr/bin/accelerate", "launch", "--cpu", *flags, "train.py", "--config", "a.yaml"]
    monkeypatch.setattr(psutil.Process, "cmdline", lambda process: command)
    assert promised_processes() == 2
    monkeypatch.setattr(psutil.Process, "cmdline", lambda process: ["python", *command[2:]])
    assert promised_processes() == 1
