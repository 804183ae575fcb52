"""A model that does not fit the data is one line, and a bug is not."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import Train, WriteConfig
from torch import nn
from torchvision.models import VisionTransformer

from trainer.errors import UserError
from trainer.tasks.misfit import described, explained_misfit

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Conv2d(1, 4, 3), r"RuntimeError: .* to have 1 channels"),
        (nn.Embedding(4, 4), r"RuntimeError: Expected tensor for .* scalar types"),
        (VisionTransformer(16, 8, 1, 1, 4, 4), r"AssertionError: Wrong image height! Expected 16 but got 8"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_one_line(model: nn.Module, message: str) -> None:
    data = [torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)]
    with pytest.raises(UserError) as info, explained_misfit(data):
        model(data[0])
    (problem,) = info.value.problems
    assert problem.path == "model"
    start = re.escape("model or loss do not take the data, [float32 [2, 3, 8, 8], int64 [2]]: ")
    assert re.match(start + message, problem.message)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("shape"), torch.OutOfMemoryError("size")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as info, explained_misfit(None):
        raise error
    assert info.value is error


def test_the_first_step_is_explained(train: Train, write_config: WriteConfig) -> None:
    code, _, err = train("--config", write_config(model__args__in_features=9))
    assert code == 2
    assert "Traceback" not in err
    assert "model: model or loss do not take the data, [float32 [" in err
    assert "shapes cannot be multiplied" in err


def test_batches_are_described() -> None:
    data = {"input": [torch.zeros(1)] * 5, "target": "text"}
    assert described(data) == "{input: [float32 [1], float32 [1], float32 [1], ...], target: str}"
