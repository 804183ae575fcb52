"""A data set that is another one in every process, so that no run with it can be repeated."""

from __future__ import annotations

import os

import torch
from vectors import Vectors


class Fickle(Vectors):
    """Its samples depend on the process that reads them."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        vector, label = super().__getitem__(index)
        return vector + os.getpid() % 1000, label
