"""Whole runs that use what the feed offers: packed data, augmentation, resident data, skipped samples, resume."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Train, WriteConfig, few
from PIL import Image
from run_results import losses, summary

from trainer.cli import main
from trainer.data.datasets import ImageFolder
from trainer.runtime import Runtime

NORMALIZE = {"mean": [0.5] * 3, "std": [0.25] * 3}
CROPS = [{"name": "RandomResizedCrop", "args": {"size": 16}}, {"name": "RandomHorizontalFlip"}]
FEEDS = ["host", "resident", "device_decode"]
EVAL = [{"name": "Resize", "args": {"size": 18}}, {"name": "CenterCrop", "args": {"size": 16}}]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """30 pictures: class a is dark, class b is bright."""
    rng = np.random.default_rng(0)
    for i in range(30):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 90, (24, 30, 3)) + 150 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.jpg", quality=95)
    return tmp_path / "photos"


@pytest.fixture
def photo_config(photos: Path, write_config: WriteConfig) -> WriteConfig:
    def write(name: str = "photos.yaml", **changes: Any) -> Path:
        folder = {"name": "image_folder", "args": {"root": str(photos)}}
        base = {
            "data": {
                "train": folder,
                "eval": folder,
                "transforms": {"train": CROPS, "eval": EVAL},
                "normalize": NORMALIZE,
                "workers": 0,
            },
            "model": {"name": "small_cnn", "args": {"width": 8, "in_channels": 3}},
            "train__epochs": 4,
            "train__batch_size": 10,
        }
        return write_config(name, **{**base, **changes})

    return write


@pytest.mark.parametrize("feed", few(FEEDS, "device_decode"))
def test_photos_are_learned_in_every_mode(feed: str, train: Train, photo_config: WriteConfig, tmp_path: Path) -> None:
    code, _, err = train("--config", photo_config(data__feed=feed, train__epochs=8))
    assert (code, err) == (0, "")
    assert summary(tmp_path / "run")["metrics"]["eval/accuracy"] == 1.0
    assert summary(tmp_path / "run")["skipped_samples"] == 0


@pytest.mark.parametrize("feed", few(FEEDS, "host", "resident"))
def test_resume_in_mid_epoch_is_exact(feed: str, train: Train, photo_config: WriteConfig, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "data__feed": feed,
        "data__augment": {"mixup": 0.3, "erase": 0.5},
        "checkpoint__every": 4,
    }
    assert train("--config", photo_config(**settings), "train.epochs=null", "train.steps=4").code == 0
    assert train("--config", photo_config(**settings), "train.epochs=null", "train.steps=9").code == 0
    whole = f"run.dir={tmp_path}/whole"
    assert train("--config", photo_config(**settings), "train.epochs=null", "train.steps=9", whole).code == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_workers_do_not_change_a_run(train: Train, photo_config: WriteConfig, tmp_path: Path) -> None:
    file = photo_config()
    for workers in (0, 1, "auto"):
        run = f"run.dir={tmp_path}/{workers}"
        assert train("--config", file, f"data.workers={workers}", run, "data.prefetch=3").code == 0
    assert losses(tmp_path / "0") == losses(tmp_path / "1") == losses(tmp_path / "auto")


def test_mixing_gives_soft_targets_in_training_alone(
    train: Train, photo_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.tasks.classification import Classification

    seen: dict[str, set[tuple[torch.dtype, int]]] = {"train": set(), "eval": set()}
    loss_sum = Classification.loss_sum

    def record(self: Classification, outputs: torch.Tensor, data: Any) -> torch.Tensor:
        targets = self.targets(data)
        seen["train" if torch.is_grad_enabled() else "eval"].add((targets.dtype, targets.ndim))
        return loss_sum(self, outputs, data)

    monkeypatch.setattr(Classification, "loss_sum", record)
    smoothing = {"name": "cross_entropy", "args": {"label_smoothing": 0.1}}
    assert (
        train("--config", photo_config(data__augment={"mixup": 0.4, "cutmix": 1.0}, task={"loss": smoothing})).code == 0
    )
    assert seen == {"train": {(torch.float32, 2)}, "eval": {(torch.int64, 1)}}


def test_an_odd_micro_batch_has_no_pairs(train: Train, photo_config: WriteConfig) -> None:
    code, _, err = train("--config", photo_config(data__augment={"mixup": 0.4}, train__micro_batch_size=5))
    assert code == 2
    assert "train.micro_batch_size: augmentation mixes pairs of samples, and 5 samples are not whole pairs" in err


def test_augmentation_of_what_is_no_picture_is_refused(train: Train, write_config: WriteConfig) -> None:
    code, _, err = train("--config", write_config(data__augment={"erase": 0.4}))
    assert code == 2
    assert "data.augment: augmentation on the device needs images" in err


def test_the_precision_of_the_step_is_that_of_its_images(
    train: Train, photo_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.small_models import SmallCNN

    seen = set()
    forward = SmallCNN.forward

    def record(self: SmallCNN, images: torch.Tensor) -> torch.Tensor:
        if images.device.type != "meta":  # where FLOPs are counted
            seen.add((images.dtype, images.is_contiguous(memory_format=torch.channels_last)))
        return forward(self, images)

    monkeypatch.setattr(SmallCNN, "forward", record)
    assert train("--config", photo_config(precision="bf16", train__epochs=1)).code == 0
    assert seen == {(torch.bfloat16, True)}


def test_a_cache_is_made_once_and_noticed_when_the_source_changes(
    train: Train, photo_config: WriteConfig, photos: Path, tmp_path: Path
) -> None:
    cache = {"path": str(tmp_path / "packed"), "encoding": "raw", "max_size": None}
    file = photo_config()
    assert train("--config", file, f"run.dir={tmp_path}/plain").code == 0
    file = photo_config(data__cache=cache)
    for name in ("first", "second"):
        code, out, _ = train("--config", file, f"run.dir={tmp_path}/{name}")
        assert code == 0
        assert ("packed 30 images" in out) == (name == "first")
        assert losses(tmp_path / name) == losses(tmp_path / "plain")
    assert len(list((tmp_path / "packed").iterdir())) == 1  # one for training and evaluation: the same folder
    Image.new("RGB", (24, 24)).save(photos / "a" / "new.jpg")
    code, out, _ = train("--config", file, f"run.dir={tmp_path}/third")
    assert code == 0
    assert "packed 31 images" in out


def test_the_pack_command_makes_the_cache_that_a_run_reads(
    train: Train, photo_config: WriteConfig, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--max-size", "20", "--encoding", "mixed", "--quality", "80", "--workers", "0", "--verify"]
    assert main(["pack", str(photos), str(tmp_path / "packed"), *arguments]) == 0
    folder = Path(capfd.readouterr().out.strip())
    assert folder.parent == tmp_path / "packed"
    cache = {"path": str(tmp_path / "packed"), "encoding": "mixed", "max_size": 20, "quality": 80}
    _, out, _ = train("--config", photo_config(data__cache=cache))
    assert "packed" not in out
    assert list((tmp_path / "packed").iterdir()) == [folder]
    packed = {"name": "packed_images", "args": {"folder": str(folder)}}
    photos.rename(tmp_path / "gone")
    file = photo_config(data__cache=None, data__train=packed, data__eval=packed)
    assert train("--config", file, f"run.dir={tmp_path}/from_pack").code == 0
    assert losses(tmp_path / "from_pack") == losses(tmp_path / "run")


def test_pack_refuses_bad_settings(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(photos), str(tmp_path / "packed"), "--quality", "101"]) == 2
    assert capfd.readouterr().err == "error: quality: must be less than or equal to 100 (got 101)\n"


def test_only_image_folders_are_packed(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    code, _, err = train("--config", write_config(data__cache={"path": str(tmp_path)}))
    assert code == 2
    assert "data.cache: image folders are packed, and neither data.train nor data.eval is one" in err


@pytest.mark.parametrize("feed", ["host", "device_decode"])
def test_unreadable_samples_are_counted(
    feed: str, train: Train, photo_config: WriteConfig, photos: Path, tmp_path: Path
) -> None:
    broken = sorted(photos.glob("a/*.jpg"))[3]
    broken.write_bytes(broken.read_bytes()[:200])
    file = photo_config(data__feed=feed, train__epochs=2)
    code, _, err = train("--config", file)
    assert code == 2
    assert str(broken) in err
    assert "Traceback" not in err
    code, out, _ = train("--config", file, "data.on_error=skip", "data.max_skipped=0.05", "checkpoint.resume=auto")
    assert code == 0, out
    assert str(broken) in out
    assert summary(tmp_path / "run")["skipped_samples"] >= 4  # once per epoch of training, and per evaluation
    code, _, err = train("--config", file, "data.on_error=skip", "data.max_skipped=0.02", f"run.dir={tmp_path}/strict")
    assert code == 2
    assert "1 of the first 30 samples cannot be read, more than data.max_skipped (0.02)" in err
    assert str(broken) in err


@pytest.mark.parametrize("pinned", [True, False])
def test_processes_of_one_machine_are_placed(
    pinned: bool, monkeypatch: pytest.MonkeyPatch, write_config: WriteConfig, caplog: pytest.LogCaptureFixture
) -> None:
    from conftest import forget_accelerate

    from trainer.config import load_config

    placed: list[tuple[int, int]] = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def place(device: torch.device, local_rank: int, num_local_ranks: int) -> str:
        placed.append((local_rank, num_local_ranks))
        return "runs on its cores"

    monkeypatch.setattr("trainer.runtime.place_this_process", place)
    forget_accelerate()
    with caplog.at_level(logging.INFO, logger="lockstep"):
        Runtime(load_config(str(write_config(parallel__pin_cores=pinned))))
    assert placed == ([(0, 2)] if pinned else [])
    assert ("runs on its cores" in caplog.text) == pinned


def test_the_way_to_the_device_is_logged(
    photo_config: WriteConfig, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    _, out, _ = train("--config", photo_config(train__epochs=1))
    assert "data.train: feed host: there is no GPU to keep it on" in out
    _, out, _ = train("--config", photo_config(train__epochs=1), "data.feed=resident")
    assert "data.train: feed resident: its pixels take" in out


def test_labels_are_checked_before_they_live_on_the_device(
    train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    images, labels = torch.zeros(30, 1, 8, 8, dtype=torch.uint8), torch.arange(30) % 3
    labels[7] = 9
    torch.save((images, labels), tmp_path / "data.pt")
    data = {
        "train": {"name": "torch_file", "args": {"path": str(tmp_path / "data.pt")}},
        "normalize": {"mean": [0.5], "std": [0.5]},
        "feed": "resident",
    }
    model = {"name": "small_cnn", "args": {"width": 8, "num_classes": 3}}
    code, _, err = train("--config", write_config(data=data, model=model))
    assert code == 2
    assert "data.train: sample 7 has label 9; the model's are 0 to 2" in err


class Relabelled(ImageFolder):
    """A user's subclass that changes what an item is."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image, 1 - label


def test_a_subclass_that_changes_items_is_read_through_them(photos: Path) -> None:
    from trainer.config_data import DataConfig
    from trainer.data.feed import DeviceFeed
    from trainer.tasks.classification import Classification

    config = DataConfig.model_validate(
        {"train": {"name": "x:y"}, "transforms": {"train": CROPS, "eval": EVAL}, "workers": 0}
    )
    labels = []
    for dataset in (ImageFolder(str(photos)), Relabelled(str(photos))):
        feed = DeviceFeed(dataset, config, "eval", torch.device("cpu"), 0, Classification(num_classes=2))
        labels.append(torch.cat([batch.data[1] for batch in feed.eval_batches(8, 0, 1)]))
    assert torch.equal(labels[1], 1 - labels[0])


def test_mistakes_are_found_before_anything_is_packed(train: Train, photo_config: WriteConfig, tmp_path: Path) -> None:
    cache = {"path": str(tmp_path / "packed")}
    wrong: list[dict[str, Any]] = [
        {"data__transforms": {"train": [{"name": "RandomResizedCop"}]}},
        {"train__micro_batch_size": 3},
    ]
    for changes in wrong:
        assert train("--config", photo_config(data__cache=cache, **changes)).code == 2
    code, _, err = train("--config", photo_config(data__cache={**cache, "encoding": "raw"}, data__feed="device_decode"))
    assert code == 2
    assert "data: feed: device_decode decodes JPEGs, and cache.encoding is raw" in err
    assert not (tmp_path / "packed").exists()


def test_evaluating_a_run_does_not_move_or_pack_its_training_data(
    train: Train, photo_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("--config", photo_config(data__feed="resident")).code == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    captured = capfd.readouterr()
    assert captured.err.count("pictures, ") == 1  # those of the evaluation
    assert json.loads(captured.out)["accuracy"] == summary(tmp_path / "run")["metrics"]["eval/accuracy"]


def test_keys_without_effect_are_named(train: Train, photo_config: WriteConfig) -> None:
    _, out, _ = train("--config", photo_config(train__epochs=1), "data.feed=resident", "data.prefetch=3")
    assert "without effect here: data.workers, data.prefetch" in out
    _, out, _ = train("--config", photo_config("b.yaml", train__epochs=1), "run.name=b", "checkpoint.resume=auto")
    assert "without effect" not in out


def test_a_model_that_views_its_input_gets_a_line(train: Train, photo_config: WriteConfig) -> None:
    code, _, err = train("--config", photo_config(model={"name": "test_feed_training:Viewing"}))
    assert code == 2
    assert "model: the model views its input as flat, but images come in channels_last memory" in err


class Viewing(torch.nn.Module):
    """A model that takes its input for contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3 * 16 * 16, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(images.view(len(images), -1))
        return out


def test_a_loss_that_takes_labels_alone_is_named_when_samples_are_mixed(
    train: Train, photo_config: WriteConfig
) -> None:
    loss = {"name": "torch.nn.functional:nll_loss"}
    code, _, err = train("--config", photo_config(data__augment={"mixup": 0.4}, task={"loss": loss}))
    assert code == 2
    assert "task.loss: with mixed samples the loss gets class probabilities" in err
    wide = {"name": "resnet18", "args": {"num_classes": 7}}
    assert train("--config", photo_config(data__augment={"mixup": 0.4}, model=wide, train__epochs=1)).code == 0
