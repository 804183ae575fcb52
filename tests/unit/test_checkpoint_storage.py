"""Storage of checkpoints: a folder, fsspec's memory and an S3 server keep the same promises."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import Train, WriteConfig, few
from object_store import s3_server
from run_results import identical, losses, tensors

from trainer.checkpoint import requests
from trainer.checkpoint import storage as storage_module
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.reading import Checkpoint
from trainer.checkpoint.requests import Span
from trainer.checkpoint.storage import MANIFEST, LocalStorage, ObjectStorage, Storage, open_storage

KINDS = ["local", "memory", "s3"]


@pytest.fixture
def location(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A place for checkpoints that does not exist yet."""
    if request.param == "local":
        yield str(tmp_path / "checkpoints")
    elif request.param == "memory":
        name = f"memory://{tmp_path.name}/run"
        yield name
        fsspec.filesystem("memory").store.clear()
    else:
        bucket = f"bucket-{uuid.uuid4()}"  # servers of one process share their buckets
        with s3_server(bucket) as variables:
            for key, value in variables.items():
                monkeypatch.setenv(key, value)
            fsspec.filesystem("s3").clear_instance_cache()  # made for the server of another test
            yield f"s3://{bucket}/team/run"


def write(storage: Storage, name: str, content: bytes = b"12345678") -> str:
    staged = storage.begin(name)
    storage.write(staged, "rank-00000.safetensors", [memoryview(content[:3]), memoryview(content[3:])])
    return staged


@pytest.mark.parametrize("location", KINDS, indirect=True)
def test_nothing_is_there_before_it_is_published(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(location)
    assert storage.names() == []
    staged = write(storage, "step-00000001")
    assert "step-00000001" not in storage.names()
    storage.publish(staged, "step-00000001", b"{}")
    assert storage.names() == ["step-00000001"]
    assert storage.size("step-00000001", "rank-00000.safetensors") == 8
    assert storage.size("step-00000001", "other") is None
    spans = [Span("rank-00000.safetensors", begin, size) for begin, size in [(2, 4), (0, 2), (6, 4)] * 9]
    found = [bytes(data) for data in storage.read("step-00000001", spans)]
    assert found == [b"3456", b"12", b"78"] * 9  # the last one is longer than the file
    assert [bytes(data) for data in storage.read("step-00000001", spans[1:2])] == [b"12"]
    assert list(storage.read("step-00000001", [])) == []
    monkeypatch.setattr(storage_module, "_READ_PIECE", 3)
    assert b"".join(map(bytes, storage.pieces("step-00000001", "rank-00000.safetensors"))) == b"12345678"


@pytest.mark.parametrize("location", ["s3"], indirect=True)
def test_requests_to_an_object_store_are_on_their_way_together(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(50)
    there = ObjectStorage(location)
    there.publish(write(there, "step-00000001", content), "step-00000001", b"{}")
    ask, under_way, most = there._fs._cat_file, 0, 0

    async def asked(*arguments: Any, **options: Any) -> bytes:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.05)
        found: bytes = await ask(*arguments, **options)
        under_way -= 1
        return found

    monkeypatch.setattr(there._fs, "_cat_file", asked)
    monkeypatch.setattr(storage_module, "REQUEST_BYTES", 4)
    monkeypatch.setattr(requests, "_BATCH_BYTES", 32)
    assert list(there.pieces("step-00000001", "rank-00000.safetensors")) == [
        content[i : i + 4] for i in range(0, 50, 4)
    ]
    assert most == 8
    most = 0
    spans = [Span("rank-00000.safetensors", 10 * i, 10) for i in range(5)]
    assert b"".join(there.read("step-00000001", spans)) == content
    assert most == 3


@pytest.mark.parametrize("location", ["s3"], indirect=True)
def test_a_package_that_returns_errors_among_the_bytes(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As fsspec before 2026.6 does, whatever it is told."""
    there = ObjectStorage(location)
    there.publish(write(there, "step-00000001"), "step-00000001", b"{}")
    errors: list[Exception] = [OSError(5, "Input/output error"), ValueError("no such region\nat all")]

    def found(paths: list[str], *_: Any, **__: Any) -> list[Any]:
        return [b"1234" for _ in paths[1:]] + [errors[-1]]

    monkeypatch.setattr(there._fs, "cat_ranges", found)
    spans = [Span("rank-00000.safetensors", 4 * i, 4) for i in range(2)]
    with pytest.raises(OSError, match=r"'.*rank-00000\.safetensors': no such region$"):
        list(there.read("step-00000001", spans))
    errors.pop()
    with pytest.raises(OSError, match=r"Input/output error: '.*rank-00000\.safetensors'"):
        list(there.pieces("step-00000001", "rank-00000.safetensors"))


@pytest.mark.parametrize("location", KINDS, indirect=True)
def test_the_manifest_is_replaced_and_everything_removed(location: str) -> None:
    storage = open_storage(location)
    storage.publish(write(storage, "step-00000001"), "step-00000001", b"old")
    storage.replace_manifest("step-00000001", b"newer")
    assert b"".join(storage.pieces("step-00000001", MANIFEST)) == b"newer"
    storage.remove("step-00000001")
    assert storage.names() == []
    assert storage.size("step-00000001", "rank-00000.safetensors") is None


@pytest.mark.parametrize("location", KINDS, indirect=True)
def test_what_was_interrupted_is_cleaned_and_what_is_damaged_is_kept(location: str) -> None:
    storage = open_storage(location)
    storage.publish(write(storage, "step-00000001"), "step-00000001", b"{}")
    storage.publish(write(storage, "step-00000002"), "step-00000002", b"{}")
    aside = storage.set_aside("step-00000002")
    interrupted = write(storage, "step-00000003")
    storage.clean()
    assert [name for name in storage.names() if name.startswith("step-")] == ["step-00000001"]
    assert storage.size(interrupted, "rank-00000.safetensors") is None
    assert storage.size(aside.rpartition("/")[2], "rank-00000.safetensors") == 8


@pytest.mark.parametrize("location", KINDS, indirect=True)
def test_a_published_name_is_taken_over(location: str) -> None:
    """A damaged checkpoint of the same step is in the way of a good one; it is not overwritten in part."""
    storage = open_storage(location)
    storage.publish(write(storage, "step-00000001", b"damaged!"), "step-00000001", b"{}")
    storage.publish(write(storage, "step-00000001", b"good"), "step-00000001", b"{1}")
    assert b"".join(storage.pieces("step-00000001", "rank-00000.safetensors")) == b"good"
    assert [name for name in storage.names() if name.startswith("step-")] == ["step-00000001"]


@pytest.mark.parametrize("location", few(KINDS, "s3"), indirect=True)
def test_a_run_keeps_its_checkpoints_there(
    location: str, train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    """The whole promise: published, pruned, resumed bit for bit, put aside where damaged."""
    assert train("--config", write_config("whole.yaml", run__dir=str(tmp_path / "whole"), train__epochs=3)).code == 0
    there = {"checkpoint": {"dir": location, "every": 2, "keep": 2, "best": {"metric": "loss", "mode": "min"}}}
    assert train("--config", write_config(train__epochs=2, **there)).code == 0
    folder = CheckpointFolder(open_storage(location), keep=2)
    best = folder.best()
    assert best is not None
    assert folder.steps() == sorted({8, 10, best})
    assert train("--config", write_config(train__epochs=3, **there)).code == 0
    assert not (tmp_path / "run" / "checkpoints").exists()
    newest = folder.newest()
    assert newest.step == 15
    for prefix in ("model.", "optimizer."):
        found = {name: newest.read(prefix + name) for name in newest.names(prefix)}
        assert identical(found, tensors(tmp_path / "whole", 15, prefix))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    storage = folder.storage
    storage.write("step-00000015", "rank-00000.safetensors", [memoryview(b"not what was written")])
    code, out, _ = train("--config", write_config(train__epochs=3, **there))
    assert code == 0
    assert "skipped the checkpoint of step 15: rank-00000.safetensors has 20 bytes instead of" in out
    assert "continuing from step 14" in out
    assert folder.newest().step == 15


def test_an_unknown_kind_of_url(train: Train, write_config: WriteConfig) -> None:
    code, _, err = train("--config", write_config(checkpoint={"dir": "teapot://kettle/run"}))
    assert code == 2
    assert "checkpoint.dir" in err
    assert "teapot" in err


def test_a_package_that_is_missing_is_named(train: Train, write_config: WriteConfig) -> None:
    code, _, err = train("--config", write_config(checkpoint={"dir": "gs://bucket/run"}))
    assert code == 2
    assert "checkpoint.dir: 'gs://bucket/run' needs another package" in err
    assert "gcsfs" in err


def test_links_point_at_the_best(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for step in (1, 2):
        name = CheckpointFolder.name(step)
        storage.publish(write(storage, name), name, b"{}")
        storage.point("best", name)
        assert os.readlink(tmp_path / "best") == name
    assert sorted(storage.names()) == ["step-00000001", "step-00000002"]
    with pytest.raises(FileExistsError):
        os.mkdir(tmp_path / "best")


def test_readers_see_a_manifest_whole(tmp_path: Path) -> None:
    """However often it is replaced, what is read is one of the two."""
    storage = LocalStorage(tmp_path)
    storage.publish(write(storage, "step-00000001"), "step-00000001", b"a" * 5000)
    for i in range(50):
        storage.replace_manifest("step-00000001", (b"a" if i % 2 else b"b") * 5000)
        content = b"".join(storage.pieces("step-00000001", MANIFEST))
        assert content in (b"a" * 5000, b"b" * 5000)


def test_a_checkpoint_opens_with_safetensors(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    """The files are plain safetensors: other tools read them without us."""
    from safetensors.torch import load_file

    train("--config", write_config())
    checkpoint = Checkpoint(LocalStorage(tmp_path / "run" / "checkpoints"), "step-00000010")
    loaded = load_file(tmp_path / "run" / "checkpoints" / "step-00000010" / "rank-00000.safetensors")
    assert loaded.keys() == checkpoint.manifest.tensors.keys()
    assert all(loaded[name].equal(checkpoint.read(name)) for name in loaded)
