"""Goodput in processes of its own: since when it counts, and which trackers are told."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import wandb_log
from conftest import REPOSITORY, nightly, tiny_config
from launching import TIMEOUT, run


def in_a_process(code: str, **variables: str) -> str:
    done = run([sys.executable, "-c", code], REPOSITORY, TIMEOUT, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_process_counts_from_its_start_and_only_once() -> None:
    code = "import time; time.sleep(0.5); from trainer.ledger import _age_of_run as age; print(age(), age())"
    started = time.time()
    first, second = map(float, in_a_process(code).split())
    assert 0.5 <= first <= time.time() - started + 0.05  # the start is known to a hundredth
    assert second == 0


def test_a_prompt_counts_from_the_run() -> None:
    """A person's notebook may be days old."""
    assert in_a_process("import sys; sys.ps1 = 'In'; from trainer.ledger import _age_of_run as age; print(age())") == (
        "0.0\n"
    )


Summarise = Callable[[str], Path]


@pytest.fixture
def summarised(tmp_path: Path) -> Summarise:
    """Logs two steps and sums up, with one tracker; returns the run folder."""

    def summarise(tracker: str) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        settings = tiny_config(folder, tracking={"trackers": [tracker]})
        code = f"""
import json
from pathlib import Path
from accelerate import PartialState
from trainer.config import Config
from trainer.tracking import Trackers
PartialState(cpu=True)
folder = Path({str(folder)!r})
trackers = Trackers(Config.model_validate(json.loads({json.dumps(settings)!r})), folder, 0, None)
trackers.log({{"train/loss": 0.5}}, 1)
trackers.log({{"train/loss": 0.25}}, 2)
trackers.summarise({{"goodput": 0.75}}, 2)
trackers.finish(failed=False)
"""
        in_a_process(code, WANDB_MODE="offline", HOME=str(tmp_path))
        return folder

    return summarise


def test_goodput_in_the_summary_of_wandb(summarised: Summarise) -> None:
    (file,) = summarised("wandb").glob("wandb/offline-run-*/*.wandb")
    assert wandb_log.summary(file)["goodput"] == 0.75
    assert [row["train/loss"] for row in wandb_log.history(file)] == [0.5, 0.25]  # and no row of its own


@nightly
def test_goodput_in_tensorboard(summarised: Summarise) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {p.parent for p in summarised("tensorboard").glob("tensorboard/events*")}
    assert [(e.step, e.value) for e in EventAccumulator(str(folder)).Reload().Scalars("goodput")] == [(2, 0.75)]
