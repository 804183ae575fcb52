"""Encoded pictures -> the pixels of a box, resized, on the host: decodes no more than the crop needs.

JPEGs go through nvImageCodec's CPU decoder (libjpeg-turbo), which decodes only the box; its pixels are bitwise
those of PIL's full decode. A crop that shrinks at least fourfold is decoded at a half, a quarter or an eighth of
the size by PIL (`draft`), which leaves at least a twofold reduction to the antialiasing resize. Whatever else there
is (other formats, broken files, a machine without nvImageCodec), PIL decodes in full, and its errors are the ones
that users see.
"""

from __future__ import annotations

import functools
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # (height, width, channels), RGB where they were decoded
Encoded = bytes | memoryview | Pixels  # a file's bytes, or pixels that need no decoding

UNREADABLE = (OSError, SyntaxError)  # what reading a broken picture raises, here and in PIL

CPU_ONLY = -99999  # NVIMGCODEC_DEVICE_CPU_ONLY of its C header
_JPEG = b"\xff\xd8"
_END_OF_JPEG = b"\xff\xd9"
_REDUCED_GAP = 2  # how much larger than the result a reduced decode is, so that the resize can still antialias
_FILTER_PIXELS = 2  # what the triangle filter reaches beyond a box, per source pixel of one output pixel, and rounding


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB; raises OSError on deeper pixels, which PIL would clip."""
    if image.mode.startswith(("I", "F")):
        raise OSError(f"{image.mode} image: convert it to 8 bits per channel first")
    return image.convert("RGB")


def read_size(encoded: Encoded) -> tuple[int, int]:
    """Returns (height, width) from the header; raises OSError where it is no picture."""
    if isinstance(encoded, np.ndarray):
        return encoded.shape[0], encoded.shape[1]
    library = codec()
    if library is not None and is_whole_jpeg(encoded):
        try:
            stream = library.CodeStream(bytes(encoded))
            return stream.height, stream.width
        except RuntimeError:
            pass  # PIL knows better, or says what is wrong
    image = _open(encoded)
    return image.height, image.width


def decode(encoded: Encoded) -> Image.Image:
    """Decodes a whole picture.

    Raises:
        OSError, SyntaxError: PIL cannot read it.
    """
    if isinstance(encoded, np.ndarray):
        return Image.fromarray(encoded)
    image = _open(encoded)
    with _as_read_errors():
        return to_rgb(image)


def _open(encoded: bytes | memoryview) -> Image.Image:
    with _as_read_errors():
        return Image.open(io.BytesIO(encoded))


@contextmanager
def _as_read_errors() -> Iterator[None]:
    """PIL raises many types for files that are broken in unusual ways; they become OSError."""
    try:
        yield
    except (OSError, SyntaxError, MemoryError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def crop_and_resize(encoded: Encoded, box: NDArray[np.float64], size: tuple[int, int]) -> Pixels:
    """Returns the box (top, left, height, width) of a picture, resized with antialiasing.

    Args:
        encoded: a file's bytes or decoded pixels.
        box: float64 (4,) in source pixels, whole or not; inside the picture. Of pixels, a box that is not resized
            may reach outside, where zeros are.
        size: height and width of the result.

    Raises:
        OSError, SyntaxError: it cannot be decoded.
    """
    if isinstance(encoded, np.ndarray):
        return _resample(encoded, box, size)
    if bytes(encoded[:2]) == _JPEG:
        if min(box[2] / size[0], box[3] / size[1]) >= 2 * _REDUCED_GAP:
            return _decode_reduced(encoded, box, size)
        margin = np.ceil(_FILTER_PIXELS * np.maximum(box[2:] / size, 1)) if _has_fraction(box) else np.zeros(2)
        region = _decode_region(encoded, box, margin)
        if region is not None:
            pixels, corner = region
            return _resample(pixels, np.concatenate([box[:2] - corner, box[2:]]), size)
    return _resample(np.asarray(decode(encoded)), box, size)


def _decode_region(
    encoded: bytes | memoryview, box: NDArray[np.float64], margin: NDArray[np.float64]
) -> tuple[Pixels, NDArray[np.float64]] | None:
    """Returns the decoded pixels around a box and their (top, left); None where PIL must do it."""
    library = codec()
    if library is None or not is_whole_jpeg(encoded):
        return None
    try:
        stream = library.CodeStream(bytes(encoded))
        top, left = (int(v) for v in np.maximum(np.floor(box[:2] - margin), 0))
        bottom = min(int(np.ceil(box[0] + box[2] + margin[0])), stream.height)
        right = min(int(np.ceil(box[1] + box[3] + margin[1])), stream.width)
        region = stream.get_sub_code_stream(region=library.Region(top, left, bottom, right))
        image = _decoder().decode(region, params=_decode_params())
    except RuntimeError:
        return None
    if image is None:
        return None
    return np.asarray(image), np.array([top, left], dtype=np.float64)


def is_whole_jpeg(encoded: bytes | memoryview) -> bool:
    """Tells whether a file starts and ends as a JPEG: what is cut off PIL reports, the codec on standard error."""
    return bytes(encoded[:2]) == _JPEG and bytes(encoded[-2:]) == _END_OF_JPEG


def _decode_reduced(encoded: bytes | memoryview, box: NDArray[np.float64], size: tuple[int, int]) -> Pixels:
    image = _open(encoded)
    height, width = image.height, image.width
    # PIL picks the smallest scale that is not below what is asked for.
    wanted = _REDUCED_GAP * np.array([width * size[1] / box[3], height * size[0] / box[2]])
    image.draft("RGB", (int(np.ceil(wanted[0])), int(np.ceil(wanted[1]))))
    scale = np.array([image.height / height, image.width / width] * 2)
    with _as_read_errors():
        image = to_rgb(image)
    return _resample(np.asarray(image), box * scale, size)


def _resample(pixels: Pixels, box: NDArray[np.float64], size: tuple[int, int]) -> Pixels:
    height, width = pixels.shape[:2]
    if not _has_fraction(box):
        top, left, h, w = (int(v) for v in box)
        part = pixels[max(top, 0) : max(top + h, 0), max(left, 0) : max(left + w, 0)]
        if (h, w) == size:
            return part if part.shape[:2] == size else _surrounded(part, max(-top, 0), max(-left, 0), size)
        # As a channels_last batch of one: torch then reads and writes pixels in place, without reordering them.
        batch = torch.from_numpy(np.require(part, requirements=["C", "W"]))[None].permute(0, 3, 1, 2)
        batch = torch.nn.functional.interpolate(batch, size, mode="bilinear", antialias=True)
        return batch.permute(0, 2, 3, 1)[0].numpy()
    left, top = max(box[1], 0.0), max(box[0], 0.0)
    right, bottom = min(box[1] + box[3], float(width)), min(box[0] + box[2], float(height))
    image = Image.fromarray(pixels if pixels.shape[2] != 1 else pixels[..., 0])
    image = image.resize(size[::-1], Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    return np.asarray(image).reshape(*size, pixels.shape[2])


def _surrounded(pixels: Pixels, top: int, left: int, size: tuple[int, int]) -> Pixels:
    """Puts zeros around pixels."""
    result = np.zeros((*size, pixels.shape[2]), dtype=np.uint8)
    result[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return result


def _has_fraction(box: NDArray[np.float64]) -> bool:
    return bool((box != np.floor(box)).any())


@functools.cache
def codec() -> Any:
    """Returns the nvImageCodec module, or None where it is not installed."""
    try:
        package = find_spec("nvidia.nvimgcodec")
    except ModuleNotFoundError:
        package = None
    if package is None or not package.submodule_search_locations:
        return None
    libraries = Path(package.submodule_search_locations[0])
    # Given all its extensions, it reports on standard error which of NVIDIA's libraries are not installed.
    names = ["libjpeg_turbo_ext.so*", *(["libnvjpeg_ext.so*"] if decodes_on_gpu() else [])]
    variable = "NVIMGCODEC_EXTENSIONS_PATH"
    given = os.environ.get(variable)
    with tempfile.TemporaryDirectory() as folder:
        for library in (path for name in names for path in (libraries / "extensions").glob(name)):
            (Path(folder) / library.name).symlink_to(library)
        os.environ[variable] = given or folder
        try:
            from nvidia import nvimgcodec

            nvimgcodec.Decoder(device_id=CPU_ONLY, max_num_cpu_threads=1)  # loads the extensions
        except (ImportError, OSError, RuntimeError):
            return None
        finally:
            os.environ.pop(variable)
            if given is not None:
                os.environ[variable] = given
    return nvimgcodec


@functools.cache
def decodes_on_gpu() -> bool:
    """Tells whether nvJPEG, which nvImageCodec needs for that, comes with CUDA or as a Python package."""
    package = find_spec("nvidia")
    folders = [Path(folder) for folder in (package.submodule_search_locations or [])] if package else []
    return any(any(folder.glob("*/lib/libnvjpeg.so*")) for folder in folders) or find_library("nvjpeg") is not None


def _decoder() -> Any:
    """Returns this process's decoder: its threads do not survive a fork."""
    return _decoder_of(os.getpid())


@functools.cache  # a forked process keeps its parent's, which it must not take down
def _decoder_of(process: int) -> Any:
    library = codec()
    backends = [library.Backend(library.BackendKind.CPU_ONLY)]
    return library.Decoder(device_id=CPU_ONLY, backends=backends, max_num_cpu_threads=1)


@functools.cache
def _decode_params() -> Any:
    # torchvision's ImageFolder does not turn pictures by their EXIF orientation either.
    return codec().DecodeParams(apply_exif_orientation=False)
