"""What tasks have in common whose targets are labels and whose models return logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainer.errors import UserError, one_line, place_at
from trainer.memory.out_of_memory import is_out_of_memory


def logits_of(outputs: Any) -> Any:
    """Returns the attribute `logits` of what Hugging Face's models and torchvision's Inception return, else all."""
    return getattr(outputs, "logits", outputs)


def name_of(label: int, names: Sequence[str]) -> str:
    """Returns the name of a label, or its number where it has none."""
    return names[label] if 0 <= label < len(names) else str(label)


def class_weights(loss: Any) -> torch.Tensor | None:
    """Returns the class weights of a cross-entropy, by which torch's mean is weighted."""
    return loss.weight if isinstance(loss, nn.CrossEntropyLoss) else None


def check_class_weights(loss: Any, num_classes: int | None) -> None:
    """Raises UserError where a cross-entropy has not as many class weights as there are classes."""
    weight = class_weights(loss)
    if weight is not None and num_classes not in (None, len(weight)):
        raise UserError(f"{len(weight)} class weights for {num_classes} classes", path="task.loss.args.weight")


def settled_num_classes(known: int | None, num_logits: int, check_labels: Callable[[int], None], per: str = "") -> int:
    """Compares the classes of the data with the first outputs, and returns how many there are.

    Args:
        known: number of classes, where it is known.
        num_logits: that the model returns.
        check_labels: called with `num_logits` where the number was not known, so that no label has been checked.
        per: of what, for messages.

    Raises:
        UserError: there are more classes than logits, or wrong labels.
    """
    if known is None:
        try:
            check_labels(num_logits)
        except UserError as error:
            raise place_at("data.train", error) from None
        return num_logits
    if known > num_logits:
        message = f"the model returns {num_logits} logits{per}, the data has {known} classes"
        raise UserError(message, path="model", agreed=True)
    return known


@contextmanager
def explained_loss_errors(gets: str) -> Iterator[None]:
    """Turns what a loss raises that does not fit the task into one line: `gets` says what it got."""
    try:
        yield
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{gets}: {one_line(error)}", path="task.loss", agreed=True) from error
