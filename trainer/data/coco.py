"""What the annotations of a COCO file have, and whether a model can learn from them. Nothing is read but the file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torchvision.datasets import CocoDetection

from trainer.errors import UserError

_OPTIONAL = ("iscrowd", "area")


def keys_of_all(dataset: CocoDetection, keys: Sequence[str]) -> tuple[str, ...]:
    """Returns keys of targets without those that some annotation lacks, where nothing needs them."""
    lacking = {
        key for key in _OPTIONAL if key in keys and any(key not in found for found in dataset.coco.anns.values())
    }
    return tuple(key for key in keys if key not in lacking)


def check_annotations(dataset: CocoDetection, category_ids: Collection[int], masks: bool, path: str) -> None:
    """Refuses a file whose annotations no model can learn from, or be compared with.

    Args:
        dataset: the file, and its pictures.
        category_ids: those that are known.
        masks: whether annotations need a segmentation.
        path: of the data set in the config.

    Raises:
        UserError: an annotation lacks something, its box is no box, or its category is not known; the first is named.
    """
    annotations = dataset.coco.anns.values()
    for is_wrong, message in (
        (_has_no_box, "no 'bbox' of four finite numbers"),
        (lambda found: masks and not found.get("segmentation"), "no 'segmentation', which task.args.masks needs"),
        (lambda found: found.get("category_id") not in category_ids, "a 'category_id' that is in no category"),
    ):
        wrong = [found for found in annotations if is_wrong(found)]
        if wrong:
            first = wrong[0]
            place = f"the first is annotation {first['id']} of image {first['image_id']}"
            raise UserError(f"{len(wrong)} of {len(annotations)} annotations have {message}: {place}", path=path)


def _has_no_box(annotation: Mapping[str, Any]) -> bool:
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        return True
    return not all(isinstance(number, int | float) and math.isfinite(number) for number in box)
