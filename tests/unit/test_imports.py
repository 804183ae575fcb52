"""Importing torch without the garbage collector."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from conftest import REPOSITORY

import launch.cli
import trainer.cli
from trainer.imports import without_collector

_CONFIG = str(REPOSITORY / "configs" / "digits.yaml")


def test_in_a_process_without_torch() -> None:
    script = """
import gc
from trainer.imports import without_collector
try:
    with without_collector():
        import torch
        assert not gc.isenabled()
        raise KeyError
except KeyError:
    pass
frozen = gc.get_freeze_count()
assert gc.isenabled()
with without_collector():
    assert gc.isenabled()
assert gc.get_freeze_count() == frozen > 50_000, frozen
"""
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True, timeout=60)


def test_where_torch_is_there_already() -> None:
    before = gc.get_freeze_count()
    with without_collector():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


@pytest.mark.parametrize(
    ("module", "command", "arguments"),
    [
        (trainer.cli, trainer.cli.train, ["--config", _CONFIG]),
        (trainer.cli, trainer.cli.main, ["evaluate", "RUN"]),
        (trainer.cli, trainer.cli.main, ["sync", "RUN"]),
        (trainer.cli, trainer.cli.main, ["pack", "SOURCE", "TARGET"]),
        (launch.cli, launch.cli.main, ["local", "--config", _CONFIG]),
        (launch.cli, launch.cli.main, ["plan", "--config", _CONFIG]),
        (launch.cli, launch.cli.main, ["doctor"]),
        (launch.cli, launch.cli.main, ["chaos", "--config", _CONFIG]),
        (
            launch.cli,
            launch.cli.main,
            ["agent", "--config", _CONFIG, *["--node-rank", "0", "--rendezvous", "a", "--job", "b"]],
        ),
    ],
)
def test_who_imports_torch_so(
    module: object,
    command: Callable[[list[str]], int],
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def stop() -> AbstractContextManager[None]:
        raise KeyError("imports")

    monkeypatch.setattr(module, "without_collector", stop)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError, match="imports"):
        command(arguments)
