"""Transforms that change inputs and targets together, and batches that are not stacked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Alone
from picture_trees import make_voc
from PIL import Image
from segments import Segments
from torchvision import datasets, tv_tensors
from torchvision.datasets import voc as voc_of_torchvision
from torchvision.transforms import v2

from trainer.config_data import DataConfig
from trainer.config_values import Component
from trainer.data.datasets import build_dataset, class_names
from trainer.data.feed import DeviceFeed
from trainer.data.joint import JointTransform, with_typed_samples
from trainer.data.nested import in_lists
from trainer.data.sampler import BatchPlan, StepSampler
from trainer.data.transforms import build_transforms
from trainer.errors import BadSample, UserError
from trainer.tasks.base import Task
from trainer.tasks.segmentation import Segmentation

CPU = torch.device("cpu")
CROP = {"name": "RandomCrop", "args": {"size": 32, "pad_if_needed": True, "fill": {"Image": 0, "Mask": 255}}}
FLIP = {"name": "RandomHorizontalFlip"}


class Objects(Segmentation):
    """Takes samples as detection does."""

    stacks = False

    def check(self, data: Any, sample_ids: torch.Tensor) -> None:
        """Finds nothing wrong."""


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voc")
    make_voc(root, {"train": 8, "val": 3})
    return root


def feed(dataset: Any, task: Task, split: Any = "train", **data: Any) -> DeviceFeed:
    section = {"train": {"name": "x:y"}, "workers": 0, **data}
    return DeviceFeed(dataset, DataConfig.model_validate(section), split, CPU, 0, task)


def batches(f: DeviceFeed, num_samples: int, batch_size: int) -> list[Any]:
    f.start(StepSampler(BatchPlan.split(num_samples, batch_size, None, 1, False), 0, 0), 0, 2)
    found = [[b.data[0], b.data[1]] for step in range(2) for b in f.step_batches(step)]
    f.close()
    return found


def test_images_and_masks_are_cropped_and_flipped_alike() -> None:
    image = torch.arange(20 * 30, dtype=torch.int32).remainder(251).to(torch.uint8).reshape(1, 20, 30).expand(3, -1, -1)
    transforms = build_transforms([Component.model_validate(c) for c in (CROP, FLIP)], "data.transforms.train")
    found = JointTransform(transforms, "input", "target")([image, image[0]])
    assert [type(part) for part in found] == [torch.Tensor, torch.Tensor]
    assert (found[0].shape, found[1].shape) == ((3, 32, 32), (32, 32))
    is_padding = found[1] == 255
    assert 0 < int(is_padding.sum()) < 32 * 32
    assert torch.equal(found[0][0][~is_padding], found[1][~is_padding])
    assert int(found[0][0][is_padding].max()) == 0


def test_boxes_follow_their_image_and_numbers_become_tensors() -> None:
    target = {"boxes": [[1, 2, 5, 9]], "labels": [3], "image_id": 7, "name": "a.jpg"}
    image = Image.new("RGB", (30, 20), (9, 8, 7))
    pixels, found = JointTransform([v2.RandomHorizontalFlip(1.0)], "input", "target")((image, target))
    assert (type(pixels), pixels.dtype, tuple(pixels.shape)) == (torch.Tensor, torch.uint8, (3, 20, 30))
    assert found["boxes"].tolist() == [[25, 2, 29, 9]]
    assert {key: type(value) for key, value in found.items() if key != "name"} == dict.fromkeys(
        ("boxes", "labels", "image_id"), torch.Tensor
    )
    assert (found["labels"].tolist(), int(found["image_id"]), found["name"]) == ([3], 7, "a.jpg")
    empty = JointTransform([v2.RandomHorizontalFlip(1.0)], "input", "target")((image, {"boxes": [], "labels": []}))
    assert (tuple(empty[1]["boxes"].shape), empty[1]["labels"].dtype) == ((0, 4), torch.int64)


def test_transforms_of_a_users_own_get_and_return_both() -> None:
    image, mask = Segments(4)[1]
    own = build_transforms([Component(name="segments:Turned")], "data.transforms.train")
    found = JointTransform(own, "image", "mask")({"image": image, "mask": mask, "index": 1})
    assert torch.equal(found["image"], image.flip(-1))
    assert torch.equal(found["mask"], mask.flip(-1))
    assert found["index"] == 1
    forgets = build_transforms([Component(name="segments:ForgetsTheTarget")], "data.transforms.train")
    with pytest.raises(UserError, match=r"ForgetsTheTarget must return \(input, target\)"):
        JointTransform(forgets, "input", "target")([image, mask])
    with pytest.raises(UserError, match=r"train\.0: 'OnlyTheInput' must take \(input, target\)"):
        feed(Segments(4), Segmentation(), transforms={"train": [{"name": "segments:OnlyTheInput"}]})


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(BadSample, match="has a mask of 4x5 pixels for an image of 30x20"):
        JointTransform([], "input", "target")((Image.new("RGB", (30, 20)), np.zeros((5, 4), np.uint8)))


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_and_masks_of_voc_become_one_batch(voc: Path, workers: int) -> None:
    data = build_dataset(Component(name="VOCSegmentation", args={"root": str(voc)}), "data.train", Alone())
    names = class_names(data)
    assert names is not None
    assert (len(names), names[0], names[15]) == (21, "__background__", "person")
    task = Segmentation(num_classes=21)
    found = batches(feed(data, task, workers=workers, transforms={"train": [CROP, FLIP]}), 8, 4)
    again = batches(feed(data, task, transforms={"train": [CROP, FLIP]}), 8, 4)
    for (images, masks), (images_again, masks_again) in zip(found, again, strict=True):
        assert (images.shape, images.dtype) == ((4, 3, 32, 32), torch.float32)
        assert 0 <= float(images.min()) < float(images.max()) <= 1
        assert (masks.shape, masks.dtype) == ((4, 1, 32, 32), torch.uint8)
        assert set(masks.unique().tolist()) == {0, 1, 2, 255}
        assert torch.equal(images, images_again)
        assert torch.equal(masks, masks_again)
        is_box = task.targets([images, masks]) == 1
        red = images.permute(0, 2, 3, 1)[is_box]
        assert float((red[:, 0] - red[:, 2]).median()) > 0.3  # the mask lies where the red box is


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_of_any_size_travel_in_lists(workers: int) -> None:
    class AnySize(Segments):
        def __getitem__(self, index: int) -> Any:
            image, _ = super().__getitem__(index)
            boxes = torch.arange(4.0 * (index % 2)).reshape(-1, 4)
            return image[:, : 4 + index], {"boxes": boxes, "labels": torch.zeros(index % 2, dtype=torch.int64)}

    data = AnySize(6)
    f = feed(data, Objects(), workers=workers, normalize={"mean": [0.5] * 3, "std": [0.25] * 3})
    f.start(StepSampler(BatchPlan.split(6, 3, None, 1, False), 0, 0), 0, 2)
    seen = []
    for step in range(2):
        for batch in f.step_batches(step):
            images, targets = batch.data
            for index, image, target in zip(batch.sample_ids.tolist(), images, targets, strict=True):
                expected, boxes = data[index]
                assert torch.allclose(image, (expected / 255 - 0.5) / 0.25, atol=1e-6)
                assert image.dtype == torch.float32
                assert {key: value.tolist() for key, value in target.items()} == {
                    key: value.tolist() for key, value in boxes.items()
                }
                assert target["boxes"].shape == (index % 2, 4)
                seen.append(index)
    f.close()
    assert sorted(seen) == [0, 1, 2, 3, 4, 5]


def test_lists_hold_copies_of_what_samples_are() -> None:
    sample: dict[str, Any] = {"input": torch.ones(2), "target": {"labels": torch.ones(1), "name": "a"}}
    found = in_lists([sample], lambda shape, dtype: torch.empty(shape, dtype=dtype))
    sample["input"].zero_()
    assert found["input"][0].tolist() == [1, 1]
    assert found["target"][0]["name"] == "a"
    with pytest.raises(KeyError, match="different keys"):
        in_lists([sample, {"input": 1}], lambda shape, dtype: torch.empty(shape, dtype=dtype))


def test_coco_samples_are_boxes_and_labels_also_where_there_is_none(tmp_path: Path) -> None:
    for number in (1, 2):
        Image.new("RGB", (30, 20), (9, 8, 7)).save(tmp_path / f"{number}.jpg")
    annotations = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 30, "height": 20} for n in (1, 2)],
        "annotations": [{"id": 1, "image_id": 2, "bbox": [3, 4, 10, 5], "category_id": 4, "iscrowd": 0, "area": 50}],
        "categories": [{"id": 2, "name": "cat"}, {"id": 4, "name": "dog"}],
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(annotations))
    data = datasets.CocoDetection(str(tmp_path), str(file))
    typed = with_typed_samples(data, ("boxes", "labels", "image_id", "area"))
    assert typed.source_name(1) == "2.jpg"  # type: ignore[attr-defined]
    transform = JointTransform([v2.RandomHorizontalFlip(1.0)], "input", "target")
    assert isinstance(typed[1][1]["boxes"], tv_tensors.BoundingBoxes)
    some, none = transform(typed[1])[1], transform(typed[0])[1]
    assert some["boxes"].tolist() == [[17, 4, 27, 9]]
    assert (some["labels"].tolist(), some["area"].tolist(), int(some["image_id"])) == ([4], [50], 2)
    assert {key: tuple(value.shape) for key, value in none.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "image_id": (),
        "area": (0,),
    }


def test_bad_samples_are_named_by_their_file(voc: Path, tmp_path: Path) -> None:
    make_voc(tmp_path, {"train": 2})
    masks = tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    data = datasets.VOCSegmentation(str(tmp_path))
    with pytest.raises(UserError, match=r"data\.train: sample \d \('.*train_00000\d\.jpg'\) has label \d in its mask"):
        batches(feed(data, Segmentation(num_classes=1)), 2, 1)
    Image.new("P", (7, 9)).save(masks / "train_000001.png")
    message = r"data\.train: sample 1 \('.*train_000001\.jpg'\) has a mask of 7x9 pixels for an image of 48x40"
    for workers in (0, 1):
        f = feed(datasets.VOCSegmentation(str(tmp_path)), Segmentation(num_classes=21), workers=workers)
        with pytest.raises(UserError, match=message):
            batches(f, 2, 1)
        f.close()
    crop = {"train": [{"name": "RandomCrop", "args": {"size": 99}}]}
    message = (
        r"data\.train: sample \d \('.*jpg'\) does not go through RandomCrop: Required crop size \(99, 99\) is larger"
    )
    with pytest.raises(UserError, match=message):
        batches(feed(datasets.VOCSegmentation(str(voc)), Segmentation(num_classes=21), transforms=crop), 2, 1)
    (masks / "train_000001.png").write_bytes(b"no picture")
    f = feed(datasets.VOCSegmentation(str(tmp_path)), Segmentation(num_classes=21), on_error="skip", max_skipped=1.0)
    assert [len(images) for images, _ in batches(f, 2, 1)] == [1, 1]
    f = feed(
        datasets.VOCSegmentation(str(tmp_path)), Segmentation(num_classes=21), "eval", on_error="skip", max_skipped=1.0
    )
    assert [b.num_samples for b in f.eval_batches(2, 0, 1)] == [1]


@pytest.mark.parametrize("augment", [{"mixup": 0.2}, {"cutmix": 1.0}, {"erase": 0.1}])
def test_what_changes_inputs_alone_is_refused(augment: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"data\.augment: mixup, cutmix and erase are not for this task: its targets"):
        feed(Segments(4), Segmentation(num_classes=3), augment=augment)


def test_pictures_are_not_normalised_among_the_transforms(voc: Path) -> None:
    normalize = {"name": "Normalize", "args": {"mean": [0.5], "std": [0.5]}}
    data, task = datasets.VOCSegmentation(str(voc)), Segmentation(num_classes=21)
    with pytest.raises(UserError, match=r"^data\.transforms\.train\.1: .* use data\.normalize"):
        feed(data, task, transforms={"train": [CROP, normalize]})
    floats = [CROP, {"name": "ToImage"}, {"name": "ToDtype", "args": {"dtype": "float32", "scale": True}}, normalize]
    images, _ = batches(feed(data, task, transforms={"train": floats}), 2, 1)[0]
    assert float(images.min()) < -0.5
    f = feed(data, task, transforms={"train": [CROP, floats[2], normalize]})
    with pytest.raises(UserError, match=r"Normalize does not take what it is given: .*; use data\.normalize"):
        batches(f, 2, 1)


@pytest.mark.parametrize("mode", ["resident", "device_decode"])
def test_ways_that_pass_over_targets_are_refused(mode: str) -> None:
    with pytest.raises(UserError, match=rf"data\.feed: {mode} is not for this task: its targets are transformed"):
        feed(Segments(4), Segmentation(num_classes=3), feed=mode, normalize={"mean": [0.5] * 3, "std": [0.25] * 3})


def test_voc_is_downloaded_only_where_it_is_not(voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(url: str, *args: Any, **kwargs: Any) -> None:
        raise OSError(f"no route to {url.split('/')[2]}")

    monkeypatch.setattr(voc_of_torchvision, "download_and_extract_archive", download)
    assert len(build_dataset(Component(name="VOCSegmentation", args={"root": str(voc)}), "data.train", Alone())) == 8
    missing = {"root": str(tmp_path)}
    message = (
        rf"^data\.train\.args\.root: 'VOCSegmentation' found no data in '{tmp_path}' \(Dataset not found .*\), and"
        r" could not download it: no route to [a-z.]+$"
    )
    with pytest.raises(UserError, match=message):
        build_dataset(Component(name="VOCSegmentation", args=missing), "data.train", Alone())
    with pytest.raises(UserError, match="Dataset not found or corrupted"):
        build_dataset(Component(name="VOCSegmentation", args={**missing, "download": False}), "data.train", Alone())
