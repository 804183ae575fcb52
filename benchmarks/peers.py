"""Our peers' ways from a folder of JPEGs to batches, each set up as its own documentation does it.

Libraries are imported where they are used, each in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.feed_entries import (
    AREA,
    ASPECT,
    BYTES,
    FLOATS,
    MEAN,
    SIZE,
    STD,
    Batches,
    Entries,
    random_crop,
    shuffled_forever,
)
from benchmarks.pictures import list_pictures

PEERS = Entries("peer")


# ---- torchvision: references/classification ----------------------------------------------------------------


@PEERS.add("torchvision", FLOATS, "torchvision", "pillow")
def _torchvision(folder: Path, batch_size: int, seed: int) -> Batches:
    return _torchvision_loader(folder, batch_size, seed, as_floats=True)


@PEERS.add("torchvision-uint8", BYTES, "torchvision", "pillow")
def _torchvision_bytes(folder: Path, batch_size: int, seed: int) -> Batches:
    return _torchvision_loader(folder, batch_size, seed, as_floats=False)


def _torchvision_loader(folder: Path, batch_size: int, seed: int, as_floats: bool) -> Batches:
    return _epochs(open_torchvision_loader(folder, batch_size, seed, SIZE, as_floats, num_workers=1))


def open_torchvision_loader(
    folder: Path, batch_size: int, seed: int, size: int, as_floats: bool = True, **options: Any
) -> Any:
    """Returns the loader of torchvision's reference, its `ClassificationPresetTrain` with PIL.

    `persistent_workers` spares it a start per epoch.

    Args:
        folder: class folders of JPEGs.
        batch_size: pictures per batch.
        seed: seed of order and augmentation.
        size: pixels of both sides of the crops.
        as_floats: whether pictures are normalised on the host; else they stay bytes.
        **options: further arguments of torch's `DataLoader`.
    """
    import torch
    from torch.utils.data import DataLoader, default_collate
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import InterpolationMode, v2

    transforms: list[Callable[[Any], Any]] = [
        v2.RandomResizedCrop(size, interpolation=InterpolationMode.BILINEAR, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
    ]
    if as_floats:
        transforms += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    torch.manual_seed(seed)
    dataset = ImageFolder(str(folder), v2.Compose([*transforms, v2.ToPureTensor()]))
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        collate_fn=default_collate,
        persistent_workers=True,
        **options,
    )


def _epochs(loader: Any) -> Batches:
    """Counts a loader of (images, labels) over and over; its workers end with it."""
    while True:
        for images, _ in loader:
            yield len(images)


# ---- timm --------------------------------------------------------------------------------------------------


@PEERS.add("timm", FLOATS, "timm", "torchvision", "pillow")
def _timm(folder: Path, batch_size: int, seed: int) -> Batches:
    return _epochs(_timm_loader(folder, batch_size, seed))


@PEERS.add("timm-uint8", BYTES, "timm", "torchvision", "pillow")
def _timm_bytes(folder: Path, batch_size: int, seed: int) -> Batches:
    return _epochs(_timm_loader(folder, batch_size, seed).loader)  # before its prefetcher, which normalises


def _timm_loader(folder: Path, batch_size: int, seed: int) -> Any:
    import torch

    return open_timm_loader(folder, batch_size, seed, SIZE, num_workers=1, device=torch.device("cpu"))


def open_timm_loader(folder: Path, batch_size: int, seed: int, size: int, **options: Any) -> Any:
    """Returns timm's loader with its prefetcher, as its train.py has it: workers collate bytes, the device normalises.

    Args:
        folder: class folders of JPEGs.
        batch_size: pictures per batch.
        seed: seed of order and augmentation.
        size: pixels of both sides of the crops.
        **options: further arguments of timm's `create_loader`.
    """
    import torch
    from timm.data import create_dataset, create_loader

    torch.manual_seed(seed)
    return create_loader(
        create_dataset("", root=str(folder), is_training=True, batch_size=batch_size),
        input_size=(3, size, size),
        batch_size=batch_size,
        is_training=True,
        use_prefetcher=True,
        scale=AREA,
        ratio=ASPECT,
        hflip=0.5,
        color_jitter=0.0,
        auto_augment=None,
        re_prob=0.0,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        **options,
    )


# ---- DALI: the ResNet-50 example, on the CPU ---------------------------------------------------------------


@PEERS.add("dali", FLOATS, "nvidia-dali-cuda*", "nvidia-nvimgcodec-cu*")
def _dali(folder: Path, batch_size: int, seed: int) -> Batches:
    return _dali_pipeline(folder, batch_size, seed, as_floats=True)


@PEERS.add("dali-uint8", BYTES, "nvidia-dali-cuda*", "nvidia-nvimgcodec-cu*")
def _dali_bytes(folder: Path, batch_size: int, seed: int) -> Batches:
    return _dali_pipeline(folder, batch_size, seed, as_floats=False)


def _dali_pipeline(folder: Path, batch_size: int, seed: int, as_floats: bool) -> Batches:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator, LastBatchPolicy

    @pipeline_def(batch_size=batch_size, num_threads=1, device_id=None, seed=seed)
    def pipeline() -> tuple[Any, Any]:
        jpegs, labels = fn.readers.file(file_root=str(folder), random_shuffle=True, name="Reader")
        images = fn.decoders.image_random_crop(
            jpegs,
            device="cpu",
            output_type=types.RGB,
            random_aspect_ratio=list(ASPECT),
            random_area=list(AREA),
            num_attempts=100,
        )
        images = fn.resize(images, resize_x=SIZE, resize_y=SIZE, interp_type=types.INTERP_TRIANGULAR)
        images = fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT if as_floats else types.UINT8,
            output_layout="CHW",
            crop=(SIZE, SIZE),
            mean=[255 * mean for mean in MEAN] if as_floats else [0.0],
            std=[255 * std for std in STD] if as_floats else [1.0],
            mirror=fn.random.coin_flip(probability=0.5),
        )
        return images, labels

    batches = DALIClassificationIterator(
        pipeline(), reader_name="Reader", last_batch_policy=LastBatchPolicy.PARTIAL, auto_reset=True
    )
    while True:
        for (batch,) in batches:
            yield len(batch["data"])


# ---- SPDL: examples/image_dataloading.py, with the filters of its page on augmentation ---------------------


@contextmanager
def _ffmpeg_of_pyav() -> Iterator[dict[str, str]]:
    """Lets SPDL, which brings no FFmpeg, find the one in PyAV's wheel; without PyAV it looks for the system's.

    SPDL looks for `libavutil.so.60` and the like. In the wheel their names hold a hash, which links in a temporary
    folder undo.
    """
    try:
        libraries = Path(str(importlib.metadata.distribution("av").locate_file("av.libs")))
    except importlib.metadata.PackageNotFoundError:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="lockstep-ffmpeg-") as folder:
        for library in libraries.glob("lib*-*.so.*"):
            stem, _, version = library.name.partition(".so.")
            plain_name = f"{stem.rpartition('-')[0]}.so.{version.partition('.')[0]}"
            (Path(folder) / plain_name).symlink_to(library)
        search_path = [folder, str(libraries), os.environ.get("LD_LIBRARY_PATH", "")]
        yield {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, search_path))}


@PEERS.add("spdl", "uint8 HWC", "spdl-core", "spdl-io", "av", variables=_ffmpeg_of_pyav)
def _spdl(folder: Path, batch_size: int, seed: int) -> Batches:
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    paths = [str(file) for file in list_pictures(folder)]
    try:
        spdl.io.demux_image(paths[0])
    except RuntimeError as error:  # its way to say that it found no FFmpeg
        raise ImportError("SPDL finds no FFmpeg: install it, or PyAV, which brings it") from error
    draws = random.Random(seed)

    def load(paths: list[str]) -> Any:
        frames = []
        for path in paths:
            packets = spdl.io.demux_image(path)
            left, top, width, height = random_crop(draws, packets.width, packets.height)
            # Before the conversion to RGB, as SPDL recommends; swscale's `bilinear` smooths where it shrinks.
            steps = [f"crop={width}:{height}:{left}:{top}", f"scale={SIZE}:{SIZE}:flags=bilinear"]
            steps += ["hflip"] * draws.getrandbits(1)
            description = spdl.io.get_video_filter_desc(filter_desc=",".join(steps), pix_fmt=None)
            frames.append(spdl.io.decode_packets(packets, filter_desc=f"{description},format=pix_fmts=rgb24"))
        return spdl.io.to_torch(spdl.io.convert_frames(frames))

    pipeline = (
        PipelineBuilder()
        .add_source(shuffled_forever(paths, seed))
        .aggregate(batch_size)
        .pipe(load, concurrency=1)
        .add_sink(3)
        .build(num_threads=1, max_failures=0)
    )
    with pipeline.auto_stop():
        for images in pipeline:
            yield len(images)
