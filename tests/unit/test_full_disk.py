"""Disks that are full or gone, real ones: training goes on, the last good checkpoint stands, no record is lost."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Train, WriteConfig, few, nightly
from resuming import TrainServer, leftovers
from run_results import losses, records, summary

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.storage import LocalStorage

STEPS = 8
ROOM = 400  # KiB: for a checkpoint and a half of the model below
NO_ROOM = "No space left on device"

MakeDisk = Callable[[int], Path]


@pytest.fixture(scope="module")
def train(server: TrainServer) -> Train:
    return server.train


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[MakeDisk]:
    """Makes an empty disk of so many KiB."""
    folder = tmp_path / "disk"

    def make(size: int) -> Path:
        folder.mkdir()
        if shutil.which("mount") is None:
            pytest.skip("there is no mount command here")
        options = ["-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
        if subprocess.run(["mount", *options], capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not permitted here")
        return folder

    yield make
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def config(write_config: WriteConfig, events: dict[int, str] | None = None, **changes: Any) -> Path:
    data = {"length": 60, "batch_size": 12, "events": events or {}}
    return write_config(
        **{
            "data__train": {"name": "disturbing:Disturbing", "args": data},
            "data__eval": None,
            "model": {"name": "mlp", "args": {"in_features": 8, "hidden": [128, 128]}},
            "train": {"steps": STEPS, "batch_size": 12},
            "checkpoint": {"every": 2, "keep": 1, "async_save": False},
            **changes,
        }
    )


def kept(folder: Path) -> list[int]:
    """Returns the checkpoints that are there, all of them good, and nothing else is."""
    found = CheckpointFolder(LocalStorage(folder), keep=1)
    for step in found.steps():
        found.open(step).verify()
    assert {path.name for path in folder.iterdir()} - {"lost+found", "filler"} == {
        CheckpointFolder.name(step) for step in found.steps()
    }
    return found.steps()


def warnings(out: str) -> list[str]:
    return [line for line in out.splitlines() if re.search("cannot|failed", line)]


@pytest.mark.parametrize("behind", few([False, True], True))
def test_room_for_a_checkpoint_and_a_half(
    behind: bool, disk: MakeDisk, train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Every save after the first fails, the last one twice."""
    folder = disk(ROOM)
    saves = {"every": 2, "keep": 1, "dir": str(folder), "async_save": behind}
    code, out, err = train("--config", config(write_config, checkpoint=saves))
    assert code == 1
    assert re.fullmatch(rf"error: the last step, 8, could not be saved: .*{NO_ROOM}.*\n", err)
    failed = [
        int(step) for step in re.findall(r"checkpoint of step (\d) failed, and that of step 2 stands: .*No sp", out)
    ]
    assert failed == [4, 6, 8, 8]
    assert len(warnings(out)) == 4
    assert kept(folder) == [2]
    assert list(losses(tmp_path / "run")) == list(range(1, STEPS + 1))
    found = summary(tmp_path / "run")
    assert found["status"] == "failed"
    assert found["checkpoints"]["num_saved"] == 1
    assert found["checkpoints"]["num_failed"] == 4


def test_room_made_meanwhile(disk: MakeDisk, train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    folder = disk(3 * ROOM)
    (folder / "filler").write_bytes(bytes(2 * ROOM * 1024))
    saves = {"every": 2, "keep": 1, "dir": str(folder), "async_save": False}
    code, out, err = train("--config", config(write_config, {6: f"free {folder}/filler"}, checkpoint=saves))
    assert (code, err) == (0, "")
    (failed,) = warnings(out)
    assert re.fullmatch(f"checkpoint of step 4 failed, and that of step 2 stands: .*{NO_ROOM}.*", failed)
    assert [int(step) for step in re.findall(r"checkpoint step (\d): ", out)] == [2, 6, 8]
    assert kept(folder) == [8]


@nightly
def test_room_for_all_but_the_manifest(disk: MakeDisk, train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    """What was staged goes away, or there would be no room for the next one either."""
    saves: dict[str, Any] = {"every": 2, "keep": 1, "async_save": False}
    assert train("--config", config(write_config, checkpoint=saves)).code == 0
    one = tmp_path / "run" / "checkpoints" / "step-00000008"
    data, manifest = (
        -(-(one / name).stat().st_size // 4096) * 4 for name in ("rank-00000.safetensors", "manifest.json")
    )
    folder = disk(2 * data + manifest)
    saves["dir"] = str(folder)
    code, _, err = train("--config", config(write_config, run__dir=str(tmp_path / "again"), checkpoint=saves))
    assert code == 1
    assert re.fullmatch(rf"error: the last step, 8, could not be saved: .*{NO_ROOM}.*\n", err)
    assert kept(folder) == [2]


def test_a_failed_save_may_end_the_run(disk: MakeDisk, train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    folder = disk(ROOM)
    saves = {"every": 2, "keep": 1, "dir": str(folder), "on_error": "raise", "async_save": False}
    code, _, err = train("--config", config(write_config, checkpoint=saves))
    assert code == 1
    assert re.fullmatch(rf"error: checkpoint.on_error is raise, and a checkpoint failed: .*{NO_ROOM}.*\n", err)
    assert summary(tmp_path / "run")["step"] <= 5
    assert kept(folder) == [2]


@pytest.mark.parametrize("freed", few([True, False], True))
def test_a_full_run_folder(
    freed: bool, disk: MakeDisk, train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Checkpoints are elsewhere. 60 records do not fit into the last page that the file has already."""
    folder, steps = disk(ROOM), 60
    run = folder / "run"
    events = {5: f"fill {folder}/filler"} | ({55: f"free {folder}/filler"} if freed else {})
    changes = {"run__dir": str(run), "checkpoint": {"every": 20, "dir": str(tmp_path / "checkpoints")}}
    code, out, err = train("--config", config(write_config, events, **changes, train__steps=steps))
    assert (code, err) == (0, "")
    warning, *of_page = warnings(out)
    assert re.fullmatch(rf"cannot write to '{run}', .*{NO_ROOM}.*", warning)
    assert [re.fullmatch(rf"cannot write '{run}/report.html': .*{NO_ROOM}", line) is not None for line in of_page] == (
        [] if freed else [True]
    )
    assert (run / "report.html").exists() == freed
    assert out.count(f"all records are in '{run}' now") == freed
    reported = list(losses(run))  # every line is a whole record
    assert reported == list(range(1, len(reported) + 1))
    if freed:
        assert len(reported) == steps
        assert summary(run)["status"] == "finished"
        assert leftovers(run) == set()
    else:
        assert 0 < len(reported) < 50
    assert kept(tmp_path / "checkpoints") == [40, 60]


def test_a_run_all_of_whose_disk_is_full(disk: MakeDisk, train: Train, write_config: WriteConfig) -> None:
    """Run folder and checkpoints: it ends with what there was, says so once and leaves no traceback."""
    folder = disk(3 * ROOM)
    run = folder / "run"
    events = {4: f"fill {folder}/filler"}
    code, out, err = train("--config", config(write_config, events, run__dir=str(run), train__steps=60))
    assert code == 1
    assert re.fullmatch(rf"error: the last step, 60, could not be saved: .*{NO_ROOM}.*\n", err)
    assert sum("cannot write to" in line for line in warnings(out)) == 1
    assert kept(run / "checkpoints") == [2]
    assert [record["step"] for record in records(run)] == list(range(1, 1 + len(records(run))))
    (folder / "filler").unlink()
    code, out, err = train(
        "--config", config(write_config, run__dir=str(run), train__steps=60, checkpoint__allow_changes=["data.train"])
    )
    assert (code, err) == (0, "")
    assert list(losses(run)) == list(range(1, 61))


def test_a_disk_that_becomes_read_only(disk: MakeDisk, train: Train, write_config: WriteConfig) -> None:
    """As file systems do after an error; and it is mended."""
    folder = disk(4 * ROOM)
    run = folder / "run"
    events = {3: f"ro {folder}", 7: f"rw {folder}"}
    code, out, err = train("--config", config(write_config, events, run__dir=str(run)))
    assert (code, err) == (0, "")
    assert re.search("checkpoint of step 4 failed, and that of step 2 stands: .*Read-only file system", out)
    assert re.search("checkpoint of step 6 failed, and that of step 2 stands: .*Read-only file system", out)
    assert list(losses(run)) == list(range(1, STEPS + 1))
    assert kept(run / "checkpoints") == [8]


@pytest.mark.parametrize("lost", few(["run", "run/checkpoints"], "run"))
def test_a_folder_that_is_lost_and_found(lost: str, train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    folder, run = tmp_path / lost, tmp_path / "run"
    events = {3: f"take {folder}", 7: f"give {folder}"}
    code, out, err = train("--config", config(write_config, events))
    assert (code, err) == (0, "")
    for step in (4, 6):
        assert re.search(f"checkpoint of step {step} failed, and that of step 2 stands: .*Not a directory", out)
    assert sum("cannot write to" in line for line in warnings(out)) == (lost == "run")
    assert list(losses(run)) == list(range(1, STEPS + 1))
    assert summary(run)["status"] == "finished"
    assert kept(run / "checkpoints") == [8]
