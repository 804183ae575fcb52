"""A share of the training data, held out for evaluation: which samples, and a data set of only these, or of the others.

Owns `data.eval_share`. Building the data set itself is `trainer.data.datasets`.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.datasets import ImageFolder, SizedDataset, class_names, gives_encoded, is_image_data
from trainer.errors import UserError

_SEED = 0  # not the run's: runs with other seeds, and runs that start from their weights, are evaluated on the same


def hold_out(dataset: SizedDataset, share: float) -> tuple[SizedDataset, SizedDataset]:
    """Returns the training part and the evaluation part of a data set, a function of its length and `share` only.

    Raises:
        UserError: one of the parts would be empty.
    """
    held_out = held_out_indices(len(dataset), share)
    if not 0 < len(held_out) < len(dataset):
        which = "none" if len(held_out) == 0 else "all"
        raise UserError(f"{share:g} of the {len(dataset)} samples of data.train is {which}", path="data.eval_share")
    rest = np.setdiff1d(np.arange(len(dataset)), held_out)
    return part_of(dataset, rest), part_of(dataset, held_out)


def held_out_indices(num_samples: int, share: float) -> NDArray[np.int64]:
    """Returns the sorted indices that are held out: one at random of each stretch of 1 / share samples.

    Of data sorted by class, such as an image folder, every class so gives its share, give or take one sample.
    """
    bounds = np.floor(np.arange(round(num_samples * share) + 1) / share).astype(np.int64).clip(max=num_samples)
    return np.random.default_rng(_SEED).integers(bounds[:-1], bounds[1:])


def part_of(dataset: SizedDataset, indices: NDArray[np.int64]) -> SizedDataset:
    """Returns the samples at `indices`, as a data set that loads as fast as the whole does."""
    if type(dataset) is ImageFolder:  # stays one, which may be packed; a subclass may keep more than these per sample
        part = copy.copy(dataset)
        part.samples = part.imgs = [dataset.samples[i] for i in indices]
        part.targets = [label for _, label in part.samples]
        return part
    return EncodedPart(dataset, indices) if gives_encoded(dataset) else Part(dataset, indices)


class Part:
    """The samples of a data set at `indices`; what they are called and that they are pictures stays known."""

    def __init__(self, dataset: SizedDataset, indices: NDArray[np.int64]) -> None:
        self.dataset: Any = dataset
        self.indices = indices
        self.classes = class_names(dataset)
        self.is_image_data = is_image_data(dataset)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def source_name(self, index: int) -> str:
        """Names a sample as the whole data set does, by its number there where it has no names."""
        number = int(self.indices[index])
        return self.dataset.source_name(number) if hasattr(self.dataset, "source_name") else f"{number} of the whole"


class EncodedPart(Part):
    """The same of a data set that gives pictures before they are decoded."""

    def encoded(self, index: int) -> tuple[Any, Any]:
        """Returns (the picture, still encoded, its target)."""
        return self.dataset.encoded(int(self.indices[index]))
