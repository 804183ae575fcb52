"""Trackers of any kind: each step is told once, and one that fails or blocks holds no run."""

from __future__ import annotations

import threading
import time
from collections.abc import Container, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import PartialState
from conftest import Train, WriteConfig

from trainer import tracking as trackers_module
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Progress
from trainer.config import load_config
from trainer.config_reporting import TrackingConfig, WandbConfig
from trainer.eval_media import EvalMedia
from trainer.tracking import Trackers
from trainer.tracking import behind as tracking_behind
from trainer.tracking.behind import Behind
from trainer.tracking.others import Other, stored_config
from trainer.tracking.tracker import Tracker


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


def trackers_of(*trackers: Tracker, finish_timeout: str = "30 s") -> Trackers:
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
    stuck, starting = Fragile(blocks=never), Fragile()

    def start() -> Fragile:
        never.wait(60)
        return starting

    beats: list[float] = []
    began = time.monotonic()
    behind = Behind("stuck", lambda: stuck), Behind("starting", start)
    trackers = trackers_of(*behind, finish_timeout="1 s")
    for step in range(1, 31):
        trackers.log({"train/loss": 0.0}, step)
    assert time.monotonic() - began < 30
    for _ in range(6):
        trackers.add(Fragile(blocks=never))
    began = time.monotonic()
    trackers.finish(failed=False, beat=lambda: beats.append(time.monotonic()))  # all at the same time
    assert 1 <= time.monotonic() - began < 10  # not one after the other, 1.5 s each
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
