"""Keys of samples and boxes of crops, for tests of geometry and augmentation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.data.draws import Keys, sample_keys
from trainer.data.sampler import SampleKey


def keys(count: int, epoch: int = 0) -> Keys:
    """Returns the keys of the first samples of an epoch."""
    return sample_keys(7, [SampleKey(epoch, i) for i in range(count)])


def random_boxes(count: int, height: int, width: int, seed: int = 0, whole: bool = False) -> NDArray[np.float64]:
    """Returns boxes (count, 4) as top, left, height, width, inside of a picture; of whole pixels where asked."""
    draws = np.random.default_rng(seed).random((count, 4))
    h, w = (0.05 + 0.95 * draws[:, 0]) * height, (0.05 + 0.95 * draws[:, 1]) * width
    if whole:
        h, w = np.ceil(h), np.ceil(w)
    top, left = draws[:, 2] * (height - h), draws[:, 3] * (width - w)
    boxes = np.stack([top, left, h, w], axis=1)
    return np.floor(boxes) if whole else boxes
