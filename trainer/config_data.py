"""The section that says what to train on and how samples get there: `data`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config_values import Bool, Component, NonNegativeFloat, PositiveFloat, PositiveInt, Ratio, Section, Workers


class TransformsConfig(Section):
    """Transforms of a sample's input, in order; random ones differ per sample and epoch.

    torchvision's crops and resizes at the start, and flips at the end, run where they are cheapest: only what a
    crop keeps is decoded, and flips run on the device. Where masks or boxes belong to the input (segmentation,
    detection), all transforms change them, too, and run on the host.
    """

    train: tuple[Component, ...] = Field(
        (), description="For training samples: torchvision.transforms.v2 classes by name, or import paths."
    )
    eval: tuple[Component, ...] = Field((), description="The same for evaluation samples.")


class NormalizeConfig(Section):
    """Per-channel normalisation of image batches, on the device."""

    mean: tuple[Annotated[float, Field(strict=True)], ...] = Field(
        description="Mean per channel, for pixels in [0, 1]."
    )
    std: tuple[PositiveFloat, ...] = Field(description="Standard deviation per channel, for pixels in [0, 1].")

    @model_validator(mode="after")
    def _same_length(self) -> NormalizeConfig:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std has {len(self.std)}")
        return self


class AugmentConfig(Section):
    """Augmentation of whole training batches on the device: flips of `transforms`, mix, `normalize`, erase."""

    mixup: NonNegativeFloat = Field(
        0.0, description="Mix pairs of images and their labels with a share from Beta(mixup, mixup); 0 is off."
    )
    cutmix: NonNegativeFloat = Field(
        0.0, description="Paste a box of the pair's other image, its area from Beta(cutmix, cutmix); 0 is off."
    )
    mix_probability: Ratio = Field(1.0, description="Share of the pairs that mixup or cutmix change.")
    cutmix_share: Ratio = Field(
        0.5, description="Where mixup and cutmix are both on: share of the changed pairs that cutmix changes."
    )
    erase: Ratio = Field(0.0, description="Share of the images in which a random box is erased.")
    erase_with: Literal["zero", "noise"] = Field(
        "zero", description="What erased pixels become, after normalisation: 0 (the mean), or normal noise."
    )

    @property
    def mixes(self) -> bool:
        """Whether pairs of samples are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @model_validator(mode="after")
    def _has_effect(self) -> AugmentConfig:
        if self.mixes and not self.mix_probability:
            raise ValueError("mixup and cutmix have no effect with mix_probability: 0")
        if not self.mixes and self.mix_probability != 1:
            raise ValueError("mix_probability has no effect without mixup or cutmix")
        if self.cutmix_share != 0.5 and not (self.mixup and self.cutmix):
            raise ValueError("cutmix_share has no effect without both mixup and cutmix")
        if self.erase_with == "noise" and not self.erase:
            raise ValueError("erase_with has no effect without erase")
        return self


class CacheConfig(Section):
    """A packed copy of an image folder: few large files, smaller pictures, read memory-mapped."""

    path: Annotated[str, Field(min_length=1)] = Field(
        description="Folder for packed copies; each source and setting has a folder of its own in it."
    )
    max_size: PositiveInt | None = Field(
        400, description="Shrink pictures so that the shorter side is at most this many pixels; null keeps them."
    )
    encoding: Literal["jpeg", "raw", "mixed"] = Field(
        "jpeg",
        description="`jpeg` re-encodes, `raw` stores pixels (no decoding, most space), `mixed` stores every second "
        "picture raw.",
    )
    quality: Annotated[int, Field(strict=True, ge=1, le=100)] = Field(90, description="JPEG quality.")


# Transforms of torchvision that make the same of a sample each time.
_SAME_EACH_TIME = {
    "CenterCrop",
    "ClampBoundingBoxes",
    "ConvertBoundingBoxFormat",
    "ConvertImageDtype",
    "Grayscale",
    "Identity",
    "LinearTransformation",
    "Normalize",
    "PILToTensor",
    "Pad",
    "RGB",
    "Resize",
    "SanitizeBoundingBoxes",
    "ToDtype",
    "ToImage",
    "ToPILImage",
    "ToPureTensor",
    "ToTensor",
}


class DataConfig(Section):
    """What to train and evaluate on, and how samples reach the device."""

    train: Component = Field(description="Training data set.")
    eval: Component | None = Field(
        None, description="Evaluation data set. Without one, and without `eval_share`, the run never evaluates."
    )
    eval_share: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = Field(
        None,
        description="Instead of `eval`: hold out this share of the training data, such as 0.1, for evaluation. The "
        "same samples in every run, of every class its share where the data are sorted by class.",
    )
    transforms: TransformsConfig = Field(
        default_factory=TransformsConfig, description="Transforms of a sample's input."
    )
    augment: AugmentConfig = Field(
        default_factory=AugmentConfig, description="Augmentation of whole training batches, on the device."
    )
    augment_repeats: PositiveInt = Field(
        1,
        description="Repeated augmentation: an epoch, of as many samples as ever, has each of its samples so many "
        "times, close together and augmented differently, and so fewer different ones.",
    )
    normalize: NormalizeConfig | None = Field(
        None,
        description="Normalise image batches on the device: uint8 becomes [0, 1], then (x - mean) / std. Without "
        "it, built-in image data sets are scaled to [0, 1] and everything else is left untouched.",
    )
    feed: Literal["auto", "host", "device_decode", "resident"] = Field(
        "auto",
        description="Where pictures are decoded and kept. `host`: workers decode. `device_decode`: workers read files, "
        "the GPU decodes. `resident`: all of them live on the device, as bytes. `auto`: resident where they take "
        "little of a GPU's memory, else host.",
    )
    resident_placement: Literal["auto", "replicated", "sharded"] = Field(
        "auto",
        description="A resident data set on several GPUs: whole on each, or a share on each, which costs an exchange "
        "per step. `auto` shares what does not fit whole.",
    )
    workers: Workers = Field(
        "auto",
        description="Worker processes per rank that load samples; 0 loads in the training process. `auto` starts one "
        "per spare core, and keeps as many as the first seconds show to be needed.",
    )
    prefetch_factor: PositiveInt = Field(2, description="Micro-batches that each worker keeps ready or in work.")
    prefetch: PositiveInt = Field(2, description="Micro-batches that wait on the device, ahead of the step.")
    cache: CacheConfig | None = Field(
        None, description="Pack image folders into few large files before training, and read these from then on."
    )
    on_error: Literal["raise", "skip"] = Field(
        "raise",
        description="What a sample that cannot be read does: `raise` ends the run, naming its file; `skip` takes "
        "another one, always the same, in training, and leaves it out of an evaluation. Skips are counted.",
    )
    max_skipped: Ratio = Field(
        0.01, description="With `on_error: skip`, end the run once more than this share of the samples is unreadable."
    )
    drop_last: Bool = Field(
        False,
        description="Leave out the last, smaller batch of an epoch. Off: every sample is seen in every epoch.",
    )

    @property
    def evaluates(self) -> bool:
        """Whether there are evaluation data."""
        return self.eval is not None or self.eval_share is not None

    @model_validator(mode="after")
    def _one_evaluation_set(self) -> DataConfig:
        if self.eval is not None and self.eval_share is not None:
            raise ValueError("set either eval or eval_share, not both (null unsets one)")
        return self

    @model_validator(mode="after")
    def _decodable(self) -> DataConfig:
        if self.feed == "device_decode" and self.cache is not None and self.cache.encoding != "jpeg":
            raise ValueError(f"feed: device_decode decodes JPEGs, and cache.encoding is {self.cache.encoding}")
        return self

    @model_validator(mode="after")
    def _repeats_differ(self) -> DataConfig:
        transforms = any(transform.name not in _SAME_EACH_TIME for transform in self.transforms.train)
        is_random = transforms or self.augment.mixes or self.augment.erase > 0
        if self.augment_repeats > 1 and not is_random and ":" not in self.train.name:  # one's own may be random itself
            message = "augment_repeats repeats what nothing augments: set a random one of transforms.train, or augment"
            raise ValueError(f"{message} (got {self.augment_repeats})")
        return self
