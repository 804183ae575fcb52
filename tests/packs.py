"""Small folders of pictures to pack, and how to look at them and to damage a pack."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainer.config_data import CacheConfig


def picture(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """A smooth picture, which a JPEG keeps about as it is."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(80, 176, (3, 4, 4), np.uint8), "RGBA")
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def make_folder(root: Path, count: int = 6, size: tuple[int, int] = (40, 30)) -> Path:
    """Makes JPEGs (width, height) in three class folders, and returns the folder of these."""
    for i in range(count):
        folder = root / f"class_{i * 3 // count}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(i, size).save(folder / f"{i:03d}.jpg", quality=95)
    return root


def settings(path: Path, **changes: Any) -> CacheConfig:
    return CacheConfig.model_validate({"path": str(path), **changes})


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def flip(file: Path, position: int) -> None:
    """Damages a file: inverts the bits of a byte."""
    data = bytearray(file.read_bytes())
    data[position] ^= 255
    file.write_bytes(data)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
