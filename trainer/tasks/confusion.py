"""Confusion matrices, counted on the device without waiting for it."""

from __future__ import annotations

import torch

MOST_CLASSES = 1000  # the matrix of more would take too much memory and time to be shown


def confusion_matrix(targets: torch.Tensor, predictions: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Counts int64 (num_classes, num_classes): a row per target, a column per prediction.

    torchmetrics' own either waits for the device, where some targets are to be ignored, or refuses them.

    Args:
        targets: integers of any shape; what is not from 0 to num_classes - 1 is not counted.
        predictions: int64 of the same shape, all of them classes.
        num_classes: number of classes.
    """
    targets = targets.reshape(-1).long()
    is_counted = (targets >= 0) & (targets < num_classes)
    cells = torch.where(is_counted, targets * num_classes + predictions.reshape(-1), 0)  # which adds 0 to a cell
    counts = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=targets.device)
    return counts.index_add_(0, cells, is_counted.long()).view(num_classes, num_classes)


def add_confusion(tables: dict[str, torch.Tensor], counts: torch.Tensor) -> None:
    """Adds the confusion matrix of a batch to the one in `tables`."""
    tables["confusion"] = tables["confusion"] + counts if "confusion" in tables else counts
