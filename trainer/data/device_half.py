"""The device half of the transforms, for batches as tasks have them: tensors, lists and dicts, stacked or not.

Owns where in a batch the images and targets are that `trainer.data.augment` changes, and which batches it cannot.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from trainer.config_data import AugmentConfig, NormalizeConfig
from trainer.data.augment import AugmentationPlan, DeviceAugmentation, mix_targets
from trainer.data.draws import sample_keys
from trainer.data.loader import LoadedBatch
from trainer.data.modes import Route, SampleMeaning, why_host_only
from trainer.data.nested import part, with_part
from trainer.errors import UserError


class ImageMeaning(SampleMeaning, Protocol):
    """What the device half must know of a batch; a task knows it."""

    input_key: str
    num_classes: int | None

    def targets(self, data: Any) -> Any:
        """Returns the targets of a batch."""

    def with_targets(self, data: Any, targets: Any) -> Any:
        """Returns the batch with other targets."""


class DeviceHalf:
    """What becomes of a batch once it is on the device.

    Args:
        route: what kind of data it is, and which flips are left for the device.
        normalize: mean and std per channel; None only scales to [0, 1].
        augment: mixing and erasing.
        task: what a batch means.
        device: where batches are.
        seed: seed of the samples' random state.
        dtype: of the images that it makes: that of the step.

    Raises:
        UserError: the augmentation is not for such data or such a task.
    """

    def __init__(
        self,
        route: Route,
        normalize: NormalizeConfig | None,
        augment: AugmentConfig,
        task: ImageMeaning,
        device: torch.device,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        self._task = task
        self._seed = seed
        if (augment.mixes or augment.erase) and (reason := why_host_only(task)):
            message = f"mixup, cutmix and erase are not for this task: {reason}"
            raise UserError(message, path="data.augment")
        if augment.mixes and task.num_classes is None:
            message = "mixing needs to know the number of classes: set model.args.num_classes"
            raise UserError(message, path="data.augment")
        self._augmentation: DeviceAugmentation | None = None
        if route.is_image_data:
            flips = route.horizontal_flip, route.vertical_flip
            dtype = dtype if task.stacks else torch.float32  # such models resize and normalise images themselves
            self._augmentation = DeviceAugmentation(normalize, augment, *flips, dtype).to(device)
        elif augment.mixes or augment.erase:
            message = "augmentation on the device needs images: set data.normalize for a data set of your own"
            raise UserError(message, path="data.augment")

    def draw(self, batch: LoadedBatch) -> AugmentationPlan | None:
        """Draws the augmentation of a batch from its samples' keys, on the host; None where nothing is random."""
        if self._augmentation is None or not self._augmentation.is_random or not len(batch.keys):
            return None
        images = self._images(batch.data)
        if not isinstance(images, torch.Tensor) or images.ndim != 4:
            return None  # the augmentation says what is wrong
        return self._augmentation.plan(sample_keys(self._seed, batch.keys), tuple(images.shape))

    @torch.no_grad()
    def finish(self, data: Any, plan: AugmentationPlan | None) -> Any:
        """Returns the batch as the step gets it; runs on the step's stream.

        Args:
            data: of the batch, on the device.
            plan: what `draw` returned for it, on the device.
        """
        if self._augmentation is None:
            return data
        images = self._images(data)
        if isinstance(images, list):  # not stacked, and each of its own size
            images = [self._augmentation(image.unsqueeze(0)).squeeze(0) for image in images]
        else:
            images = self._augmentation(images, plan)
        data = images if isinstance(data, torch.Tensor) else with_part(data, self._task.input_key, 0, images)
        if self._augmentation.mixes:
            assert plan is not None
            assert self._task.num_classes is not None
            data = self._task.with_targets(data, mix_targets(self._task.targets(data), plan, self._task.num_classes))
        return data

    def _images(self, data: Any) -> Any:
        if isinstance(data, torch.Tensor):
            return data
        try:
            return part(data, self._task.input_key, 0)
        except LookupError:
            message = f"samples have no key '{self._task.input_key}' to normalise"
            raise UserError(message, path="data.normalize") from None
