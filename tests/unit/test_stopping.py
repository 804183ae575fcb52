"""Requests to stop: where they are obeyed, that nothing is lost by it, and what is done when time is short."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Train, WriteConfig, few
from resuming import assert_same_end
from run_results import checkpoint, summary

from trainer.checkpoint.storage import LocalStorage
from trainer.config import load_config
from trainer.faults.plan import VARIABLE, Event, write_plan
from trainer.faults.stopping import REPEAT_SECONDS, STOP_FILE, StopRequests
from trainer.loop import Trainer

NORMED = {"name": "vectors_model:Normed", "args": {"dropout": 0.2}}
STOPS: dict[str, tuple[Event, dict[str, Any], int]] = {
    "in a step": (Event("signal:SIGTERM", step=4, place="backward"), {}, 4),
    "within a long step": (Event("signal:SIGTERM", step=4, place="backward"), {"train__micro_batch_size": 2}, 3),
    "in its last micro-batch": (Event("signal:SIGINT", step=4, place="optimizer"), {"train__micro_batch_size": 2}, 4),
    "in the last step": (Event("signal:SIGUSR1", step=10), {}, 10),
    "in an evaluation": (Event("signal:SIGTERM", step=5, place="evaluation"), {"eval": {"batch_size": 2}}, 5),
    "in the last evaluation": (Event("signal:SIGTERM", step=10, place="evaluation"), {"eval": {"batch_size": 2}}, 10),
    "while saving": (Event("signal:SIGTERM", step=5, place="saving a checkpoint"), {}, 5),
    "before the first step": (Event("signal:SIGTERM", step=1), {}, 1),
}


@pytest.mark.parametrize("name", few(STOPS, "within a long step", "in the last evaluation", "while saving"))
def test_a_stop_loses_nothing(
    name: str, train: Train, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With BatchNorm, dropout, and loader workers: the run that goes on ends as if it had not been stopped."""
    event, changes, step = STOPS[name]
    changes = {"model": NORMED, "data__workers": 1, "log": {"every": 3}, **changes}
    assert train("--config", write_config("quiet.yaml", run__dir=str(tmp_path / "quiet"), **changes)).code == 0
    config = write_config(**changes)
    write_plan(tmp_path / "plan.json", tmp_path / "run", [event])
    monkeypatch.setenv(VARIABLE, str(tmp_path / "plan.json"))
    done = train("--config", config)
    assert done.code == 75, done.err
    found = summary(tmp_path / "run")
    assert (found["status"], found["step"]) == ("stopped", step)
    assert found["stopped_by"] == f"{event.action.partition(':')[2]} on rank 0"
    assert checkpoint(tmp_path / "run", step).manifest.progress.step == step
    done = train("--config", config)
    assert done.code == 0, done.err
    assert f"continuing from step {step}" in done.out
    assert_same_end(tmp_path / "run", tmp_path / "quiet", done.out)


def test_the_file_stop_is_obeyed_once(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    """Also where it was there before the start; the next start trains."""
    data = {"name": "slow:Steady", "args": {"length": 60, "seconds": 0.02}}
    config = write_config(data__train=data)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / STOP_FILE).touch()
    assert train("--config", config).code == 75
    assert summary(tmp_path / "run")["stopped_by"] == "the file STOP on rank 0"
    assert not (tmp_path / "run" / STOP_FILE).exists()
    assert train("--config", config).code == 0


@pytest.mark.parametrize(("grace", "step"), [(30, 8), (0.2, 4)])
def test_no_checkpoint_where_saves_take_longer_than_the_grace(
    grace: float,
    step: int,
    train: Train,
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish = LocalStorage.publish

    def slowly(self: LocalStorage, *arguments: Any) -> None:
        time.sleep(0.5)
        publish(self, *arguments)

    monkeypatch.setattr(LocalStorage, "publish", slowly)
    plan = tmp_path / "plan.json"
    write_plan(plan, tmp_path / "run", [Event("signal:SIGTERM", step=8)])
    monkeypatch.setenv(VARIABLE, str(plan))
    often = {"checkpoint": {"every": 4, "async_save": False}, "train": {"steps": 10, "batch_size": 6}}
    done = train("--config", write_config(**often, faults={"grace": grace}))
    assert done.code == 75, done.err
    saved = max(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == f"step-{step:08d}"
    assert ("no checkpoint of step" in done.out) is (step == 4), done.out


def test_a_second_signal_is_not_waited_for() -> None:
    """In a child, as it ends at once."""
    child = os.fork()
    if child == 0:
        requests = StopRequests()
        requests.install()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # the same request, by another way
        if not requests.requested or requests.reason != "SIGUSR1":
            os._exit(3)
        time.sleep(REPEAT_SECONDS + 0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        os._exit(4)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def test_the_file_stop_is_no_first_signal(tmp_path: Path) -> None:
    requests = StopRequests()
    requests.install()
    try:
        (tmp_path / STOP_FILE).touch()
        requests.watch_file(tmp_path)
        deadline = time.monotonic() + 5
        while not requests.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        assert requests.reason == "the file STOP"
        time.sleep(REPEAT_SECONDS + 0.1)
        os.kill(os.getpid(), signal.SIGTERM)  # would end this process
        assert requests.seconds_ago() > REPEAT_SECONDS
    finally:
        requests.release_signals()


@pytest.mark.parametrize(("limit", "seconds"), [("7 minutes", 420.0), (None, None)])
def test_the_watch_has_the_limit_of_the_config(
    limit: str | None, seconds: float | None, write_config: WriteConfig
) -> None:
    trainer = Trainer(load_config(str(write_config(faults__hang_timeout=limit))))
    assert trainer.lookout is not None
    assert trainer.lookout.watch._hang_seconds == seconds
    trainer.close()
