"""W&B and the other trackers: what they get over kills, resumes and dead networks, and what an evaluation shows."""

from __future__ import annotations

import glob
import json
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import wandb
import wandb_log
from accelerate import PartialState
from conftest import Train, WriteConfig
from launching import environment
from run_results import records, summary
from torch import nn
from torch.nn import functional
from wandb import Artifact
from wandb.errors import CommError
from wandb_server import StoredRun, WandbServer

from benchmarks import tracking
from trainer import tracking as trackers_module
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Manifest, Progress
from trainer.checkpoint.storage import LocalStorage
from trainer.cli import main
from trainer.config import load_config
from trainer.config_data import NormalizeConfig
from trainer.config_reporting import TrackingConfig, WandbConfig
from trainer.data.augment import DeviceAugmentation
from trainer.data.datasets import Digits
from trainer.errors import UserError
from trainer.eval_media import Collector, EvalMedia
from trainer.faults.plan import VARIABLE, Event, write_plan
from trainer.run_folder import RunFolder
from trainer.tasks.classification import Classification
from trainer.tracking import Trackers, artifacts, reminder, syncing, wandb_file, wandb_run
from trainer.tracking import behind as tracking_behind
from trainer.tracking.artifacts import CheckpointUploads
from trainer.tracking.behind import Behind
from trainer.tracking.others import Other, stored_config
from trainer.tracking.tracker import Tracker
from trainer.tracking.wandb_run import WandbRun

if TYPE_CHECKING:
    from resuming import TrainServer


def wandb_config(**settings: Any) -> dict[str, Any]:
    return {"trackers": ["wandb"], "wandb": settings}


def home(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "home"
    folder.mkdir(exist_ok=True)
    return {"HOME": str(folder)}


def sync(variables: Mapping[str, str], *arguments: str) -> None:
    """Uploads with wandb's own reader."""
    command = [sys.executable, "-m", "wandb", "sync", *arguments]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=60)
    assert "ERROR" not in done.stderr, done.stderr


def trainer_command(variables: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m trainer`."""
    command = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=60)


def offline_runs(run_dir: Path) -> list[str]:
    return sorted(glob.glob(str(run_dir / "wandb" / "offline-run-*")))


def assert_one_curve(run: StoredRun, run_dir: Path) -> None:
    """Asserts that W&B has each step of metrics.jsonl once, in order, with the same values."""
    expected: dict[int, dict[str, Any]] = {}
    for record in records(run_dir):
        expected.setdefault(record["step"], {}).update(
            {key: value for key, value in record.items() if key != "time" and value is not None}
        )
    assert [row["step"] for row in run.history] == list(expected)
    assert [row["_step"] for row in run.history] == list(expected)
    for row in run.history:
        for key, value in expected[row["step"]].items():
            # The others are measured by a clock: they differ where a step was made twice.
            if key in ("epoch", "samples", "train/loss", "train/lr", "train/grad_norm") or key.startswith("eval/"):
                assert row[key] == value, (row["step"], key)
        assert row.keys() >= {key for key in expected[row["step"]] if not key.startswith("system/")}


def aliases(artifact: Mapping[str, Any]) -> set[str]:
    return {alias["alias"] for alias in artifact["aliases"]}


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Variables of a run with a checkpoint every 3 steps that is rolled back in step 8, and killed in step 9."""
    (tmp_path / "run").mkdir()
    events = [Event("nan", step=8), Event("kill", step=9, place="forward")]
    write_plan(tmp_path / "plan.json", tmp_path / "run", events, seconds_valid=600)
    return {VARIABLE: str(tmp_path / "plan.json")}


def test_online_is_one_curve_over_a_kill(
    server: TrainServer,
    write_config: WriteConfig,
    tmp_path: Path,
    killed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"project": "p", "name": "shown", "group": "g", "tags": ["t"], "notes": "n", "entity": "team"}
    init = {"wandb": {"job_type": "trial", "settings": {"x_file_stream_transmit_interval": 0.1}}}
    changes = {**wandb_config(**settings, checkpoints="all"), "init": init}
    config = write_config(tracking=changes, checkpoint__every=3, eval__every=2, faults__non_finite="rollback")
    with WandbServer() as online:
        variables = {**home(tmp_path), **online.variables}
        assert server.train("--config", config, variables={**variables, **killed}).code == -9
        done = server.train("--config", config, variables=variables)
        assert done.code == 0, done.err
        (run,) = online.runs.values()
        assert_one_curve(run, tmp_path / "run")
        assert run.num_starts == 2
        assert run.exit_code == 0
        told = run.attributes
        assert (told["displayName"], told["groupName"], told["tags"], told["notes"]) == ("shown", "g", ["t"], "n")
        assert (told["entity"], told["project"], told["jobType"]) == ("team", "p", "trial")
        assert run.config["optim"]["lr"] == 0.01
        evaluated = [r["eval/accuracy"] for r in records(tmp_path / "run") if "eval/accuracy" in r]
        losses = [r["train/loss"] for r in records(tmp_path / "run") if r.get("train/loss") is not None]
        assert (run.summary["eval/accuracy"], run.summary["train/loss"]) == (evaluated[-1], losses[-1])
        assert run.summary["best/eval/accuracy"] == max(evaluated)
        assert run.summary["best/train/loss"] == min(losses)
        models = [found for found in online.artifacts if found["artifactTypeName"] == "model"]
        steps = {step for found in models for step in aliases(found) if step.startswith("step-")}
        assert {"step-3", "step-6", "step-9", "step-10"} <= steps
        assert {"latest", "step-10"} <= aliases(models[-1])
        assert any("best" in aliases(found) for found in models)
        assert not (tmp_path / "run" / "wandb" / "checkpoints").exists(), done.out  # all is uploaded
        assert run.summary["status"] == "finished"
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        export = ["export", str(tmp_path / "run"), "--output", str(tmp_path / "model.safetensors"), "--artifact"]
        assert main(export) == 0
        assert "export-" in str(online.artifacts[-1])
        monkeypatch.setenv("WANDB_MODE", "disabled")
        assert main(export) == 2


def test_offline_is_one_curve_once_synced(
    server: TrainServer, write_config: WriteConfig, tmp_path: Path, killed: dict[str, str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"checkpoint__every": 3, "eval__every": 2, "faults__non_finite": "rollback"}
    offline = {"trackers": ["wandb", "tensorboard"], "wandb": {"mode": "offline"}}
    config = write_config(**changes, tracking=offline)
    variables = home(tmp_path)
    assert server.train("--config", config, variables={**variables, **killed}).code == -9
    assert server.train("--config", config, variables=variables).code == 0
    with WandbServer() as online:
        sync({**variables, **online.variables}, *offline_runs(tmp_path / "run"))
        (run,) = online.runs.values()
        assert_one_curve(run, tmp_path / "run")
        assert run.exit_code == 0
    assert summary(tmp_path / "run")["num_rollbacks"] == 1
    written = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    written.Reload()
    assert [event.step for event in written.Scalars("train/loss")] == list(range(1, 11))
    # Never synced, and the network is back: another attempt sends what the server lacks.
    longer = write_config(**changes, tracking=wandb_config(mode="online"), train__epochs=3)
    with WandbServer() as online:
        variables = {**variables, **online.variables}
        assert server.train("--config", longer, variables=variables).code == 0
        (run,) = online.runs.values()
        assert_one_curve(run, tmp_path / "run")
        assert max(row["step"] for row in run.history) == 15
        sync(variables, *offline_runs(tmp_path / "run"))  # nothing is left to do
        assert_one_curve(run, tmp_path / "run")


def test_a_server_that_dies_in_the_middle(server: TrainServer, write_config: WriteConfig, tmp_path: Path) -> None:
    init = {"wandb": {"settings": {"x_file_stream_transmit_interval": 0.1}}}
    changes = {**wandb_config(mode="online", finish_timeout="2 seconds"), "init": init, "samples": 0}
    with WandbServer(dies=True) as online:
        variables = {**home(tmp_path), **online.variables}
        done = server.train("--config", write_config(tracking=changes, train__epochs=60), variables=variables)
        assert done.code == 0, done.err
        assert online.stopped
        (run,) = online.runs.values()
        assert run.history == []
    assert summary(tmp_path / "run")["status"] == "finished"
    (file,) = (tmp_path / "run" / "wandb").glob("run-*/*.wandb")
    assert [row["step"] for row in wandb_log.history(file)] == list(range(1, 301))
    assert "wandb: not all is uploaded after 2 s" in done.out
    (line,) = (line for line in done.out.splitlines() if "-m trainer sync" in line)
    arguments = line.partition("-m trainer ")[2].split()
    assert arguments == ["sync", str(tmp_path / "run")]
    assert not (tmp_path / "run" / "wandb" / "complete").exists()
    with WandbServer() as online:  # as the line says
        variables = {**home(tmp_path), **online.variables}
        late = trainer_command(variables, *arguments)
        assert late.returncode == 0, late.stderr
        assert late.stderr.startswith("sent 300 rows to the W&B run ")
        assert late.stderr.count("\n") == 1
        (run,) = online.runs.values()
        assert_one_curve(run, tmp_path / "run")
        assert (run.exit_code, run.summary["status"]) == (0, "finished")
        assert (tmp_path / "run" / "wandb" / "complete").exists()
        # A server that has a part of it.
        run.lines = {place: run.lines[place] for place in range(7)}
        run.summary = run.lines[6]
        assert trainer_command(variables, *arguments).stderr.startswith("sent 293 rows to the W&B run ")
        assert_one_curve(run, tmp_path / "run")


def test_sync_says_in_a_line_what_it_lacks(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()

    def told() -> str:
        assert main(["sync", str(run)]) == 2
        return capsys.readouterr().err

    assert told() == f"error: '{run}' is no run folder: it has no config.yaml\n"
    shutil.copy(write_config(), run / "config.yaml")
    assert told() == f"error: the run in '{run}' has no W&B run: tracking.trackers had no wandb\n"
    (run / "wandb" / "offline-run-20260101_000000-abc").mkdir(parents=True)
    (run / "wandb" / "offline-run-20260101_000000-abc" / "run-abc.wandb").touch()
    monkeypatch.setattr(syncing, "wandb_server", lambda: "http://127.0.0.1:9")
    monkeypatch.setattr(syncing, "has_wandb_key", lambda: False)
    assert told() == "error: no API key for 127.0.0.1: type `wandb login`, or set WANDB_API_KEY\n"
    monkeypatch.setattr(syncing, "has_wandb_key", lambda: True)
    assert told() == "error: 127.0.0.1 cannot be reached\n"


def test_servers_that_keep_one_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wandb_run, "_PROBE_SECONDS", 0.2)
    online = WandbConfig(mode="online")
    with WandbServer(silent=True) as silent:
        monkeypatch.setattr(wandb_run, "wandb_server", lambda: silent.url)
        assert wandb_run.wandb_mode(online) == "offline"
    with WandbServer() as fine:
        monkeypatch.setattr(wandb_run, "_PROBE_SECONDS", 10)
        monkeypatch.setattr(wandb_run, "wandb_server", lambda: "http://far.example:8080")
        monkeypatch.setenv("http_proxy", fine.url)  # it reaches what we cannot
        assert wandb_run.wandb_mode(online) == "online"
        assert fine.requests == ["GET http://far.example:8080"]
        monkeypatch.delenv("http_proxy")
    monkeypatch.setattr(wandb_run, "_PROBE_SECONDS", 0.2)
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments, **options: time.sleep(20))
    started = time.monotonic()
    assert wandb_run.wandb_mode(online) == "offline"
    assert time.monotonic() - started < 5


def digits(write_config: WriteConfig, run_dir: Path, **tracking: Any) -> Path:
    return write_config(
        f"{run_dir.name}.yaml",
        run={"name": "tiny", "dir": str(run_dir), "seed": 3},
        data={split: {"name": "digits", "args": {"split": split}} for split in ("train", "eval")} | {"workers": 0},
        model={"name": "small_cnn", "args": {"width": 8}},
        train={"steps": 30, "batch_size": 96},
        eval={"every": 10},
        log={"every": 10},
        checkpoint={"every": 30},
        tracking=tracking,
    )


def test_what_evaluations_show_and_artifacts(
    train: Train, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, value in home(tmp_path).items():
        monkeypatch.setenv(name, value)
    run, plain = tmp_path / "run", tmp_path / "plain"
    settings = {"mode": "offline", "checkpoints": "last"}
    config = digits(write_config, run, trackers=["wandb", "tensorboard"], wandb=settings, samples=5)
    assert train("--config", config).code == 0
    assert train("--config", digits(write_config, plain, trackers=[], samples=0)).code == 0
    evaluations = [r for r in records(run) if "eval/accuracy" in r]
    for record, expected in zip(evaluations, (r for r in records(plain) if "eval/accuracy" in r), strict=True):
        assert record["eval/accuracy"] == expected["eval/accuracy"]
        assert record["eval/loss"] == expected["eval/loss"]
    assert not (plain / "eval").exists()

    # The run folder: the newest and the best evaluation.
    best = summary(run)["best"]["step"]
    assert {path.name for path in (run / "eval").iterdir()} == {f"step-{step:08d}" for step in {30, best}}
    shown = run / "eval" / "step-00000030"
    confusion = json.loads((shown / "confusion.json").read_text())
    counts = np.array(confusion["counts"])
    data_set = Digits("eval")
    labels = [int(data_set[i][1]) for i in range(len(data_set))]
    assert confusion["classes"] == [str(label) for label in range(10)]
    assert counts.sum(1).tolist() == np.bincount(labels, minlength=10).tolist()
    assert counts.trace() / counts.sum() == evaluations[-1]["eval/accuracy"]
    samples = json.loads((shown / "samples.json").read_text())
    assert [sample["target"] for sample in samples] == [str(label) for label in labels[:5]]
    for i, sample in enumerate(samples):
        assert 0 < sample["confidence"] <= 1
        picture = np.asarray(Image.open(shown / sample["image"]))
        assert picture.shape == (8, 8, 3)
        original = np.asarray(data_set[i][0]).reshape(8, 8).astype(float)
        assert np.abs(picture[:, :, 0] / 255 - original / original.max()).max() < 0.1

    # W&B.
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    rows = [row for row in wandb_log.history(file) if "eval/accuracy" in row]
    assert [row["step"] for row in rows] == [10, 20, 30]
    files = file.parent / "files"
    for row in rows:
        assert "train/loss" in row  # one row per step
        assert len(row["eval/images.captions"]) == 5
        assert all((files / name).exists() for name in row["eval/images.filenames"])
    table = json.loads((files / rows[-1]["eval/samples.path"]).read_text())
    assert table["columns"] == ["image", "target", "prediction", "confidence"]
    assert [line[1:3] for line in table["data"]] == [[sample["target"], sample["prediction"]] for sample in samples]
    cells = json.loads((files / rows[-1]["eval/confusion_table.path"]).read_text())["data"]
    assert [cell[2] for cell in cells] == counts.flatten().tolist()
    uploaded = [found for found in wandb_log.artifacts(file) if found.type == "model"]
    (checkpoint,) = uploaded
    assert set(checkpoint.aliases) >= {"latest", "step-30"}
    linked = run / "wandb" / "checkpoints" / "step-00000030-1"
    assert {f.name for f in linked.iterdir()} == {f.name for f in (run / "checkpoints" / "step-00000030").iterdir()}

    # TensorBoard.
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    assert {f"eval/samples/{i}" for i in range(5)} | {"eval/confusion"} == set(found.Tags()["images"])
    assert [event.step for event in found.Images("eval/samples/0")] == [10, 20, 30]

    # An export joins the run.
    output = tmp_path / "model.safetensors"
    assert main(["export", str(run), "--output", str(output), "--artifact"]) == 0
    assert main(["export", str(plain), "--output", str(output), "--artifact"]) == 2
    newest = sorted(run.glob("wandb/offline-run-*/*.wandb"))[-1]
    assert newest.parent != file.parent
    assert wandb_log.run(newest).run_id == wandb_log.run(file).run_id
    (exported,) = wandb_log.artifacts(newest)
    assert (exported.type, set(exported.aliases)) == ("model", {"latest", "step-30", "safetensors"})
    assert [entry.path for entry in exported.manifest.contents] == ["model.safetensors"]


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
        (place / "manifest.json").write_bytes(Manifest(told, {}, 10, 1, {}, {}, {}).to_bytes())
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
    config = load_config(str(write_config(tracking=wandb_config(mode="online"))), [])
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


def test_a_rollback_sends_no_step_twice() -> None:
    """Trackers other than W&B are told of each step once, too."""
    tracker = Fragile()
    trackers = trackers_of(tracker)
    for step in (1, 2, 3, 2, 3, 4):
        trackers.log({"train/loss": 0.0}, step)
    trackers.log({"eval/loss": 0.0}, 4)
    trackers.show(EvalMedia([], {}, []), 4)
    trackers.show(EvalMedia([], {}, []), 4)
    assert tracker.given == [("log", step) for step in (1, 2, 3, 4, 4)] + [("show", 4)]


class Fragile:
    """A tracker that fails at some steps, and blocks where it is told to."""

    def __init__(
        self, fails_at: Container[int] = (), blocks: threading.Event | None = None, name: str = "fragile"
    ) -> None:
        self.name = name
        self.fails_at = fails_at
        self.blocks = blocks
        self.given: list[tuple[str, int]] = []
        self.ends: list[bool] = []
        self.threads: set[str] = set()

    def log(self, record: Mapping[str, Any], step: int) -> None:
        if self.blocks is not None:
            self.blocks.wait(60)
        self._take("log", step)

    def show(self, media: EvalMedia, step: int) -> None:
        self._take("show", step)

    def end_step(self, step: int) -> None:
        pass

    def summarise(self, values: Mapping[str, Any], step: int) -> None:
        self._take("summarise", step)

    def checkpoint(self, folder: CheckpointFolder, progress: Progress) -> None:
        pass

    def finish(self, failed: bool, open_step: int | None, seconds: float) -> None:
        if self.blocks is not None:
            self.blocks.wait(60)
        self.ends.append(failed)

    def _take(self, what: str, step: int) -> None:
        self.threads.add(threading.current_thread().name)
        if step in self.fails_at:
            raise ConnectionError("a hiccup")
        self.given.append((what, step))


def trackers_of(*trackers: Tracker, finish_timeout: str = "1 s") -> Trackers:
    tracking = TrackingConfig(trackers=(), wandb=WandbConfig.model_validate({"finish_timeout": finish_timeout}))
    config: Any = SimpleNamespace(tracking=tracking)
    made = Trackers(config, Path(), 0, None)
    for tracker in trackers:
        made.add(tracker)
    return made


def test_a_tracker_that_fails_is_kept_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    direct, behind = Fragile(range(3, 9)), Fragile(range(3, 9))
    broken, broken_behind = Fragile(range(3, 99), name="broken"), Fragile(range(3, 99))
    blind = Fragile(name="blind")
    blind.show = lambda media, step: 1 / 0  # type: ignore[assignment]
    trackers = trackers_of(direct, Behind("a", lambda: behind), broken, Behind("b", lambda: broken_behind), blind)
    for step in range(1, 31):
        trackers.log({"train/loss": 0.0}, step)
        trackers.show(EvalMedia([], {}, []), step)
    until = time.monotonic() + 30
    while not broken_behind.ends and time.monotonic() < until:
        time.sleep(0.01)
    trackers.finish(failed=False)
    for tracker in (direct, behind):
        assert [step for what, step in tracker.given if what == "log"] == [1, 2, *range(9, 31)]
        assert tracker.ends == [False]
    for tracker in (broken, broken_behind):
        assert [step for what, step in tracker.given if what == "log"] == [1, 2]
        assert tracker.ends == [True]  # it is closed all the same
    assert len(blind.given) == 30
    assert behind.threads == {"tracker-a"}
    assert "fails with records: ConnectionError: a hiccup" in caplog.text
    assert "has failed with records 10 times in a row" in caplog.text


def test_trackers_that_block_hold_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(tracking_behind, "_START_SECONDS", 0.1)
    monkeypatch.setattr(tracking_behind, "_MOST_WAITING", 5)
    monkeypatch.setattr(trackers_module, "_OVER_SECONDS", 0.5)
    never = threading.Event()
    stuck, starting, direct = Fragile(blocks=never), Fragile(), Fragile(blocks=never)

    def start() -> Fragile:
        never.wait(60)
        return starting

    beats: list[float] = []
    began = time.monotonic()
    trackers = trackers_of(Behind("stuck", lambda: stuck), Behind("starting", start))
    for step in range(1, 31):
        trackers.log({"train/loss": 0.0}, step)
    assert time.monotonic() - began < 5
    trackers.add(direct)
    began = time.monotonic()
    trackers.finish(failed=False, beat=lambda: beats.append(time.monotonic()))  # all at the same time
    assert 1 <= time.monotonic() - began < 3
    assert len(beats) >= 2
    assert caplog.text.count("stuck is slow or away") == 1
    assert "starting has not started after 0 s" in caplog.text
    assert "did not finish within 1 s" in caplog.text
    never.set()
    with pytest.raises(ZeroDivisionError):
        Behind("broken", lambda: 1 / 0)  # type: ignore[arg-type,return-value]


def test_tensorboard_is_one_curve_where_a_run_begins_anew(write_config: WriteConfig, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    PartialState(cpu=True)
    init = {"comet_ml": {"api_key": "not-to-be-shown"}}
    tracking = {"trackers": ["tensorboard", "comet_ml"], "init": init}
    config = load_config(str(write_config(tracking=tracking)), [])
    for last in (5, 3):
        tensorboard = Other("tensorboard", config, tmp_path, 0, {})
        for step in range(1, last + 1):
            tensorboard.log({"train/loss": 10.0 * last + step}, step)
        tensorboard.finish(False, None, 1)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 31), (2, 32), (3, 33)]
    assert "not-to-be-shown" not in str(stored_config(config))


def test_a_record_that_is_not_whole_is_not_replayed(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(load_config(str(write_config()), []))
    folder.create()
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in (1, 2, 3)]
    folder.metrics_file.write_text("\n".join([*lines, '{"step": 4, "tra']))

    def full(file: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.run_folder.replacing", full)
    assert [record["step"] for record in folder.cut_metrics(2, 0)] == [1, 2]


def test_arguments_of_a_tracker(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    init = {"tensorboard": {"filename_suffix": ".mine"}}
    assert train("--config", write_config(tracking={"trackers": ["tensorboard"], "init": init})).code == 0
    assert list((tmp_path / "run" / "tensorboard").glob("events*.mine"))
    wrong = write_config(
        run__dir=str(tmp_path / "b"), tracking={"trackers": ["tensorboard"], "init": {"tensorboard": {"no": 1}}}
    )
    done = train("--config", wrong)
    assert done.code == 2
    assert "tracking.init.tensorboard.no: tensorboard takes no such argument" in done.err
    for key, message in [
        ("mode=offline", "wandb.mode: use tracking.wandb.mode"),
        ("id=a", "wandb.id: a run is continued by itself"),
        ("projct=a", "wandb.projct: wandb takes no such argument; did you mean 'project'?"),
        ("settings={no: 1}", "wandb.settings: "),
    ]:
        done = train("--config", write_config(tracking={"trackers": ["wandb"]}), f"tracking.init.wandb.{key}")
        assert done.code == 2
        assert f"tracking.init.{message}" in done.err
    done = train("--config", write_config(tracking={"trackers": [], "init": {"mlflow": {}}}))
    assert "tracking.init.mlflow: tracking.trackers does not name 'mlflow'" in done.err
    done = train("--config", write_config(tracking={"trackers": ["aim"]}))
    assert "tracking.trackers.0: 'aim' is not installed; pip install aim, or leave it out" in done.err


def test_files_of_killed_attempts_are_mended(tmp_path: Path) -> None:
    whole = b":W&B\xe1\xbe\x00"
    ends = []
    for kind, data in [(1, b"a" * 50), (2, b"b" * 32_600), (4, b"c" * 100), (1, b"d" * 9)]:
        left = 32768 - len(whole) % 32768
        assert left >= 7
        check = zlib.crc32(data, zlib.crc32(bytes([kind])))
        whole += struct.pack("<IHB", check, len(data), kind) + data
        if kind != 2:
            ends.append(len(whole))
    (tmp_path / "offline-run-1-abc").mkdir()
    file = tmp_path / "offline-run-1-abc" / "run-abc.wandb"

    def mended(content: bytes) -> int:
        file.write_bytes(content)
        assert wandb_file.last_step(tmp_path, "abc", tmp_path / "other") == -1
        return file.stat().st_size

    for cut in (*ends, ends[0] + 3, ends[1] - 1, ends[1] + 5, ends[2] - 1):
        assert mended(whole[:cut]) == max(end for end in ends if end <= cut), cut
    assert mended(whole[: ends[2] - 1] + b"x") == ends[1]  # the last record is broken
    for content in (b"", whole[:7], whole[:30], whole[:20] + b"x" + whole[21:], whole[:100] + b"x" + whole[101:]):
        assert mended(content) == len(content)  # nothing to go by, or broken in the middle: left as it is
    whole_online = tmp_path / "run-1-abc" / "run-abc.wandb"
    whole_online.parent.mkdir()
    whole_online.write_bytes(whole[:-1])
    assert mended(whole) == len(whole)
    assert whole_online.stat().st_size == len(whole) - 1


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


@pytest.mark.parametrize("is_soft", [False, True])
def test_the_confusion_matrix_counts_what_has_a_label(is_soft: bool) -> None:
    task = Classification(num_classes=3)
    outputs = torch.tensor([[2.0, 1, 0], [0, 2, 1], [0, 2, 1], [0, 0, 5]])
    labels = torch.tensor([0, 1, 2, 2]) if is_soft else torch.tensor([0, 1, 2, -100])
    targets = functional.one_hot(labels, 3).float() if is_soft else labels
    tables: dict[str, torch.Tensor] = {}
    for _ in range(2):
        task.eval_tables(tables, outputs, (torch.zeros(4), targets))
    assert tables["confusion"].tolist() == [[2, 0, 0], [0, 2, 0], [0, 2, 2 if is_soft else 0]]
    wide: dict[str, torch.Tensor] = {}
    task.eval_tables(wide, torch.zeros(4, 1001), (torch.zeros(4), labels))
    assert wide == {}


def no_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.flatten(1).mean(1)


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        (nn.MSELoss(reduction="none"), torch.randn(4, 1), torch.randn(4, 1)),
        (lambda outputs, targets: (outputs[:, 0] - targets) ** 2, torch.randn(4, 1), torch.randn(4)),
        (nn.CrossEntropyLoss(reduction="none"), torch.randn(4, 5, 6), torch.randint(0, 5, (4, 6))),
        (no_loss, torch.randn(4, 3), torch.tensor([0, 3, -100, -1])),  # labels outside of the classes
    ],
)
def test_what_is_no_classification_is_evaluated_as_before(
    loss: Any, outputs: torch.Tensor, targets: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    task = Classification(loss=loss)
    task._outputs_checked = True
    collector = Collector(task, 2)
    collector.add(outputs, (torch.zeros(4, 3), targets))
    media = collector.media(collector.tables, None, None)
    assert caplog.text == ""
    if loss is no_loss:
        assert media is not None
        assert media.tables["confusion"].sum() == 1
        assert [example.target for example in media.examples][1:] == ["3"]
    else:
        assert media is None


class Unwilling(Classification):
    """A user's task, which cannot show what it says it can."""

    def __init__(self, where: str) -> None:
        super().__init__(num_classes=2)
        self.where = where

    def eval_tables(self, tables: dict[str, torch.Tensor], outputs: torch.Tensor, data: Any) -> None:
        if self.where == "eval_tables":
            raise KeyError("no")
        super().eval_tables(tables, outputs, data)
        if self.where == "table":
            tables["confusion"] = tables["confusion"].float()

    def describe_examples(self, examples: Any, classes: Any) -> Any:
        return [(0, None)]


@pytest.mark.parametrize("where", ["eval_tables", "table", "describe_examples"])
def test_a_task_that_cannot_show_ends_no_run(where: str, caplog: pytest.LogCaptureFixture) -> None:
    task = Unwilling(where)
    batch = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
    for _ in range(2):
        collector = Collector(task, 2)
        for _ in range(2):
            collector.add(torch.eye(2), batch)
        assert collector.media(collector.tables, None, None) is None
    assert caplog.text.count("evaluations show no samples and no tables from here on") == 1


def test_a_large_confusion_matrix_is_told_in_its_largest_cells() -> None:
    counts = np.arange(1000 * 1000).reshape(1000, 1000) % 1009
    counts[:, :500] = 0
    media = EvalMedia([], {"confusion": counts}, [str(i) for i in range(1000)])
    started = time.process_time()
    told = wandb_run._wandb_media(media)["eval/confusion"].table.data
    assert time.process_time() - started < 2
    assert len(told) == 10_000
    assert all(counts[int(i), int(j)] == count for i, j, count in told)
    assert min(count for _, _, count in told) >= np.sort(counts, axis=None)[-10_000]


def test_pictures_are_as_they_were_before_they_were_normalised() -> None:
    original = torch.randint(0, 256, (3, 3, 20, 500), dtype=torch.uint8)
    normalize = NormalizeConfig(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])
    normalized = DeviceAugmentation(normalize, dtype=torch.float32)(original)
    task = Classification(num_classes=2)
    collector = Collector(task, 5)
    for batch in (normalized[:2], normalized[2:]):
        collector.add(torch.tensor([[0.0, 9.0]] * len(batch)), (batch, torch.tensor([0] * len(batch))))
    media = collector.media({}, ["cat", "dog"], normalize)
    assert media is not None
    assert [(e.number, e.target, e.prediction) for e in media.examples] == [(i, "cat", "dog") for i in range(3)]
    assert media.examples[0].caption == "dog (100%), is cat"
    for example, expected in zip(media.examples, original, strict=True):
        assert example.image is not None
        assert example.image.shape == (10, 256, 3)
        small = functional.interpolate(expected[None].float(), (10, 256), mode="area")[0].permute(1, 2, 0)
        assert np.abs(example.image - small.numpy()).max() <= 1


def test_a_step_that_is_evaluated_by_the_next_attempt(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home(tmp_path)["HOME"])
    PartialState(cpu=True)
    config = load_config(str(write_config(tracking=wandb_config(mode="offline"))), [])
    first = WandbRun(config, tmp_path, None, [], {}, {})
    for step in (9, 10):
        first.log({"train/loss": float(step)}, step)
    first.finish(failed=True, open_step=10, seconds=20)
    wandb.teardown()  # as at the end of a process: offline files are whole then
    assert (tmp_path / "wandb" / "run-id").read_text().strip() == first.id
    records = [{"step": step, "time": 0.0, "train/loss": float(step)} for step in (9, 10)]
    second = WandbRun(config, tmp_path, None, records, {}, {})  # no checkpoint knows of the first one
    assert second.id == first.id
    second.log({"eval/loss": 1.0}, 10)
    second.end_step(10)
    assert second._row == {}  # it waits for nothing more
    second.finish(failed=False, open_step=None, seconds=20)
    wandb.teardown()
    assert reminder(config, tmp_path) is None
    monkeypatch.setenv("WANDB_MODE", "online")
    online = load_config(str(write_config(tracking=wandb_config())), [])
    assert f"-m trainer sync {tmp_path}" in str(reminder(online, tmp_path))
    (tmp_path / "wandb" / "complete").touch()
    assert reminder(online, tmp_path) is None
    rows = [wandb_log.history(file) for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    told = [[(row["step"], row["train/loss"], row.get("eval/loss")) for row in part] for part in rows]
    assert told == [[(9, 9.0, None)], [(10, 10.0, 1.0)]]
    codes = [wandb_log.exit_code(file) for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    assert codes == [1, 0]
