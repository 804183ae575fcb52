"""Checkpoints of several processes: every rank writes its part, into a folder or an object store."""

from __future__ import annotations

import uuid
from pathlib import Path

import fsspec
import pytest
from conftest import WriteConfig
from object_store import s3_server
from resuming import TrainServer
from run_results import checkpoint, identical, losses, weights

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.storage import open_storage


def test_every_rank_writes_its_part_and_any_number_reads_it(
    server: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    normed = {"model": {"name": "vectors_model:Normed", "args": {"dropout": 0.0}}}
    done = server.train("--config", write_config(**normed, train__epochs=1), ranks=2)
    assert done.code == 0, done.err
    two = checkpoint(tmp_path / "run", 5)
    assert sorted(two.manifest.files) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    done = server.train("--config", write_config(**normed, train__epochs=2), ranks=3)
    assert done.code == 0, done.err
    assert "written by 2 processes, read by 3" in done.out
    assert "continuing from step 5" in done.out
    assert list(losses(tmp_path / "run")) == list(range(1, 11))
    checkpoint(tmp_path / "run", 10).verify()


def test_object_store_of_several_processes(
    server: TrainServer, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"every": 2, "keep": 1}
    file = write_config("folder.yaml", run__dir=str(tmp_path / "folder"), checkpoint=there)
    done = server.train("--config", file, ranks=2)
    assert done.code == 0, done.err
    bucket = f"bucket-{uuid.uuid4()}"
    with s3_server(bucket) as variables:
        file = write_config(checkpoint={**there, "dir": f"s3://{bucket}/run"})
        for epochs in (1, 2):
            done = server.train("--config", file, f"train.epochs={epochs}", ranks=2, variables=variables)
            assert done.code == 0, done.out + done.err
        assert "continuing from step 5" in done.out
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        fsspec.filesystem("s3").clear_instance_cache()
        found = CheckpointFolder(open_storage(f"s3://{bucket}/run"), keep=1).newest()
        assert found.step == 10
        stored = {name: found.read(f"model.{name}") for name in found.names("model.")}
        assert identical(stored, weights(tmp_path / "folder", 10))
    assert losses(tmp_path / "run") == losses(tmp_path / "folder")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_that_ranks_do_not_share_is_refused(
    server: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Rank 1 writes elsewhere, as with a disk of its own; rank 0 misses the file and publishes nothing."""
    data = {"name": "own_disks:Vectors", "args": {"length": 60}}
    done = server.train("--config", write_config(data__train=data, data__eval=None), ranks=2)
    assert done.code == 1, done.out
    assert "rank-00001.safetensors is not there as rank 0 sees it: checkpoints must be on storage" in done.err
    assert "Traceback" not in done.err
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
