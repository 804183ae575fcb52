"""A picture as it is stored in a pack: kept as it is, or shrunk, and encoded anew or as pixels. Imports no torch."""

from __future__ import annotations

from io import BytesIO
from typing import NamedTuple

from PIL import Image

from trainer.data.packed import JPEG, RAW
from trainer.errors import one_line_text

LARGEST_JPEG = 65500  # pixels of a side that libjpeg writes


class Corrupt(Exception):
    """A picture that cannot be decoded; the text does not depend on where the source lies."""


class Stored(NamedTuple):
    """A picture as it is written."""

    kind: int  # RAW, JPEG or BROKEN
    data: bytes
    height: int = 0
    width: int = 0
    error: bytes = b""


def encode(data: bytes, as_raw: bool, max_size: int | None, quality: int) -> Stored:
    """Turns an image file into what is stored of it.

    A gray or RGB JPEG that needs not be shrunk stays as it is, byte for byte. Modes are converted as in
    `trainer.data.datasets.ImageFolder`.

    Args:
        data: the file.
        as_raw: store pixels, not a JPEG.
        max_size: pixels that the shorter side has at most; None: any.
        quality: of a JPEG that is made anew.

    Raises:
        Corrupt: it cannot be decoded, or has other than 8 bits per channel.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):  # PIL would clip it
                raise Corrupt(f"{image.mode} image: convert it to 8 bits per channel first")
            is_plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
            width, height = shrunk(image.size, max_size)
            is_kept = (width, height) == image.size
            if not is_kept:
                image.draft(None, (2 * width, 2 * height))  # has libjpeg decode a half, a quarter or an eighth
            image.load()  # also of a file that is kept: it may be truncated
            pixels = image if image.mode == "RGB" else image.convert("RGB")
        if not is_kept:
            pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)  # Lanczos takes 1.4 times as long
        if as_raw or (not is_plain and max(width, height) > LARGEST_JPEG):
            return Stored(RAW, pixels.tobytes(), height, width)
        if is_plain and is_kept:
            return Stored(JPEG, data, height, width)
        encoded = BytesIO()
        pixels.info = {}  # or its comment would be written
        pixels.save(encoded, "JPEG", quality=quality)
        return Stored(JPEG, encoded.getvalue(), height, width)
    except (Corrupt, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise Corrupt("cannot identify image file") from None  # PIL's text has the address of the bytes
    except Exception as error:  # PIL raises many types for broken files
        raise Corrupt(one_line_text(error)) from error


def shrunk(size: tuple[int, int], max_size: int | None) -> tuple[int, int]:
    """Returns a size (width, height) whose shorter side has at most `max_size` pixels."""
    shorter = min(size)
    if max_size is None or shorter <= max_size:
        return size
    width, height = (round(side * max_size / shorter) for side in size)
    return width, height
