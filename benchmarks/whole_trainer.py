"""Our whole trainer as `benchmarks.feed_training` measures it: `train.py` on the `host` feed, read from its reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from benchmarks.plain_loop import (
    LEARNING_RATE,
    MOMENTUM,
    WEIGHT_DECAY,
    Measurement,
    Setup,
    data_section,
    model_section,
)
from benchmarks.rounds import Problem
from benchmarks.telling import REPOSITORY

TIMEOUT = 900  # seconds, of one measurement

_ENDLESS = 10**6  # steps
_REPORT_STEPS = 10
_STOPPED = 75  # train.py's exit code where it was asked to stop


def measure_trainer(setup: Setup, seed: int) -> Measurement:
    """Runs train.py until its reports cover the warm-up and the window, then asks it to stop.

    Raises:
        Problem: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="lockstep-feed-training-") as folder:
        run_dir = Path(folder) / "run"
        config = {
            "run": {"name": "feed-training", "dir": str(run_dir), "seed": seed},
            "data": data_section(setup, "host"),
            "model": model_section(setup),
            "optim": {
                "name": "sgd",
                "lr": LEARNING_RATE,
                "weight_decay": WEIGHT_DECAY,
                "args": {"momentum": MOMENTUM},
            },
            "precision": "bf16",
            "backends": {"cudnn_benchmark": setup.device.type == "cuda"},  # as the plain loop has it
            "train": {"steps": _ENDLESS, "batch_size": setup.batch_size},
            "log": {"every": _REPORT_STEPS},
            "checkpoint": {"every": _ENDLESS},
            "tracking": {"trackers": []},
        }
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        with _running_trainer(file, setup.device) as trainer:
            deadline = time.monotonic() + TIMEOUT
            while (taken := read_reports(run_dir / "metrics.jsonl", setup)) is None:
                if trainer.poll() is not None:
                    raise Problem(_last_line(trainer), is_absence=False)
                if time.monotonic() > deadline:
                    raise Problem(f"not done after {TIMEOUT} s", is_absence=False)
                time.sleep(0.2)
            trainer.send_signal(signal.SIGTERM)
            if trainer.wait(TIMEOUT) not in (0, _STOPPED):
                raise Problem(_last_line(trainer), is_absence=False)
    return taken


@contextmanager
def _running_trainer(config: Path, device: torch.device) -> Iterator[subprocess.Popen[str]]:
    variables = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    with open(config.with_suffix(".log"), "w+", encoding="utf-8") as log:
        trainer = subprocess.Popen(
            [sys.executable, "train.py", "--config", str(config)],
            cwd=REPOSITORY,
            env={**os.environ, **variables},
            stdout=log,
            stderr=log,
            text=True,
        )
        trainer.stderr = log
        try:
            yield trainer
        finally:
            if trainer.poll() is None:
                trainer.kill()
            trainer.wait()


def _last_line(trainer: subprocess.Popen[str]) -> str:
    assert trainer.stderr is not None
    trainer.stderr.seek(0)
    return (trainer.stderr.read().strip().splitlines() or [f"exit code {trainer.returncode}"])[-1]


def read_reports(file: Path, setup: Setup) -> Measurement | None:
    """Returns what the reports of a run say about the window; None while they do not cover it."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    reports = [json.loads(line) for line in lines if line.endswith("\n") and "train/samples_per_second" in line]
    samples = warmed = images = 0
    seconds = 0.0
    for number, report in enumerate(reports):
        in_report = report["samples"] - samples
        samples = report["samples"]
        took = in_report / report["train/samples_per_second"]
        if number == 0:  # compiles, chooses kernels, starts workers
            continue
        if warmed < setup.warm_up_seconds:
            warmed += took
            continue
        images += in_report
        seconds += took
        if seconds >= setup.seconds:
            return Measurement(images, seconds)
    return None
