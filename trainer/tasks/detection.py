"""Object detection with torchvision's detection models: their own losses, average precision as COCO measures it."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchvision.datasets import CocoDetection, Kitti, WIDERFace

from trainer.data.coco import check_annotations
from trainer.errors import BadSample, UserError
from trainer.tasks.base import Task
from trainer.tasks.labels import name_of
from trainer.tasks.misfit import described

if TYPE_CHECKING:
    from trainer.config import Config

_AP = {"ap": "map", "ap50": "map_50", "ap75": "map_75"}
_AP_BY_SIZE = {"ap_small": "map_small", "ap_medium": "map_medium", "ap_large": "map_large"}
_NAMES = {**_AP, **_AP_BY_SIZE}  # ours, and those of torchmetrics
_MOST_DRAWN = 20  # boxes of a picture
_LEAST_SCORE = 0.5  # of a box that is drawn
_NO_CATEGORY = -1  # the id of labels that the model has and the data set has not


class Detection(Task):
    """Inputs are pictures (3, H, W) of any size, targets dicts: `boxes` (N, 4) in pixels, XYXY; `labels` int64 (N,).

    The model is called as torchvision's: with lists of pictures in [0, 1] and of targets while it trains, when it
    returns a dict of losses, each a mean over the pictures; with pictures only in evaluations, when it returns a dict
    of `boxes`, `labels` and `scores` per picture. It resizes and normalises pictures itself.

    Labels are 1 and up; 0 is the background, which counts in `num_classes`. Of a COCO file the category ids are taken
    as they are if the model's `num_classes` is above all of them, as it is for torchvision's own weights (91); else
    they are numbered from 1 in ascending order, for the model. Metrics and pictures have the file's.

    As in torchvision's reference, boxes are clipped to the picture, and in training those that are crowds or have no
    width or height are left out. Evaluations take one picture at a time unless `eval.batch_size` says otherwise: in a
    batch pictures are padded to the same size, so that a prediction would depend on its neighbours.

    Args:
        num_classes: labels that the model knows, the background among them; None: what a COCO file has.
        masks: also give the model the objects' masks (N, H, W), as Mask R-CNN learns them; metrics are of boxes.
        input_key: where the input is in samples that are dicts.
        target_key: where the target is in samples that are dicts.
    """

    transforms_targets = True
    stacks = False
    eval_batch_size = 1
    metric_names = tuple(_NAMES)
    best_metric = "ap"

    def __init__(
        self,
        num_classes: int | None = None,
        masks: bool = False,
        input_key: str = "input",
        target_key: str = "target",
    ) -> None:
        self.num_classes = num_classes
        self.masks = masks
        self.input_key = input_key
        self.target_key = target_key
        self.target_keys = ("boxes", "labels", "masks") if masks else None
        self._ids: list[int] | None = None  # the data set's, by the model's label; None where they are the same
        self._tables: dict[tuple[str, torch.device], torch.Tensor] = {}

    def check_config(self, config: Config) -> None:
        if config.precision in ("bf16", "fp8"):
            message = "torchvision makes anchors in the type of the features, and bfloat16 has only whole numbers up to"
            raise UserError(f"{message} 256: boxes would be pixels off; use fp16 or no", path="precision")
        if config.precision != "no" and config.parallel.strategy != "ddp":
            message = f"{config.parallel.strategy} rounds the boxes that a model is given to {config.precision}"
            raise UserError(f"{message}, to a pixel in large pictures; use no, or strategy: ddp", path="precision")
        if config.data.normalize is not None:
            message = "detection models normalise pictures themselves, by image_mean and image_std in model.args"
            raise UserError(f"{message}: leave it out", path="data.normalize")

    def look_at(self, train_set: Any, eval_set: Any) -> None:
        if eval_set is not None and importlib.util.find_spec("pycocotools") is None:
            message = "average precision needs pycocotools: pip install 'lockstep-trainer[detection]'"
            raise UserError(message, path="task.name")
        if type(train_set) in (Kitti, WIDERFace):
            name = type(train_set).__name__
            message = f"{name} has no boxes with labels from 1 up: detection needs a class of your own that makes them"
            raise UserError(message, path="data.train")
        if not isinstance(train_set, CocoDetection):
            return
        self.target_keys = ("boxes", "labels", "iscrowd", "area", *(("masks",) if self.masks else ()))
        categories = {int(key): str(category["name"]) for key, category in train_set.coco.cats.items()}
        ids = sorted(categories)
        if not ids:
            raise UserError("its 'categories' are empty: annotations need some to refer to", path="data.train")
        if not train_set.coco.anns:
            raise UserError("it has no annotations: there is nothing to learn", path="data.train")
        for dataset, path in ((train_set, "data.train"), (eval_set, "data.eval")):
            if isinstance(dataset, CocoDetection):
                check_annotations(dataset, ids, self.masks, path)
        if self.num_classes is None or not 0 < ids[0] <= ids[-1] < self.num_classes:
            needed = len(ids) + 1
            if self.num_classes is not None and self.num_classes < needed:
                message = f"the data has {len(ids)} categories, which with the background need {needed} classes"
                raise UserError(f"{message}, not {self.num_classes}", path="model.args.num_classes")
            self.num_classes = self.num_classes or needed
            self._ids = [0, *ids]
        names = {0: "background", **{self._ids.index(i) if self._ids else i: categories[i] for i in ids}}
        self.class_names = [names.get(label, str(label)) for label in range(max(names) + 1)]

    def check_model(self, model: nn.Module) -> None:
        try:
            signature = inspect.signature(model.forward)
            signature.bind([])
            signature.bind([], [])
        except TypeError:
            message = "detection calls the model with pictures, and in training with targets, too, as torchvision's"
            name = type(model).__name__
            raise UserError(f"{message} fasterrcnn_resnet50_fpn; {name} takes {signature}", path="model.name") from None

    def check(self, data: Any, sample_ids: torch.Tensor) -> None:
        for target, sample in zip(self.targets(data), sample_ids.tolist(), strict=True):
            if not isinstance(target, Mapping) or not {"boxes", "labels"} <= set(target):
                raise BadSample("has no target with boxes and labels", sample)
            boxes, labels = target["boxes"], target["labels"]
            if boxes.ndim != 2 or boxes.shape[1] != 4:
                raise BadSample(f"has boxes of shape {list(boxes.shape)}, not (boxes, 4)", sample)
            for key in ("labels", "iscrowd", "area", "masks"):
                if key in target and len(target[key]) != len(boxes):
                    message = f"has {len(boxes)} boxes and {len(target[key])} {key}"
                    message += "; leave SanitizeBoundingBoxes out: boxes without an area are left out anyway"
                    raise BadSample(message, sample)
            if not len(labels):
                continue
            known = self._ids[1:] if self._ids else range(1, self.num_classes or int(labels.max()) + 1)
            wrong = next((label for label in labels.tolist() if label not in known), None)
            if wrong is not None:
                raise BadSample(f"has label {wrong}; known are {_listed(known)}", sample)

    def forward(self, model: nn.Module, data: Any) -> Any:
        images = [image.float() / 255 if image.dtype == torch.uint8 else image for image in self.inputs(data)]
        if not model.training:
            return model(images)
        pairs = zip(images, self.targets(data), strict=True)
        losses = model(images, [self._to_learn(target, *image.shape[-2:]) for image, target in pairs])
        if not isinstance(losses, Mapping):
            message = f"in training the model returned {described(losses)}, not a dict of losses"
            raise UserError(f"{message} as torchvision's detection models", path="model", agreed=True)
        return losses

    def _to_learn(self, target: Mapping[str, torch.Tensor], height: int, width: int) -> dict[str, torch.Tensor]:
        """Returns the target as the model takes it. The host waits for the device, as it does in these models."""
        boxes = target["boxes"].float()
        limits = torch.tensor([width, height, width, height], dtype=boxes.dtype)
        boxes = torch.minimum(boxes.clamp(min=0), limits.to(boxes.device, non_blocking=True))
        is_kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        if "iscrowd" in target:
            is_kept &= target["iscrowd"] == 0
        kept = is_kept.nonzero().squeeze(1)
        learnt = {"boxes": boxes[kept], "labels": self._translated(target["labels"].long()[kept], "label")}
        if self.masks:  # of a picture without objects nobody knew the size
            learnt["masks"] = target["masks"].reshape(len(boxes), height, width)[kept]
        return learnt

    def _translated(self, labels: torch.Tensor, to: str) -> torch.Tensor:
        """Returns the model's labels of the data set's ids, or with `to="id"` the other way round."""
        if self._ids is None:
            return labels
        if (to, labels.device) not in self._tables:
            table = torch.tensor([*self._ids, _NO_CATEGORY])
            if to == "label":
                numbers = torch.arange(len(self._ids))
                table = torch.zeros(max(self._ids) + 1, dtype=torch.int64).index_copy_(0, table[:-1], numbers)
            self._tables[to, labels.device] = table.to(labels.device)
        table = self._tables[to, labels.device]
        return table[labels.clamp(max=len(table) - 1)]  # a model may have more labels than there are categories

    def loss_sum(self, outputs: Mapping[str, torch.Tensor], data: Any) -> torch.Tensor:
        return torch.stack([loss.float() for loss in outputs.values()]).sum() * len(self.inputs(data))

    def eval_records(self, outputs: Sequence[Mapping[str, torch.Tensor]], data: Any) -> list[Any]:
        """Returns per picture what was found and what is there, by the data set's own ids, as numpy arrays."""
        records = []
        for found, there in zip(outputs, self.targets(data), strict=True):
            labels = self._translated(found["labels"], "id")
            # numpy has no bfloat16
            found = {"boxes": found["boxes"].float(), "labels": labels, "scores": found["scores"].float()}
            there = {key: there[key] for key in ("boxes", "labels", "iscrowd", "area") if key in there}
            records.append(tuple({k: v.cpu().numpy() for k, v in part.items()} for part in (found, there)))
        return records

    def metrics_of_records(self, records: Sequence[Any]) -> dict[str, float]:
        """Returns average precision from 0 to 1 as COCO defines it; NaN where the data has nothing of a kind."""
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(sync_on_compute=False)
        metric.warn_on_many_detections = False
        tensors = [[{k: torch.from_numpy(v) for k, v in part.items()} for part in record] for record in records]
        metric.update([found for found, _ in tensors], [there for _, there in tensors])
        values = metric.compute()
        return {name: _known(float(values[theirs])) for name, theirs in _NAMES.items()}

    def examples(self, outputs: Any, data: Any, num: int) -> dict[str, torch.Tensor]:
        """Returns the first picture of a batch, and its boxes: what is there, then what was found."""
        found, there, image = outputs[0], self.targets(data)[0], self.inputs(data)[0]
        scores = found["scores"].float()
        labels = torch.where(scores >= _LEAST_SCORE, found["labels"], -1)  # nobody waits to know how many
        true_labels = self._translated(there["labels"].long(), "label")
        picture = image if image.dtype == torch.uint8 else (image.float().clamp(0, 1) * 255).round().byte()
        height, width = image.shape[-2:]
        size = torch.tensor([width, height, width, height]).to(image.device, non_blocking=True)
        boxes = [_padded(part["boxes"].float() / size, 0.0) for part in (there, found)]
        return {
            "image": picture[None],
            "boxes": torch.stack(boxes)[None],
            "labels": torch.stack([_padded(true_labels, -1), _padded(labels, -1)])[None],
            "confidence": _padded(scores, math.nan)[None, :1],
        }

    def describe_examples(
        self, examples: Mapping[str, torch.Tensor], classes: Sequence[str]
    ) -> list[tuple[str, str, float | None]]:
        def text(labels: torch.Tensor) -> str:
            names = Counter(name_of(label, self.class_names) for label in labels.tolist() if label >= 0)
            return ", ".join(f"{count} {name}" for name, count in sorted(names.items())) or "nothing"

        told = zip(examples["labels"], examples["confidence"][:, 0].tolist(), strict=True)
        return [(text(labels[0]), text(labels[1]), sure) for labels, sure in told]


def _known(value: float) -> float:
    return math.nan if value < 0 else value  # COCO's code says -1


def _padded(values: torch.Tensor, with_value: float) -> torch.Tensor:
    """Returns the first `_MOST_DRAWN` rows, and as many of a value as are missing."""
    missing = max(_MOST_DRAWN - len(values), 0)
    return torch.cat([values[:_MOST_DRAWN], values.new_full((missing, *values.shape[1:]), with_value)])


def _listed(known: Sequence[int]) -> str:
    if isinstance(known, range):
        return f"{known[0]} to {known[-1]}" if len(known) else "none"
    return ", ".join(map(str, known[:10])) + (", ..." if len(known) > 10 else "")
