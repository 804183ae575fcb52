"""The same run on 1, 2 and 3 processes; with LOCKSTEP_NIGHTLY=1 to its end on each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import NIGHTLY, REPOSITORY, few
from launching import local
from resuming import TrainServer
from run_results import losses, summary, weights
from safetensors.torch import load_file

from trainer.cli import main
from trainer.data.sampler import BatchPlan, StepSampler

WORLDS = (1, 2, 3)
BATCH, SAMPLES, EVAL_SAMPLES = 96, 1442, 355
EPOCHS = 30 if NIGHTLY else 5  # the shipped config has 30, and evaluates every fifth
EVALUATIONS = EPOCHS // 5
DIGITS = REPOSITORY / "configs" / "digits.yaml"


@pytest.fixture(scope="module")
def runs(server: TrainServer, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The shipped digits config, with a data set that is recorded."""
    folder = tmp_path_factory.mktemp("same")
    config = yaml.safe_load(DIGITS.read_text())
    config["data"]["train"]["name"] = config["data"]["eval"]["name"] = "recorded_digits:RecordedDigits"
    config["optim"]["lr"] = float(config["optim"]["lr"])  # PyYAML alone reads 6e-3 as text
    config["train"]["epochs"] = EPOCHS
    config["log"] = {"every": 1}
    config["tracking"] = {"trackers": []}
    loss = config["task"]["loss"]
    for world in WORLDS:
        (folder / f"recorded-{world}").mkdir()
        config["run"] = {"name": f"digits-{world}"}
        config["task"] = {
            "name": "recording:Recording",
            "args": {"folder": f"recorded-{world}"},
            "loss": loss,
        }
        (folder / f"{world}.yaml").write_text(yaml.safe_dump(config))
        done = server.train("--config", folder / f"{world}.yaml", ranks=world, folder=folder)
        assert done.code == 0, done.out + done.err
        assert "Traceback" not in done.err
    return {world: folder / "runs" / f"digits-{world}" for world in WORLDS}


def recorded(run: Path, split: str, rank: int) -> list[list[int]]:
    world = run.name[-1]
    file = run.parent.parent / f"recorded-{world}" / f"{split}-{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("world", WORLDS)
def test_every_step_has_the_samples_of_the_permutation(world: int, runs: dict[int, Path]) -> None:
    by_rank = [recorded(runs[world], "train", rank) for rank in range(world)]
    plan = BatchPlan.split(SAMPLES, BATCH, None, 1, False)
    alone = StepSampler(plan, rank=0, seed=0)
    assert {len(steps) for steps in by_rank} == {EPOCHS * plan.steps_per_epoch}
    for step in range(EPOCHS * plan.steps_per_epoch):
        expected = alone.samples(step)
        share = [steps[step] for steps in by_rank]
        assert share == [expected[rank::world] or expected[:1] for rank in range(world)]


@pytest.mark.parametrize("world", WORLDS)
def test_evaluation_counts_exactly_the_evaluation_set(world: int, runs: dict[int, Path]) -> None:
    evaluated = [i for rank in range(world) for batch in recorded(runs[world], "eval", rank) for i in batch]
    assert sorted(evaluated) == sorted(list(range(EVAL_SAMPLES)) * EVALUATIONS)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_steps_and_losses_are_the_same(world: int, runs: dict[int, Path]) -> None:
    one, many = summary(runs[1]), summary(runs[world])
    assert many["num_processes"] == world
    for key in ("status", "step", "samples", "epoch"):
        assert many[key] == one[key]
    assert losses(runs[world]) == pytest.approx(losses(runs[1]), rel=1e-4)
    assert many["metrics"]["eval/loss"] == pytest.approx(one["metrics"]["eval/loss"], rel=1e-4)
    assert many["metrics"]["eval/accuracy"] == pytest.approx(one["metrics"]["eval/accuracy"], abs=1.01 / EVAL_SAMPLES)


@pytest.mark.parametrize("world", few(WORLDS, 2))
def test_the_digits_are_learned(world: int, tmp_path: Path) -> None:
    """The README's command."""
    done = local(DIGITS, world, f"run.dir={tmp_path}", "tracking.trackers=[]")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    found = summary(tmp_path)
    assert (found["status"], found["num_processes"]) == ("finished", world)
    assert found["metrics"]["eval/accuracy"] >= 0.99


def test_exported_weights_have_the_same_names_and_are_the_trained_ones(runs: dict[int, Path], tmp_path: Path) -> None:
    exported = {}
    for world, run in runs.items():
        file = tmp_path / f"{world}.safetensors"
        assert main(["export", str(run), "--format", "safetensors", "--output", str(file)]) == 0
        exported[world] = load_file(file)
        newest = max((run / "checkpoints").glob("step-*"))
        trained = weights(run, int(newest.name.removeprefix("step-")))
        assert exported[world].keys() == trained.keys()
        assert all(torch.equal(exported[world][k], trained[k]) for k in trained)
    assert exported[1].keys() == exported[2].keys() == exported[3].keys()
    for name, weight in exported[1].items():
        for world in WORLDS[1:]:
            torch.testing.assert_close(exported[world][name], weight, rtol=1e-3, atol=1e-4)
