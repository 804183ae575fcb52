"""What makes faults in a run of a test, as its environment says."""

from __future__ import annotations

from pathlib import Path

from trainer.faults.injection import Injector

STEP = "loading a batch"  # the first place of a step


def injector(run_dir: Path, rank: int = 0) -> Injector:
    found = Injector.from_environment(run_dir, rank)
    assert found is not None
    return found
