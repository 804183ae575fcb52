"""Metrics of torchmetrics by name, and losses that are divided by what a task counts."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import Train, WriteConfig
from counted import Counted
from run_results import records, summary
from torch import nn

from trainer.config_values import Component
from trainer.data.sampler import BatchPlan
from trainer.errors import UserError
from trainer.faults.judging import EVALUATION, METRICS
from trainer.faults.lookout import Lookout
from trainer.normalising import Normaliser
from trainer.tasks.base import Task
from trainer.tasks.classification import Classification
from trainer.tasks.language_model import LanguageModel
from trainer.tasks.metrics import UserMetrics, check_name

pytestmark = pytest.mark.unit

CLASSIFICATION = "torchmetrics.classification"
ACCURACY = {"name": f"{CLASSIFICATION}:MulticlassAccuracy", "args": {"num_classes": 3, "average": "micro"}}
EACH = {"name": f"{CLASSIFICATION}:MulticlassConfusionMatrix", "args": {"num_classes": 3}}
SAME = {"name": f"{CLASSIFICATION}:MulticlassF1Score", "args": {"num_classes": 3, "average": None}}


class Silent(Task):
    """Says nothing of what metrics are updated with."""

    def loss_sum(self, outputs: Any, data: Any) -> torch.Tensor:
        raise NotImplementedError


class Alone:
    """Stands in for the runtime of one process."""

    num_ranks = 1
    device = torch.device("cpu")

    @staticmethod
    def exact(value: torch.Tensor) -> torch.Tensor:
        return value.detach().double()


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        (Classification(), "acuracy", r"it has: loss, accuracy, top5; did you mean 'accuracy'"),
        (LanguageModel(8), "accuracy", "it has: loss, perplexity, token_accuracy, bits_per_byte, top5"),
        (LanguageModel(8), "bits_per_byte", None),
        (Classification(), "top5", None),
        (Classification(), "top5/one", None),  # of a metric that gives several
        (type("Own", (Classification,), {})(), "mine", None),
    ],
)
def test_names_that_no_evaluation_has(task: Task, name: str, message: str | None) -> None:
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_name(name, task, {"top5": Component(name="top:5")}, "checkpoint.best.metric")


def test_a_metric_is_reported_and_decides_the_best_checkpoint(
    train: Train, write_config: WriteConfig, tmp_path: Any
) -> None:
    best = {"metric": "again", "mode": "max"}
    done = train("--config", write_config(task={"metrics": {"again": ACCURACY}}, checkpoint={"best": best}))
    assert done.code == 0, done.err
    found = summary(tmp_path / "run")
    assert found["metrics"]["eval/again"] == pytest.approx(found["metrics"]["eval/accuracy"])
    assert found["best"]["metric"] == "again"


@pytest.mark.parametrize(
    ("task", "name", "component", "message"),
    [
        (Classification(), "accuracy", ACCURACY, "the task has a metric of this name"),
        (Classification(), "r", {"name": "torchmetrics:PearsonCorrCoef"}, "cannot be merged exactly"),
        (Classification(), "m", {"name": "torch.nn:ReLU"}, "is not a torchmetrics.Metric"),
        (Classification(), "m", {"name": "torchmetrics:MeanMetricc"}, "did you mean 'MeanMetric'"),
        (Classification(), "m", {**ACCURACY, "args": {"classes": 3}}, "raised|takes no argument"),
        (Classification(), "m", SAME, r"m\.args\.average: gives a number per class: write micro, macro or weighted"),
        (Classification(num_classes=10), "m", ACCURACY, r"m\.args\.num_classes: 3 classes, where the data has 10"),
        (Silent(), "m", ACCURACY, "needs a method metric_inputs"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_run(task: Task, name: str, component: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        UserMetrics({name: Component(**component)}, task, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"metrics": {"each": EACH}}}, r"task\.metrics\.each: does not give one number"),
        ({"task": {"metrics": {"a": ACCURACY}}, "data__eval": None}, r"task\.metrics: without data\.eval nothing is"),
        ({"task": {"metrics": {"top.5": ACCURACY}}}, r"task\.metrics\.top\.5"),
        ({"task": {"metrics": {"a": {"nam": "x"}}}}, r"task\.metrics\.a\.nam: unknown key; did you mean 'name'"),
        ({"task": {"name": "counted:Counted", "metrics": {"in_order": ACCURACY}}}, "has a metric of this name"),
    ],
)
def test_what_makes_no_sense_is_one_line(changes: Any, message: str, train: Train, write_config: WriteConfig) -> None:
    done = train("--config", write_config(**changes))
    assert done.code == 2
    assert "Traceback" not in done.err
    assert re.search(message, done.err), done.err


def gradient(labels: list[int], micro_batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradient of a step with 6 samples, and the loss as it is reported."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3), torch.randn(6, 4)
    optimizer, task = torch.optim.SGD(model.parameters(), lr=1.0), Counted()
    plan = BatchPlan.split(6, 6, micro_batch_size, 1, False)
    normaliser = Normaliser(Alone(), plan, 0)  # type: ignore[arg-type]
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, 6, micro_batch_size):
        data = [inputs[start:][:micro_batch_size], torch.tensor(labels)[start:][:micro_batch_size]]
        outputs = task.forward(model, data)
        loss = task.loss_sum(outputs, data)
        (loss * normaliser.scale(task.loss_count(outputs, data))).backward()
        total += loss.detach()
    factor = normaliser.settle(optimizer)
    assert factor is not None
    assert model.weight.grad is not None
    return model.weight.grad, total * factor / 6


@pytest.mark.parametrize("micro_batch_size", [6, 3, 1])
def test_the_gradient_is_that_of_the_mean_over_what_counts(micro_batch_size: int) -> None:
    labels = [2, 2, 0, 1, 2, 1]  # with micro-batches of 1 the first count, on which all is guessed, is 0
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3), torch.randn(6, 4)
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([3.0, 1.0, 0.0]))(model(inputs), torch.tensor(labels))
    weighted.backward()
    found, loss = gradient(labels, micro_batch_size)
    torch.testing.assert_close(found, model.weight.grad)
    assert float(loss) == pytest.approx(float(weighted.detach()))


@pytest.mark.parametrize("micro_batch_size", [6, 2])
def test_where_nothing_counts_nothing_is_learnt(micro_batch_size: int) -> None:
    found, loss = gradient([2] * 6, micro_batch_size)
    assert not found.any()
    assert loss == 0


def test_where_the_first_micro_batches_count_nothing_the_guess_is_the_samples() -> None:
    """Undivided sums of thousands of pixels would overflow under fp16."""
    normaliser = Normaliser(Alone(), BatchPlan.split(6, 6, 3, 1, False), 0)  # type: ignore[arg-type]
    assert normaliser.scale(torch.tensor(0)) == pytest.approx(1 / 6)
    assert normaliser.scale(torch.tensor(900)) == pytest.approx(1 / 6)
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.full((1,), 450 / 6)
    assert normaliser.settle(torch.optim.SGD([parameter])) == pytest.approx(6 / 900)
    assert float(parameter.grad) == pytest.approx(0.5)


@pytest.mark.parametrize("faults", [{}, {"non_finite": "skip"}])
def test_a_step_where_nothing_counts_has_no_loss(
    faults: dict[str, str], train: Train, write_config: WriteConfig, tmp_path: Any
) -> None:
    """One sample in three counts nothing."""
    found = {}
    for every in (1, 12):
        settings = {
            "task": {"name": "counted:Counted"},
            "data__eval": None,
            "train": {"steps": 12, "batch_size": 1},
            "log": {"every": every},
            "faults": faults,
        }
        file = write_config(**settings, run__dir=str(tmp_path / str(every)))
        assert train("--config", file).code == 0
        found[every] = [record["train/loss"] for record in records(tmp_path / str(every))]
    each = [loss for loss in found[1] if loss is not None]
    assert 0 < len(each) < len(found[1]) == 12
    assert min(each) > 0
    assert found[12] == [pytest.approx(sum(each) / len(each))]


def test_some_counts_are_none_is_refused() -> None:
    normaliser = Normaliser(Alone(), BatchPlan.split(6, 6, 3, 1, False), 0)  # type: ignore[arg-type]
    assert normaliser.scale(None) == 1 / 6
    with pytest.raises(UserError, match="for every batch, or None for every batch"):
        normaliser.scale(torch.tensor(1))


def test_metrics_may_take_any_time() -> None:
    """Others wait for rank 0 meanwhile, which is no hang."""
    lookout = Lookout.__new__(Lookout)
    lookout.watch, lookout.injector = mock.Mock(), None
    for place, allowance in ((EVALUATION, 1.0), (METRICS, 0.0)):
        lookout.at(place, 5)
        assert lookout.watch.at.call_args.args == (place, 5, (), allowance)
