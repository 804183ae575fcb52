"""What the detection task makes of targets, losses, predictions and category ids."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train, WriteConfig
from picture_trees import make_coco
from torch import nn
from torchvision.datasets import CocoDetection, Kitti, WIDERFace
from torchvision.transforms import v2

from trainer.config import load_config
from trainer.data.joint import JointTransform, with_typed_samples
from trainer.errors import UserError
from trainer.eval_media import Collector
from trainer.tasks.detection import Detection
from trainer.tasks.labels import name_of
from trainer.telemetry.efficiency import FlopCounter

IMAGE = torch.zeros(3, 20, 30)


def target(boxes: Sequence[Sequence[float]], labels: Sequence[int], **more: Any) -> dict[str, torch.Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64), **more}


class Listening(nn.Module):
    """Remembers what it is called with."""

    def forward(self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]] | None = None) -> Any:
        self.images, self.targets = images, targets
        return {"a": torch.tensor(1.0), "b": torch.tensor(0.5)} if self.training else [{} for _ in images]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> CocoDetection:
    folder = tmp_path_factory.mktemp("coco")
    make_coco(folder, {"train": 3})
    return CocoDetection(str(folder / "train"), str(folder / "annotations" / "instances_train.json"))


def test_boxes_are_clipped_and_crowds_and_empty_ones_left_out() -> None:
    boxes = [
        [-5.0, 2.0, 40.0, 10.0],
        [4.0, 4.0, 4.0, 9.0],
        [1.0, 1.0, 5.0, 5.0],
        [31.0, 0.0, 33.0, 5.0],
        [2.0, 2.0, 6.0, 6.0],
    ]
    model, task = Listening(), Detection(num_classes=9)
    data: list[list[Any]] = [[IMAGE], [target(boxes, [1, 2, 3, 4, 5], iscrowd=torch.tensor([0, 0, 1, 0, 0]))]]
    losses = task.forward(model, data)
    assert model.targets is not None
    assert model.targets[0]["boxes"].tolist() == [[0, 2, 30, 10], [2, 2, 6, 6]]
    assert model.targets[0]["labels"].tolist() == [1, 5]
    assert task.loss_sum(losses, data) == 1.5
    assert task.loss_sum(losses, [[IMAGE, IMAGE], data[1] * 2]) == 3.0


def test_masks_go_with_their_boxes() -> None:
    masks = torch.arange(3).view(3, 1, 1).expand(3, 20, 30)
    model, task = Listening(), Detection(num_classes=3, masks=True)
    boxes = [[0.0, 0.0, 5.0, 5.0], [3.0, 3.0, 3.0, 3.0], [1.0, 1.0, 9.0, 9.0]]
    task.forward(model, [[IMAGE], [target(boxes, [1, 1, 2], masks=masks)]])
    assert model.targets is not None
    assert model.targets[0]["masks"][:, 0, 0].tolist() == [0, 2]
    task.forward(model, [[IMAGE], [target([], [], masks=torch.zeros(0, dtype=torch.int64))]])
    assert model.targets[0]["masks"].shape == (0, 20, 30)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools decodes masks
def test_mask_r_cnn_takes_a_coco_picture_without_an_object(tmp_path: Path) -> None:
    make_coco(tmp_path, {"train": 5})  # the fifth has none
    data = CocoDetection(str(tmp_path / "train"), str(tmp_path / "annotations" / "instances_train.json"))
    task = Detection(masks=True)
    task.look_at(data, None)
    typed = with_typed_samples(data, task.target_keys)
    transform = JointTransform([v2.RandomCrop((40, 30))], "input", "target")
    torch.manual_seed(0)  # of the crop, which may else leave out all objects
    samples = [transform(typed[i]) for i in (0, 4)]
    batch = [list(part) for part in zip(*samples, strict=True)]
    task.check(batch, torch.tensor([0, 4]))
    model = Listening()
    task.forward(model, batch)
    assert model.targets is not None
    kinds = [(found["masks"].dtype, found["masks"].shape[1:]) for found in model.targets]
    assert kinds == [(torch.uint8, (40, 30))] * 2
    assert (len(model.targets[0]["masks"]) > 0, len(model.targets[1]["masks"])) == (True, 0)


def test_evaluation_gets_pictures_only_and_bytes_become_shares() -> None:
    model, task = Listening().eval(), Detection()
    task.forward(model, [[torch.full((3, 4, 4), 255, dtype=torch.uint8)], [target([], [])]])
    assert model.targets is None
    assert model.images[0].max() == 1.0


@pytest.mark.parametrize(
    ("num_classes", "label", "classes"),
    [(None, 2, 3), (3, 2, 3), (4, 2, 4), (8, 7, 8), (91, 7, 91)],
)
def test_category_ids_are_labels_where_they_fit_and_else_renumbered(
    coco: CocoDetection, num_classes: int | None, label: int, classes: int
) -> None:
    model, task = Listening(), Detection(num_classes=num_classes)
    task.look_at(coco, coco)
    assert task.num_classes == classes
    task.forward(model, [[IMAGE], [target([[0, 0, 5, 5.0]], [7])]])
    assert model.targets is not None
    assert model.targets[0]["labels"].tolist() == [label]
    assert name_of(label, task.class_names) == "disc"
    half = torch.zeros(1, 4, dtype=torch.bfloat16)
    found = [{"boxes": half, "scores": half[0, :1], "labels": torch.tensor([label])}]
    (record,) = task.eval_records(found, [[IMAGE], [target([[0, 0, 5, 5.0]], [7])]])
    assert record[0]["labels"].tolist() == record[1]["labels"].tolist() == [7]


def test_labels_beyond_the_categories_are_found_and_in_no_category() -> None:
    task = Detection(num_classes=10)
    task._ids = [0, 1, 5, 200]
    there = [target([[0, 0, 10, 10.0], [10, 10, 20, 20]], [5, 200])]
    boxes = torch.tensor([[0, 0, 10, 10.0], [10, 10, 20, 20], [5, 5, 9, 9]])
    found = [{"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([2, 3, 9])}]
    records = task.eval_records(found, [[IMAGE], there])
    assert records[0][0]["labels"].tolist() == [5, 200, -1]
    assert task.metrics_of_records(records)["ap"] == pytest.approx(1.0)


COCO_RUN: dict[str, Any] = {
    "task": {"name": "trainer.tasks.detection:Detection"},  # as a subclass of it would be named
    "data__train": {"name": "segments:Segments", "args": {"length": 8}},
    "data__eval": None,
    "train": {"steps": 1, "batch_size": 4},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf16"}, r"precision: .*boxes would be pixels off; use fp16 or no"),
        ({"precision": "fp16", "parallel": {"strategy": "fsdp"}}, r"precision: fsdp rounds the boxes .*; use no, or"),
        ({"data__normalize": {"mean": [0.5] * 3, "std": [0.5] * 3}}, r"data\.normalize: .* normalise pictures them"),
    ],
)
def test_settings_that_would_spoil_boxes_or_pictures_are_refused(
    changes: dict[str, Any], message: str, train: Train, write_config: WriteConfig
) -> None:
    done = train("--config", write_config(**COCO_RUN, **changes))
    assert done.code == 2
    assert re.search(message, done.err), done.err


def test_fp16_and_fsdp_in_float32_are_not_refused(write_config: WriteConfig) -> None:
    for changes in ({"precision": "fp16"}, {"parallel": {"strategy": "fsdp"}}, {}):
        Detection().check_config(load_config(str(write_config(**COCO_RUN, **changes))))


def test_too_few_classes_are_refused(coco: CocoDetection) -> None:
    with pytest.raises(UserError, match=r"2 categories, which with the background need 3 classes, not 2"):
        Detection(num_classes=2).look_at(coco, coco)


def changed(coco: CocoDetection, folder: Path, change: Callable[[dict[str, Any]], Any]) -> CocoDetection:
    """Returns the data set with another file."""
    content = copy.deepcopy(coco.coco.dataset)
    change(content)
    file = folder / "changed.json"
    file.write_text(json.dumps(content))
    return CocoDetection(coco.root, str(file))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["categories"].clear(), "data.train: its 'categories' are empty"),
        (lambda c: c["annotations"].clear(), "data.train: it has no annotations"),
        (
            lambda c: c["annotations"][1].pop("bbox"),
            "1 of . annotations have no 'bbox' of four finite numbers: .* 2 of",
        ),
        (
            lambda c: c["annotations"][0].update(bbox=[1.0, math.nan, 2, 2]),
            "no 'bbox' of four .* annotation 1 of image 1",
        ),
        (lambda c: c["annotations"][2].update(category_id=5), "1 of . annotations have a 'category_id' that is in no"),
        (lambda c: c["annotations"][0].update(segmentation=[]), "no 'segmentation', which task.args.masks needs"),
    ],
)
def test_files_that_nothing_can_be_learnt_from(
    coco: CocoDetection, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    Detection(masks=True).look_at(coco, coco)
    data = changed(coco, tmp_path, change)
    with pytest.raises(UserError, match=message):
        Detection(masks=True).look_at(data, None)
    if data.coco.anns and data.coco.cats:
        with pytest.raises(UserError, match=message.replace("data.train", "data.eval")):
            Detection(masks=True).look_at(coco, data)


def test_what_nothing_needs_may_be_missing(coco: CocoDetection, tmp_path: Path) -> None:
    def without(content: dict[str, Any]) -> None:
        content["annotations"][0].pop("area")
        for annotation in content["annotations"]:
            annotation.pop("iscrowd")

    task = Detection()
    data = changed(coco, tmp_path, without)
    task.look_at(data, coco)
    assert set(with_typed_samples(data, task.target_keys)[0][1]) == {"boxes", "labels"}
    assert set(with_typed_samples(coco, task.target_keys)[0][1]) == {"boxes", "labels", "iscrowd", "area"}


def test_a_model_that_takes_no_targets_is_refused() -> None:
    Detection().check_model(Listening())
    with pytest.raises(UserError, match=r"model\.name: detection calls .* Linear takes \(input"):
        Detection().check_model(nn.Linear(1, 1))


def test_flops_are_not_counted_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lockstep"):
        assert not FlopCounter(Listening(), Detection(), peak=1e12).is_due
    assert [record.getMessage() for record in caplog.records] == [
        "no MFU: FLOPs are not counted where a batch is a list of samples"
    ]


@pytest.mark.parametrize("kind", [Kitti, WIDERFace])
def test_data_sets_without_labels_of_boxes_are_refused(kind: Any) -> None:
    with pytest.raises(UserError, match=f"{kind.__name__} has no boxes with labels"):
        Detection().look_at(object.__new__(kind), None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (target([[0, 0, 1, 1.0]], [3]), "sample 12 has label 3; known are 1 to 2"),
        (target([[0, 0, 1, 1.0]], [0]), "sample 12 has label 0"),
        ({"boxes": torch.zeros(2, 5), "labels": torch.ones(2)}, r"sample 12 has boxes of shape \[2, 5\]"),
        (target([[0, 0, 1, 1.0]], [1], iscrowd=torch.zeros(2)), "1 boxes and 2 iscrowd; leave SanitizeBoundingBoxes"),
        (torch.tensor(1), "no target with boxes and labels"),
    ],
)
def test_a_wrong_target_is_named(wrong: Any, message: str) -> None:
    task = Detection(num_classes=3)
    good = target([], [])
    task.check([[IMAGE], [good]], torch.tensor([11]))
    with pytest.raises(UserError, match=message):
        task.check([[IMAGE, IMAGE], [good, wrong]], torch.tensor([11, 12]))


def test_average_precision() -> None:
    """One of two objects is found, the second of a class that nothing else has, in a picture with one wrong box."""
    task = Detection(num_classes=3)
    there = [target([[0, 0, 10, 10.0], [10, 10, 20, 20]], [1, 2]), target([], [])]
    found = [
        {"boxes": torch.tensor([[0, 0, 10, 10.0]]), "scores": torch.tensor([0.9]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[0, 0, 10, 10.0]]), "scores": torch.tensor([0.3]), "labels": torch.tensor([1])},
    ]
    metrics = task.metrics_of_records(task.eval_records(found, [[IMAGE, IMAGE], there]))
    assert metrics["ap"] == metrics["ap50"] == metrics["ap_small"] == pytest.approx(0.5)
    assert math.isnan(metrics["ap_large"])
    assert tuple(metrics) == task.metric_names


def test_crowds_count_neither_for_nor_against() -> None:
    task = Detection(num_classes=2)
    there = [target([[0, 0, 10, 10.0], [0, 0, 20, 20]], [1, 1], iscrowd=torch.tensor([0, 1]))]
    boxes = torch.tensor([[0, 0, 10, 10.0], [10, 10, 18, 18]])
    found = [{"boxes": boxes, "scores": torch.tensor([0.5, 0.9]), "labels": torch.tensor([1, 1])}]
    assert task.metrics_of_records(task.eval_records(found, [[IMAGE], there]))["ap"] == pytest.approx(1.0)


def test_boxes_are_drawn_on_a_copy_of_the_picture() -> None:
    task = Detection(num_classes=3)
    task.class_names = ["background", "square", "disc"]
    found = [
        {
            "boxes": torch.tensor([[3, 3, 9, 9.0], [0, 0, 2, 2]]),
            "scores": torch.tensor([0.75, 0.1]),
            "labels": torch.tensor([2, 1]),
        }
    ]
    collector = Collector(task, 1)
    collector.add(found, [[IMAGE], [target([[2, 2, 8, 8.0], [9, 9, 12, 12]], [1, 1])]])
    media = collector.media({}, task.class_names, None)
    assert media is not None
    (example,) = media.examples
    assert (example.target, example.prediction, example.confidence) == ("2 square", "1 disc", 0.75)
    assert example.image is not None
    assert example.image.shape == (20, 60, 3)
    assert example.image[:, :30].any()
    assert not (example.image[:, :30] == example.image[:, 30:]).all()
