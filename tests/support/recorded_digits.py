"""The digits as dicts with their index, named by import path."""

from __future__ import annotations

from typing import Any

from trainer.data.datasets import Digits


class RecordedDigits(Digits):
    """Items are dicts with the image, the label and the index."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return {"input": image, "target": label, "index": index}
