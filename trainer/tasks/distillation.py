"""Distillation: a model that is trained learns from another one, its teacher, as well as from the targets.

Owns `task.teacher`: building the teacher, and its part of the training loss. A teacher is whole on every rank, and no
part of the run's state: checkpoints keep only a checksum of its weights, so that a run goes on with the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from trainer.checkpoint.manifest import new_checksum
from trainer.config_model import TeacherConfig
from trainer.errors import UserError
from trainer.model import build_model, uses_channels_last
from trainer.tasks.misfit import described
from trainer.weights import settled_weights, start_from_weights

if TYPE_CHECKING:
    from trainer.tasks.base import Task

_CHECKSUM = "teacher"  # among the values of a checkpoint's manifest
_SETTINGS = ("task", "task.teacher", "task.teacher.weights")  # allowing one of these to change allows other weights


class Teacher(nn.Module):
    """A trained model on its device, in eval mode, without gradients.

    Args:
        model: in host memory, with its weights.
        config: the `task.teacher` section.
        step_dtype: what the run's matrix products take.
    """

    def __init__(self, model: nn.Module, config: TeacherConfig, step_dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self._config = config
        self._step_dtype = step_dtype
        self._is_checked = False
        self.checksum = _checksum(model.state_dict())
        """Of all weights and buffers."""

    @torch.no_grad()
    def logits(self, task: Task, data: Any) -> Any:
        """Returns what the teacher makes of a batch, which it sees as the model does: augmented, and mixed."""
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, self._step_dtype, enabled=self._step_dtype != torch.float32):
            return task.forward(self.model, data)

    def taught(self, loss_sum: torch.Tensor, outputs: Any, task: Task, data: Any) -> torch.Tensor:
        """Returns (1 - alpha) of the loss of the targets, and alpha of the distance from the teacher.

        The distance is temperature^2 KL(teacher || model) of probabilities at this temperature (Hinton, Vinyals and
        Dean, 2015, https://arxiv.org/abs/1503.02531), or with `hard` the cross-entropy with the class that the teacher
        would choose (DeiT: Touvron et al., 2020, https://arxiv.org/abs/2012.12877).

        Args:
            loss_sum: of the targets, a scalar: a sum over the batch.
            outputs: the model's logits (B, classes).
            task: what a batch means.
            data: the batch.

        Returns:
            A scalar: a sum over the batch.

        Raises:
            UserError: the two models' outputs are no logits, or not of the same classes, or the task divides its loss
                by something else than samples.
        """
        if not self._is_checked and task.loss_count(outputs, data) is not None:
            message = "distillation is per sample, and this task divides its loss by a count of its own"
            raise UserError(message, path="task.teacher", agreed=True)
        self._is_checked = True
        logits = self.logits(task, data)
        both_are_tensors = isinstance(outputs, torch.Tensor) and isinstance(logits, torch.Tensor)
        if not both_are_tensors or outputs.ndim != 2 or outputs.shape != logits.shape:
            returned = f"the model returns {described(outputs)} and its teacher {described(logits)}"
            message = f"{returned}, not logits of the same classes"
            raise UserError(message, path="task.teacher", agreed=True)
        if self._config.hard:
            distance = functional.cross_entropy(outputs.float(), logits.argmax(1), reduction="sum")
        else:
            temperature = self._config.temperature
            own, wanted = (functional.log_softmax(found.float() / temperature, 1) for found in (outputs, logits))
            distance = temperature**2 * functional.kl_div(own, wanted, reduction="sum", log_target=True)
        return (1 - self._config.alpha) * loss_sum + self._config.alpha * distance

    def check_same(self, values: Mapping[str, Any], allow_changes: Sequence[str]) -> None:
        """Refuses to go on from a checkpoint whose run had a teacher with other weights.

        Args:
            values: of the checkpoint's manifest.
            allow_changes: settings that may be other than the checkpoint's.

        Raises:
            UserError: the weights differ.
        """
        if values.get(_CHECKSUM, self.checksum) == self.checksum or any(key in _SETTINGS for key in allow_changes):
            return
        message = "these are other weights than those that the run began with; this changes the training"
        hint = "name those, choose another run.dir, or set checkpoint.allow_changes=[task.teacher.weights]"
        raise UserError(f"{message}: {hint}", path="task.teacher.weights")

    def values(self) -> dict[str, Any]:
        """Returns what a checkpoint's manifest says of the teacher."""
        return {_CHECKSUM: self.checksum}


def settled_teacher(config: TeacherConfig | None) -> TeacherConfig | None:
    """Returns the section with a checkpoint in place of a run, as `trainer.weights.settled_weights` does."""
    return config and config.model_copy(update={"weights": settled_weights(config.model).weights})


def build_teacher(config: TeacherConfig, num_classes: int | None, step_dtype: torch.dtype) -> Teacher:
    """Builds a teacher in host memory, with its weights.

    Args:
        config: the `task.teacher` section.
        num_classes: of the data, as for the model.
        step_dtype: what the run's matrix products take.

    Raises:
        UserError: it cannot be built, or its weights do not fit, to the last layer.
    """
    settings = config.model
    try:
        model = build_model(settings.model_copy(update={"weights": None}), num_classes)
        if settings.weights is not None:
            start_from_weights(model, settings, new_head=False)
        elif config.args.get("pretrained"):
            _check_head(model)
    except UserError as error:
        problems = (replace(p, path=f"task.teacher{p.path.removeprefix('model')}") for p in error.problems)
        raise UserError(*problems) from None
    if uses_channels_last(settings, model):
        model.to(memory_format=torch.channels_last)
    return Teacher(model, config, step_dtype)


def _check_head(model: nn.Module) -> None:
    """Refuses a model of timm whose own weights are of other classes: its last layer has learned nothing."""
    trained = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    built = getattr(model, "num_classes", None)
    if trained is not None and trained != built:
        message = f"its weights are of {trained} classes, and it has {built}: set weights that are of these"
        raise UserError(message, path="model")


def _checksum(state: Mapping[str, Any]) -> str:
    found = new_checksum()
    for name in sorted(state):
        value = state[name]
        if isinstance(value, torch.Tensor):
            found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    digest: str = found.hexdigest()
    return digest
