"""The benchmark of trackers: the table that it writes, and the run that it starts."""

from __future__ import annotations

from pathlib import Path

from benchmarks import tracking
from trainer.config import load_config


def test_the_table_of_the_benchmark() -> None:
    speeds = {"none": [10.0, 12.0, 11.0], "silent": [10.0, 11.9, 11.0], "dies": [9.9, 12.0, 11.0]}
    result = {
        "command": "python -m benchmarks.tracking",
        "hardware": "2 CPU cores",
        "versions": {"wandb": "0.31.0"},
        "steps": 1000,
        **tracking.compared(speeds),
    }
    lines = tracking.table(result).splitlines()
    assert lines[2] == "| `tracking.trackers: []` | 11.0 |  |  |"
    assert lines[3] == "| W&B online, a server that never answers | 11.0 | 1.000 | 0.992 to 1.000 |"
    assert lines[4] == "| W&B online, a server that dies in the middle | 11.0 | 1.000 | 0.990 to 1.000 |"
    job = tracking.command("dies", Path("run"), 1000)
    assert load_config(job[job.index("--config") + 1], job[job.index("--config") + 2 :]).tracking.wandb.mode == "online"
