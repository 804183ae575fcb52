"""A step under DDP and FSDP2 on two processes takes as much memory as predicted, as torch's profiler counts it."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import nightly
from launching import on_processes
from memory_models import CASES

TOLERANCE = 0.1


@nightly  # a minute; one process is in tests/unit
def test_as_much_as_measured(tmp_path: Path) -> None:
    done = on_processes(2, "memory_worker.py", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if "RESULT" in line]
    errors = {}
    for result in results:
        key = result["model"], result["micro_batches"], result["strategy"]
        predicted, measured = sum(result["predicted"].values()), result["measured"]
        errors[key] = predicted / measured - 1
        parts = ", ".join(f"{part} {size >> 20}" for part, size in result["predicted"].items() if size >> 20)
        print(f"ERROR {key} {errors[key]:+.2%} of {measured / 2**20:.1f} MiB ({parts}), {result['seconds']:.1f} s")
    assert [*errors] == [(*case, strategy) for case in CASES for strategy in ("ddp", "fsdp2")]
    assert max(map(abs, errors.values())) < TOLERANCE, errors
