"""Built-in data sets, and data sets by torchvision's names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Alone
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets as torchvision_datasets

from trainer.config_data import DataConfig
from trainer.config_values import Component
from trainer.data.datasets import (
    Digits,
    ImageFolder,
    TorchFile,
    build_dataset,
    build_eval_dataset,
    class_names,
    is_image_data,
)
from trainer.data.feed import DeviceFeed
from trainer.errors import UserError
from trainer.tasks.classification import Classification


def build(name: str, **args: Any) -> Any:
    return build_dataset(Component(name=name, args=args), "data.train", Alone())


def test_digits_are_split_fixed_and_stratified() -> None:
    train, evaluation = Digits("train"), Digits("eval")
    assert (len(train), len(evaluation)) == (1442, 355)
    packaged = load_digits()
    pixels, targets = torch.from_numpy(packaged.images / 16).float().unsqueeze(1), packaged.target.tolist()
    of_class: Counter[int] = Counter()
    expected: dict[bool, list[int]] = {True: [], False: []}
    for i, target in enumerate(targets):
        of_class[target] += 1
        expected[of_class[target] % 5 == 0].append(i)
    for found, chosen in ((evaluation, expected[True]), (train, expected[False])):
        assert torch.equal(found.images, pixels[chosen])
        assert found.labels == [targets[i] for i in chosen]
    shares = {label: n / Counter(train.labels)[label] for label, n in Counter(evaluation.labels).items()}
    assert len(shares) == 10
    assert all(0.23 < share < 0.26 for share in shares.values())
    image, label = train[0]
    assert (tuple(image.shape), image.dtype, label) == ((1, 8, 8), torch.float32, 0)
    assert 0 <= float(train.images.min()) < float(train.images.max()) == 1


def folder(root: Path, classes: str) -> Path:
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        Image.new("L", (8, 6), i * 50).save(root / name / "0.jpg")
    return root


def test_image_folder(tmp_path: Path) -> None:
    data = build("image_folder", root=str(folder(tmp_path, "ab")))
    image, label = data[1]
    assert (image.mode, image.size, label) == ("RGB", (8, 6), 1)
    assert class_names(data) == ["a", "b"]
    assert is_image_data(data)


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder(tmp_path / split, "ab")
    with pytest.raises(UserError, match="are splits, not classes: train, val; name the one to train on"):
        build("image_folder", root=str(tmp_path))


@pytest.mark.parametrize(
    ("target_types", "names"),
    [("category", ["Abyssinian", "Beagle"]), ("binary-category", ["Cat", "Dog"]), ("segmentation", None)],
)
def test_masks_of_pets_are_of_no_breed(target_types: str, names: list[str] | None, tmp_path: Path) -> None:
    place = tmp_path / "oxford-iiit-pet"
    for inside in ("images", "annotations/trimaps"):
        (place / inside).mkdir(parents=True)
    pets = {"Abyssinian_1": "1 1 1", "beagle_1": "2 2 1"}
    lines = "".join(f"{name} {numbers}\n" for name, numbers in pets.items())
    (place / "annotations" / "trainval.txt").write_text(lines)
    data = build("OxfordIIITPet", root=str(tmp_path), target_types=target_types)
    assert class_names(data) == names


def test_evaluation_folder_keeps_the_labels_of_training(tmp_path: Path) -> None:
    sets = {
        split: {"name": "image_folder", "args": {"root": str(folder(tmp_path / split, classes))}}
        for split, classes in (("train", "abc"), ("eval", "ac"))
    }
    config = DataConfig.model_validate(sets)
    train = build_dataset(config.train, "data.train", Alone())
    evaluation = build_eval_dataset(config, train, Alone())
    assert evaluation is not None
    assert [evaluation[i][1] for i in range(len(evaluation))] == [0, 2]
    with pytest.raises(UserError, match="not in training: b"):
        ImageFolder(str(tmp_path / "train"), classes=["a", "c"])


def test_shipped_bytes_become_normalised_floats_on_the_device(tmp_path: Path) -> None:
    data = {"name": "image_folder", "args": {"root": str(folder(tmp_path, "abcdef"))}}
    for normalize, expected in (
        (None, 250 / 255),
        ({"mean": [0.5] * 3, "std": [0.25] * 3}, (250 / 255 - 0.5) / 0.25),
    ):
        config = DataConfig.model_validate({"train": data, "normalize": normalize, "workers": 0})
        dataset = build_dataset(config.train, "data.train", Alone())
        feed = DeviceFeed(dataset, config, "train", torch.device("cpu"), 0, Classification())
        images = next(iter(feed.eval_batches(6, 0, 1))).data[0]
        assert images.dtype == torch.float32
        assert images[5].mean() == pytest.approx(expected, abs=0.01)


def test_a_users_tensors_are_left_untouched() -> None:
    images = torch.randint(0, 255, (4, 1, 2, 2), dtype=torch.uint8)
    config = DataConfig.model_validate({"train": {"name": "x:y"}, "workers": 0})
    dataset = [(image, 0) for image in images]
    feed = DeviceFeed(dataset, config, "train", torch.device("cpu"), 0, Classification())
    assert torch.equal(next(iter(feed.eval_batches(4, 0, 1))).data[0], images)


def test_torchvision_by_name() -> None:
    data = build("FakeData", size=12, image_size=[3, 8, 8], num_classes=4)
    assert len(data) == 12
    assert is_image_data(data)
    assert isinstance(data[0][0], Image.Image)


def test_torchvision_data_is_downloaded_where_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def init(self: Any, root: str, train: bool = True, download: bool = False) -> None:
        asked.append((root, download))
        if root == "missing" and not download:
            raise RuntimeError("Dataset not found or corrupted.")
        self.data, self.targets, self.transforms = np.zeros((3, 4, 4), np.uint8), [0, 1, 2], None

    monkeypatch.setattr(torchvision_datasets.CIFAR10, "__init__", init)
    build("CIFAR10", root="there")
    build("CIFAR10", root="missing")
    with pytest.raises(UserError, match="not found"):
        build("CIFAR10", root="missing", download=False)
    assert asked == [("there", False), ("missing", False), ("missing", True), ("missing", False)]


def test_download_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from urllib.error import URLError

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(UserError, match=r"could not download it: .*Name or service not known"):
        build("CIFAR10", root=str(tmp_path))


@pytest.mark.parametrize("kind", ["pair", "dict", "npy"])
def test_torch_file(kind: str, tmp_path: Path) -> None:
    x, y = torch.randn(5, 3), torch.arange(5)
    path: Any = tmp_path / "data.pt"
    args = {}
    if kind == "pair":
        torch.save((x, y), path)
    elif kind == "dict":
        torch.save({"pixels": x, "labels": y}, path)
        args = {"inputs": "pixels", "targets": "labels"}
    else:
        np.save(tmp_path / "x.npy", x.numpy())
        np.save(tmp_path / "y.npy", y.numpy())
        path = {"inputs": tmp_path / "x.npy", "targets": tmp_path / "y.npy"}
    data = TorchFile({k: str(v) for k, v in path.items()} if kind == "npy" else str(path), **args)
    assert len(data) == 5
    for i in range(5):
        assert torch.equal(data[i][0], x[i])
        assert torch.equal(data[i][1], y[i])


@pytest.mark.parametrize(
    ("inputs", "image"),
    [(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), True), (torch.zeros(2, 3, 4, 4), False), (torch.zeros(2, 3), False)],
)
def test_saved_bytes_are_images(inputs: torch.Tensor, image: bool, tmp_path: Path) -> None:
    torch.save((inputs, torch.zeros(2)), tmp_path / "d.pt")
    np.save(tmp_path / "x.npy", inputs.numpy())
    assert is_image_data(TorchFile(str(tmp_path / "d.pt"))) == image
    assert is_image_data(TorchFile({"inputs": str(tmp_path / "x.npy"), "targets": str(tmp_path / "x.npy")})) == image


def test_torch_file_is_memory_mapped(tmp_path: Path) -> None:
    torch.save(
        (torch.zeros(64 * 2**20, dtype=torch.uint8), torch.zeros(64 * 2**20, dtype=torch.uint8)), tmp_path / "d.pt"
    )
    data = TorchFile(str(tmp_path / "d.pt"))
    with open("/proc/self/smaps", encoding="utf-8") as file:
        lines = file.read().split("d.pt", 1)[1].splitlines()
    resident = next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    assert resident < 1024  # kB of the 128 MiB
    assert int(data[5][0]) == 0
