"""Errors of a model's forward and backward that a user can mend, each said in one line that says how.

A model that does not fit its data is `trainer.tasks.misfit`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trainer.errors import UserError, one_line
from trainer.memory.checkpointing import explain_checkpointing_error


@contextmanager
def explained_model_errors() -> Iterator[None]:
    """Turns errors of a model's forward that a user can mend into one line that says how."""
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel when training" not in str(error):
            raise
        message = (
            "BatchNorm needs more than one sample: leave the last, small batch of the epoch out, or train larger "
            "micro-batches (train.micro_batch_size)"
        )
        raise UserError(message, path="data.drop_last") from error
    except RuntimeError as error:
        explained = explain_checkpointing_error(error)
        if explained is not None:
            raise explained from error
        if "view size is not compatible" in str(error):
            message = (
                "the model views its input as flat, but images come in channels_last memory: use flatten or reshape"
            )
            raise UserError(f"{message} there; {one_line(error)}", path="model") from error
        if "find_unused_parameters" not in str(error):
            raise
        message = "the last step left parameters unused (without a gradient); if the model is meant so, set it to true"
        raise UserError(message, path="parallel.find_unused_parameters") from error
