"""How fast a feed can be at most: decoding and nothing else, in one thread."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from benchmarks.feed_entries import Batches, Entries, random_crop, shuffled_forever
from benchmarks.pictures import list_pictures

LIMITS = Entries("limit")


@LIMITS.add("limit-full-decode", "uint8 HWC, whole pictures as they are", "simplejpeg")
def _full_decode(folder: Path, batch_size: int, seed: int) -> Batches:
    """libjpeg-turbo, all of every picture."""
    import simplejpeg

    for paths in _path_batches(folder, batch_size, seed):
        for path in paths:
            simplejpeg.decode_jpeg(Path(path).read_bytes())
        yield len(paths)


@LIMITS.add("limit-region-decode", "uint8 HWC, crops as they are", "nvidia-nvimgcodec-cu*")
def _region_decode(folder: Path, batch_size: int, seed: int) -> Batches:
    """libjpeg-turbo through nvImageCodec, no more of a picture than its random crop needs."""
    from trainer.data.decode import CPU_ONLY, codec

    library = codec()
    if library is None:
        raise ModuleNotFoundError("nvidia.nvimgcodec")
    cpu = library.Backend(library.BackendKind.CPU_ONLY)
    decoder = library.Decoder(device_id=CPU_ONLY, backends=[cpu], max_num_cpu_threads=1)
    draws = random.Random(seed)
    for paths in _path_batches(folder, batch_size, seed):
        for path in paths:
            stream = library.CodeStream(Path(path).read_bytes())
            left, top, width, height = random_crop(draws, stream.width, stream.height)
            region = library.Region(top, left, top + height, left + width)
            assert decoder.decode(stream.get_sub_code_stream(region=region)) is not None, path
        yield len(paths)


def _path_batches(folder: Path, batch_size: int, seed: int) -> Iterator[list[str]]:
    paths = shuffled_forever([str(file) for file in list_pictures(folder)], seed)
    while True:
        yield list(itertools.islice(paths, batch_size))
