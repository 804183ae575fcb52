"""A language model on two ranks: the same run as on one, also where targets are ignored, and after a stop."""

from __future__ import annotations

from pathlib import Path

import language_runs
import pytest
import yaml
from conftest import REPOSITORY
from resuming import TrainServer
from run_results import identical, losses, summary, tensors

STEPS = 6


def test_two_ranks_are_one(server: TrainServer, tmp_path: Path) -> None:
    language_runs.documentation(tmp_path, num_modules=10)
    own = {"name": "token_sets:SomeIgnored", "args": {"path": str(tmp_path / "train.bin")}}

    def run(name: str, ranks: int, *overrides: str) -> Path:
        folder = tmp_path / name
        file = tmp_path / f"{name}.yaml"
        settings = language_runs.config(
            tmp_path,
            run__dir=str(folder),
            data__train=own,
            data__eval={"args": {"path": str(tmp_path / "eval.bin"), "sequence_length": 32}},
            train={"steps": STEPS, "batch_size": 16, "micro_batch_size": 4},
        )
        settings |= {"log": {"every": 1}, "checkpoint": {"every": STEPS // 2}, "schedule": {"name": "constant"}}
        file.write_text(yaml.safe_dump(settings))
        done = server.train("--config", file, *overrides, ranks=ranks, folder=REPOSITORY / "examples")
        assert done.code == 0, done.err
        return folder

    one, two = run("one", 1), run("two", 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert 4 < losses(one)[1] < 8  # nats per token that counts
    assert summary(two)["metrics"] == pytest.approx(summary(one)["metrics"], rel=1e-4)
    run("stopped", 2, f"train.steps={STEPS // 2}")
    again = run("stopped", 2, "checkpoint.allow_changes=[train.steps]")
    assert identical(tensors(again, STEPS, ""), tensors(two, STEPS, ""))
