"""Benchmarks that are suites of tests, run for the figures which the tests write down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.telling import REPOSITORY


def run_tests(files: Sequence[str], variable: str, only: str | None, nightly: bool = False) -> tuple[int, Any]:
    """Runs tests, and returns pytest's exit code and the JSON that they wrote; None where there is none.

    Args:
        files: of tests, from the repository.
        variable: of the environment: by it the tests know where to write.
        only: an expression of pytest's `-k`.
        nightly: whether those that are much like others run, too.
    """
    with tempfile.TemporaryDirectory(prefix="lockstep-tested-") as folder:
        file = Path(folder) / "figures.json"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *(["-k", only] if only else []), *files],
            env={**os.environ, variable: str(file), **({"LOCKSTEP_NIGHTLY": "1"} if nightly else {})},
            cwd=REPOSITORY,
            stdout=sys.stderr,
            check=False,
        )
        return done.returncode, json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
