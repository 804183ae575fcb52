"""A language model on two ranks: the same run as on one, also where targets are ignored, and after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import language_runs
import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY
from resuming import TrainServer, assert_same_end
from run_results import losses, summary

STEPS = 6


class SomeIgnored(torch.utils.data.Dataset[Any]):
    """Sequences of which each second has a single target that counts."""

    vocab_size = 256

    def __init__(self, path: str) -> None:
        self.tokens = torch.from_numpy(np.fromfile(path, "uint16").astype(np.int64)[: 33 * 200]).view(200, 33)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.tokens[index, :-1], self.tokens[index, 1:].clone()
        if index % 2:
            targets[1:] = -100
        return inputs, targets


def test_two_ranks_are_one(server: TrainServer, tmp_path: Path) -> None:
    language_runs.documentation(tmp_path, num_modules=10)
    own = {"name": "test_language_model_dist:SomeIgnored", "args": {"path": str(tmp_path / "train.bin")}}

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
        settings["log"] = {"every": 1}
        settings["checkpoint"] = {"every": 3}
        file.write_text(yaml.safe_dump(settings))
        variables = {"PYTHONPATH": str(Path(__file__).parent)}
        done = server.train("--config", file, *overrides, ranks=ranks, folder=REPOSITORY / "examples", variables=variables)
        assert done.code == 0, done.err
        return folder

    one, two = run("one", 1), run("two", 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert 4 < losses(one)[1] < 8  # nats per token that counts
    assert summary(two)["metrics"] == pytest.approx(summary(one)["metrics"], rel=1e-4)
    run("stopped", 2, "train.steps=3", "schedule.name=constant")
    again = run("stopped", 2, "schedule.name=constant", "checkpoint.allow_changes=[train.steps]")
    assert_same_end(again, run("whole", 2, "schedule.name=constant"))
