"""The sections that say what is trained, and how: `model`, `task`, `optim` and `schedule`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config_values import (
    Bool,
    Component,
    ComponentName,
    Duration,
    EmaWarmup,
    Interval,
    MetricName,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Ratio,
    Section,
)


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


# Arguments by which timm and torchvision give a model its trained weights, all of them.
_BRING_WEIGHTS = ("pretrained", "checkpoint_path", "weights")


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
        brings_weights = is_own or (package != "transformers" and any(map(self.args.get, _BRING_WEIGHTS)))
        if self.weights is None and not brings_weights:
            raise ValueError("a teacher has learned something: set weights")
        return self


class TaskConfig(Component):
    """What a batch means, how it is scored, and the loss."""

    name: ComponentName = Field(
        "classification",
        description="`classification`, `segmentation`, `detection`, `language_model`, or the import path of a class.",
    )
    loss: Component | None = Field(
        None,
        description="The loss: `cross_entropy` (the task's default), or an import path to a function of "
        "(outputs, targets), or to a class of such, that returns a mean or one value per sample (or pixel).",
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
        "dimension or less), and patterns of names of parameters or of modules, such as `pos_embed`. A model may lack "
        "some of the kinds; a pattern has to name something.",
    )
    layer_decay: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = Field(
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
        if self.warmup_start != 0.01 and not self.warmup.count:
            raise ValueError("warmup_start has no effect without warmup")
        if self.interval == "epoch" and is_flat and not self.warmup.count:
            raise ValueError("interval has no effect on a constant rate")
        return self
