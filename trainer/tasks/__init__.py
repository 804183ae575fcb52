"""Tasks: what a batch means. Building one by name is here; what one is, in `trainer.tasks.base`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from trainer.components import accepts, call, check_args, is_import_path, resolve
from trainer.config_model import TaskConfig
from trainer.config_values import Component
from trainer.errors import UserError
from trainer.tasks.base import Task


def build_task(config: TaskConfig, num_classes: int | None) -> Task:
    """Builds the task, with `loss=` where the config names one; built-in tasks are given `num_classes`, too.

    Raises:
        UserError: the task or its loss cannot be built, or is none.
    """
    given: dict[str, Any] = {}
    target = resolve("task", config.name, "task")
    if config.loss is not None:
        if not accepts(target, "loss", count_kwargs=True):
            raise UserError(f"'{config.name}' takes no loss", path="task.loss")
        given["loss"] = _build_loss(config.loss, getattr(target, "loss_args", {}))
    if not is_import_path(config.name):
        given["num_classes"] = num_classes
    task = call(target, {**given, **config.args}, config.name, "task")
    if not isinstance(task, Task):
        raise UserError(f"'{config.name}' is not a subclass of trainer.tasks.base.Task", path="task.name")
    return task


def _build_loss(component: Component, of_task: Mapping[str, Any]) -> Callable[..., torch.Tensor]:
    """Builds a loss: a class is called with `args`; any other callable of (outputs, targets) is the loss itself.

    It gets what the task gives its losses, too, where it takes that and the config does not say otherwise.
    """
    target = resolve("loss", component.name, "task.loss")
    # One value per sample, where the loss can give it, keeps the mean over the global batch exact.
    wanted: dict[str, Any] = {"reduction": "none", **of_task}
    given = {name: value for name, value in wanted.items() if accepts(target, name)}
    if component.args.get("reduction") == "sum":
        raise UserError("a loss is a mean or a value per sample, not a sum", path="task.loss.args.reduction")
    if not inspect.isclass(target):
        outputs_and_targets = dict.fromkeys(list(inspect.signature(target).parameters)[:2])
        check_args(target, {**outputs_and_targets, **component.args}, component.name, "task.loss")
        return functools.partial(target, **{**given, **component.args})
    loss = call(target, {**given, **component.args}, component.name, "task.loss")
    if not callable(loss):
        raise UserError(f"'{component.name}' returned a {type(loss).__name__}, not a callable", path="task.loss")
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        raise UserError(f"'{component.name}' has parameters of its own; only the model is trained", path="task.loss")
    return loss
