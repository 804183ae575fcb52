"""Samples -> batches in host memory, with per-sample randomness and a rule for samples that cannot be read.

Owns reading the samples of one batch, in whichever process it runs. Which samples, and in what order, is
`trainer.data.sampler`; the processes are `trainer.data.workers`; getting batches onto the device is
`trainer.data.feed`.
"""

from __future__ import annotations

import hashlib
import random
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from trainer.data.columns import columns, rows
from trainer.data.datasets import SizedDataset, draws_nothing
from trainer.data.decode import UNREADABLE, Encoded, crop_and_resize, read_size
from trainer.data.draws import Stream, sample_keys, uniforms
from trainer.data.geometry import Geometry
from trainer.data.nested import Allocate, collate, in_lists
from trainer.data.sampler import KeyRows, SampleKey, key_array, named_keys
from trainer.data.transforms import HostTransform
from trainer.errors import BadSample, Problem, UserError, one_line, place_at

_UNREADABLE = (*UNREADABLE, Image.DecompressionBombError)  # also of data sets that use PIL themselves
_MOST_REPLACEMENTS = 10

OnRead = Callable[[int], None]  # told of each sample before it is read


class Skipped(NamedTuple):
    """A sample that could not be read."""

    sample: int
    problem: str


class LoadedBatch(NamedTuple):
    """A collated batch in host memory, and which samples are in it."""

    keys: NDArray[np.int64]  # (B, 3): epoch, index and repeat of each sample, as in a SampleKey
    data: Any
    skipped: tuple[Skipped, ...] = ()

    @property
    def sample_ids(self) -> torch.Tensor:
        """The samples' indices, int64 (B,)."""
        return torch.from_numpy(self.keys[:, 1].copy())


class LoadFailure(NamedTuple):
    """What a worker hands over instead of a batch that could not be loaded; raised in the training process.

    An exception raised in a worker would arrive as a page of traceback text.
    """

    problems: tuple[Problem, ...]


def sample_seed(seed: int, key: SampleKey) -> int:
    """Returns the 64-bit seed of one sample: a function of (seed, epoch, index, repeat) and of nothing else."""
    # Without the first repeat, so that a run without any has the numbers that it had before there were repeats.
    numbers = key if key.repeat else key[:2]
    digest = hashlib.blake2b(struct.pack(f"<Q{len(numbers)}q", seed, *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def seed_global_generators(seed: int) -> None:
    """Seeds the global CPU generators of torch, numpy and random, from which users' transforms draw."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Leaves the global generators as they were: loading in the training process must not disturb dropout."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


@dataclass(frozen=True)
class EncodedPictures:
    """The files of a batch, one after the other."""

    data: torch.Tensor  # uint8
    ends: NDArray[np.int64]  # (B,): where each file ends
    sizes: NDArray[np.int64]  # (B, 2): height and width

    def files(self) -> list[NDArray[np.uint8]]:
        """Returns the bytes of each file."""
        return np.split(self.data.numpy(), self.ends[:-1])


class _Picture(NamedTuple):
    """A picture whose pixels have not been looked at."""

    key: SampleKey
    encoded: Encoded
    target: Any
    size: tuple[int, int]  # height and width


class SampleLoader:
    """Loads batches of one data set.

    Args:
        dataset: the samples. One that has `encoded(index) -> (file's bytes or pixels, target)` is asked for these
            where `geometry` then decides what is decoded.
        transform: what happens to a sample on the host, after the geometry.
        geometry: crop and resize of encoded pictures; None for data sets that give samples ready.
        seed: seed of the samples' random state.
        name: the data set's place in the config, such as `data.train`.
        on_error: what to do with samples that cannot be read. `replace` reads another, drawn for that sample;
            `drop` leaves it out of the batch.
        stacks: whether the samples of a batch are stacked; else it is lists of them.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        transform: HostTransform,
        geometry: Geometry | None,
        seed: int,
        name: str,
        on_error: Literal["raise", "replace", "drop"],
        stacks: bool = True,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.geometry = geometry
        self.seed = seed
        self.name = name
        self.on_error = on_error
        self.stacks = stacks
        self.is_random = bool(transform.transforms) or not draws_nothing(dataset)
        """Whether samples may draw from the global generators."""
        self._items_are_as_kept = stacks and not self.is_random and type(transform) is HostTransform

    def load(self, keys: KeyRows, allocate: Allocate, reading: OnRead) -> LoadedBatch | LoadFailure:
        """Loads one batch, its tensors in memory from `allocate`. Disturbs the global generators.

        Raises:
            Exception: what the data set or a transform raised, where it is no fault of the data.
        """
        skipped: list[Skipped] = []
        load = self._load_items if self.geometry is None else self._load_pictures
        try:
            read, data = load(key_array(keys), allocate, reading, skipped)
        except UserError as error:
            return LoadFailure(place_at(self.name, error).problems)
        return LoadedBatch(key_array(read), data, tuple(skipped))

    def load_encoded(self, keys: KeyRows, allocate: Allocate, reading: OnRead) -> LoadedBatch | LoadFailure:
        """Loads the files of one batch, undecoded: data are [EncodedPictures, targets]."""
        skipped: list[Skipped] = []
        try:
            found = [self._first_readable(key, self._open_file, reading, skipped) for key in named_keys(keys)]
            pictures: list[_Picture] = [picture for picture in found if picture is not None]
            read = key_array([picture.key for picture in pictures])
            if not pictures:
                return LoadedBatch(read, None, tuple(skipped))
            files = [np.frombuffer(picture.encoded, np.uint8) for picture in pictures]
            ends = np.cumsum([len(file) for file in files])
            data = allocate((int(ends[-1]),), torch.uint8)
            np.concatenate(files, out=data.numpy())
            encoded = EncodedPictures(data, ends, np.array([picture.size for picture in pictures]))
            return LoadedBatch(read, [encoded, collate([p.target for p in pictures], allocate)], tuple(skipped))
        except UserError as error:
            return LoadFailure(place_at(self.name, error).problems)

    def decode_on_host(
        self, key: SampleKey, encoded: Encoded, target: Any, box: Any, size: tuple[int, int], skipped: list[Skipped]
    ) -> tuple[SampleKey, Any, Any] | None:
        """Returns (key, pixels, target) of a picture's crop, or of its replacement; None where it is dropped.

        Raises:
            UserError: it cannot be decoded, and `on_error` is `raise`.
        """
        picture = _Picture(key, encoded, target, (0, 0))
        return self._decoded(picture, box, size, lambda sample: None, skipped)

    def describe(self, index: int) -> str:
        """Names a sample by its number and, where the data set knows it, its file."""
        name = None
        with suppress(Exception):  # it is for messages about something worse
            if hasattr(self.dataset, "source_name"):
                name = self.dataset.source_name(index)
            else:
                samples = getattr(self.dataset, "samples", None)  # as torchvision's folder data sets keep them
                if isinstance(samples, list) and isinstance(samples[index], tuple):
                    name = samples[index][0]
        return f"sample {index}" + (f" ('{name}')" if name else "")

    # ---- samples that the data set gives ready -------------------------------------------------------------

    def _load_items(
        self, keys: NDArray[np.int64], allocate: Allocate, reading: OnRead, skipped: list[Skipped]
    ) -> tuple[Sequence[SampleKey] | NDArray[np.int64], Any]:
        if self._items_are_as_kept and (kept := columns(self.dataset)) is not None:
            samples = np.ascontiguousarray(keys[:, 1])
            reading(int(samples[0]))
            return keys, rows(kept, samples, allocate)
        found = [self._first_readable(key, self._read_item, reading, skipped) for key in named_keys(keys)]
        pairs = [pair for pair in found if pair is not None]
        read = [key for key, _ in pairs]
        return read, self._collate([item for _, item in pairs], read, allocate)

    def _read_item(self, key: SampleKey) -> tuple[SampleKey, Any]:
        if self.is_random:
            seed_global_generators(sample_seed(self.seed, key))
        return key, self.transform(self.dataset[key.sample])

    # ---- encoded pictures, of which only what the crop keeps is decoded ------------------------------------

    def _load_pictures(
        self, keys: NDArray[np.int64], allocate: Allocate, reading: OnRead, skipped: list[Skipped]
    ) -> tuple[list[SampleKey], Any]:
        found = [self._first_readable(key, self._open, reading, skipped) for key in named_keys(keys)]
        pictures = [picture for picture in found if picture is not None]
        if not pictures:
            return [], None
        assert self.geometry is not None
        crops = self.geometry(np.array([p.size for p in pictures]), sample_keys(self.seed, [p.key for p in pictures]))
        sizes = [(int(h), int(w)) for h, w in crops.sizes]
        as_one = not self.transform.transforms and all(size == sizes[0] for size in sizes)
        first = pictures[0].encoded
        channels = first.shape[2] if isinstance(first, np.ndarray) else 3
        images = allocate((len(pictures), *sizes[0], channels), torch.uint8) if as_one else torch.empty(0)
        target = images.numpy()
        read: list[SampleKey] = []
        inputs: list[Any] = []
        targets: list[Any] = []
        for picture, box, size in zip(pictures, crops.boxes, sizes, strict=True):
            reading(picture.key.sample)
            done = self._decoded(picture, box, size, reading, skipped)
            if done is None:
                continue
            key, pixels, label = done
            if as_one:
                if pixels.shape != target.shape[1:]:  # a replacement of another shape
                    shapes = f"{list(target.shape[1:3])} and {list(pixels.shape[:2])}"
                    raise UserError(f"sample {key.sample} differs in shape from others ({shapes}); crop them to one")
                target[len(read)] = pixels
            else:
                seed_global_generators(sample_seed(self.seed, key))
                try:
                    inputs.append(self.transform.apply_to_pixels(pixels))
                except BadSample as error:
                    raise error.named(self.describe(key.sample), self.name) from None
            read.append(key)
            targets.append(label)
        if not read:
            return [], None
        if as_one:
            return read, [images[: len(read)].permute(0, 3, 1, 2), collate(targets, allocate)]
        return read, self._collate(list(zip(inputs, targets, strict=True)), read, allocate)

    def _open_file(self, key: SampleKey) -> _Picture:
        picture = self._open(key)
        if isinstance(picture.encoded, np.ndarray):
            raise UserError(
                "its pictures are stored as pixels, which need no decoding: data.feed: host", path="data.feed"
            )
        return picture

    def _open(self, key: SampleKey) -> _Picture:
        encoded, target = self.dataset.encoded(key.sample)  # type: ignore[attr-defined]
        return _Picture(key, encoded, target, read_size(encoded))

    def _decoded(
        self, picture: _Picture, box: Any, size: tuple[int, int], reading: OnRead, skipped: list[Skipped]
    ) -> tuple[SampleKey, Any, Any] | None:
        try:
            return picture.key, crop_and_resize(picture.encoded, box, size), picture.target
        except _UNREADABLE as error:
            self._note_unreadable(picture.key, error, skipped)
        if self.on_error == "drop":
            return None
        return self._first_readable(picture.key, self._open_and_decode, reading, skipped, first_attempt=1)

    def _open_and_decode(self, key: SampleKey) -> tuple[SampleKey, Any, Any]:
        picture = self._open(key)
        assert self.geometry is not None
        crops = self.geometry(np.array([picture.size]), sample_keys(self.seed, [key]))
        size = int(crops.sizes[0, 0]), int(crops.sizes[0, 1])
        return key, crop_and_resize(picture.encoded, crops.boxes[0], size), picture.target

    # ---- both ------------------------------------------------------------------------------------------------

    def _first_readable(
        self,
        key: SampleKey,
        read: Callable[[SampleKey], Any],
        reading: OnRead,
        skipped: list[Skipped],
        first_attempt: int = 0,
    ) -> Any:
        """Returns `read(key)`, or that of the first replacement that can be read; None where it is dropped.

        Which replacements are tried is a function of the key: every rank and every run takes the same.
        """
        for attempt in range(first_attempt, _MOST_REPLACEMENTS + 1):
            asked = key if attempt == 0 else self._replacement(key, attempt)
            reading(asked.sample)
            try:
                return read(asked)
            except _UNREADABLE as error:
                self._note_unreadable(asked, error, skipped)
            except BadSample as error:
                raise error.named(self.describe(asked.sample), self.name) from None
            except UserError:
                raise
            except Exception as error:
                error.add_note(f"while reading {self.describe(asked.sample)} of {self.name}")
                raise
            if self.on_error == "drop":
                return None
        raise UserError(f"{_MOST_REPLACEMENTS} samples in a row could not be read; the last: {skipped[-1].problem}")

    def _note_unreadable(self, key: SampleKey, error: BaseException, skipped: list[Skipped]) -> None:
        reason = re.sub(r" <_io\.[^>]*>", "", " ".join(str(error).split()))  # PIL names files by their address
        message = f"cannot read {self.describe(key.sample)}: {reason}"
        if self.on_error == "raise":
            raise UserError(message, path=self.name) from error
        skipped.append(Skipped(key.sample, message))

    def _replacement(self, key: SampleKey, attempt: int) -> SampleKey:
        draw = uniforms(sample_keys(self.seed, [key]), Stream.REPLACE, attempt)[0, attempt - 1]
        return SampleKey(key.epoch, int(draw * len(self.dataset)), key.repeat)

    def _collate(self, items: list[Any], keys: Sequence[SampleKey], allocate: Allocate) -> Any:
        if not items:
            return None
        try:
            return collate(items, allocate) if self.stacks else in_lists(items, allocate)
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise UserError(self._explain_collate(items, keys, error), path=self.name) from error

    def _explain_collate(self, items: list[Any], keys: Sequence[SampleKey], error: Exception) -> str:
        inputs = [item[0] if isinstance(item, tuple | list) and item else item for item in items]
        for key, value in zip(keys, inputs, strict=True):
            first = inputs[0]
            if isinstance(value, torch.Tensor) and isinstance(first, torch.Tensor) and value.shape != first.shape:
                one_by_one = ", or set eval.batch_size: 1" if self.name == "data.eval" else ""
                return (
                    f"samples {keys[0].sample} and {key.sample} differ in shape ({list(first.shape)} and "
                    f"{list(value.shape)}); make them equal, for images with a resize or crop in data.transforms"
                    f"{one_by_one}"
                )
        return f"samples {[key.sample for key in keys][:4]}... do not make a batch: {one_line(error)}"
