"""A doctor whose rank 1 is slow, and stops in the middle of the all-reduce. Started as the doctor itself is.

Slow for real: rank 1 shares one core with processes that do nothing else, and rank 0 has the other one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from launch.doctor.agreed import BARE, Request
from launch.doctor.checks import CHECKS
from launch.doctor.situation import Check, Situation
from launch.doctor.verdicts import Values
from trainer.config import load_config

_KEPT = ("versions", "matmul", "connecting", "all-reduce", "pairs")
_HOG = "import ctypes; ctypes.CDLL(None).prctl(1, 9)\nwhile True: pass"  # and die with the parent


def _slow(check: Check) -> Check:
    def measure(situation: Situation) -> Values:
        hogs: list[subprocess.Popen[bytes]] = []
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[0 if situation.place.rank else -1]})
        if situation.place.rank == 1:
            hogs = [subprocess.Popen([sys.executable, "-c", _HOG]) for _ in range(2)]
        try:
            return check.measure(situation)
        finally:
            for hog in hogs:
                hog.kill()
                hog.wait()

    return replace(check, measure=measure)


def _stopping(check: Check) -> Check:
    def measure(situation: Situation) -> Values:
        if situation.place.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return check.measure(situation)

    return replace(check, measure=measure)


def _main() -> int:
    from launch.doctor import start

    config = load_config(str(BARE), ["launch.processes=2"])
    request = Request(str(BARE), ("launch.processes=2",), config, 5.0, Path("doctor.json"))
    return start.run(start.plan_here(request, script=__file__), config)


if __name__ == "__main__":
    if "RANK" in os.environ:
        from launch.doctor.rank import run_and_leave

        changes = {"matmul": _slow, "all-reduce": _stopping}
        run_and_leave(checks=[changes.get(c.name, lambda same: same)(c) for c in CHECKS if c.name in _KEPT])
    sys.exit(_main())
