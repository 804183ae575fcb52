"""Losses of class probabilities: mixed and smoothed labels as timm has them, and refused where they make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Train, WriteConfig
from torch.nn import functional

from trainer.config_model import TaskConfig
from trainer.errors import UserError
from trainer.tasks import build_task
from trainer.tasks.classification import Classification

LOGITS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 5
SOFT_LOSSES = ("timm.loss:BinaryCrossEntropy", "timm.loss:SoftTargetCrossEntropy", "torch.nn:BCEWithLogitsLoss")


def classification(**config: Any) -> Classification:
    task = build_task(TaskConfig.model_validate(config), num_classes=5)
    assert isinstance(task, Classification)
    return task


class TestSoftTargets:
    @pytest.mark.parametrize("name", SOFT_LOSSES)
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_mixed_and_smoothed_as_timm_does_it(self, name: str, smoothing: float) -> None:
        mixup = pytest.importorskip("timm.data.mixup")
        task = classification(loss={"name": name}, args={"label_smoothing": smoothing})
        ours = task.loss_sum(LOGITS, (None, mixup.mixup_target(LABELS, 5, lam=0.3))) / 12
        theirs = task_loss(name)(LOGITS, mixup.mixup_target(LABELS, 5, lam=0.3, smoothing=smoothing))
        torch.testing.assert_close(ours, theirs)
        own = task.loss_sum(LOGITS, (None, LABELS)) / 12  # of what is not mixed, as in evaluations
        torch.testing.assert_close(own, task_loss(name)(LOGITS, mixup.mixup_target(LABELS, 5, smoothing=smoothing)))

    def test_a_threshold_of_timms(self) -> None:
        loss = pytest.importorskip("timm.loss").BinaryCrossEntropy(target_threshold=0.2)
        args = {"name": "timm.loss:BinaryCrossEntropy", "args": {"target_threshold": 0.2}}
        soft = functional.one_hot(LABELS, 5) * 0.3 + functional.one_hot(LABELS.flip(0), 5) * 0.7
        torch.testing.assert_close(classification(loss=args).loss_sum(LOGITS, (None, soft)) / 12, loss(LOGITS, soft))

    def test_labels_that_are_no_class_have_no_part(self) -> None:
        task = classification(loss={"name": "timm.loss:SoftTargetCrossEntropy"}, args={"label_smoothing": 0.1})
        pytest.importorskip("timm")
        ignored = torch.where(LABELS == 1, -100, LABELS)
        kept = classification(loss={"name": "cross_entropy", "args": {"label_smoothing": 0.1}})
        torch.testing.assert_close(task.loss_sum(LOGITS, (None, ignored)), kept.loss_sum(LOGITS, (None, ignored)))

    @pytest.mark.parametrize("name", SOFT_LOSSES[1:])
    @pytest.mark.parametrize("num_samples", [1, 5, 12])  # labels of 5 samples would pass for a value per class
    def test_a_loss_of_probabilities_is_refused_where_there_are_labels(self, name: str, num_samples: int) -> None:
        pytest.importorskip("timm")
        message = "task.loss: the loss takes class probabilities, not labels: task.args.label_smoothing: 0 makes them"
        with pytest.raises(UserError, match=message):
            classification(loss={"name": name}).loss_sum(LOGITS[:num_samples], (None, LABELS[:num_samples]))
        task = classification(loss={"name": name})  # also where training alone would do, as its labels are mixed
        task.targets((None, LABELS))
        with pytest.raises(UserError, match=message):
            task.loss_sum(LOGITS, (None, functional.one_hot(LABELS, 5).float()))

    def test_data_with_probabilities_need_nothing(self) -> None:
        soft = torch.softmax(LOGITS.flip(0), 1)
        found = classification(loss={"name": "torch.nn:BCEWithLogitsLoss"}).loss_sum(LOGITS, (None, soft)) / 12
        torch.testing.assert_close(found, functional.binary_cross_entropy_with_logits(LOGITS, soft))

    @pytest.mark.parametrize("name", ["timm.loss:LabelSmoothingCrossEntropy", "torch.nn:NLLLoss"])
    def test_a_loss_of_labels_is_refused_where_samples_are_mixed(self, name: str) -> None:
        pytest.importorskip("timm")
        task = classification(loss={"name": name})
        task.targets((None, LABELS))
        with pytest.raises(UserError, match=r"task.loss: with mixed samples the loss gets class probabilities"):
            task.loss_sum(LOGITS, (None, functional.one_hot(LABELS, 5).float()))

    def test_cross_entropy_smooths_by_itself(self) -> None:
        with pytest.raises(UserError, match=r"task.args.label_smoothing: cross_entropy smooths by itself"):
            classification(args={"label_smoothing": 0.1})
        with pytest.raises(UserError, match=r"task.args.label_smoothing: must be between 0 and 1"):
            classification(loss={"name": "torch.nn:BCEWithLogitsLoss"}, args={"label_smoothing": 2})

    def test_training_and_evaluation_by_binary_cross_entropy(self, train: Train, write_config: WriteConfig) -> None:
        task = {"loss": {"name": "torch.nn:BCEWithLogitsLoss"}, "args": {"label_smoothing": 0.1}}
        assert train("--config", write_config(task=task, train__epochs=1)).code == 0


def task_loss(name: str) -> Any:
    """Returns the loss as its own package has it, a mean over the batch."""
    module, _, attribute = name.partition(":")
    return getattr(pytest.importorskip(module), attribute)()
