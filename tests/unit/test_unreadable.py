"""`data.on_error`: samples that cannot be read are named, replaced by a rule, or left out, and always counted."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.config_data import DataConfig
from trainer.data.datasets import ImageFolder
from trainer.data.feed import DeviceFeed
from trainer.data.sampler import BatchPlan, StepSampler, named_keys
from trainer.errors import UserError
from trainer.tasks.classification import Classification

CPU = torch.device("cpu")
SEED = 5
BATCH = 6
CROP = [{"name": "RandomResizedCrop", "args": {"size": 24}}]  # the crop decides what is decoded
PLAIN = [{"name": "Resize", "args": {"size": [24, 24], "interpolation": "bicubic"}}]  # pictures are decoded in full
PATHS = pytest.mark.parametrize("transforms", [CROP, PLAIN], ids=["crop", "plain"])

# Kinds of bad files, and what the message says; they are sorted between the good ones.
BAD = {
    "truncated.jpg": "truncated",
    "cut_in_header.jpg": "",
    "garbage.jpg": "cannot identify image file",
    "zero_bytes.jpg": "cannot identify image file",
    "text.png": "cannot identify image file",
    "truncated.png": "truncated",
    "sixteen_bits.png": "convert it to 8 bits",
    "deleted.jpg": "No such file",
    "huge.bmp": "exceeds limit",
}
READABLE = ["cmyk.jpg", "progressive.jpg", "png_named.jpg", "gray.jpg", "palette.png"]
NUM_GOOD = 16
NUM_READABLE = NUM_GOOD + len(READABLE)
NUM_FILES = NUM_READABLE + len(BAD)


def picture(number: int) -> Image.Image:
    low = np.random.default_rng(number).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((50 + number % 9, 40 + number % 5), Image.Resampling.BICUBIC)


def write_bad(file: Path) -> None:
    """Writes the kind of bad file that the name says."""
    image = picture(99).resize((120, 90))
    if file.name == "sixteen_bits.png":
        Image.fromarray(np.full((40, 50), 40_000, np.uint16)).save(file)
    elif file.name == "garbage.jpg":
        file.write_bytes(np.random.default_rng(1).bytes(3000))
    elif file.name == "zero_bytes.jpg":
        file.touch()
    elif file.name == "huge.bmp":
        image.save(file)
        header = bytearray(file.read_bytes())
        header[18:26] = (30_000).to_bytes(4, "little") * 2  # width and height
        file.write_bytes(header)
    elif file.name == "text.png":
        file.write_text("see the other folder")
    else:
        image.save(file)
        size = file.stat().st_size
        if "deleted" not in file.name:
            file.write_bytes(file.read_bytes()[: 60 if "header" in file.name else size // 2])


def write_readable(file: Path) -> None:
    """Writes an unusual picture, of the kind that the name says."""
    image = picture(len(file.name))
    if file.name == "cmyk.jpg":
        image.convert("CMYK").save(file)
    elif file.name == "progressive.jpg":
        image.save(file, progressive=True)
    elif file.name == "png_named.jpg":
        image.save(file, format="PNG")
    elif file.name == "gray.jpg":
        image.convert("L").save(file)
    else:
        image.convert("P").save(file)


def folder(root: Path, bad: Any = BAD) -> ImageFolder:
    """Returns good, unusual and bad pictures; `deleted.jpg` is gone once it has been listed."""
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
    for i in range(NUM_GOOD):
        picture(i).save(root / "ab"[i % 2] / f"good_{i:02}.jpg")
    for name in READABLE:
        write_readable(root / "a" / name)
    for name in bad:
        write_bad(root / "b" / name)
    dataset = ImageFolder(str(root))
    if "deleted.jpg" in bad:
        (root / "b" / "deleted.jpg").unlink()
    return dataset


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    return folder(tmp_path_factory.mktemp("mixed") / "root")


def index_of(dataset: ImageFolder, name: str) -> int:
    return next(i for i, (path, _) in enumerate(dataset.samples) if Path(path).name == name)


def open_feed(
    dataset: Any,
    transforms: list[Any],
    workers: int = 0,
    split: Literal["train", "eval"] = "train",
    on_error: str = "skip",
    max_skipped: float = 1.0,
    seed: int = SEED,
) -> DeviceFeed:
    config = DataConfig.model_validate(
        {
            "train": {"name": "image_folder", "args": {"root": "/"}},
            "transforms": {split: transforms},
            "normalize": {"mean": [0.5] * 3, "std": [0.25] * 3},
            "workers": workers,
            "on_error": on_error,
            "max_skipped": max_skipped,
        }
    )
    return DeviceFeed(dataset, config, split, CPU, seed, Classification(num_classes=2))


class Sample(NamedTuple):
    """One sample that reached the device."""

    number: int
    label: int
    pixels: bytes


class Seen(NamedTuple):
    """The samples of each step, in order, and how many reads failed."""

    steps: list[list[Sample]]
    num_skipped: int


def train(
    dataset: Any,
    transforms: list[Any],
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
    batch_size: int = BATCH,
    epochs: int = 2,
    **settings: Any,
) -> Seen:
    feed = open_feed(dataset, transforms, workers, **settings)
    plan = BatchPlan.split(len(dataset), batch_size, None, ranks, True)
    num_steps = epochs * plan.steps_per_epoch
    try:
        feed.start(StepSampler(plan, rank, SEED), 0, num_steps)
        steps = [
            [sample for batch in feed.step_batches(step) for sample in samples_of(batch)] for step in range(num_steps)
        ]
        return Seen(steps, feed.num_skipped)
    finally:
        feed.close()


def samples_of(batch: Any) -> list[Sample]:
    images, labels = batch.data
    assert images.shape[1:] == (3, 24, 24)
    assert len(images) == len(labels) == len(batch.sample_ids)
    return [
        Sample(index, int(label), image.contiguous().numpy().tobytes())
        for index, label, image in zip(batch.sample_ids.tolist(), labels, images, strict=True)
    ]


# ---- raise -------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("name", BAD)
def test_raise_names_the_sample_and_the_file(name: str, transforms: list[Any], tmp_path: Path) -> None:
    dataset = folder(tmp_path / "root", [name])
    index = index_of(dataset, name)
    with pytest.raises(UserError) as raised:
        train(dataset, transforms, on_error="raise", epochs=1, batch_size=1)
    (problem,) = raised.value.problems
    assert problem.path == "data.train"
    assert problem.message.startswith(f"cannot read sample {index} ('{tmp_path}/root/b/{name}'): ")
    assert BAD[name] in problem.message


@PATHS
def test_raise_is_the_same_with_workers(transforms: list[Any], tmp_path: Path) -> None:
    dataset = folder(tmp_path / "root", ["garbage.jpg"])
    problems = []
    for workers in (0, 2):
        with pytest.raises(UserError) as raised:
            train(dataset, transforms, workers, on_error="raise", epochs=1, batch_size=1)
        problems.append(raised.value.problems)
    assert problems[0] == problems[1]


@PATHS
def test_unusual_pictures_are_read(transforms: list[Any], tmp_path: Path) -> None:
    dataset = folder(tmp_path / "root", [])
    seen = train(dataset, transforms, on_error="raise", batch_size=1, epochs=1)
    assert sorted(sample.number for step in seen.steps for sample in step) == list(range(NUM_READABLE))


# ---- skip, in training -------------------------------------------------------------------------------------------


@PATHS
def test_replacements_do_not_depend_on_workers(transforms: list[Any], mixed: ImageFolder) -> None:
    reference = train(mixed, transforms)
    bad = {index_of(mixed, name) for name in BAD}
    assert all(len(step) == BATCH for step in reference.steps)
    assert not bad & {sample.number for step in reference.steps for sample in step}
    assert all(sample.label == mixed.samples[sample.number][1] for step in reference.steps for sample in step)
    for workers in (1, 4):
        assert train(mixed, transforms, workers) == reference


@PATHS
def test_replacements_do_not_depend_on_ranks(transforms: list[Any], mixed: ImageFolder) -> None:
    reference = train(mixed, transforms)
    for ranks in (2, 3):
        shares = [train(mixed, transforms, rank=rank, ranks=ranks) for rank in range(ranks)]
        for step, expected in enumerate(reference.steps):
            assert Counter(sample for share in shares for sample in share.steps[step]) == Counter(expected)
        assert sum(share.num_skipped for share in shares) == reference.num_skipped


@PATHS
def test_replacements_are_functions_of_seed_epoch_and_sample(transforms: list[Any], mixed: ImageFolder) -> None:
    def by_asked(batch_size: int, seed: int = SEED) -> list[tuple[int, int, Sample]]:
        """Returns (epoch, sample asked for, sample that came), sorted."""
        plan = BatchPlan.split(NUM_FILES, batch_size, None, 1, True)
        sampler = StepSampler(plan, 0, SEED)
        seen = train(mixed, transforms, batch_size=batch_size, epochs=2, seed=seed)
        return sorted(
            (key.epoch, key.sample, came)
            for step, samples in enumerate(seen.steps)
            for key, came in zip(named_keys(sampler.keys(step)), samples, strict=True)
        )

    one, all_ = by_asked(1), by_asked(NUM_FILES)
    assert len(one) == 2 * NUM_FILES
    assert one == all_
    replaced = [(epoch, asked, came.number) for epoch, asked, came in one if came.number != asked]
    assert {asked for _, asked, _ in replaced} == {index_of(mixed, name) for name in BAD}
    first, second = ([came for epoch, _, came in replaced if epoch == e] for e in (0, 1))
    assert len(first) == len(second) == len(BAD)
    assert first != second
    assert len(set(first)) > 1
    assert replaced != [(e, a, c.number) for e, a, c in by_asked(1, seed=6) if c.number != a]


@PATHS
@pytest.mark.parametrize("workers", [0, 2])
def test_skips_are_counted_and_logged(
    transforms: list[Any],
    workers: int,
    mixed: ImageFolder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = train(mixed, transforms, workers, batch_size=1, epochs=1)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(set(warnings)) == len(BAD)
    assert all(message.startswith("data.train: skipped: cannot read sample ") for message in warnings)
    assert all(any(f"/b/{name}'" in message for message in warnings) for name in BAD)
    # One read of each bad file, and those replacements that were bad as well.
    assert len(BAD) <= seen.num_skipped < 3 * len(BAD)


# ---- skip, in evaluation -----------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (2, 1), (0, 2)])
def test_evaluation_sees_each_readable_sample_once(
    transforms: list[Any], workers: int, ranks: int, mixed: ImageFolder
) -> None:
    transforms = [{"name": "Resize", "args": {"size": [24, 24]}}] if transforms == CROP else transforms
    seen: list[int] = []
    num_skipped = 0
    for rank in range(ranks):
        feed = open_feed(mixed, transforms, workers, "eval")
        for batch in feed.eval_batches(4, rank, ranks):
            assert batch.num_samples == len(samples_of(batch)) > 0
            seen += batch.sample_ids.tolist()
        num_skipped += feed.num_skipped
        feed.close()
    bad = {index_of(mixed, name) for name in BAD}
    assert sorted(seen) == [i for i in range(NUM_FILES) if i not in bad]
    assert num_skipped == len(BAD)


@PATHS
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_without_a_readable_sample_is_left_out(transforms: list[Any], workers: int, tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
    for i in range(12):
        picture(i).save(tmp_path / "a" / f"{i:02}.jpg")
        if 4 <= i < 6:
            write_bad(tmp_path / "a" / "garbage.jpg")
            (tmp_path / "a" / "garbage.jpg").rename(tmp_path / "a" / f"{i:02}.jpg")
        elif 6 <= i < 8:
            write_bad(tmp_path / "a" / "truncated.jpg")
            (tmp_path / "a" / "truncated.jpg").rename(tmp_path / "a" / f"{i:02}.jpg")
    picture(0).save(tmp_path / "b" / "0.jpg")
    transforms = [{"name": "Resize", "args": {"size": [24, 24]}}] if transforms == CROP else transforms
    feed = open_feed(ImageFolder(str(tmp_path)), transforms, workers, "eval")
    batches = [batch.sample_ids.tolist() for batch in feed.eval_batches(4, 0, 1)]
    feed.close()
    assert batches == [[0, 1, 2, 3], [8, 9, 10, 11], [12]]
    assert feed.num_skipped == 4


# ---- too many ----------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_end_the_run(transforms: list[Any], workers: int, mixed: ImageFolder) -> None:
    share = 4.5 / NUM_FILES  # the fifth is too many
    with pytest.raises(UserError) as raised:
        train(mixed, transforms, workers, batch_size=1, epochs=3, max_skipped=share)
    (problem,) = raised.value.problems
    assert problem.path == "data.train"
    assert problem.message.startswith("5 of ")
    assert f"more than data.max_skipped ({share:g}); the last: cannot read sample " in problem.message
    assert any(f"/b/{name}'" in problem.message for name in BAD)
    train(mixed, transforms, workers, epochs=1, max_skipped=len(BAD) / NUM_FILES)  # no more than that: all is well


@PATHS
def test_too_many_in_evaluation(transforms: list[Any], mixed: ImageFolder) -> None:
    transforms = [{"name": "Resize", "args": {"size": [24, 24]}}] if transforms == CROP else transforms
    feed = open_feed(mixed, transforms, 0, "eval", max_skipped=0.05)
    with pytest.raises(UserError, match=r"data\.eval: 3 of the first \d+ samples cannot be read"):
        list(feed.eval_batches(4, 0, 1))


@PATHS
def test_nothing_but_unreadable_samples(transforms: list[Any], tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(4):
            (tmp_path / label / f"{i}.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="10 samples in a row could not be read; the last: cannot read sample"):
        train(ImageFolder(str(tmp_path)), transforms, batch_size=2)
