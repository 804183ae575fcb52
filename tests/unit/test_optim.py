"""Optimizers by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.components import _library_names
from trainer.config_model import OptimConfig
from trainer.errors import UserError
from trainer.optim import build_optimizer


@pytest.mark.parametrize(
    "name", ["sgd", "adamw", *(n for n in _library_names("optimizer") if n != "Muon"), "torch.optim:SGD"]
)
def test_every_optimizer_steps(name: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.1), model, "cpu")
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_optimizer_gets_its_settings() -> None:
    args = {"momentum": 0.9, "nesterov": True}
    optimizer = build_optimizer(OptimConfig(name="sgd", lr=0.1, weight_decay=0.01, args=args), nn.Linear(3, 2), "cpu")
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"], group["lr"]) == (0.9, True, 0.01, 0.1)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=0.1), model, "cpu")
    assert [p is model.weight for p in optimizer.param_groups[0]["params"]] == [True]


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Optimizer", "lr_scheduler"])
def test_what_cannot_run_in_this_loop_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="unknown optimizer"):
        build_optimizer(OptimConfig(name=name, lr=0.1), nn.Linear(3, 2), "cpu")
