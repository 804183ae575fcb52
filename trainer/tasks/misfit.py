"""A model or a loss that does not fit the data, said in one line with shapes.

Owns which errors of the first forward mean that. Errors of other steps are bugs, and keep their traceback.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from trainer.errors import UserError, one_line

_OF_SHAPES = re.compile(r"shape|size|channel|dimension|dtype|scalar type|index out of range", re.IGNORECASE)
_MOST_SHOWN = 3  # parts of a batch


@contextmanager
def explained_misfit(data: Any) -> Iterator[None]:
    """Turns what torch says of shapes and types, and what models check themselves, into one line.

    Args:
        data: the batch that forward and loss are given.
    """
    try:
        yield
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        is_check = type(error) in (AssertionError, ValueError)  # as transformers and timm check sizes
        is_misfit = type(error) in (IndexError, RuntimeError) and _OF_SHAPES.search(str(error))
        if not (is_check or is_misfit):
            raise
        message = f"model or loss do not take the data, {described(data)}: {one_line(error)}"
        raise UserError(message, path="model") from error


def described(data: Any) -> str:
    """Returns types and shapes of a batch or of outputs, such as `[uint8 [8, 3, 32, 32], int64 [8]]`."""
    if isinstance(data, torch.Tensor):
        return f"{str(data.dtype).removeprefix('torch.')} {list(data.shape)}"
    if isinstance(data, Mapping):
        return "{" + ", ".join(f"{key}: {described(value)}" for key, value in data.items()) + "}"
    if isinstance(data, list | tuple):
        shown = [described(part) for part in data[:_MOST_SHOWN]]
        return f"[{', '.join(shown + ['...'] * (len(data) > _MOST_SHOWN))}]"
    return type(data).__name__
