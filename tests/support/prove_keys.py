"""Runs tests as they are and with a config key ignored, and tells for which keys the second fails.

Each run is a fork of this process, which has imported torch, so it costs little more than the tests themselves. Only
what runs every day counts: nightly tests and cases are left out.
`python tests/support/prove_keys.py` prints a line per key of `keys.yaml`, with `KEY ...` of these keys, with
`KEY=NODE_ID ...` of tests that are not there yet; and at the end how many keys are proven.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
for folder in ("examples", "tests/support", "tests", "."):
    sys.path.insert(0, str(REPOSITORY / folder))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("LOCKSTEP_NIGHTLY", None)

import ignoring  # noqa: E402
import pytest  # noqa: E402
import yaml  # noqa: E402

_SECONDS = 600  # of a run


class _Notes:
    """Takes note of how tests ended: `passed`, `failed`, `skipped`, or with an `error` in what is around them."""

    def __init__(self) -> None:
        self.outcomes: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.outcomes.add("error" if report.failed and report.when != "call" else report.outcome)


def outcomes(test: str, key: str | None) -> set[str]:
    """Runs a test in a fork in which `key` is ignored, and returns how its cases and what is around them ended.

    Nothing is returned of a fork that came to no end. What the test writes goes to the file `PROVE_KEYS_LOG`.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "outcomes.json"
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            log = os.open(os.environ.get("PROVE_KEYS_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if key is not None:
                os.environ[ignoring.VARIABLE] = key
                ignoring.install()
            notes = _Notes()
            pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--timeout=0", test], plugins=[notes])
            answer.write_text(json.dumps(sorted(notes.outcomes)))
            os._exit(0)
        ended = False
        try:
            ended = _wait(child)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what took too long, or what a test that failed has left
        if not ended:
            os.waitpid(child, 0)
            return set()
        return set(json.loads(answer.read_text())) if answer.exists() else set()


def _wait(child: int) -> bool:
    """Waits for the end of a fork, and tells whether it came in time; pytest-timeout would call a late test failed."""
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.05)
    return False


@functools.cache
def passes(test: str) -> bool:
    """Tells whether a test passes as things are."""
    return outcomes(test, None) - {"skipped"} == {"passed"}


def preload(files: Iterable[str]) -> None:
    """Imports test files and whatever these import."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files])


def main(arguments: list[str]) -> int:
    os.chdir(REPOSITORY)
    test_of = yaml.safe_load((REPOSITORY / "tests" / "support" / "keys.yaml").read_text())
    pairs = []
    for argument in arguments or test_of:
        key, _, test = argument.partition("=")
        pairs.append((key, test or f"tests/{test_of[key]}"))
    preload(sorted({test.partition("::")[0] for _, test in pairs}))
    is_proven = []
    for key, test in pairs:
        is_proven.append(passes(test) and "failed" in outcomes(test, key))
        print(f"{'proven' if is_proven[-1] else 'NOT PROVEN'} {key} {test}", flush=True)
    print(f"{sum(is_proven)} of {len(is_proven)} are proven")
    return 0 if all(is_proven) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
