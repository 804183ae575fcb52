"""A data set of a user's own that returns PIL images, named by import path."""

from __future__ import annotations

from PIL import Image


class Pictures:
    """Items are (gray 8x8 PIL image, label)."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (8, 8), 200 * (index % 2)), index % 2
