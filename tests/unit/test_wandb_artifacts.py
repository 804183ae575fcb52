"""Checkpoints and exports as artifacts of W&B: which are uploaded, and what becomes of those that are not."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import WriteConfig
from wandb import Artifact
from wandb.errors import CommError

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Manifest, Progress
from trainer.checkpoint.storage import LocalStorage
from trainer.config import load_config
from trainer.errors import UserError
from trainer.tracking import artifacts, wandb_run
from trainer.tracking.artifacts import CheckpointUploads


class Recorded:
    """A W&B run that notes what it is given, whose server takes an upload only when it is told to."""

    id = "a-run"

    def __init__(self) -> None:
        self.given: list[tuple[int, list[str]]] = []
        self.metadata: list[dict[str, Any]] = []
        self.uploads = [threading.Event() for _ in range(20)]

    def log_artifact(self, artifact: Any, aliases: list[str]) -> Any:
        assert artifact.type == "model"
        assert set(artifact.manifest.entries) == {"manifest.json", "rank-0.safetensors"}
        self.given.append((artifact.metadata["step"], aliases))
        self.metadata.append(artifact.metadata)
        upload = self.uploads[len(self.given) - 1]
        return SimpleNamespace(wait=lambda: upload.wait(60))


class Written:
    """A folder of checkpoints, and what uploads them."""

    def __init__(self, run: Recorded, path: Path, which: Any, is_online: bool) -> None:
        self.run = run
        self.path = path
        self.folder = CheckpointFolder(LocalStorage(path / "checkpoints"), 1, lambda step: False)
        self.uploads = CheckpointUploads(run, path / "wandb", which, is_online)

    def add(self, step: int, best: int | None = None, is_pruned: bool = True, **progress: Any) -> None:
        """Writes a checkpoint, tells of it and deletes it."""
        place = self.path / "checkpoints" / self.folder.name(step)
        place.mkdir(parents=True, exist_ok=True)
        told = Progress(step=step, best_step=best, **progress)
        (place / "manifest.json").write_bytes(Manifest(told, {}, 10, 1, {}).to_bytes())
        (place / "rank-0.safetensors").write_text(str(step))
        self.uploads.add(self.folder, told)
        if is_pruned:
            shutil.rmtree(place)

    @property
    def staged(self) -> list[str]:
        return sorted(path.name for path in (self.path / "wandb").glob("checkpoints/*"))

    @property
    def given(self) -> list[tuple[int, list[str]]]:
        return self.run.given

    def wait(self, is_so: Callable[[], bool]) -> None:
        for _ in range(1000):
            if is_so():
                return
            time.sleep(0.01)
        raise AssertionError((self.given, self.staged))


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("all", [(1, ["best"]), (2, []), (3, ["best"])]),  # known to be the best only after it was saved
        ("best", [(3, ["best"])]),
        ("last", [(3, ["best"])]),
    ],
)
def test_which_checkpoints_are_uploaded(which: Any, expected: list[tuple[int, list[str]]], tmp_path: Path) -> None:
    """Offline, where they are given to W&B at the end."""
    written = Written(Recorded(), tmp_path, which, is_online=False)
    for step, best in ((1, 1), (2, 1), (3, 1), (3, 3), (3, 3)):
        written.add(step, best, is_pruned=step < 3)
    assert written.uploads.finish(30)
    written.uploads.clean()
    assert written.given == [(step, ["latest", f"step-{step}", *more]) for step, more in expected]
    assert len(written.staged) == len(expected)  # for `wandb sync`


def test_uploads_over_a_slow_network(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Recorded()
    written = Written(run, tmp_path, "all", is_online=True)
    written.add(1, evaluated_step=1, eval_metrics={"accuracy": 0.5})
    written.wait(lambda: len(run.given) == 1)
    written.add(1, 1, evaluated_step=1, eval_metrics={"accuracy": 0.5})  # while W&B reads its first upload
    for step in range(2, 7):
        written.add(step, 1, evaluated_step=1, eval_metrics={"accuracy": 0.5})
    left = ["step-00000001-1", "step-00000001-2", "step-00000005-6", "step-00000006-7"]
    assert written.staged == left  # one that is read and three that wait, the best among them
    assert caplog.text.count("more than 3 checkpoints wait") == 1
    run.uploads[0].set()
    written.wait(lambda: len(run.given) == 2)
    assert written.staged == left[1:]
    assert written.uploads.finish(30)
    assert [step for step, _ in run.given] == [1, 1, 5, 6]
    assert run.metadata[1:3] == [{"step": 1, "eval/accuracy": 0.5}, {"step": 5}]
    run.uploads[1].set()
    written.uploads.clean()  # W&B gave up on the others
    assert written.staged == left[2:]

    # The next attempt uploads what is left, but nothing that is half-made.
    staging = tmp_path / "wandb" / "checkpoints"
    (staging / ".step-00000007-1.new").mkdir()
    (staging / "step-00000008-1").mkdir()
    again = Recorded()
    for event in again.uploads:
        event.set()
    second = Written(again, tmp_path, "all", is_online=True)
    second.wait(lambda: not staging.exists())
    assert again.given == [(5, ["step-5"]), (6, ["step-6"])]
    assert second.uploads.finish(30)


def test_what_takes_too_long_to_read_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Recorded()
    released = threading.Event()
    read = Artifact.add_dir
    monkeypatch.setattr(Artifact, "add_dir", lambda *args, **options: (released.wait(60), read(*args, **options)))
    written = Written(run, tmp_path, "last", is_online=True)
    written.add(4, is_pruned=False)
    assert not written.uploads.finish(0.2)
    assert "not uploaded after 0 s: checkpoints of steps 4; they stay in" in caplog.text
    written.uploads.clean()
    released.set()
    written.uploads._thread.join(30)
    assert run.given == []  # the run is over
    assert written.staged == ["step-00000004-1"]


def test_uploads_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_link(source: Path, target: Path) -> None:
        raise OSError("not here")

    monkeypatch.setattr("os.link", no_link)
    copies: list[str] = []
    copy = shutil.copyfile

    def noted_copy(source: Path, target: Path) -> None:
        copies.append(threading.current_thread().name)
        copy(source, target)

    monkeypatch.setattr("shutil.copyfile", noted_copy)
    written = Written(Recorded(), tmp_path, "all", is_online=False)
    written.add(1)
    written.add(2, is_pruned=False)
    assert written.uploads.finish(30)
    assert set(copies) == {"wandb-artifacts"}
    assert written.staged == ["step-00000002-2"]
    assert [step for step, _ in written.given] == [2]
    assert "checkpoint of step 1 not uploaded: FileNotFoundError" in caplog.text


class Refusing:
    """A W&B run that takes no artifact, or not in time."""

    id = "a-run"
    settings = SimpleNamespace(sync_dir="wandb/run-1")

    def __init__(self, problem: Exception | None) -> None:
        self.problem = problem
        self._finish_timed_out = problem is None

    def log_artifact(self, artifact: Any, aliases: list[str]) -> Any:
        if isinstance(self.problem, CommError):
            raise self.problem
        return self

    def wait(self, timeout: int) -> None:
        assert self.problem is not None
        raise self.problem

    def finish(self) -> None:
        pass


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (CommError("no way"), "is written, but not added to the W&B run a-run: no way"),
        (ValueError("quota"), "is written, but not added to the W&B run a-run: quota"),
        (None, "is written, but not uploaded after 60 s; this uploads it: wandb sync --include-online wandb/run-1"),
    ],
)
def test_an_export_that_is_not_uploaded(
    problem: Exception | None, told: str, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Refusing(problem)
    monkeypatch.setattr(wandb_run, "wandb_mode", lambda config: "online")
    monkeypatch.setattr(wandb_run, "start", lambda *arguments: (SimpleNamespace(tracker=run), "online"))
    config = load_config(str(write_config(tracking={"trackers": ["wandb"], "wandb": {"mode": "online"}})), [])
    file = tmp_path / "model.safetensors"
    file.write_text("weights")
    with pytest.raises(UserError) as caught:
        artifacts.log_export(config, tmp_path, "a-run", file, {"step": 3, "format": "safetensors"})
    assert str(caught.value).startswith("tracking.wandb: ")
    assert told in str(caught.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="'wandb' is not installed"):
        artifacts.check_export(config, tmp_path, "a-run")


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_a_checkpoint_in_an_object_store_is_a_reference(scheme: str, tmp_path: Path) -> None:
    run = SimpleNamespace(id="a-run", given=[])
    run.log_artifact = lambda artifact, aliases: run.given.append(artifact.manifest.entries)
    uploads = CheckpointUploads(run, tmp_path / "wandb", "last", is_online=False)
    storage = SimpleNamespace(location=f"{scheme}://bucket/run")
    uploads.add(CheckpointFolder(storage, 1), Progress(step=3))
    uploads.finish(30)
    (entries,) = run.given
    assert {name: entry.ref for name, entry in entries.items()} == {
        "step-00000003": f"{scheme}://bucket/run/step-00000003"
    }
