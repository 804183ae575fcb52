"""Every YAML section as a typed, frozen model, and the strict way from a file to a `Config`.

Owns what the keys mean, their defaults and the checks between them. Reading YAML is `trainer.yaml_source`;
turning component names into objects is `trainer.components`. Imports no torch: `--help` and config errors
answer at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from trainer import yaml_source
from trainer.config_launch import LaunchConfig
from trainer.config_reporting import LogConfig, ProfileConfig, TrackingConfig
from trainer.config_values import (
    Amount,
    Bool,
    ComponentName,
    Duration,
    EmaWarmup,
    Every,
    EveryOrMinutes,
    Interval,
    MemoryAmount,
    MetricName,
    MicroBatchSize,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Ratio,
    Seconds,
    Section,
    TimeSpan,
    Workers,
)
from trainer.errors import Problem, UserError, nearest

Precision = Literal["no", "bf16", "fp16", "fp8"]


SectionT = TypeVar("SectionT", bound=Section)


class Component(Section):
    """Something built by name: a built-in's short name, or `package.module:attribute` of the user's own."""

    name: ComponentName = Field(description="A built-in's short name or an import path `package.module:attribute`.")
    args: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments that it is called with.")


class RunConfig(Section):
    """Who this run is and where it leaves its files."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="Name of the run; also its default folder under `runs/` and its name in trackers."
    )
    dir: Annotated[str, Field(min_length=1)] | None = Field(None, description="Run folder. Default: `runs/<run.name>`.")
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = Field(
        0, description="Seed of initial weights, sample order, augmentation and dropout."
    )


class TransformsConfig(Section):
    """Transforms of a sample's input, in order; random ones differ per sample and epoch.

    torchvision's crops and resizes at the start, and flips at the end, run where they are cheapest: only what a
    crop keeps is decoded, and flips run on the device.
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
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_probability > 0


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


class DataConfig(Section):
    """What to train and evaluate on, and how samples reach the device."""

    train: Component = Field(description="Training data set.")
    eval: Component | None = Field(None, description="Evaluation data set; without one the run never evaluates.")
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

    @model_validator(mode="after")
    def _decodable(self) -> DataConfig:
        if self.feed == "device_decode" and self.cache is not None and self.cache.encoding != "jpeg":
            raise ValueError(f"feed: device_decode decodes JPEGs, and cache.encoding is {self.cache.encoding}")
        return self

    @model_validator(mode="after")
    def _repeats_differ(self) -> DataConfig:
        is_random = self.transforms.train or self.augment.mixes or self.augment.erase > 0
        if self.augment_repeats > 1 and not is_random and ":" not in self.train.name:  # one's own may be random itself
            message = "augment_repeats repeats what nothing augments: set transforms.train or augment"
            raise ValueError(f"{message} (got {self.augment_repeats})")
        return self


class ModelConfig(Component):
    """The model: a torchvision.models name, a small built-in, or an import path called with `args` only."""

    weights: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Start from these weights: a run folder (its newest checkpoint, averages before raw weights), a "
        "checkpoint's folder, a .safetensors or state-dict file, or a torchvision weights name such as `DEFAULT`. A "
        "final layer of another size keeps its fresh weights.",
    )
    freeze: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        description="Do not train these parameters: patterns of names of parameters or of modules, such as `layer1.*`. "
        "Modules of which nothing is trained stay in eval mode, so BatchNorm uses and keeps its statistics.",
    )
    weights_strict: Bool = Field(
        True,
        description="Refuse weights that lack some of the model's, have others or other shapes. Off: load what fits, "
        "and say what does not.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the parameters, and so of gradients and optimizer state. bfloat16 halves their memory and "
        "loses small updates; `precision` is the usual way.",
    )
    channels_last: Bool | Literal["auto"] = Field(
        "auto",
        description="Keep the weights of 2D convolutions in channels_last memory, as images arrive. `auto`: where the "
        "model has such convolutions.",
    )
    compile: Literal["none", "blocks", "model"] = Field(
        "none",
        description="torch.compile: `blocks` compiles each repeated block (quick to compile, and gradients are "
        "exchanged while backward runs), `model` the whole model.",
    )
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
        "default", description="Mode of torch.compile; `reduce-overhead` and `max-autotune` use CUDA graphs."
    )

    @model_validator(mode="after")
    def _compiled(self) -> ModelConfig:
        if self.compile == "none" and self.compile_mode != "default":
            raise ValueError("compile_mode needs compile: blocks or model")
        return self


class TeacherConfig(Component):
    """Distillation: a trained model that the model learns from, besides the targets. Its class scores are compared."""

    name: ComponentName = Field(description="A model, as in the section `model`.")
    weights: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="The teacher's weights, as `model.weights`, last layer included. Not needed where `args` bring "
        "trained weights, or an import path of your own does.",
    )
    alpha: Annotated[float, Field(strict=True, gt=0, le=1)] = Field(
        0.5, description="Weight of the teacher in the loss; that of the targets is 1 - alpha."
    )
    temperature: PositiveFloat = Field(
        1.0,
        description="Divides the scores of both models before their probabilities are compared. That part of the loss "
        "is multiplied by its square, which keeps gradients alike.",
    )
    hard: Bool = Field(False, description="Learn the teacher's best class instead of its probabilities.")

    @property
    def model(self) -> ModelConfig:
        """The teacher as a section `model` would describe it."""
        return ModelConfig(name=self.name, args=self.args, weights=self.weights)

    @model_validator(mode="after")
    def _teaches(self) -> TeacherConfig:
        if self.hard and self.temperature != 1:
            raise ValueError("temperature has no effect with hard: true")
        package = self.name.partition(":")[0] if ":" in self.name else None
        is_own = package not in (None, "timm") and (package != "transformers" or self.name.endswith(".from_pretrained"))
        brings_weights = is_own or any("weights" in key or key == "pretrained" for key in self.args)
        if self.weights is None and not brings_weights:
            raise ValueError("a teacher has learned something: set weights")
        return self


class TaskConfig(Component):
    """What a batch means, how it is scored, and the loss."""

    name: ComponentName = Field(
        "classification", description="A built-in task by name, or an import path to a task class."
    )
    loss: Component | None = Field(
        None,
        description="The loss: `cross_entropy` (the task's default), or an import path to a function of "
        "(outputs, targets), or to a class of such, that returns a mean or one value per sample.",
    )
    metrics: dict[MetricName, Component] = Field(
        default_factory=dict,
        description="Further metrics of evaluations: `eval/<name>` by the import path of a torchmetrics class.",
    )
    teacher: TeacherConfig | None = Field(None, description="Distillation: a trained model to learn from as well.")


class EmaConfig(Section):
    """A moving average of the weights, which is evaluated and exported instead of the last weights."""

    decay: Annotated[float, Field(strict=True, gt=0, lt=1)] = Field(
        description="Share of itself that the average keeps in an update, such as 0.9998."
    )
    warmup: EmaWarmup = Field(
        True,
        description="Let the n-th update keep at most (1 + n) / (10 + n), or with `timm` at most 1 - n^(-2/3), as "
        "timm's --model-ema-warmup.",
    )
    every: PositiveInt = Field(1, description="Update after every so many optimizer steps.")


class RestConfig(Component):
    """A second optimizer, for what the main one cannot or should not take."""

    name: ComponentName = Field(description="As `optim.name`.")
    lr: PositiveFloat | None = Field(None, description="Its peak learning rate. Default: `optim.lr`.")
    weight_decay: NonNegativeFloat | None = Field(None, description="Its weight decay. Default: `optim.weight_decay`.")
    match: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        ("not_matrix", "embedding", "last_layer"),
        min_length=1,
        description="What it takes: `not_matrix` (all but two-dimensional parameters), `embedding` (weights of "
        "nn.Embedding), `last_layer` (the last module with a weight), and patterns of names of parameters or of "
        "modules. Default: what torch's Muon cannot take, and what by convention it is not given.",
    )


class OptimConfig(Component):
    """The optimizer and what happens to gradients before it."""

    name: ComponentName = Field("adamw", description="`sgd`, `adamw`, a torch.optim class name or an import path.")
    lr: PositiveFloat = Field(description="Peak learning rate; the schedule multiplies it.")
    weight_decay: NonNegativeFloat = Field(
        0.0, description="Weight decay of every parameter that `no_weight_decay` does not name."
    )
    no_weight_decay: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        description="What has no weight decay: `norm` (parameters of normalizations), `bias`, `vector` (all of one "
        "dimension or less), and patterns of names of parameters or of modules, such as `pos_embed`.",
    )
    layer_decay: Annotated[float, Field(strict=True, gt=0, le=1)] | None = Field(
        None,
        description="Layer-wise decay of the learning rate: a layer's is multiplied by this once for each layer "
        "after it. Layers are timm's where the model has such, else the repeated blocks, `memory.blocks` if set.",
    )
    rest: RestConfig | None = Field(
        None, description="A second optimizer for what the main one cannot take; made for torch's Muon."
    )
    clip_norm: PositiveFloat | None = Field(None, description="Clip the global gradient norm to this before each step.")
    clip_value: PositiveFloat | None = Field(
        None, description="Clip each number in the gradients to at most this, up and down, before each step."
    )
    implementation: Literal["auto", "fused", "foreach", "for_loop"] = Field(
        "auto",
        description="How torch updates the parameters: one kernel for many (`fused`), one per operation for many "
        "(`foreach`), or one by one. `auto`: fused on GPUs where the optimizer has it, else torch's choice.",
    )
    ema: EmaConfig | None = Field(
        None,
        description="Keep a moving average of the weights. Evaluations, under the same names, and so the best "
        "checkpoint are then those of the average.",
    )

    @model_validator(mode="after")
    def _has_effect(self) -> OptimConfig:
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError("clip_norm and clip_value are two ways to clip: choose one")
        decays = self.weight_decay or (self.rest is not None and self.rest.weight_decay)
        if self.no_weight_decay and not decays:
            raise ValueError("no_weight_decay has no effect without weight_decay")
        return self


class ScheduleConfig(Component):
    """Learning rate as a pure function of the step: warm-up, then the named schedule."""

    name: ComponentName = Field(
        "constant",
        description="`constant`, `cosine` (args: min_ratio), `linear` (end_ratio), `polynomial` (power, end_ratio), "
        "`step` (every, gamma), `multistep` (milestones, gamma), `exponential` (gamma, every), `one_cycle`, `wsd` "
        "(decay, shape, end_ratio), or an import path to a function of total_steps that returns a function step -> "
        "factor.",
    )
    interval: Literal["step", "epoch"] = Field(
        "step",
        description="How often the rate changes: with every step, or once per epoch, as in torchvision's recipes. With "
        "`epoch` warm-up and schedule count epochs.",
    )
    warmup: Duration = Field(Interval(0), description="Linear warm-up before the schedule: steps, or like `5 epochs`.")
    warmup_start: Ratio = Field(0.01, description="Share of the peak rate at the first warm-up step.")
    warmup_prefix: Bool = Field(
        True,
        description="Let the schedule begin at the end of warm-up. Off: it begins at step 0, and warm-up takes the "
        "place of its first part.",
    )

    @model_validator(mode="after")
    def _has_effect(self) -> ScheduleConfig:
        is_flat = self.name == "constant"
        if not self.warmup_prefix and (is_flat or not self.warmup.count):
            raise ValueError(f"warmup_prefix has no effect {'on a constant rate' if is_flat else 'without warmup'}")
        if self.interval == "epoch" and is_flat and not self.warmup.count:
            raise ValueError("interval has no effect on a constant rate")
        return self


class BackendsConfig(Section):
    """Shortcuts that torch's kernels may take; the defaults are torch's own."""

    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest",
        description="Of float32 matrix products: `highest` is float32, `high` TF32 and `medium` bfloat16 inside, where "
        "the device has them.",
    )
    cudnn_tf32: Bool = Field(True, description="Let float32 convolutions on GPUs use TF32.")
    cudnn_benchmark: Bool = Field(
        False,
        description="Try cuDNN's algorithms and keep the fastest per shape. Which one wins may differ from run to run, "
        "and with it the last bits of the result.",
    )


class MemoryConfig(Section):
    """How the model is made to fit: what is kept for backward, and what happens when memory runs out."""

    checkpointing: Literal["none", "full", "every_2", "selective", "auto"] = Field(
        "none",
        description="Gradient checkpointing of the model's repeated blocks: `full` recomputes each in backward, "
        "`every_2` every second, `selective` all but matrix products, convolutions and attention; `auto` recomputes "
        "what costs the least time to fit `budget`.",
    )
    blocks: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        description="The repeated blocks, as module names (`layers.*`) or class names. Default: found by structure.",
    )
    budget: MemoryAmount | None = Field(
        None,
        description="With `checkpointing: auto`: activations to keep, as a share of those without checkpointing or in "
        "bytes. Default: what `target` leaves.",
    )
    target: MemoryAmount = Field(
        Amount("90%"),
        description="Most memory that a step may take on a device, as a share of the device's or in bytes; what "
        "`train.micro_batch_size: auto` and `checkpointing: auto` fit.",
    )
    on_oom: Literal["stop", "shrink"] = Field(
        "stop",
        description="When a device runs out of memory: `stop` ends the run with a report; `shrink` also halves the "
        "micro-batch for the next start, from the last checkpoint, which `python -m launch` makes by itself.",
    )

    @model_validator(mode="after")
    def _has_effect(self) -> MemoryConfig:
        if self.budget is not None and self.checkpointing != "auto":
            raise ValueError("budget needs checkpointing: auto")
        return self


class ParallelConfig(Section):
    """How several processes train one model: each with a copy of it (DDP), or sharing one (FSDP2)."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = Field(
        "ddp",
        description="`ddp`: a copy of the model per process. `fsdp`: all processes share one copy of parameters, "
        "gradients and optimizer state. `hsdp`: `shard_size` processes share a copy, and there are several. A single "
        "process trains the whole model under each.",
    )
    shard_size: PositiveInt | None = Field(
        None,
        description="With `strategy: hsdp`: processes that share one copy; must divide the number of processes. "
        "Default: the processes of one machine.",
    )
    reshard_after_forward: Bool = Field(
        True,
        description="With `fsdp` and `hsdp`: let go of a block's gathered parameters after its forward and gather them "
        "again for backward. Off: more memory, less traffic.",
    )
    cpu_offload: Bool = Field(
        False,
        description="With `fsdp` and `hsdp`: keep the shares of parameters, gradients and optimizer state in host "
        "memory, where the optimizer then works. Slow; for models that fit in no other way.",
    )
    sync_batchnorm: Bool = Field(
        False,
        description="BatchNorm over the samples of all processes instead of each process's own: an exchange per layer, "
        "for micro-batches that are too small.",
    )
    pin_cores: Bool = Field(
        True,
        description="Where several processes train on GPUs of one machine: keep each, and its loader workers, on its "
        "share of the CPU cores next to its GPU.",
    )
    find_unused_parameters: Bool = Field(
        False,
        description="Let steps leave some parameters without a gradient, at the cost of a search in every step. "
        "Needed only for models that do.",
    )
    static_graph: Bool = Field(
        False,
        description="Tell DDP that every step uses the same parameters in the same order, so that it can plan ahead.",
    )
    gradient_as_bucket_view: Bool = Field(
        True, description="Let gradients live in the buckets in which they are exchanged, instead of being copied."
    )
    bucket_mb: PositiveFloat = Field(
        25.0, description="Size in MiB of the buckets in which gradients are exchanged while backward runs."
    )
    gradient_compression: Literal["none", "bf16", "fp16"] = Field(
        "none",
        description="With `ddp`: exchange gradients in bfloat16 or float16: half the traffic, less exact sums. float16 "
        "has more digits and overflows.",
    )

    @model_validator(mode="after")
    def _one_graph(self) -> ParallelConfig:
        if self.static_graph and self.find_unused_parameters:
            raise ValueError("static_graph finds unused parameters itself; unset find_unused_parameters")
        return self


class EarlyStoppingConfig(Section):
    """When a run ends early: once its evaluations no longer get better."""

    metric: Annotated[str, Field(min_length=1)] = Field(
        description="Name of an evaluation metric, without `eval/`; for example `accuracy`."
    )
    mode: Literal["max", "min"] | None = Field(
        None,
        description="Whether larger (`max`) or smaller (`min`) is better. Default: as for the best checkpoint, where "
        "that has the same metric.",
    )
    patience: PositiveInt = Field(description="End with so many evaluations in a row that are not better.")
    min_delta: NonNegativeFloat = Field(0.0, description="What is better is so by more than this.")


class TrainConfig(Section):
    """How long to train and in what batches."""

    steps: PositiveInt | None = Field(None, description="Optimizer steps to train; set this or `epochs`.")
    epochs: PositiveInt | None = Field(None, description="Passes over the training data; set this or `steps`.")
    batch_size: PositiveInt = Field(
        description="Samples per optimizer step over all devices; the same whatever the hardware."
    )
    micro_batch_size: MicroBatchSize = Field(
        None,
        description="Most samples that one device holds at once; gradients accumulate until `batch_size` is "
        "reached. `auto`: the most that fit into `memory.target`. Default: no accumulation.",
    )
    early_stopping: EarlyStoppingConfig | None = Field(
        None, description="End before `steps` or `epochs` once evaluations no longer get better."
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("set either steps or epochs, not both (null unsets one)")
        if self.steps is None and self.epochs is None:
            raise ValueError("set steps or epochs")
        return self


class EvalConfig(Section):
    """When and how to evaluate. The end of training is always evaluated."""

    every: Every = Field(Interval(1, "epochs"), description="Evaluate this often: steps, or like `1 epoch`.")
    batch_size: PositiveInt | None = Field(
        None, description="Samples per device and batch in evaluation. Default: the training micro-batch."
    )


class BestConfig(Section):
    """Which evaluation decides the best checkpoint."""

    metric: str = Field(description="Name of an evaluation metric, without `eval/`; for example `accuracy`.")
    mode: Literal["max", "min"] = Field(description="Whether larger (`max`) or smaller (`min`) is better.")


class CheckpointConfig(Section):
    """When to save, where, what to keep, and whether to continue. The end of training is always saved."""

    every: EveryOrMinutes = Field(
        Interval(1, "epochs"), description="Save this often: steps, or like `1 epoch` or `10 minutes`."
    )
    dir: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Where to save: a folder that all ranks share, or a URL that fsspec knows, such as "
        "`s3://bucket/run`. Default: `checkpoints` in the run folder.",
    )
    keep: PositiveInt = Field(2, description="Newest checkpoints to keep, besides the best one.")
    keep_every: Every | None = Field(
        None, description="Never delete the checkpoints of these steps: multiples of a number of steps or epochs."
    )
    best: BestConfig | None = Field(
        None, description="What makes a checkpoint the best. Default: the task's own metric."
    )
    async_save: Bool = Field(
        True,
        description="Copy the state to (pinned) host memory and write it behind the training, which takes as much host "
        "memory as a process's part of a checkpoint. Off: training waits until all is written.",
    )
    on_error: Literal["warn", "raise"] = Field(
        "warn",
        description="When a checkpoint cannot be written (a full disk, a lost mount): `warn` goes on, with the last "
        "good one kept and the next one tried as usual; `raise` ends the run. The last checkpoint of a run always ends "
        "it.",
    )
    resume: Literal["auto", "never"] = Field(
        "auto",
        description="`auto` continues from the newest checkpoint that verifies; `never` refuses to start where there "
        "is one.",
    )
    allow_changes: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        description="Settings that may differ from the checkpoint's although they change the training, such as "
        "`optim.lr` or `schedule`.",
    )


class FaultsConfig(Section):
    """What is done about whatever goes wrong in a long run. docs/reliability.md tells the story."""

    non_finite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="When a loss or a gradient is not finite, or a loss is a spike: `stop` ends the run before such "
        "weights are saved; `skip` leaves that optimizer step out; `rollback` goes back to the last checkpoint and "
        "leaves that batch out. With `stop` gradients are looked at only where `optim.clip_norm` is set.",
    )
    spike_factor: Annotated[float, Field(strict=True, gt=1, allow_inf_nan=False)] | None = Field(
        None,
        description="A step's loss is a spike where it is larger than this times the moving average of the losses "
        "before it. Default: nothing is a spike.",
    )
    max_rollbacks: PositiveInt = Field(3, description="With `non_finite: rollback`: end the run when one more is due.")
    hang_timeout: Seconds | None = Field(
        TimeSpan(600.0),
        description="End the job when a rank has not got on for so long, such as `10 minutes`, and name that rank. "
        "The first step, which may compile, and restoring a checkpoint get five times as long; data sets and models "
        "are built without a limit. null: wait for ever.",
    )
    grace: Seconds = Field(
        TimeSpan(30.0),
        description="Time between a request to stop and the end, such as the cluster gives. Where saves have taken "
        "longer than what is left of it, no checkpoint is written, and the newest one stands.",
    )


class Config(Section):
    """A whole run: what `train.py --config FILE` reads and `--print-config` prints."""

    run: RunConfig = Field(description="Name, folder and seed of the run.")
    data: DataConfig = Field(description="Data sets and loading.")
    model: ModelConfig = Field(description="The model.")
    task: TaskConfig = Field(default_factory=TaskConfig, description="What a batch means, and the loss.")
    optim: OptimConfig = Field(description="The optimizer.")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="The learning-rate schedule.")
    precision: Precision = Field(
        "no",
        description="Mixed precision of forward and backward; weights and optimizer stay in `model.dtype`. fp16 scales "
        "the loss; fp8 needs a GPU that has it, and torchao or Transformer Engine.",
    )
    backends: BackendsConfig = Field(
        default_factory=BackendsConfig, description="Shortcuts that torch's kernels may take."
    )
    memory: MemoryConfig = Field(default_factory=MemoryConfig, description="How the model is made to fit.")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="How processes train together.")
    train: TrainConfig = Field(description="Length and batch arithmetic.")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="When to evaluate.")
    log: LogConfig = Field(default_factory=LogConfig, description="When to report.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="When to save and what to keep.")
    faults: FaultsConfig = Field(
        default_factory=FaultsConfig, description="What is done about whatever goes wrong in a long run."
    )
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="Experiment trackers.")
    profile: ProfileConfig = Field(default_factory=ProfileConfig, description="Traces of a few steps.")
    launch: LaunchConfig = Field(default_factory=LaunchConfig, description="How a job is started and restarted.")

    _source: yaml_source.Source = PrivateAttr(default_factory=yaml_source.Source)

    @property
    def run_dir(self) -> Path:
        """The run folder: `run.dir`, or `runs/<run.name>`."""
        return Path(self.run.dir).expanduser() if self.run.dir else Path("runs") / self.run.name

    @property
    def leaves_memory_open(self) -> bool:
        """Whether the micro-batch, or what is recomputed in backward, is to be found out."""
        return self.train.micro_batch_size == "auto" or self.memory.checkpointing == "auto"

    def of_trial(self, environment: Mapping[str, str]) -> Config:
        """Returns the config of the trial of a W&B sweep that `wandb agent` has started, if it has: a run of its own.

        All trials of a sweep share a config file, whose run folder one of them would continue for another.
        """
        trial = environment.get("WANDB_RUN_ID") if environment.get("WANDB_SWEEP_ID") else None
        if not trial or f"-{trial}" in self.run.name:  # also before the number of a task
            return self

        def own(folder: str | None) -> str | None:
            return None if folder is None else f"{folder.rstrip('/')}-{trial}"

        run = self.run.model_copy(update={"name": f"{self.run.name}-{trial}", "dir": own(self.run.dir)})
        checkpoint = self.checkpoint.model_copy(update={"dir": own(self.checkpoint.dir)})
        return self.model_copy(update={"run": run, "checkpoint": checkpoint})

    def locate(self, problem: Problem) -> Problem:
        """Adds to a problem the file and line where its dotted path was written."""
        if problem.origin or not problem.path:
            return problem
        keys = tuple(int(k) if k.isdigit() else k for k in problem.path.split("."))
        return Problem(problem.message, problem.path, self._source.origin(keys))

    def to_yaml(self) -> str:
        """Returns the resolved config, defaults included, as YAML that reads back to an equal `Config`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_section(section: type[SectionT], **values: object) -> SectionT:
    """Builds one section from values that come from a command line.

    Raises:
        UserError: one problem per value that does not fit.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(*(_problem(details, yaml_source.Source()) for details in error.errors())) from None


def load_config(file: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file (and its `base:`), applies `section.key=value` overrides and checks everything.

    Raises:
        UserError: one problem per mistake, each with file, line, dotted path and the nearest valid name.
    """
    source = yaml_source.read(file, overrides)
    try:
        config = Config.model_validate(source.values)
    except ValidationError as error:
        problems = [_problem(details, source) for details in error.errors()]
        raise UserError(*dict.fromkeys(problems)) from None
    config._source = source
    if config.checkpoint.best is not None and config.data.eval is None:
        problem = Problem("without data.eval nothing is ever the best", "checkpoint.best")
        raise UserError(config.locate(problem))
    if config.train.early_stopping is not None and config.data.eval is None:
        problem = Problem("without data.eval there is nothing that gets better", "train.early_stopping")
        raise UserError(config.locate(problem))
    if config.task.metrics and config.data.eval is None:
        raise UserError(config.locate(Problem("without data.eval nothing is evaluated", "task.metrics")))
    if config.model.dtype == "bfloat16" and config.precision != "bf16":
        problem = Problem("bfloat16 parameters need precision: bf16", "model.dtype")
        raise UserError(config.locate(problem))
    unteachable = _teacher_problem(config) if config.task.teacher is not None else None
    if unteachable is not None:
        raise UserError(config.locate(unteachable))
    may_accumulate = config.train.micro_batch_size == "auto" or config.memory.on_oom == "shrink"
    if config.parallel.static_graph and may_accumulate:
        message = (
            "DDP with a static graph cannot accumulate gradients, which micro_batch_size: auto and on_oom: shrink do"
        )
        raise UserError(config.locate(Problem(message, "parallel.static_graph")))
    for i, key in enumerate(config.checkpoint.allow_changes):
        if not _is_key(key):
            problem = Problem(f"'{key}' is no setting{nearest(key, _all_keys())}", f"checkpoint.allow_changes.{i}")
            raise UserError(config.locate(problem))
    problems = _parallel_problems(config)
    if problems:
        raise UserError(*map(config.locate, problems))
    uses_blocks = (
        config.memory.checkpointing != "none"
        or config.model.compile == "blocks"
        or config.parallel.strategy != "ddp"
        or config.optim.layer_decay is not None
    )
    if config.memory.blocks and not uses_blocks:
        message = (
            "has no effect without memory.checkpointing, model.compile: blocks, parallel.strategy: fsdp or hsdp, or "
            "optim.layer_decay"
        )
        raise UserError(config.locate(Problem(message, "memory.blocks")))
    return config


def _teacher_problem(config: Config) -> Problem | None:
    """Returns what does not go with `task.teacher`, if anything."""
    if ":" not in config.task.name and config.task.name != "classification":
        return Problem(f"distillation compares class scores, which {config.task.name} has not", "task.teacher")
    message = "a teacher's memory is not planned: auto would not count it"
    if config.train.micro_batch_size == "auto":
        return Problem(message, "train.micro_batch_size")
    if config.memory.checkpointing == "auto":
        return Problem(message, "memory.checkpointing")
    return None


_ONLY_DDP = (
    "find_unused_parameters",
    "static_graph",
    "gradient_as_bucket_view",
    "bucket_mb",
    "gradient_compression",
)
_ONLY_SHARDED = ("shard_size", "reshard_after_forward", "cpu_offload")


def _parallel_problems(config: Config) -> list[Problem]:
    """Returns what has no effect with the chosen `parallel.strategy`, or does not go with it."""
    parallel = config.parallel
    strategy = parallel.strategy
    without_effect = {"ddp": _ONLY_SHARDED, "fsdp": (*_ONLY_DDP, "shard_size"), "hsdp": _ONLY_DDP}[strategy]
    defaults = ParallelConfig()
    problems = [
        Problem(f"has no effect with strategy: {strategy}", f"parallel.{key}")
        for key in without_effect
        if getattr(parallel, key) != getattr(defaults, key)
    ]
    if strategy == "ddp":
        return problems
    if parallel.shard_size == 1:
        problems.append(Problem("1 process shares with nobody: that is strategy: ddp", "parallel.shard_size"))
    if config.model.dtype != "float32":
        message = f"{strategy} keeps parameters in float32 and gathers them in what `precision` says"
        problems.append(Problem(message, "model.dtype"))
    if config.model.channels_last is True:
        message = f"{strategy} keeps weights row by row; `auto` leaves images in channels_last, which is what matters"
        problems.append(Problem(message, "model.channels_last"))
    if config.precision == "fp8":
        problems.append(Problem(f"fp8 does not go with strategy: {strategy}; use bf16", "precision"))
    return problems


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def schema_text() -> str:
    """Returns the JSON Schema of a config file, for editors; committed as `configs/schema.json`."""
    schema = Config.model_json_schema()
    base = {"type": "string", "description": "Another YAML file that this one builds on, relative to this one."}
    schema["properties"] = {"base": base, **schema["properties"]}
    # A file with a base may leave out what the base holds; the loader checks the merged whole.
    schema["anyOf"] = [{"required": ["base"]}, {"required": schema.pop("required")}]
    full = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(full, indent=2) + "\n"


def _problem(details: ErrorDetails, source: yaml_source.Source) -> Problem:
    """Puts one pydantic error into our words: where it stands, what is wrong, what was meant."""
    path, kind, value = details["loc"], details["type"], details["input"]
    if kind == "extra_forbidden":
        valid = _keys_at(path[:-1])
        message = f"unknown key{nearest(str(path[-1]), valid) or '; valid keys: ' + ', '.join(valid)}"
    elif kind == "missing":
        message = "required, but not set"
    elif kind == "literal_error":
        expected = details["ctx"]["expected"]
        valid = re.findall(r"'([^']*)'", expected)
        message = f"must be {expected} (got {value!r}){nearest(str(value), valid)}"
    elif kind == "value_error":
        message = str(details["ctx"]["error"])
    elif kind in ("model_type", "dict_type", "model_attributes_type"):
        message = f"must be a section of `key: value` lines (got {value!r})"
    elif kind == "tuple_type":
        message = f"must be a list (got {value!r})"
    elif kind == "string_type" and not isinstance(value, dict | list):
        message = f"must be text; write quotes around it (got {value!r})"
    else:
        text = details["msg"].removeprefix("Input should be ").removeprefix("String should ")
        message = f"must be {text}" if text != details["msg"] else text
        if not isinstance(value, dict | list):
            message += f" (got {value!r})"
    return Problem(message, ".".join(map(str, path)), source.origin(path))


def _is_key(key: str) -> bool:
    """Tells whether a dotted path names a section or a setting, or something inside a component's `args`."""
    return key in _all_keys() or any(key.startswith(f"{known}.") for known in _all_keys() if known.endswith(".args"))


def _all_keys(section: type[Section] | None = None, prefix: str = "") -> list[str]:
    """Returns the dotted paths of all sections and settings."""
    keys = []
    for name, field in (section or Config).model_fields.items():
        keys.append(prefix + name)
        inside = _section_inside(field.annotation)
        if inside is not None:
            keys += _all_keys(inside, f"{prefix}{name}.")
    return keys


def _keys_at(path: tuple[int | str, ...]) -> list[str]:
    """Returns the valid keys of the section at `path`."""
    section: type[Section] = Config
    for key in path:
        if isinstance(key, int):
            continue
        if key in section.model_fields:  # else it is a name of the user's, such as that of a metric
            inside = _section_inside(section.model_fields[key].annotation)
            assert inside is not None, key
            section = inside
    return list(section.model_fields)


def _section_inside(annotation: Any) -> type[Section] | None:
    """Returns the one Section class inside an annotation such as `Component | None`, or None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = [_section_inside(a) for a in getattr(annotation, "__args__", ()) if a not in (type(None), Ellipsis)]
    return next((section for section in found if section is not None), None)
