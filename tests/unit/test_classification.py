"""The classification task: losses that add up exactly, labels that are checked, metrics."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional

from trainer.config_model import TaskConfig
from trainer.errors import UserError
from trainer.tasks import build_task
from trainer.tasks.classification import Classification, CrossEntropy

LOGITS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 5


def task(**config: Any) -> Classification:
    built = build_task(TaskConfig.model_validate(config), num_classes=5)
    assert isinstance(built, Classification)
    return built


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, labels)


LOSSES: dict[str, tuple[dict[str, Any], Any]] = {
    "default": ({}, functional.cross_entropy),
    "label smoothing": (
        {"loss": {"name": "cross_entropy", "args": {"label_smoothing": 0.1}}},
        lambda o, t: functional.cross_entropy(o, t, label_smoothing=0.1),
    ),
    "class weights": (
        {"loss": {"name": "cross_entropy", "args": {"weight": [1.0, 2.0, 3.0, 4.0, 5.0]}}},
        lambda o, t: functional.cross_entropy(o, t, weight=torch.arange(1.0, 6.0), reduction="none").mean(),
    ),
    "a function that returns a mean": ({"loss": {"name": "test_classification:mean_loss"}}, functional.cross_entropy),
    "torch's function": (
        {"loss": {"name": "torch.nn.functional:cross_entropy", "args": {"label_smoothing": 0.2}}},
        lambda o, t: functional.cross_entropy(o, t, label_smoothing=0.2),
    ),
    "torch's by import path": ({"loss": {"name": "torch.nn:CrossEntropyLoss"}}, functional.cross_entropy),
    "several values per sample": (
        {"loss": {"name": "test_classification:OneHotMSE"}},
        lambda o, t: functional.mse_loss(o, functional.one_hot(t, 5).float()),
    ),
}


class OneHotMSE(nn.MSELoss):
    def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().forward(outputs, functional.one_hot(labels, outputs.shape[1]).float())


@pytest.mark.parametrize("name", LOSSES)
def test_sums_over_pieces_make_the_mean_over_the_whole(name: str) -> None:
    config, reference = LOSSES[name]
    t = task(**config)
    pieces = [slice(0, 5), slice(5, 6), slice(6, 12)]
    total = sum(t.loss_sum(LOGITS[p], [None, LABELS[p]]) for p in pieces) / 12
    torch.testing.assert_close(total, reference(LOGITS, LABELS))


def test_soft_targets() -> None:
    soft = torch.softmax(torch.randn(12, 5), 1)
    t = task()
    t.check([None, soft], torch.arange(12))
    torch.testing.assert_close(t.loss_sum(LOGITS, [None, soft]) / 12, functional.cross_entropy(LOGITS, soft))
    assert t.eval_sums(LOGITS, [None, soft])["correct"] == (LOGITS.argmax(1) == soft.argmax(1)).sum()


def test_metrics_are_exact_over_any_split() -> None:
    t = task()
    whole = {k: float(v) for k, v in t.eval_sums(LOGITS, [None, LABELS]).items()}
    parts = [t.eval_sums(LOGITS[i::5], [None, LABELS[i::5]]) for i in range(5)]
    added = {k: float(sum(p[k] for p in parts)) for k in whole}
    assert (
        t.metrics(whole)["accuracy"] == t.metrics(added)["accuracy"] == float((LOGITS.argmax(1) == LABELS).sum()) / 12
    )
    assert t.metrics(whole)["loss"] == pytest.approx(t.metrics(added)["loss"], rel=1e-6)


def test_dicts_under_names_of_their_own() -> None:
    t = task(args={"input_key": "pixels", "target_key": "label"})
    data = {"pixels": LOGITS, "label": LABELS}
    t.check(data, torch.arange(12))
    outputs = t.forward(nn.Identity(), data)
    torch.testing.assert_close(t.loss_sum(outputs, data) / 12, functional.cross_entropy(LOGITS, LABELS))


def test_outputs_with_logits() -> None:
    class Output(NamedTuple):
        logits: torch.Tensor
        aux: torch.Tensor

    class Model(nn.Module):
        def forward(self, inputs: torch.Tensor) -> Any:
            return Output(inputs, inputs)

    assert torch.equal(task().forward(Model(), [LOGITS, LABELS]), LOGITS)


def test_outputs_that_are_no_logits() -> None:
    class Model(nn.Module):
        def forward(self, inputs: torch.Tensor) -> Any:
            return {"out": inputs}

    with pytest.raises(UserError, match=r"the model returned \{out: float32 \[.*\]\}, not logits"):
        task().forward(Model(), [LOGITS, LABELS])


def test_labels_are_checked_before_the_device_sees_them() -> None:
    ids = torch.arange(100, 112)
    labels = LABELS.clone()
    labels[7] = 5
    with pytest.raises(UserError, match="sample 107 has label 5; the model's are 0 to 4"):
        task().check([None, labels], ids)
    labels[7] = -100  # torch's ignore_index
    task().check([None, labels], ids)
    labels[7] = -1
    with pytest.raises(UserError, match="has label -1"):
        task().check([None, labels], ids)


def test_number_of_classes_is_learned_from_the_outputs() -> None:
    t = Classification()
    with pytest.raises(UserError, match="a sample has label 4; the model's are 0 to 3"):
        t.loss_sum(LOGITS[:, :4], [None, LABELS])
    assert t.num_classes == 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LOGITS, r"must be \(input, target\) pairs, dicts or dataclasses"),
        ([LOGITS], r"must be \(input, target\) pairs, dicts or dataclasses"),
        ([LOGITS, ("a", "b")], "must be numbers or tensors"),
        ({"input": LOGITS, "label": LABELS}, r"no key 'target' \(they have: input, label\)"),
    ],
)
def test_samples_that_are_not_pairs(data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task().check(data, torch.arange(12))


def test_a_loss_of_the_wrong_shape() -> None:
    t = Classification(loss=lambda outputs, targets: outputs.sum(0))
    with pytest.raises(UserError, match=r"returned shape \[5\] for a batch of 12"):
        t.loss_sum(LOGITS, [None, LABELS])


def test_soft_targets_cost_what_torch_says_and_ignored_ones_nothing() -> None:
    outputs = torch.randn(6, 4)
    targets = torch.softmax(torch.randn(6, 4), 1)
    for smoothing, weight in ((0.0, None), (0.1, None), (0.1, [1.0, 2.0, 0.5, 1.5])):
        loss = CrossEntropy(label_smoothing=smoothing, weight=weight)
        weights = None if weight is None else torch.tensor(weight)
        expected = torch.nn.functional.cross_entropy(
            outputs, targets, weight=weights, reduction="none", label_smoothing=smoothing
        )
        torch.testing.assert_close(loss(outputs, targets), expected)
    ignoring = CrossEntropy(label_smoothing=0.1, ignore_index=255)
    nothing = torch.zeros(6, 4)
    assert torch.equal(ignoring(outputs, nothing), torch.zeros(6))
    half = 0.5 * torch.eye(4)[[0, 1, 2, 3, 0, 1]]
    torch.testing.assert_close(ignoring(outputs, half), 0.5 * ignoring(outputs, 2 * half))
