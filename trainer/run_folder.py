"""The files that a run leaves behind, other than checkpoints: the contract that users' scripts read.

`config.yaml`, `environment.json`, `metrics.jsonl` and `summary.json`; rank 0 writes them all.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from trainer.config import Config, flatten
from trainer.errors import UserError


class RunFolder:
    """The run folder of one config. Creating it is the first write of a run, so a bad path fails early."""

    def __init__(self, config: Config) -> None:
        self.path = config.run_dir
        self.config = config
        self.metrics_file = self.path / "metrics.jsonl"

    def create(self) -> None:
        """Makes the folder and checks that it can be written to.

        Raises:
            UserError: it cannot.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise UserError(f"cannot write to '{self.path}': {error.strerror}", path="run.dir") from error

    def describe(self, num_ranks: int, device: torch.device) -> None:
        """Writes the resolved config and the environment of this attempt."""
        self._write("config.yaml", self.config.to_yaml())
        self._write("environment.json", json.dumps(_environment(num_ranks, device), indent=2))

    def config_changes(self) -> list[str]:
        """Returns what this config says other than the one that the run was last started with."""
        file = self.path / "config.yaml"
        if not file.is_file():
            return []
        before = flatten(yaml.safe_load(file.read_text(encoding="utf-8")))
        now = flatten(self.config.model_dump(mode="json"))
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return [f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys]

    def cut_metrics(self, step: int) -> None:
        """Drops records after `step`, which a resumed run is about to write again."""
        if not self.metrics_file.exists():
            return
        kept = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # a line that a killed run left half written
                continue
        self._write("metrics.jsonl", "".join(kept))

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a record to `metrics.jsonl` and flushes it."""
        with open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite({**record, "time": round(time.time(), 3)})) + "\n")

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`."""
        self._write("summary.json", json.dumps(_finite(summary), indent=2))

    def _write(self, name: str, text: str) -> None:
        staged = self.path / f".{name}.new"
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, self.path / name)


def _finite(value: Any) -> Any:
    """Replaces NaN and infinities, which JSON does not have, by null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _environment(num_ranks: int, device: torch.device) -> dict[str, Any]:
    packages = ("torch", "torchvision", "accelerate", "numpy", "wandb", "lockstep-trainer")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "num_processes": num_ranks,
        "cpu_count": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
