"""W&B and the other trackers: what they get over kills, resumes and dead networks, and what an evaluation shows."""

from __future__ import annotations

import glob
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import wandb_log
from conftest import Train, WriteConfig
from run_results import records, summary
from wandb_server import StoredRun, WandbServer

from launching import environment
from trainer.faults.plan import VARIABLE, Event, write_plan

if TYPE_CHECKING:
    from resuming import TrainServer

MEASURED = ("train/samples_per_second", "train/data_wait", "goodput")  # by a clock: differ where a step is made twice


def wandb_config(**settings: Any) -> dict[str, Any]:
    return {"trackers": ["wandb"], "wandb": settings}


def home(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "home"
    folder.mkdir(exist_ok=True)
    return {"HOME": str(folder)}


def sync(run_dir: Path, variables: Mapping[str, str]) -> None:
    """Uploads all offline runs with wandb's own reader."""
    folders = sorted(glob.glob(str(run_dir / "wandb" / "offline-run-*")))
    command = [sys.executable, "-m", "wandb", "sync", *folders]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=60)
    assert "ERROR" not in done.stderr, done.stderr


def assert_one_curve(run: StoredRun, run_dir: Path) -> None:
    """Asserts that W&B has each step of metrics.jsonl once, in order, with the same values."""
    expected: dict[int, dict[str, Any]] = {}
    for record in records(run_dir):
        expected.setdefault(record["step"], {}).update({k: v for k, v in record.items() if k != "time"})
    assert [row["step"] for row in run.history] == list(expected)
    assert [row["_step"] for row in run.history] == list(expected)
    for row in run.history:
        for key, value in expected[row["step"]].items():
            if key.split("/")[0] in ("train", "eval", "epoch", "samples") and key not in MEASURED:
                assert row[key] == value, (row["step"], key)


def aliases(artifact: Mapping[str, Any]) -> set[str]:
    return {alias["alias"] for alias in artifact["aliases"]}


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Variables of a run that is killed in step 9; the checkpoint before is that of step 6."""
    (tmp_path / "run").mkdir()
    write_plan(tmp_path / "plan.json", tmp_path / "run", [Event("kill", step=9, place="forward")], seconds_valid=600)
    return {VARIABLE: str(tmp_path / "plan.json")}


def test_online_is_one_curve_over_a_kill(
    server: TrainServer, write_config: WriteConfig, tmp_path: Path, killed: dict[str, str]
) -> None:
    settings = {"project": "p", "name": "shown", "group": "g", "tags": ["t"], "notes": "n", "entity": "team"}
    init = {"wandb": {"job_type": "trial", "settings": {"x_file_stream_transmit_interval": 0.1}}}
    tracking = {**wandb_config(**settings, checkpoints="all"), "init": init}
    config = write_config(tracking=tracking, checkpoint__every=3, eval__every=2)
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
        losses = [r["train/loss"] for r in records(tmp_path / "run") if "train/loss" in r]
        assert (run.summary["eval/accuracy"], run.summary["train/loss"]) == (evaluated[-1], losses[-1])
        assert run.summary["best/eval/accuracy"] == max(evaluated)
        assert run.summary["best/train/loss"] == min(losses)
        models = [found for found in online.artifacts if found["artifactTypeName"] == "model"]
        steps = {step for found in models for step in aliases(found) if step.startswith("step-")}
        assert {"step-3", "step-6", "step-9", "step-10"} <= steps
        assert {"latest", "step-10"} <= aliases(models[-1])
        assert any("best" in aliases(found) for found in models)
        assert not (tmp_path / "run" / "wandb" / "checkpoints").exists()  # all is uploaded
        assert run.summary["status"] == "finished"


def test_offline_is_one_curve_once_synced(
    server: TrainServer, write_config: WriteConfig, tmp_path: Path, killed: dict[str, str]
) -> None:
    changes = {"checkpoint__every": 3, "eval__every": 2, "tracking": wandb_config(mode="offline")}
    config = write_config(**changes)
    variables = home(tmp_path)
    assert server.train("--config", config, variables={**variables, **killed}).code == -9
    assert server.train("--config", config, variables=variables).code == 0
    with WandbServer() as online:
        sync(tmp_path / "run", {**variables, **online.variables})
        (run,) = online.runs.values()
        assert_one_curve(run, tmp_path / "run")
        assert run.exit_code == 0
    # Never synced, and the network is back: another attempt sends what the server lacks.
    longer = write_config(**{**changes, "tracking": wandb_config(mode="online"), "train__epochs": 3})
    with WandbServer() as online:
        variables = {**variables, **online.variables}
        assert server.train("--config", longer, variables=variables).code == 0
        (run,) = online.runs.values()
        assert_one_curve(run, tmp_path / "run")
        assert max(row["step"] for row in run.history) == 15
        sync(tmp_path / "run", variables)  # nothing is left to do
        assert_one_curve(run, tmp_path / "run")


def test_a_server_that_dies_in_the_middle(server: TrainServer, write_config: WriteConfig, tmp_path: Path) -> None:
    init = {"wandb": {"settings": {"x_file_stream_transmit_interval": 0.1}}}
    tracking = {**wandb_config(mode="online", finish_timeout="2 seconds"), "init": init, "samples": 0}
    with WandbServer(dies=True) as online:
        variables = {**home(tmp_path), **online.variables}
        done = server.train("--config", write_config(tracking=tracking, train__epochs=60), variables=variables)
        assert done.code == 0, done.err
        assert online.stopped
        (run,) = online.runs.values()
        assert run.history == []
    assert summary(tmp_path / "run")["status"] == "finished"
    (file,) = (tmp_path / "run" / "wandb").glob("run-*/*.wandb")
    assert [row["step"] for row in wandb_log.history(file)] == list(range(1, 301))
    assert f"wandb sync --include-online {file.parent}" in done.out
