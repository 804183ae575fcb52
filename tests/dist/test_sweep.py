"""W&B sweeps on several processes: the shipped sweep file, and the commands that W&B's own agent makes of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb_log
import yaml
from conftest import REPOSITORY, WriteConfig, nightly
from launching import environment
from run_results import summary

from trainer.config import load_config

pytestmark = pytest.mark.alone

SWEEP = yaml.safe_load((REPOSITORY / "launch" / "sweep.yaml").read_text())


def start_trials(
    monkeypatch: pytest.MonkeyPatch, command: list[str], trials: dict[str, dict[str, Any]]
) -> dict[str, int]:
    """Has W&B's agent start each trial as if its server had asked for it, and returns their exit codes."""
    from wandb.wandb_agent import Agent

    for name, value in environment(WANDB_MODE="offline", WANDB_SWEEP_ID="a-sweep").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # its `python`
    agent = Agent(api=None, queue=None, sweep_id="a-sweep")
    agent._sweep_command = list(command)
    codes = {}
    for trial, values in trials.items():
        asked = {"type": "run", "run_id": trial, "program": "", "args": {k: {"value": v} for k, v in values.items()}}
        assert "exception" not in agent._process_command(asked)
        codes[trial] = agent._run_processes[trial].wait()
    return codes


@nightly
def test_every_trial_is_a_run_of_its_own(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_config(tracking={"trackers": ["wandb"], "wandb": {"project": "p"}}, train__epochs=1)
    command = [str(file) if part == "configs/digits.yaml" else part for part in SWEEP["command"]]
    command.insert(command.index("${args_no_hyphens}"), "launch.processes=2")
    trials = {"trial1": {"optim.lr": 0.02, "optim.weight_decay": 0.1}, "trial2": {"optim.lr": 0.001}}
    assert start_trials(monkeypatch, command, trials) == {"trial1": 0, "trial2": 0}
    for trial, values in trials.items():
        folder = tmp_path / f"run-{trial}"
        assert summary(folder)["status"] == "finished"
        assert len(list((folder / "logs").iterdir())) >= 1
        (log,) = folder.glob("wandb/offline-run-*/*.wandb")
        run = wandb_log.run(log)
        assert (run.run_id, run.sweep_id, run.display_name) == (trial, "a-sweep", f"tiny-{trial}")
        config = wandb_log.config(log)
        assert config["optim"]["lr"] == values["optim.lr"]
        assert config["launch"]["processes"] == 2
        assert [row["step"] for row in wandb_log.history(log) if "eval/accuracy" in row] == [5]


def test_the_shipped_sweep_fits_its_config() -> None:
    """Its command reads the shipped config with its parameters, and its metric is one that is logged."""
    assert "${args_no_hyphens}" in SWEEP["command"]
    file = SWEEP["command"][SWEEP["command"].index("--config") + 1]
    values = [
        f"{key}={parameter.get('min', parameter.get('values', [0])[0])}"
        for key, parameter in SWEEP["parameters"].items()
    ]
    load_config(str(REPOSITORY / file), values)
    assert SWEEP["metric"]["name"] == "eval/accuracy"


def test_names_of_trials(write_config: WriteConfig) -> None:
    config = load_config(str(write_config()))
    of_agent = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "t"}
    trial = config.of_trial(of_agent)
    assert (trial.run.name, trial.run.dir) == ("tiny-t", f"{config.run.dir}-t")
    assert trial.of_trial(of_agent) == trial
    in_a_store = load_config(str(write_config()), ["checkpoint.dir=s3://bucket/run/"]).of_trial(of_agent)
    assert in_a_store.checkpoint.dir == "s3://bucket/run-t"
    task = load_config(str(write_config()), ["run.name=tiny-t-3"])
    assert task.of_trial(of_agent) == task
    assert config.of_trial({"WANDB_RUN_ID": "t"}) == config
    named = load_config(str(write_config(run__dir=None))).of_trial(of_agent)
    assert str(named.run_dir) == "runs/tiny-t"
