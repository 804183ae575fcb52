"""Runs tests once more with a config key ignored, and tells which of them fail.

Each run is a fork of this process, which has imported torch, so it costs little more than the tests themselves.
`python tests/support/prove_keys.py KEY=NODE_ID ...` prints a line per key.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
for folder in ("examples", "tests/support", "tests", "."):
    sys.path.insert(0, str(REPOSITORY / folder))
os.environ["OMP_NUM_THREADS"] = "1"

import ignoring  # noqa: E402
import pytest  # noqa: E402


class Ran(NamedTuple):
    """What became of tests: node ids."""

    passed: list[str]
    failed: list[str]
    skipped: list[str]
    seconds: dict[str, float]


class _Notes:
    def __init__(self) -> None:
        self.ran = Ran([], [], [], {})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran.seconds[report.nodeid] = self.ran.seconds.get(report.nodeid, 0.0) + report.duration
        if report.when == "call" or report.outcome != "passed":
            kept = {"passed": self.ran.passed, "failed": self.ran.failed, "skipped": self.ran.skipped}[report.outcome]
            if report.nodeid not in kept:
                kept.append(report.nodeid)


def run(nodes: list[str], key: str | None, seconds: float = 300.0, *options: str) -> Ran:
    """Runs tests in a fork in which `key` is ignored; all of them count as failed where they take too long."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "ran.json"
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            log = os.open(os.environ.get("PROVE_KEYS_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            signal.alarm(int(seconds))
            if key is not None:
                os.environ[ignoring.VARIABLE] = key
                ignoring.install()
            notes = _Notes()
            common = ("-q", "-p", "no:cacheprovider", f"--timeout={int(seconds / 2)}")
            pytest.main([*common, *options, *nodes], plugins=[notes])
            answer.write_text(json.dumps(notes.ran))
            os._exit(0)
        os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what a test that failed has left
        return Ran(*json.loads(answer.read_text())) if answer.exists() else Ran([], nodes, [], {})


def preload(files: Iterable[str]) -> None:
    """Imports test files and whatever these import."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files])


def main(pairs: list[str]) -> int:
    os.chdir(REPOSITORY)
    preload(sorted({pair.partition("=")[2].partition("::")[0] for pair in pairs}))
    unproven = 0
    for pair in pairs:
        key, _, node = pair.partition("=")
        ran = run([node], key)
        unproven += not ran.failed
        print(f"{'proven' if ran.failed else 'NOT PROVEN'} {key} {node} {sum(ran.seconds.values()):.1f} s", flush=True)
    return 1 if unproven else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
