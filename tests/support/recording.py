"""A task that writes down which samples each rank trained and evaluated on, in order."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from trainer.tasks.classification import Classification


class Recording(Classification):
    """Expects dicts with an `index`; appends to `<folder>/<train or eval>-<rank>.jsonl`, a line per forward."""

    def __init__(self, folder: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.folder = folder

    def loss_sum(self, outputs: torch.Tensor, data: Any) -> torch.Tensor:
        split = "train" if torch.is_grad_enabled() else "eval"
        with open(f"{self.folder}/{split}-{os.environ.get('RANK', '0')}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(data["index"].tolist()) + "\n")
        return super().loss_sum(outputs, data)
