"""The JPEGs that the feed is measured on: photos of ImageNet's shape in class folders, the same for everybody.

Owns how they are made and where they are kept. Real photos (those that scikit-image and scikit-learn ship) are
enlarged, cropped at random and given a little grain, for enlarged photos are too smooth to cost what photos cost.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NUM_CLASSES = 10
DEFAULT_FOLDER = Path(tempfile.gettempdir()) / "lockstep-pictures"

_SHARE_420 = 0.75  # of the pictures; the others are 4:4:4
_LARGEST_ZOOM = 1.5  # beyond what fills the frame
_GRAIN_TILE = 512  # pixels
_SUBSAMPLING_444, _SUBSAMPLING_420 = 0, 2  # as PIL numbers them


@dataclass(frozen=True)
class Shape:
    """What the pictures of a set have in common."""

    width: int  # pixels
    height: int
    target_bytes: int  # of one JPEG, which the quality is chosen for
    grain: float  # standard deviation, in levels of 0 to 255


SHAPES = {
    "imagenet": Shape(width=500, height=375, target_bytes=100_000, grain=6),
    "large": Shape(width=1600, height=1200, target_bytes=380_000, grain=2),
}


def make_pictures(
    count: int,
    size: str = "imagenet",
    folder: Path = DEFAULT_FOLDER,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Returns a folder of `count` JPEGs in class folders, made now unless `folder` already holds it.

    Args:
        count: number of pictures. Picture i is the same in sets of any length.
        size: a name in `SHAPES`.
        folder: where sets are kept.
        seed: seed of crops, grain and chroma subsampling.
        progress: called with the number of pictures made so far; by default every 500th is told.
    """
    made = folder / f"{size}-{count}-seed{seed}"
    if made.is_dir():  # it gets this name only once it is complete
        return made
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{made.name}.", dir=folder))
    try:
        for label in range(NUM_CLASSES):
            (partial / f"class-{label}").mkdir()
        photos = _photos()
        for i in range(count):
            jpeg = make_picture(photos, SHAPES[size], seed, i)
            (partial / f"class-{i % NUM_CLASSES}" / f"{i:06d}.jpg").write_bytes(jpeg)
            (progress or _tell)(i + 1)
        partial.chmod(0o755)  # mkdtemp made it for us alone
        try:
            os.rename(partial, made)
        except OSError:
            if not made.is_dir():  # else another run was quicker
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return made


def _tell(made: int) -> None:
    if made % 500 == 0:
        sys.stderr.write(f"{made} pictures made\n")


def make_picture(photos: Sequence[Image.Image], shape: Shape, seed: int, index: int) -> bytes:
    """Returns one JPEG: a function of the photos, the shape, the seed and the index."""
    draws = np.random.default_rng((seed, index))
    photo = photos[index % len(photos)]
    zoom = max(shape.width / photo.width, shape.height / photo.height) * draws.uniform(1, _LARGEST_ZOOM)
    width, height = max(shape.width, round(photo.width * zoom)), max(shape.height, round(photo.height * zoom))
    left, top = draws.integers(width - shape.width + 1), draws.integers(height - shape.height + 1)
    box = tuple(float(edge / zoom) for edge in (left, top, left + shape.width, top + shape.height))
    box = (box[0], box[1], min(box[2], photo.width), min(box[3], photo.height))
    crop = photo.resize((shape.width, shape.height), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(crop, dtype=np.float32) + _grain(draws, shape)
    picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    subsampling = _SUBSAMPLING_420 if draws.random() < _SHARE_420 else _SUBSAMPLING_444
    return _encode_near(picture, subsampling, shape.target_bytes)


def list_pictures(folder: Path) -> list[Path]:
    """Returns the JPEGs of a set, in order."""
    return sorted(folder.glob("*/*.jpg"))


def describe_pictures(folder: Path) -> dict[str, Any]:
    """Returns what the JPEGs of a set are: their number, shapes, bytes and the share with 4:2:0 chroma."""
    from PIL import JpegImagePlugin

    shapes: set[str] = set()
    sizes, halved = [], 0
    for file in list_pictures(folder):
        with Image.open(file) as picture:
            shapes.add(f"{picture.width}x{picture.height}")
            halved += JpegImagePlugin.get_sampling(picture) == _SUBSAMPLING_420
        sizes.append(file.stat().st_size)
    return {
        "pictures": len(sizes),
        "pixels": sorted(shapes),
        "mean_bytes": round(sum(sizes) / len(sizes)),
        "share_420": round(halved / len(sizes), 3),
    }


def _photos() -> list[Image.Image]:
    from skimage import data
    from sklearn.datasets import load_sample_images

    left, right, _ = data.stereo_motorcycle()
    arrays: list[NDArray[np.uint8]] = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), left, right]
    return [Image.fromarray(array) for array in [*arrays, *load_sample_images().images]]


def _grain(draws: np.random.Generator, shape: Shape) -> NDArray[np.float32]:
    # One tile over and over: drawing every pixel's own noise takes longer than encoding.
    tile = draws.standard_normal((_GRAIN_TILE, _GRAIN_TILE, 3), dtype=np.float32) * np.float32(shape.grain)
    tiles = np.tile(tile, (-(-shape.height // _GRAIN_TILE), -(-shape.width // _GRAIN_TILE), 1))
    return tiles[: shape.height, : shape.width]


def _encode_near(picture: Image.Image, subsampling: int, target_bytes: int) -> bytes:
    """Returns the JPEG with the quality whose size comes nearest to the target: size grows with quality."""
    low, high, best = 30, 97, b""
    while low <= high:
        quality = (low + high) // 2
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
        jpeg = buffer.getvalue()
        if not best or abs(len(jpeg) - target_bytes) < abs(len(best) - target_bytes):
            best = jpeg
        if len(jpeg) < target_bytes:
            low = quality + 1
        else:
            high = quality - 1
    return best
