"""The doctor on two processes of this machine: a real run of it, and machines with something wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SUPPORT, WriteConfig, nightly
from launching import run

pytestmark = pytest.mark.alone

DOCTOR = [sys.executable, "-m", "launch", "doctor"]


def report(file: Path) -> dict[str, Any]:
    """Returns the report with its checks by name."""
    data = json.loads(file.read_text())
    return {**data, "checks": {check["name"]: check for check in data["checks"]}}


def failures(data: dict[str, Any], name: str) -> list[str]:
    return [f["message"] for f in data["checks"][name]["findings"] if f["verdict"] == "fail"]


def test_two_ranks_here(write_config: WriteConfig, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for name in ("a", "b"):
        (pictures / name).mkdir(parents=True)
        (pictures / name / "x.png").write_bytes(bytes(100_000))
    train = {"name": "image_folder", "args": {"root": str(pictures)}}
    config = str(write_config(data__train=train, data__eval=None))
    done = run([*DOCTOR, "--config", config, "--processes", "2"], tmp_path)
    data = report(tmp_path / "run" / "doctor.json")
    # How fast things are differs here from one moment to the next; all else is as it should be.
    failed = {name for name, check in data["checks"].items() if check["verdict"] == "fail"}
    assert failed <= {"matmul"}, done.stdout
    assert done.returncode == (1 if failed else 0), done.stderr
    assert done.stderr.count("error: ") == sum(len(failures(data, name)) for name in failed), done.stderr
    skipped = {name for name, check in data["checks"].items() if check["verdict"] == "skipped"}
    assert skipped == {"GPU health", "host to GPU", "W&B"}
    assert max(map(len, done.stdout.splitlines())) <= 120
    for name in data["checks"]:
        assert f" {name} " in done.stdout
    by_rank = {name: [rank["values"] for rank in check["ranks"]] for name, check in data["checks"].items()}
    assert [values["tflops"] > 0 for values in by_rank["matmul"]] == [True, True]
    sizes = by_rank["all-reduce"][0]["sizes"]
    assert sizes[0]["bytes"] == 1024
    assert all(size["seconds"] > 0 for size in sizes)
    assert [len(values["pairs"]) for values in by_rank["pairs"]] == [1, 1]
    assert by_rank["reading data"][0]["places"]["data.train.args.root"]["bytes"] == 200_000
    assert by_rank["checkpoint"][0]["bytes_per_s"] > 0
    assert data["num_ranks"] == 2
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["doctor.json"]


@nightly
def test_a_machine_with_faults(write_config: WriteConfig, tmp_path: Path) -> None:
    """No room in /dev/shm, a run folder on a read-only mount, few open files: each is named, all in one run."""
    trial = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if trial.returncode:
        pytest.skip("no mount namespaces for this user")
    config = str(write_config(run__dir=str(tmp_path / "frozen" / "run")))
    (tmp_path / "frozen").mkdir()
    script = f"""
        mount -t tmpfs -o size=64k none /dev/shm && mount -t tmpfs -o ro none {tmp_path}/frozen || exit 77
        head -c 65536 /dev/zero > /dev/shm/full
        ulimit -n 200
        exec "$@" """
    command = ["unshare", "--mount", "bash", "-c", script, "bash", *DOCTOR]
    done = run([*command, "--config", config, "--processes", "2", "--json", "found.json"], tmp_path)
    assert done.returncode == 1, done.stderr
    data = report(tmp_path / "found.json")
    (host,) = {rank["host"] for rank in data["checks"]["versions"]["ranks"]}
    expected = {
        "/dev/shm": f"{host}: /dev/shm cannot be used: No space left on device",
        "open files": f"{host}: a process may have 200 files open, and a rank needs about 256",
        "run folder": f"{host}: the run folder '{tmp_path}/frozen/run' cannot be written to: Read-only file system",
        "checkpoint": f"{host}: no checkpoint can be written to '{tmp_path}/frozen/run/checkpoints': Read-only",
    }
    for name, text in expected.items():
        assert failures(data, name)[0].startswith(text)
        assert f"error: {name} on {text}" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


@nightly
def test_a_slow_rank_and_one_that_stops_are_named(tmp_path: Path) -> None:
    done = run(
        [sys.executable, str(SUPPORT / "slowed_doctor.py")], tmp_path
    )  # which gives it 150 s, and it ends itself
    assert done.returncode == 1, done.stderr
    data = report(tmp_path / "doctor.json")
    (host,) = {rank["host"] for rank in data["checks"]["versions"]["ranks"]}
    (slow,) = failures(data, "matmul")
    assert slow.startswith(f"{host} rank 1 cpu: ")
    assert failures(data, "ranks")[0].startswith(f"{host} rank 1 cpu: was last seen at: all-reduce")
    assert failures(data, "all-reduce")[0].startswith(f"{host} rank 0 cpu: ")
    assert data["checks"]["pairs"]["verdict"] == "skipped"
    assert f"error: ranks on {host} rank 1 cpu" in done.stderr
