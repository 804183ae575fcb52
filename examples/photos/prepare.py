"""Makes a folder of pictures to try `photos.yaml` on: tiles of the two photos that scikit-learn packages.

    python examples/photos/prepare.py

writes photos/china/*.jpg and photos/flower/*.jpg, 60 tiles of 64x64 pixels each that do not overlap. Both photos are
CC BY 2.0, by danielbuechele and vultilion on Flickr. Telling their tiles apart is easy: it shows that all works, and
measures nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

TILE = 64  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a small folder of class folders.")
    parser.add_argument("--output", type=Path, default=Path("photos"), help="folder to write (default: photos)")
    output: Path = parser.parse_args().output
    photos = load_sample_images()
    for name, pixels in zip(photos.filenames, photos.images, strict=True):
        folder = output / Path(name).stem
        folder.mkdir(parents=True, exist_ok=True)
        height, width = pixels.shape[:2]
        for top in range(0, height - TILE + 1, TILE):
            for left in range(0, width - TILE + 1, TILE):
                tile = Image.fromarray(pixels[top : top + TILE, left : left + TILE])
                tile.save(folder / f"{top:03d}-{left:03d}.jpg", quality=95)
        print(f"{folder}: {len(list(folder.iterdir()))} pictures")  # noqa: T201  # a script


if __name__ == "__main__":
    main()
