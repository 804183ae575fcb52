"""Data sets that keep their pictures as one array of bytes, such as CIFAR-10: seen as undecoded pictures.

So their crops are drawn and made as those of picture files are, on the host or on the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import datasets

from trainer.data.datasets import SizedDataset, TorchFile, class_names
from trainer.data.held_out import Part

_ARRAYS_OF_TORCHVISION = (
    *(datasets.CIFAR10, datasets.CIFAR100, datasets.MNIST, datasets.FashionMNIST, datasets.KMNIST, datasets.EMNIST),
    *(datasets.SVHN, datasets.USPS),
)


class ArrayPictures:
    """The pictures of another data set, as pixels; items are those of that data set.

    Args:
        dataset: the data set.
        images: its pictures, uint8 (N, H, W, C), C being 1 or 3.
        targets: a target per picture.
        as_tensors: whether the data set's own items are tensors, not PIL images.
    """

    is_image_data = True

    def __init__(self, dataset: SizedDataset, images: NDArray[np.uint8], targets: Any, as_tensors: bool) -> None:
        self.dataset = dataset
        self.images = images
        self.targets = targets
        self.as_tensors = as_tensors
        self.classes = class_names(dataset)

    def at(self, indices: NDArray[np.int64]) -> ArrayPictures:
        """Returns the pictures at `indices`, copied."""
        targets = [self.targets[int(i)] for i in indices]
        return ArrayPictures(Part(self.dataset, indices), self.images[indices], targets, self.as_tensors)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def encoded(self, index: int) -> tuple[NDArray[np.uint8], Any]:
        """Returns (pixels (H, W, C), target)."""
        target = self.targets[index]
        return self.images[index], target if isinstance(target, torch.Tensor) else np.asarray(target)[()]

    def sizes(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Returns heights and widths (n, 2), and the number of channels."""
        return np.tile(np.array(self.images.shape[1:3], dtype=np.int64), (len(indices), 1)), self.images.shape[3]

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], list[Any]]:
        """Returns the pixels of pictures, one after the other, and their targets."""
        return np.ascontiguousarray(self.images[indices]).reshape(-1), [self.encoded(int(i))[1] for i in indices]


def as_array_pictures(dataset: SizedDataset) -> ArrayPictures | None:
    """Returns a data set as an array of pictures, or None where it is not kept as one."""
    images: Any
    if type(dataset) is Part:
        whole = as_array_pictures(dataset.dataset)
        return None if whole is None else whole.at(dataset.indices)
    if isinstance(dataset, TorchFile):
        if not dataset.is_image_data:
            return None
        images = np.asarray(dataset.inputs).transpose(0, 2, 3, 1)
        return ArrayPictures(dataset, images, dataset.targets, as_tensors=True) if _is_gray_or_rgb(images) else None
    if type(dataset) not in _ARRAYS_OF_TORCHVISION:
        return None
    if any(getattr(dataset, name, None) is not None for name in ("transform", "target_transform", "transforms")):
        return None
    images = getattr(dataset, "data", None)
    targets = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if not isinstance(images, np.ndarray | torch.Tensor) or targets is None or len(targets) != len(dataset):
        return None
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        return None
    if images.ndim == 3:
        images = images[..., None]
    elif images.shape[1] == 3 and images.shape[3] != 3:  # SVHN keeps channels first
        images = images.transpose(0, 2, 3, 1)
    return ArrayPictures(dataset, images, targets, as_tensors=False) if _is_gray_or_rgb(images) else None


def _is_gray_or_rgb(images: Any) -> bool:
    return images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3)
