"""Segmentation: the loss and gradients of torchvision's references, mean IoU, and that it learns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Train, WriteConfig
from picture_trees import make_voc
from PIL import Image
from run_results import records, summary
from segments import SmallSegmenter
from torch import nn
from torchvision.models import segmentation as models

from trainer.config_model import TaskConfig
from trainer.config_values import Component
from trainer.errors import BadSample, UserError
from trainer.eval_media import Collector
from trainer.model_errors import explained_model_errors
from trainer.tasks import build_task
from trainer.tasks.segmentation import Logits, Segmentation

IDS = torch.arange(100, 200)


def batch(num_samples: int = 4, height: int = 12, width: int = 10) -> list[torch.Tensor]:
    """Returns images and masks of 3 classes, of which 255 is a part that differs by sample."""
    generator = torch.Generator().manual_seed(3)
    masks = torch.randint(0, 3, (num_samples, 1, height, width), dtype=torch.uint8, generator=generator)
    for i in range(num_samples):
        masks[i, :, :i] = 255
    return [torch.randn(num_samples, 3, height, width, generator=generator), masks]


def reference_loss(outputs: dict[str, torch.Tensor], masks: torch.Tensor) -> torch.Tensor:
    """What torchvision's references for segmentation minimise."""
    losses = {name: nn.functional.cross_entropy(x, masks, ignore_index=255) for name, x in outputs.items()}
    return losses["out"] + 0.5 * losses["aux"] if "aux" in losses else losses["out"]


def mean_loss(task: Segmentation, outputs: Logits, data: Any) -> torch.Tensor:
    count = task.loss_count(outputs, data)
    assert count is not None
    return task.loss_sum(outputs, data) / count


def totals(sums: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Returns sums as the loop gives them to `metrics`."""
    return {name: value.double() if value.ndim else float(value) for name, value in sums.items()}


def of(loss: dict[str, Any], num_classes: int | None = 3) -> Segmentation:
    task = build_task(TaskConfig(name="segmentation", loss=Component(**loss)), num_classes)
    assert isinstance(task, Segmentation)
    return task


def test_loss_and_gradients_are_those_of_torchvisions_reference() -> None:
    torch.manual_seed(0)
    model = models.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    data = batch(2, 32, 32)
    outputs = model(data[0])
    expected = reference_loss(outputs, data[1].squeeze(1).long())
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    task = Segmentation(num_classes=3)
    found = mean_loss(task, task.forward(model, data), data)
    assert torch.allclose(found, expected, rtol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(found, list(model.parameters())), gradients, strict=True):
        assert float((ours - theirs).norm()) <= 1e-4 * float(theirs.norm()) + 1e-7


@pytest.mark.parametrize("weight", [None, [0.5, 1.0, 2.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mean_is_torchs_however_the_batch_is_split(weight: list[float] | None, smoothing: float) -> None:
    data = batch()
    logits = torch.randn(4, 3, 12, 10)
    task = of({"name": "cross_entropy", "args": {"weight": weight, "label_smoothing": smoothing}})
    weights = None if weight is None else torch.tensor(weight)
    expected = nn.functional.cross_entropy(
        logits, data[1].squeeze(1).long(), weights, ignore_index=255, label_smoothing=smoothing
    )
    parts = [(Logits(logits[i:j]), [data[0][i:j], data[1][i:j]]) for i, j in ((0, 1), (1, 4))]
    counts = [count for part in parts if (count := task.loss_count(*part)) is not None]
    assert len(counts) == 2
    whole = torch.stack([task.loss_sum(*part) for part in parts]).sum() / torch.stack(counts).sum()
    assert torch.allclose(whole, expected, rtol=1e-6)


def test_losses_by_name_are_told_what_to_ignore() -> None:
    data = batch()
    logits = torch.randn(4, 3, 12, 10)
    expected = mean_loss(Segmentation(num_classes=3), Logits(logits), data)
    for name in ("torch.nn:CrossEntropyLoss", "torch.nn.functional:cross_entropy"):
        task = of({"name": name})
        assert task.ignore_index == 255
        assert torch.allclose(mean_loss(task, Logits(logits), data), expected)
    other = of({"name": "cross_entropy", "args": {"ignore_index": 1}}, None)
    assert int(other.loss_count(Logits(torch.randn(4, 256, 12, 10)), data)) == int((data[1] != 1).sum())  # type: ignore[arg-type]


def test_a_loss_per_sample_or_of_the_batch_counts_samples() -> None:
    data, logits = batch(), torch.randn(4, 3, 12, 10)
    mean = Segmentation(lambda outputs, masks: outputs.mean())
    assert mean.loss_count(Logits(logits), data) is None
    assert torch.allclose(mean.loss_sum(Logits(logits), data), 4 * logits.mean())
    each = Segmentation(lambda outputs, masks: outputs.flatten(1).mean(1))
    assert torch.allclose(each.loss_sum(Logits(logits), data), 4 * logits.mean())
    assert each.loss_count(Logits(logits), data) is None
    metrics = each.metrics(totals(each.eval_sums(Logits(logits), data)))
    assert metrics["loss"] == pytest.approx(float(logits.mean()), rel=1e-5)
    with pytest.raises(UserError, match=r"task\.loss: the loss returned shape \[2\]"):
        Segmentation(lambda outputs, masks: torch.ones(2)).loss_sum(Logits(logits), data)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_that_does_not_fit_is_one_line() -> None:
    task = of({"name": "torch.nn:MSELoss"})
    with pytest.raises(UserError, match=r"^task\.loss: the loss gets logits \[4, 3, 12, 10\] and labels \[4, 12, 10\]"):
        task.loss_sum(Logits(torch.zeros(4, 3, 12, 10)), batch())


def test_more_logits_than_classes_change_nothing_of_what_labels_there_are() -> None:
    task, data = Segmentation(num_classes=2), batch()
    task.loss_sum(Logits(torch.zeros(4, 21, 12, 10)), [data[0], data[1].clamp(max=1)])
    with pytest.raises(BadSample, match="has label 2 in its mask"):
        task.check(data, IDS)


def test_metrics_are_those_of_their_definitions() -> None:
    data = batch()
    logits = torch.randn(4, 5, 12, 10)
    logits[:, 4] = -9.0  # neither in a mask nor in a prediction
    task = Segmentation()
    task.class_names = ["ground", "box", "disc"]
    sums: dict[str, Any] = {}
    for part in (slice(0, 1), slice(1, 4)):
        for name, value in task.eval_sums(Logits(logits[part]), [data[0][part], data[1][part]]).items():
            sums[name] = sums.get(name, 0) + value
    assert sums["confusion"].dtype == torch.int64
    found = task.metrics(totals(sums))
    masks = data[1].squeeze(1).long()
    is_counted = masks != 255
    predictions, labels = logits.argmax(1)[is_counted], masks[is_counted]
    ious = []
    for label, name in enumerate(("ground", "box", "disc", "3")):
        both = int(((predictions == label) & (labels == label)).sum())
        ious.append(both / int(((predictions == label) | (labels == label)).sum()))
        assert found[f"iou/{name}"] == pytest.approx(ious[-1])
    assert ious[3] == 0  # it is predicted, and in no mask
    assert "iou/4" not in found
    assert found["mean_iou"] == pytest.approx(sum(ious) / 4)
    assert found["pixel_accuracy"] == pytest.approx(float((predictions == labels).double().mean()))
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, masks, ignore_index=255)), rel=1e-5)


def test_batches_that_come_in_the_same_tensor_are_counted_each() -> None:
    """As those of a model do that is replayed from CUDA graphs."""
    data, task = batch(), Segmentation()
    outputs = Logits(torch.empty(4, 3, 12, 10))
    tables: dict[str, torch.Tensor] = {}
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for seed in range(3):
        outputs.out.copy_(torch.randn(4, 3, 12, 10, generator=torch.Generator().manual_seed(seed)))
        counted = task.eval_sums(outputs, data)["confusion"]
        assert torch.equal(counted, Segmentation().eval_sums(Logits(outputs.out.clone()), data)["confusion"])
        task.eval_tables(tables, outputs, data)
        expected += counted
    (table,) = tables.values()
    assert torch.equal(table, expected)


def test_nothing_to_count_is_no_error() -> None:
    data = batch()
    data[1][:] = 255
    task = Segmentation(num_classes=3)
    sums = task.eval_sums(Logits(torch.randn(4, 3, 12, 10)), data)
    found = task.metrics(totals(sums))
    assert all(math.isnan(found[name]) for name in ("loss", "mean_iou", "pixel_accuracy"))


def test_logits_of_another_size_are_resized() -> None:
    class Coarse(nn.Module):
        def forward(self, images: torch.Tensor) -> Any:
            class Output:
                logits = torch.arange(3.0).view(1, 3, 1, 1).expand(len(images), 3, 4, 4)

            return Output()

    outputs = Segmentation().forward(Coarse(), batch())
    assert outputs.out.shape == (4, 3, 12, 10)
    assert outputs.aux is None
    with pytest.raises(UserError, match=r"model: masks need logits .* the model returned float32 \[4, 30\]"):
        Segmentation().forward(nn.Flatten(1), [torch.ones(4, 30), batch()[1]])


def test_masks_are_checked() -> None:
    task = Segmentation(num_classes=3)
    images, masks = batch()
    task.check([images, masks], IDS)
    with pytest.raises(UserError, match=r"sample 100 has no mask, an integer per pixel, but int64 \[\]"):
        task.check([images, torch.ones(4, dtype=torch.int64)], IDS)
    with pytest.raises(UserError, match=r"sample 100 has a mask of shape \[3, 12, 10\]; it must have one channel"):
        task.check([images, masks.expand(-1, 3, -1, -1)], IDS)
    with pytest.raises(UserError, match=r"an image and a mask of sizes \[6, 10\] and \[12, 10\] after data.transforms"):
        task.check([images[:, :, :6], masks], IDS)
    masks[2, 0, 4, 4] = 7
    with pytest.raises(BadSample, match="sample 102 has label 7 in its mask; the model's are 0 to 2, 255 is ignored"):
        task.check([images, masks], IDS)
    many = of({"name": "cross_entropy", "args": {"ignore_index": -1}}, 300)
    many.check([images, masks.fill_(200)], IDS)  # which in bytes is more than 300 - 256
    with pytest.raises(UserError, match=r"model: the model returns 2 logits per pixel, the data has 3 classes"):
        task.loss_sum(Logits(torch.ones(4, 2, 12, 10)), [images, batch()[1]])
    with pytest.raises(UserError, match=r"task\.loss\.args\.weight: 2 class weights for 3 classes"):
        of({"name": "cross_entropy", "args": {"weight": [1, 2]}})


def test_class_255_is_not_ignored_unseen() -> None:
    message = r"task\.loss\.args\.ignore_index: of 256 classes 255 would be ignored"
    with pytest.raises(UserError, match=message):
        Segmentation(num_classes=256)
    data, logits = batch(), Logits(torch.zeros(4, 256, 12, 10))
    with pytest.raises(UserError, match=message):
        Segmentation().loss_sum(logits, data)
    Segmentation(num_classes=255).check(data, IDS)
    masks = torch.full((4, 12, 10), 255)
    task = of({"name": "cross_entropy", "args": {"ignore_index": -1}}, 256)
    assert int(task.loss_count(logits, [data[0], masks])) == 4 * 12 * 10  # type: ignore[arg-type]


def test_examples_show_masks_over_pictures() -> None:
    task, data = Segmentation(num_classes=3), batch()
    logits = torch.full((4, 3, 12, 10), -9.0)
    logits[:, 1] = 9.0
    collector = Collector(task, 2)
    collector.add(Logits(logits), data)
    media = collector.media(collector.tables, ["ground", "box", "disc"], None)
    assert media is not None
    assert media.tables["confusion"].sum() == int((data[1] != 255).sum())
    assert [example.prediction for example in media.examples] == ["box 100%", "box 100%"]
    assert all(part.split()[0] in ("ground", "box", "disc") for part in media.examples[0].target.split(", "))
    assert media.examples[0].confidence == pytest.approx(1.0, abs=1e-3)
    image = media.examples[1].image
    assert image is not None
    assert image.shape == (12, 30, 3)  # the picture, its mask, the prediction
    assert np.array_equal(image[0, :10], image[0, 10:20])  # ignored
    drawn = image[:, 20:].astype(int) * 2 - image[:, :10]
    assert np.abs(drawn - drawn[0, 0]).max() <= 2  # one colour, half of which shows


def voc_changes(root: Path) -> dict[str, Any]:
    """A config for pictures of three kinds of pixels, in a VOC tree at `root`."""
    args = {"root": str(root), "download": False}
    crop = {"name": "RandomCrop", "args": {"size": 40, "pad_if_needed": True, "fill": {"Image": 0, "Mask": 255}}}
    return {
        "data": {
            "train": {"name": "VOCSegmentation", "args": args},
            "eval": {"name": "VOCSegmentation", "args": {**args, "image_set": "val"}},
            "transforms": {"train": [crop, {"name": "RandomHorizontalFlip"}]},
            "normalize": {"mean": [0.45, 0.45, 0.45], "std": [0.25, 0.25, 0.25]},
            "workers": 0,
        },
        "model": {"name": "segments:SmallSegmenter", "args": {"num_classes": 21, "aux": True}},
        "task": {"name": "segmentation"},
        "optim": {"name": "adamw", "lr": 0.02},
        "schedule": {"name": "cosine"},
        "train": {"epochs": 10, "batch_size": 8},
        "eval": {"every": "10 epochs"},
    }


def test_it_learns_boxes_and_discs_in_a_voc_tree(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    make_voc(tmp_path, {"train": 32, "val": 16})
    done = train("--config", write_config(**voc_changes(tmp_path)))
    assert done.code == 0, done.err
    found = [r for r in records(tmp_path / "run") if "eval/mean_iou" in r][-1]
    assert found["eval/mean_iou"] > 0.95
    assert {key for key in found if key.startswith("eval/iou/")} >= {
        "eval/iou/__background__",
        "eval/iou/aeroplane",
        "eval/iou/bicycle",
    }
    assert summary(tmp_path / "run")["best"]["metric"] == "mean_iou"
    (shown,) = (tmp_path / "run" / "eval").iterdir()
    with Image.open(shown / "0.png") as image:
        assert image.size == (3 * 48, 40)
    samples = json.loads((shown / "samples.json").read_text())
    assert "aeroplane" in samples[0]["target"]
    assert samples[0]["num_views"] == 3


def test_deeplab_on_one_sample_is_one_clear_line() -> None:
    model = models.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    with (
        pytest.raises(UserError, match=r"data\.drop_last: BatchNorm needs more than one sample"),
        explained_model_errors(),
    ):
        Segmentation().forward(model, batch(1, 32, 32))


def test_a_weight_for_an_auxiliary_head_needs_one() -> None:
    task, data = Segmentation(aux_weight=0.3), batch()
    assert task.forward(SmallSegmenter(aux=True), data).aux is not None
    without = SmallSegmenter()
    with pytest.raises(UserError, match=r"task\.args\.aux_weight: the model has no auxiliary head"):
        task.forward(without, data)
    assert task.forward(without.eval(), data).aux is None
    assert Segmentation().forward(without.train(), data).aux is None
