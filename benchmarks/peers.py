"""What is measured: every way from a folder of JPEGs to batches, ours and our peers', by name.

Owns how each is set up, as its own documentation does it: one decoding worker or thread, random resized crops of
224x224 (8 to 100% of the area, 3/4 to 4/3), random flips, shuffled, batch after batch without end. How they are
measured is `benchmarks.measure`. Libraries are imported where they are used, each in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import math
import os
import random
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from benchmarks.pictures import NUM_CLASSES, list_pictures

SIZE = 224  # pixels, of both sides of what a feed delivers
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)

FLOATS = "float32 CHW, normalised"
BYTES = "uint8 CHW"
BYTES_UNFLIPPED = "uint8 CHW, flips left to the device"

Kind = Literal["ours", "peer", "limit"]
Batches = Generator[int, None, None]  # the number of pictures in each batch; closing it ends workers and threads
Open = Callable[[Path, int, int], Batches]  # (folder of class folders, batch size, seed)
Variables = Callable[[], AbstractContextManager[dict[str, str]]]


def _no_variables() -> AbstractContextManager[dict[str, str]]:
    return nullcontext({})


@dataclass(frozen=True)
class Entry:
    """One way from JPEGs to batches."""

    name: str
    kind: Kind
    output: str  # what a batch holds when it is counted
    packages: tuple[str, ...]  # what does the work, as installed; a pattern where the name says which CUDA
    open: Open
    variables: Variables = _no_variables  # environment variables that its process must be started with

    def versions(self) -> dict[str, str]:
        """Returns the installed versions of `packages`, without those that are missing."""
        installed = {
            str(found.metadata["Name"]).lower().replace("_", "-"): found.version
            for found in importlib.metadata.distributions()
        }
        return {n: installed[n] for p in self.packages for n in sorted(installed) if fnmatchcase(n, p)}


ENTRIES: dict[str, Entry] = {}


def entry(
    name: str, kind: Kind, output: str, *packages: str, variables: Variables = _no_variables
) -> Callable[[Open], Open]:
    """Adds a function to what is measured, under this name and in this place of the table."""

    def add(open_batches: Open) -> Open:
        ENTRIES[name] = Entry(name, kind, output, packages, open_batches, variables)
        return open_batches

    return add


# ---- torchvision: references/classification ----------------------------------------------------------------


@entry("torchvision", "peer", FLOATS, "torchvision", "pillow")
def _torchvision(folder: Path, batch_size: int, seed: int) -> Batches:
    return _torchvision_loader(folder, batch_size, seed, as_floats=True)


@entry("torchvision-uint8", "peer", BYTES, "torchvision", "pillow")
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


@entry("timm", "peer", FLOATS, "timm", "torchvision", "pillow")
def _timm(folder: Path, batch_size: int, seed: int) -> Batches:
    return _epochs(_timm_loader(folder, batch_size, seed))


@entry("timm-uint8", "peer", BYTES, "timm", "torchvision", "pillow")
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


@entry("dali", "peer", FLOATS, "nvidia-dali-cuda*", "nvidia-nvimgcodec-cu*")
def _dali(folder: Path, batch_size: int, seed: int) -> Batches:
    return _dali_pipeline(folder, batch_size, seed, as_floats=True)


@entry("dali-uint8", "peer", BYTES, "nvidia-dali-cuda*", "nvidia-nvimgcodec-cu*")
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


@entry("spdl", "peer", "uint8 HWC", "spdl-core", "spdl-io", "av", variables=_ffmpeg_of_pyav)
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
        .add_source(_shuffled_forever(paths, seed))
        .aggregate(batch_size)
        .pipe(load, concurrency=1)
        .add_sink(3)
        .build(num_threads=1, max_failures=0)
    )
    with pipeline.auto_stop():
        for images in pipeline:
            yield len(images)


# ---- ours --------------------------------------------------------------------------------------------------


_OUR_PACKAGES = ("lockstep-trainer", "nvidia-nvimgcodec-cu*", "torch", "pillow")
_ENDLESS = 10**9  # steps


@entry("ours", "ours", BYTES_UNFLIPPED, *_OUR_PACKAGES)
def _ours(folder: Path, batch_size: int, seed: int) -> Batches:
    """What our host does; the device half (flip, normalise) is the GPU's on a real run."""
    return _host_half(open_our_feed(folder, batch_size, seed))


@entry("ours-all-on-cpu", "ours", FLOATS, *_OUR_PACKAGES)
def _ours_all_on_cpu(folder: Path, batch_size: int, seed: int) -> Batches:
    """With the device half, on the CPU: what a run without a GPU does."""
    feed = open_our_feed(folder, batch_size, seed)
    try:
        for step in itertools.count():
            for batch in feed.step_batches(step):
                yield len(batch.sample_ids)
    finally:
        feed.close()


@entry("ours-packed-jpeg", "ours", BYTES_UNFLIPPED, *_OUR_PACKAGES)
def _ours_packed_jpeg(folder: Path, batch_size: int, seed: int) -> Batches:
    """From the packed cache, as its defaults are: JPEGs, the shorter side at most 400 pixels."""
    return _host_half(open_our_feed(folder, batch_size, seed, pack={}))


@entry("ours-packed-jpeg-256", "ours", BYTES_UNFLIPPED, *_OUR_PACKAGES)
def _ours_packed_jpeg_256(folder: Path, batch_size: int, seed: int) -> Batches:
    """From the packed cache, pictures shrunk to 256 pixels."""
    return _host_half(open_our_feed(folder, batch_size, seed, pack={"max_size": 256}))


@entry("ours-packed-mixed-256", "ours", BYTES_UNFLIPPED, *_OUR_PACKAGES)
def _ours_packed_mixed_256(folder: Path, batch_size: int, seed: int) -> Batches:
    """From the packed cache, shrunk to 256 pixels, every second picture stored raw."""
    return _host_half(open_our_feed(folder, batch_size, seed, pack={"max_size": 256, "encoding": "mixed"}))


@entry("ours-packed-raw", "ours", BYTES_UNFLIPPED, *_OUR_PACKAGES)
def _ours_packed_raw(folder: Path, batch_size: int, seed: int) -> Batches:
    """From the packed cache, stored raw, the shorter side at most 400 pixels."""
    return _host_half(open_our_feed(folder, batch_size, seed, pack={"encoding": "raw"}))


@entry("ours-packed-raw-256", "ours", BYTES_UNFLIPPED, *_OUR_PACKAGES)
def _ours_packed_raw_256(folder: Path, batch_size: int, seed: int) -> Batches:
    """From the packed cache, stored raw, shrunk to 256 pixels."""
    return _host_half(open_our_feed(folder, batch_size, seed, pack={"max_size": 256, "encoding": "raw"}))


def _host_half(feed: Any) -> Batches:
    try:
        while True:  # not `step_batches`, which runs the device half
            yield len(feed._next(feed._batches).batch.sample_ids)
    finally:
        feed.close()


def open_our_feed(folder: Path, batch_size: int, seed: int, pack: dict[str, Any] | None = None, **settings: Any) -> Any:
    """Returns our `DeviceFeed` on the CPU with one worker, started at step 0.

    Args:
        folder: class folders of JPEGs.
        batch_size: pictures per batch.
        seed: seed of order and augmentation.
        pack: settings of the packed cache that is read instead, and made first.
        **settings: further keys of the config's `data` section.
    """
    import torch

    from trainer.config_data import CacheConfig, DataConfig
    from trainer.data.datasets import build_dataset
    from trainer.data.feed import DeviceFeed
    from trainer.data.packed import PackedImages
    from trainer.data.packing import pack_folder
    from trainer.data.sampler import BatchPlan, StepSampler

    section = {
        "train": {"name": "image_folder", "args": {"root": str(folder)}},
        "transforms": {
            "train": [{"name": "RandomResizedCrop", "args": {"size": SIZE}}, {"name": "RandomHorizontalFlip"}]
        },
        "normalize": {"mean": list(MEAN), "std": list(STD)},
        "workers": 1,
        **settings,
    }
    config = DataConfig.model_validate(section)
    dataset: Any = build_dataset(config.train, "data.train", _OnlyRank())
    if pack is not None:
        cache = CacheConfig(path=str(folder.with_name(f"{folder.name}-packed")), **pack)
        dataset = PackedImages(pack_folder(dataset, cache))
    feed = DeviceFeed(dataset, config, "train", torch.device("cpu"), seed, _Pairs())
    plan = BatchPlan.split(len(dataset), batch_size, None, num_ranks=1, drop_last=False)
    feed.start(StepSampler(plan, rank=0, seed=seed), step=0, total_steps=_ENDLESS)
    return feed


class _Pairs:
    """What a task would say of batches that are (images, labels)."""

    input_key, target_key = "image", "label"
    num_classes: int | None = NUM_CLASSES
    transforms_targets, stacks = False, True
    target_keys: tuple[str, ...] | None = None

    def check(self, data: Any, sample_ids: Any) -> None:
        """Finds nothing wrong."""

    def targets(self, data: Any) -> Any:
        """Returns the labels."""
        return data[1]

    def with_targets(self, data: Any, targets: Any) -> Any:
        """Returns the batch with other labels."""
        return [data[0], targets]


class _OnlyRank:
    """A job of one process: nobody goes first."""

    def main_first(self) -> AbstractContextManager[None]:
        return nullcontext()


# ---- limits: decoding and nothing else, in one thread ------------------------------------------------------


@entry("limit-full-decode", "limit", "uint8 HWC, whole pictures as they are", "simplejpeg")
def _full_decode(folder: Path, batch_size: int, seed: int) -> Batches:
    """libjpeg-turbo, all of every picture."""
    import simplejpeg

    for paths in _path_batches(folder, batch_size, seed):
        for path in paths:
            simplejpeg.decode_jpeg(Path(path).read_bytes())
        yield len(paths)


@entry("limit-region-decode", "limit", "uint8 HWC, crops as they are", "nvidia-nvimgcodec-cu*")
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
    paths = _shuffled_forever([str(file) for file in list_pictures(folder)], seed)
    while True:
        yield list(itertools.islice(paths, batch_size))


def _shuffled_forever(paths: Sequence[str], seed: int) -> Iterator[str]:
    draws = random.Random(seed)
    while True:
        yield from draws.sample(paths, len(paths))


def random_crop(draws: random.Random, width: int, height: int) -> tuple[int, int, int, int]:
    """Returns (left, top, width, height) in pixels as torchvision's `RandomResizedCrop` draws them."""
    for _ in range(10):
        area = width * height * draws.uniform(*AREA)
        aspect = math.exp(draws.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = draws.randint(0, width - crop_width), draws.randint(0, height - crop_height)
            return left, top, crop_width, crop_height
    side = min(width, height)  # within every aspect ratio allowed
    return (width - side) // 2, (height - side) // 2, side, side
