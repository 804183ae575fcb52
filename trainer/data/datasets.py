"""Built-in data sets, and the one place where a data set is built from the config.

A data set is anything with `__len__` and `__getitem__(index)`. Optional attributes mean something to us: `classes`
(names of the classes, in label order), `is_image_data` (inputs are images that `trainer.data.augment` may convert),
`encoded(index)` (a picture before it is decoded, and its target: then only what a crop keeps is decoded),
`source_name(index)` (where a sample comes from, for messages) and `device_batch` (the data lives on the device: see
`Synthetic`). Order, randomness and loading are elsewhere in this package.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset
from torchvision import datasets as torchvision_datasets

from trainer.components import accepts, call, is_import_path, resolve
from trainer.config_data import DataConfig
from trainer.config_values import Component
from trainer.data.decode import to_rgb
from trainer.errors import UserError, one_line, one_line_text


class SizedDataset(Protocol):
    """What we need of a data set."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class RankOrder(Protocol):
    """Lets rank 0 of the job go first, then the first rank of every other host, then the rest."""

    def main_first(self) -> AbstractContextManager[None]: ...


class Digits:
    """The UCI handwritten digits that scikit-learn packages: 1,797 images of 8x8 pixels, 10 classes.

    Items are (float32 image (1, 8, 8) in [0, 1], label). The split is fixed and stratified: within each class
    every fifth image, in the order of the file, is for evaluation (355); the other 1,442 are for training.

    Source: https://archive.ics.uci.edu/dataset/80, the part that `sklearn.datasets.load_digits` holds.
    """

    def __init__(self, split: Literal["train", "eval"]) -> None:
        if split not in ("train", "eval"):
            raise UserError(f"split must be 'train' or 'eval' (got {split!r})")
        package = importlib.util.find_spec("sklearn")  # importing it would take a second
        assert package is not None
        assert package.submodule_search_locations is not None
        table = np.loadtxt(
            Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz"), delimiter=","
        )
        images, targets = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
        order_in_class = np.zeros(len(targets), dtype=np.int64)
        for label in range(10):
            members = targets == label
            order_in_class[members] = np.arange(members.sum())
        chosen = (order_in_class % 5 == 4) == (split == "eval")
        self.images = torch.from_numpy(images[chosen] / 16.0).float().unsqueeze(1)
        self.labels: list[int] = targets[chosen].tolist()
        self.classes = [str(label) for label in range(10)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.labels[index]


class ImageFolder(torchvision_datasets.ImageFolder):
    """Images in class folders, `root/<class>/*.jpg`; items are (RGB PIL image, label).

    Args:
        root: the folder of class folders.
        classes: class names in label order; default: the folder names, sorted. With names given, a class may
            have no folder here (an evaluation set that lacks a class keeps the labels of the training set).
    """

    is_image_data = True

    def __init__(self, root: str, classes: Sequence[str] | None = None) -> None:
        root = str(Path(root).expanduser())
        if not Path(root).is_dir():
            raise UserError(f"no such folder: '{root}'")
        self._given_classes = list(classes) if classes is not None else None
        try:
            super().__init__(root, loader=_load_rgb, allow_empty=classes is not None)
        except FileNotFoundError as error:  # no class folder at all, or a class without an image
            raise UserError(f"'{root}': {one_line_text(error)}") from None
        if not self.samples:
            raise UserError(f"'{root}' holds no image")

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Returns (the file's bytes, label)."""
        path, label = self.samples[index]
        with open(path, "rb") as file:
            return file.read(), label

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Returns the class names and their labels, as torchvision's `ImageFolder` asks for them."""
        if self._given_classes is None:
            classes, labels = super().find_classes(directory)
            if len(classes) > 1 and set(classes) <= _SPLITS:
                message = f"the folders of '{directory}' are splits, not classes: {', '.join(classes)}"
                raise UserError(f"{message}; name the one to train on, and in data.eval the one to evaluate on")
            return classes, labels
        unknown = {p.name for p in Path(directory).iterdir() if p.is_dir()} - set(self._given_classes)
        if unknown:
            raise UserError(f"'{directory}' has class folders that are not in training: {', '.join(sorted(unknown))}")
        return self._given_classes, {name: label for label, name in enumerate(self._given_classes)}


_SPLITS = {"eval", "test", "train", "training", "val", "valid", "validation"}


def _load_rgb(path: str) -> Image.Image:
    with open(path, "rb") as file:
        return to_rgb(Image.open(file))


class TorchFile:
    """Tensors or arrays saved to disk, memory-mapped: workers share the pages and nothing is read up front.

    Items are (input, target) tensors. Inputs and targets agree in their first dimension. Inputs of shape
    (N, C, H, W) and type uint8 are taken for images.

    Args:
        path: a file that `torch.save` wrote, holding a pair (inputs, targets) or a dict; or a mapping
            `{inputs: x.npy, targets: y.npy}` of two .npy files.
        inputs: key of the inputs in a saved dict.
        targets: key of the targets in a saved dict.
    """

    def __init__(self, path: str | Mapping[str, str], inputs: str = "inputs", targets: str = "targets") -> None:
        if isinstance(path, Mapping):
            if set(path) != {"inputs", "targets"}:
                raise UserError("path must name one file, or have the keys 'inputs' and 'targets'")
            self.inputs: Any = _map_npy(path["inputs"])
            self.targets: Any = _map_npy(path["targets"])
        else:
            self.inputs, self.targets = _map_torch(path, inputs, targets)
        if len(self.inputs) != len(self.targets):
            raise UserError(f"{len(self.inputs)} inputs but {len(self.targets)} targets in {path}")
        self.is_image_data = self.inputs.ndim == 4 and str(self.inputs.dtype).endswith("uint8")

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        # torch.tensor copies: what leaves the data set no longer points into the file.
        return _copy(self.inputs[index]), _copy(self.targets[index])


def _copy(value: Any) -> torch.Tensor:
    return value.clone() if isinstance(value, torch.Tensor) else torch.tensor(value)


def _map_npy(file: str) -> np.ndarray:
    try:
        array = np.load(Path(file).expanduser(), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{file}': {one_line_text(error)}") from None
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        raise UserError(f"'{file}' is not a .npy file with one array")
    return array


def _map_torch(file: str, inputs: str, targets: str) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        saved = torch.load(Path(file).expanduser(), map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: '{file}'") from None
    except Exception as error:  # torch.load raises many types for files that are not its own
        raise UserError(f"cannot read '{file}' with torch.load: {str(error).splitlines()[0]}") from None
    if isinstance(saved, Mapping):
        missing = [key for key in (inputs, targets) if key not in saved]
        if missing:
            raise UserError(f"'{file}' has no key '{missing[0]}' (keys: {', '.join(map(str, saved))})")
        saved = saved[inputs], saved[targets]
    if not (isinstance(saved, list | tuple) and len(saved) == 2 and all(isinstance(t, torch.Tensor) for t in saved)):
        raise UserError(f"'{file}' holds neither a pair of tensors nor a dict with '{inputs}' and '{targets}'")
    return saved[0], saved[1]


class Synthetic:
    """Images made on the device, for benchmarks: no disk, no host work, no copy.

    Sample `i` is image `i % pool` of a fixed random pool with label `i % num_classes`, so that a run is the
    same on any number of ranks. Its batches come from `device_batch`; the pinned loader is not involved.

    Args:
        num_samples: length of the data set.
        shape: shape of one input, such as [3, 224, 224].
        num_classes: number of labels.
        pool: distinct inputs kept on the device.
    """

    def __init__(
        self, num_samples: int, shape: Sequence[int] = (3, 224, 224), num_classes: int = 1000, pool: int = 256
    ) -> None:
        for name, value in (("num_samples", num_samples), ("num_classes", num_classes), ("pool", pool)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a positive whole number (got {value!r})")
        if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
            raise UserError(f"shape must be positive whole numbers (got {list(shape)})")
        self.num_samples = num_samples
        self.shape = tuple(shape)
        self.num_classes = num_classes
        self.pool = pool
        self.classes = [str(label) for label in range(num_classes)]
        self._images: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        images, labels = self.device_batch(torch.tensor([index]), torch.device("cpu"))
        return images[0], int(labels[0])

    def device_batch(self, indices: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (inputs (B, *shape) float32, labels (B,) int64) on `device` for int64 `indices` (B,)."""
        if self._images is None or self._images.device != device:
            generator = torch.Generator().manual_seed(0)  # on the host: the same numbers for every device
            self._images = torch.randn(self.pool, *self.shape, generator=generator).to(device)
        indices = indices.to(device, non_blocking=True)
        return self._images[indices % self.pool], indices % self.num_classes


def build_dataset(component: Component, path: str, order: RankOrder) -> SizedDataset:
    """Builds a data set; a download happens on rank 0 first while the others wait.

    Raises:
        UserError: it cannot be built, has no length or index, or is empty.
    """
    with order.main_first():
        target = resolve("data set", component.name, path)
        args = dict(component.args)
        is_torchvision = not is_import_path(component.name) and target.__module__.startswith("torchvision.")
        # EMNIST and QMNIST pass `download` on to the class below them.
        downloads = is_torchvision and any(accepts(c, "download") for c in getattr(target, "__mro__", ()))
        dataset = _found_or_downloaded(target, args, component.name, path) if downloads else None
        if dataset is None:
            dataset = call(target, args, component.name, path)
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        message = f"'{component.name}' must have __len__ and __getitem__: exact order and resume need an index"
        raise UserError(message, path=path)
    try:
        length = len(dataset)
    except Exception as error:
        raise UserError(f"the length of '{component.name}' raised {one_line(error)}", path=path) from error
    if length == 0:
        raise UserError(f"'{component.name}' is empty", path=path)
    return dataset


def _found_or_downloaded(target: Callable[..., Any], args: dict[str, Any], name: str, path: str) -> Any:
    """Builds one of torchvision's data sets; downloads it only where it is not there.

    VOC and others would download and unpack their archive again, though its files are there.
    """
    if "download" in args:
        return None
    try:
        return call(target, {**args, "download": False}, name, path)
    except UserError as error:
        if not isinstance(error.__cause__, RuntimeError | OSError):  # what torchvision's raise for missing files
            raise
        missing = one_line_text(error.__cause__)
    try:
        return call(target, {**args, "download": True}, name, path)
    except UserError as error:
        if not isinstance(error.__cause__, RuntimeError | OSError):
            raise
        message = f"'{name}' found no data in '{args.get('root')}' ({missing}), and could not download it: "
        raise UserError(message + one_line_text(error.__cause__), path=f"{path}.args.root") from error


def build_eval_dataset(config: DataConfig, train: SizedDataset, order: RankOrder) -> SizedDataset | None:
    """Builds the evaluation data set, if there is one, with the labels of the training set.

    Raises:
        UserError: as `build_dataset`, or its classes are not those of the training set.
    """
    component = config.eval
    if component is None:
        return None
    known = class_names(train)
    if component.name == config.train.name == "image_folder":
        component = Component(name=component.name, args={"classes": known, **component.args})
    dataset = build_dataset(component, "data.eval", order)
    names = class_names(dataset)
    if known is not None and names is not None and names != known:
        message = f"its {len(names)} classes are not the {len(known)} of data.train, in that order"
        raise UserError(message, path="data.eval")
    return dataset


def class_names(dataset: SizedDataset) -> list[str] | None:
    """Returns the names of the classes in label order, where the data set knows them.

    COCO's category ids become labels in the task only. The masks of Oxford's pets are of no breed.
    """
    if isinstance(dataset, _VOC):
        from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights

        return list(DeepLabV3_ResNet50_Weights.DEFAULT.meta["categories"])
    classes = getattr(dataset, "classes", None)
    if isinstance(dataset, torchvision_datasets.OxfordIIITPet):
        names = {("category",): classes, ("binary-category",): dataset.bin_classes}
        classes = names.get(tuple(dataset._target_types))
    if not isinstance(classes, list | tuple):
        return None
    return [str(getattr(found, "name", found)) for found in classes]  # Cityscapes describes its classes


_VOC = (torchvision_datasets.VOCSegmentation, torchvision_datasets.VOCDetection)


def gives_encoded(dataset: Any) -> bool:
    """Tells whether a data set's `encoded` speaks for its items: no subclass has changed these since."""
    classes = type(dataset).__mro__
    first = {name: next((i for i, c in enumerate(classes) if name in vars(c)), None) for name in _ITEM_METHODS}
    encoded, item = first["encoded"], first["__getitem__"]
    return encoded is not None and item is not None and encoded <= item


_ITEM_METHODS = ("encoded", "__getitem__")


def draws_nothing(dataset: SizedDataset) -> bool:
    """Tells whether items are known to be the same each time: then no generator has to be seeded for them.

    That is so where they are made by code of this module or of the libraries, and go through nothing of the user's.
    """
    is_known = getattr(type(dataset), "__getitem__", None) in _DRAW_NOTHING
    return is_known and all(getattr(dataset, name, None) is None for name in ("transform", "target_transform"))


_DRAW_NOTHING = {
    known.__getitem__
    for known in (
        Digits,
        TorchFile,
        TensorDataset,
        torchvision_datasets.CIFAR10,
        torchvision_datasets.MNIST,
        torchvision_datasets.SVHN,
    )
}


def is_image_data(dataset: SizedDataset) -> bool:
    """Tells whether inputs are images of a built-in data set, which we may convert to [0, 1] floats."""
    own = getattr(dataset, "is_image_data", None)
    if own is not None:
        return bool(own)
    return inspect.getmodule(type(dataset)) is not None and type(dataset).__module__.startswith("torchvision.datasets")
