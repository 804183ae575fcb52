"""`data.eval_share`: which samples are held out, and that runs neither train on them nor augment them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Train, WriteConfig
from picture_trees import make_class_folders
from run_results import summary

from trainer.cli import main
from trainer.config_data import CacheConfig
from trainer.data.arrays import as_array_pictures
from trainer.data.datasets import Digits, ImageFolder, TorchFile
from trainer.data.held_out import held_out_indices, hold_out
from trainer.data.modes import gives_encoded
from trainer.data.packed import PackedImages
from trainer.data.packing import pack_folder
from trainer.errors import UserError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("share", [0.1, 0.15, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("num_samples", [10, 97, 1000])
def test_every_stretch_gives_its_share(num_samples: int, share: float) -> None:
    chosen = held_out_indices(num_samples, share)
    assert len(chosen) == len(set(chosen.tolist())) == round(num_samples * share)
    assert chosen.tolist() == sorted(chosen.tolist())
    for end in range(num_samples + 1):
        assert abs((chosen < end).sum() - end * share) <= 1.5
    assert np.array_equal(chosen, held_out_indices(num_samples, share))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    make_class_folders(tmp_path, {"photos": 10})
    return tmp_path / "photos"


def test_parts_of_an_image_folder(pictures: Path) -> None:
    whole = ImageFolder(str(pictures))
    train, evaluation = hold_out(whole, 0.2)
    assert isinstance(train, ImageFolder)
    assert isinstance(evaluation, ImageFolder)
    assert sorted(train.samples + evaluation.samples) == whole.samples
    assert [evaluation.targets.count(label) for label in range(4)] == [2, 2, 2, 2]
    assert evaluation.classes == whole.classes
    assert evaluation[3][1] == evaluation.encoded(3)[1] == evaluation.targets[3]


def test_parts_of_packed_images_are_decoded_where_it_is_cheapest(pictures: Path, tmp_path: Path) -> None:
    source = ImageFolder(str(pictures))
    whole = PackedImages(
        pack_folder(source, CacheConfig(path=str(tmp_path / "packed")), num_workers=0), read_ahead=False
    )
    _, evaluation = hold_out(whole, 0.2)
    chosen = held_out_indices(40, 0.2)
    assert gives_encoded(evaluation)
    assert evaluation.encoded(1)[1] == whole.encoded(int(chosen[1]))[1]  # type: ignore[attr-defined]
    assert evaluation.source_name(1) == whole.source_name(int(chosen[1]))  # type: ignore[attr-defined]


def test_parts_of_other_data_sets() -> None:
    whole = Digits("train")
    train, evaluation = hold_out(whole, 0.25)
    assert len(train) + len(evaluation) == len(whole)
    assert torch.equal(evaluation[7][0], whole[int(held_out_indices(len(whole), 0.25)[7])][0])
    assert evaluation.classes == whole.classes  # type: ignore[attr-defined]


@pytest.mark.parametrize(("share", "which"), [(0.01, "none"), (0.99, "all")])
def test_an_empty_part_is_refused(pictures: Path, share: float, which: str) -> None:
    with pytest.raises(UserError, match=f"of the 40 samples of data.train is {which}"):
        hold_out(ImageFolder(str(pictures)), share)


def test_a_folder_of_class_folders_trains_and_is_evaluated(
    pictures: Path, tmp_path: Path, train: Train, capfd: pytest.CaptureFixture[str]
) -> None:
    config: dict[str, Any] = {
        "run": {"name": "photos", "dir": str(tmp_path / "run")},
        "data": {
            "train": {"name": "image_folder", "args": {"root": str(pictures)}},
            "eval_share": 0.2,
            "transforms": {
                "train": [{"name": "RandomResizedCrop", "args": {"size": 16}}],
                "eval": [{"name": "Resize", "args": {"size": 20}}, {"name": "CenterCrop", "args": {"size": 16}}],
            },
            "cache": {"path": str(tmp_path / "packed"), "max_size": 24},
            "workers": 0,
        },
        "model": {"name": "small_cnn", "args": {"in_channels": 3}},
        "optim": {"name": "adamw", "lr": 0.01},
        "train": {"epochs": 2, "batch_size": 8},
        "tracking": {"trackers": []},
    }
    file = tmp_path / "photos.yaml"
    file.write_text(yaml.safe_dump(config))
    done = train("--config", file)
    assert done.code == 0, done.err
    found = summary(tmp_path / "run")
    assert found["samples"] == 2 * 32
    assert len(list((tmp_path / "packed").iterdir())) == 2
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    again = yaml.safe_load(capfd.readouterr().out.splitlines()[-1])  # random crops would give another loss
    assert again["loss"] == pytest.approx(found["metrics"]["eval/loss"])
    again_with = train("--config", file, "data.eval_share=0.3")
    assert again_with.code == 2
    assert "data.eval_share: 0.2 in the checkpoint, 0.3 now; this cannot change in a run" in again_with.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__eval_share": 0.1}, "data: set either eval or eval_share, not both"),
        ({"data__eval": None, "data__eval_share": 1.5}, "data.eval_share: must be less than 1 (got 1.5)"),
        (
            {"data__eval": None, "data__eval_share": 0.1, "task": {"name": "segmentation"}},
            "data.eval_share: the task segmentation asks its data sets more than samples: set data.eval",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    changes: dict[str, Any], message: str, train: Train, write_config: WriteConfig
) -> None:
    done = train("--config", write_config(**changes))
    assert done.code == 2
    assert message in done.err


class Scored(ImageFolder):
    """One that keeps more than files and labels per sample."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.scores = [float(i) for i in range(len(self.samples))]

    def __getitem__(self, index: int) -> Any:
        return self.samples[index][0], self.scores[index]


def test_what_a_subclass_keeps_stays_with_its_sample(pictures: Path) -> None:
    whole = Scored(str(pictures))
    pairs = dict(whole[i] for i in range(len(whole)))
    for part in hold_out(whole, 0.2):
        assert dict(part[i] for i in range(len(part))).items() <= pairs.items()


def test_parts_of_arrays_stay_arrays(tmp_path: Path) -> None:
    images, labels = torch.randint(256, (20, 3, 4, 4), dtype=torch.uint8), torch.arange(20)
    torch.save((images, labels), tmp_path / "data.pt")
    whole = TorchFile(str(tmp_path / "data.pt"))
    _, evaluation = hold_out(whole, 0.2)
    part = as_array_pictures(evaluation)
    assert part is not None
    assert len(part) == 4
    chosen = held_out_indices(20, 0.2)
    for i, index in enumerate(chosen):
        pixels, label = part.encoded(i)
        assert label == labels[index]
        assert torch.equal(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1), images[index])
        assert part[i][1] == label


def test_more_pictures_than_the_run_had_are_not_evaluated(
    pictures: Path, tmp_path: Path, train: Train, write_config: WriteConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    config: dict[str, Any] = {
        "data": {
            "train": {"name": "image_folder", "args": {"root": str(pictures)}},
            "eval_share": 0.2,
            "transforms": {name: [{"name": "CenterCrop", "args": {"size": 16}}] for name in ("train", "eval")},
            "workers": 0,
        },
        "model": {"name": "small_cnn", "args": {"in_channels": 3}},
        "train": {"steps": 1, "batch_size": 8},
    }
    assert train("--config", write_config(**config)).code == 0
    first = next(pictures.rglob("*.*"))
    (first.parent / f"0-more{first.suffix}").write_bytes(first.read_bytes())
    capfd.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "data.train: has other samples than the 32 of the run" in capfd.readouterr().err
