"""The files that a run leaves behind, other than checkpoints: the contract that users' scripts read.

`config.yaml`, `environment.json`, `metrics.jsonl`, `ranks.jsonl` and `summary.json`; rank 0 writes them all. Where
there is no room, what is to be written waits in memory until there is.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.config import Config
from trainer.errors import UserError, one_line_text
from trainer.files import SUMMARY, replacing
from trainer.report.curves import Curves

logger = logging.getLogger("lockstep")


RANKS_FILE = "ranks.jsonl"  # what tells ranks apart, a record per report of several


class RunFolder:
    """The run folder of one config. Creating it is the first write of a run, so a bad path fails early."""

    def __init__(self, config: Config) -> None:
        self.path = config.run_dir
        self.config = config
        self.metrics_file = self.path / "metrics.jsonl"
        # What could not be written yet: files as they should be, and records to append after that.
        self._files: dict[str, str] = {}
        self._lines: list[str] = []
        self._is_behind = False
        self.curves = Curves()  # of all records so far, for the run page
        self._torn_at: int | None = None  # where an append to `metrics.jsonl` began that failed

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
        self.write("config.yaml", self.config.to_yaml())
        self.write("environment.json", json.dumps(_environment(num_ranks, device), indent=2))

    def cut_metrics(self, step: int, evaluated_step: int) -> list[dict[str, Any]]:
        """Drops what a run that goes on from `step` writes again: later records, and evaluations new to it.

        Returns:
            The records of `metrics.jsonl` that stay.
        """
        self.curves = Curves(self.path)
        kept: list[dict[str, Any]] = []
        self._cut("metrics.jsonl", step, evaluated_step, kept.append)
        for record in kept:
            self.curves.add(record)
        self._cut(RANKS_FILE, step, evaluated_step, self.curves.ranks.add)
        return kept

    def _cut(self, name: str, step: int, evaluated_step: int, keep: Callable[[dict[str, Any]], None]) -> None:
        file = self.path / name
        if not file.exists():
            return
        before = file.read_text(encoding="utf-8")
        kept = []
        for line in before.splitlines():
            try:
                record = json.loads(line)
                is_evaluation = any(key.startswith("eval/") for key in record)
                if record["step"] <= (evaluated_step if is_evaluation else step):
                    kept.append(line + "\n")
                    keep(record)
            except (ValueError, KeyError, TypeError, AttributeError):  # a line that a killed run left half written
                continue
        if "".join(kept) != before:
            self.write(name, "".join(kept))

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a record to `metrics.jsonl` and flushes it."""
        record = _finite({**record, "time": round(time.time(), 3)})
        self.curves.add(record)
        self._lines.append(json.dumps(record) + "\n")
        self._write_what_waits()

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Appends a record to another file, which matters less: it is lost where there is no room."""
        file = self.path / name
        if name == RANKS_FILE:
            self.curves.ranks.add(record)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(_finite(record)) + "\n")
        except OSError as error:
            logger.warning("cannot write to '%s': %s", file, one_line_text(error))

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`."""
        self.write(SUMMARY, json.dumps(_finite(summary), indent=2))

    def write(self, name: str, text: str) -> None:
        """Replaces a file of this name, all at once."""
        self._files[name] = text
        self._write_what_waits()

    def _write_what_waits(self) -> None:
        """Writes all that is not written yet. A full disk or a lost mount leaves it waiting, and ends no run."""
        try:
            for name, text in list(self._files.items()):
                with replacing(self.path / name) as staged:
                    staged.write_text(text, encoding="utf-8")
                del self._files[name]
            if self._lines:
                self._append("".join(self._lines).encode())
                self._lines.clear()
        except OSError as error:
            if not self._is_behind:
                message = "cannot write to '%s', and tries again with every record, all of which are kept: %s"
                logger.warning(message, self.path, one_line_text(error))
            self._is_behind = True
            return
        if self._is_behind:
            logger.info("all records are in '%s' now", self.path)
        self._is_behind = False

    def _append(self, data: bytes) -> None:
        with open(self.metrics_file, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if self._torn_at is not None and end > self._torn_at:  # half of what did not fit the last time
                end = file.truncate(self._torn_at)
            self._torn_at = end
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(end)  # at once, if it can be: a reader wants whole records
                raise
        self._torn_at = None  # only now: some file systems find out on closing that there was no room


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
