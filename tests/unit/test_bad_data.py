"""Bad data: pictures, folders and tensor files; exit 2, one line with the key, no traceback."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Train, WriteConfig
from PIL import Image


def image_tree(root: Path) -> Path:
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (i * 40, 0, 0)).save(root / name / f"{i}.png")
    return root


def unreadable_image(root: Path) -> None:
    (image_tree(root) / "dog" / "3.png").write_bytes(b"not an image")


def truncated_image(root: Path) -> None:
    file = image_tree(root) / "dog" / "3.png"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:600])


def sixteen_bit_image(root: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(image_tree(root) / "dog" / "3.png")


def empty_class(root: Path) -> None:
    (image_tree(root) / "bird").mkdir()


def no_class(root: Path) -> None:
    root.mkdir()


def odd_sizes(root: Path) -> None:
    Image.new("RGB", (9, 8)).save(image_tree(root) / "dog" / "3.png")


FOLDERS: list[tuple[Callable[[Path], None], int, str]] = [
    (unreadable_image, 0, r"cannot read sample 9 \('.*dog/3.png'\): cannot identify image file"),
    (unreadable_image, 2, r"cannot read sample 9 \('.*dog/3.png'\): cannot identify image file"),
    (truncated_image, 0, r"cannot read sample 9 \('.*dog/3.png'\): .*truncated"),
    (sixteen_bit_image, 0, r"cannot read sample 9 .*convert it to 8 bits"),
    (odd_sizes, 0, r"samples \d+ and \d+ differ in shape .* resize or crop"),
    (odd_sizes, 2, r"samples \d+ and \d+ differ in shape .* resize or crop"),
    (empty_class, 0, r"no valid file for the classes bird"),
    (no_class, 0, r"find any class folder"),
]


@pytest.mark.parametrize(("make", "workers", "message"), FOLDERS)
def test_image_folder(
    make: Callable[[Path], None], workers: int, message: str, train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    make(tmp_path / "images")
    file = write_config(
        data={"train": {"name": "image_folder", "args": {"root": str(tmp_path / "images")}}, "workers": workers},
        model={"name": "small_cnn", "args": {"in_channels": 3}},
    )
    code, _, err = train("--config", file)
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert re.search(rf"tiny.yaml:\d+: data.train: .*{message}", err), err


def test_eval_folder_with_unknown_class(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    image_tree(tmp_path / "train")
    image_tree(tmp_path / "eval")
    (tmp_path / "eval" / "cat").rename(tmp_path / "eval" / "cow")
    sets = {split: {"name": "image_folder", "args": {"root": str(tmp_path / split)}} for split in ("train", "eval")}
    code, _, err = train("--config", write_config(data={**sets, "workers": 0}))
    assert code == 2
    assert "data.eval: " in err
    assert "not in training: cow" in err


def tensors(path: Path | dict[str, str]) -> dict[str, Any]:
    return {"name": "torch_file", "args": {"path": path if isinstance(path, dict) else str(path)}}


SAVED: dict[str, tuple[Any, str]] = {
    "lengths differ": ((torch.zeros(3, 8), torch.zeros(2)), "3 inputs but 2 targets"),
    "no pair": (torch.zeros(3), "neither a pair of tensors nor a dict"),
    "no such key": ({"x": torch.zeros(3), "y": torch.zeros(3)}, "no key 'inputs' (keys: x, y)"),
}


@pytest.mark.parametrize("name", SAVED)
def test_torch_file(name: str, train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    value, message = SAVED[name]
    torch.save(value, tmp_path / "data.pt")
    code, _, err = train("--config", write_config(data__train=tensors(tmp_path / "data.pt")))
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x04cposix\nsystem\n(S'true'\ntR."])
def test_broken_torch_file(content: bytes, train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "data.pt").write_bytes(content)
    code, _, err = train("--config", write_config(data__train=tensors(tmp_path / "data.pt")))
    assert code == 2
    assert "cannot read" in err
    assert len(err.splitlines()) == 1


def test_npy_that_would_unpickle(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    file = tmp_path / "x.npy"
    code, _, err = train("--config", write_config(data__train=tensors({"inputs": str(file), "targets": str(file)})))
    assert code == 2
    assert "cannot read" in err
