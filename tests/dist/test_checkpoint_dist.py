"""Checkpoints of several processes: every rank writes its part, into a folder or an object store."""

from __future__ import annotations

import uuid
from pathlib import Path

import fsspec
import pytest
from conftest import WriteConfig
from launching import local
from object_store import s3_server
from run_results import checkpoint, identical, losses, weights

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.storage import open_storage


def test_every_rank_writes_its_part_and_any_number_reads_it(write_config: WriteConfig, tmp_path: Path) -> None:
    normed = {"model": {"name": "vectors_model:Normed", "args": {"dropout": 0.0}}}
    done = local(write_config(**normed, train__epochs=1), 2)
    assert done.returncode == 0, done.stderr
    two = checkpoint(tmp_path / "run", 5)
    assert sorted(two.manifest.files) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    sizes = [record.size for record in two.manifest.files.values()]
    assert max(sizes) < 2 * min(sizes)
    done = local(write_config(**normed, train__epochs=2), 3)
    assert done.returncode == 0, done.stderr
    assert "written by 2 processes, read by 3" in done.stdout
    assert "continuing from step 5" in done.stdout
    assert list(losses(tmp_path / "run")) == list(range(1, 11))
    checkpoint(tmp_path / "run", 10).verify()


def test_object_store_of_several_processes(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"every": 2, "keep": 1}
    done = local(write_config("folder.yaml", run__dir=str(tmp_path / "folder"), checkpoint=there), 2)
    assert done.returncode == 0, done.stderr
    bucket = f"bucket-{uuid.uuid4()}"
    with s3_server(bucket) as variables:
        file = write_config(checkpoint={**there, "dir": f"s3://{bucket}/run"})
        for epochs in (1, 2):
            done = local(file, 2, f"train.epochs={epochs}", **variables)
            assert done.returncode == 0, done.stdout + done.stderr
        assert "continuing from step 5" in done.stdout
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        fsspec.filesystem("s3").clear_instance_cache()
        found = CheckpointFolder(open_storage(f"s3://{bucket}/run"), keep=1).newest()
        assert found.step == 10
        stored = {name: found.read(f"model.{name}") for name in found.names("model.")}
        assert identical(stored, weights(tmp_path / "folder", 10))
    assert losses(tmp_path / "run") == losses(tmp_path / "folder")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_that_ranks_do_not_share_is_refused(write_config: WriteConfig, tmp_path: Path) -> None:
    """Rank 1 writes elsewhere, as with a disk of its own; rank 0 misses the file and publishes nothing."""
    data = {"name": "own_disks:Vectors", "args": {"length": 60}}
    done = local(write_config(data__train=data, data__eval=None), 2)
    assert done.returncode == 1, done.stdout
    assert "rank-00001.safetensors is not there as rank 0 sees it: checkpoints must be on storage" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
