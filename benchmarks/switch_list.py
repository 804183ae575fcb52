"""Which switches are measured on what: a setting of the config, its values, and a model that it may matter for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

NUM_CLASSES = 1000
NUM_RANKS = 2

_TRANSFORMER = "torchvision.models.vision_transformer:VisionTransformer"


@dataclass(frozen=True)
class Workload:
    """What a switch is measured on: a model, its micro-batch and precision."""

    label: str
    model: str
    args: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 32
    image_size: int = 96
    precision: str = "float32"

    @property
    def batch_text(self) -> str:
        """The micro-batch in words."""
        return f"{self.batch_size} images of {self.image_size}x{self.image_size}, {self.precision}"


@dataclass(frozen=True)
class Switch:
    """One setting of the config and the values that are compared, the yardstick first.

    Args:
        path: dotted path of the setting; `clip_grad_norm_.foreach` is torch's argument, which we leave to torch.
        values: the first is the one that all others are compared with.
        workload: what it is measured on.
        what: what is timed.
        fixed: other settings of `model`.
        lacks: what this machine lacks to measure it, if anything.
        apart: every measurement in a fresh process, for torch keeps what it learnt with another value.
    """

    path: str
    values: tuple[Any, ...]
    workload: Workload
    what: str = "forward and backward"
    fixed: dict[str, Any] = field(default_factory=dict)
    lacks: str | None = None
    apart: bool = False

    @property
    def section(self) -> str:
        """Of the config."""
        return self.path.partition(".")[0]

    @property
    def key(self) -> str:
        """In its section."""
        return self.path.partition(".")[2]

    @property
    def label(self) -> str:
        """What tells it from all others."""
        return f"{self.path} of {self.workload.label}"


def _vit(label: str, layers: int, width: int, batch_size: int, size: int, patch: int, precision: str) -> Workload:
    args = {"image_size": size, "patch_size": patch, "num_layers": layers, "num_heads": max(width // 64, 1)}
    args |= {"hidden_dim": width, "mlp_dim": 4 * width, "num_classes": NUM_CLASSES}
    return Workload(label, _TRANSFORMER, args, batch_size, size, precision)


def switches(device_type: str, tiny: bool) -> list[Switch]:
    """Returns all switches, those that cannot be measured here with what is missing."""
    on_gpu = device_type == "cuda"
    if tiny:
        convolutional = Workload("small_cnn", "small_cnn", {"in_channels": 3}, batch_size=2, image_size=16)
        transformer = _vit("tiny ViT", layers=2, width=16, batch_size=2, size=16, patch=8, precision="float32")
        exact = exact_transformer = parameters = exchanged = convolutional
        launch_bound = transformer
    elif on_gpu:
        convolutional = Workload("resnet50", "resnet50", {}, batch_size=128, image_size=224, precision="bf16")
        transformer = Workload("vit_b_16", "vit_b_16", {}, batch_size=64, image_size=224, precision="bf16")
        exact = dataclasses.replace(convolutional, batch_size=64, precision="float32")
        exact_transformer = dataclasses.replace(transformer, batch_size=32, precision="float32")
        parameters, exchanged = convolutional, convolutional
        launch_bound = _vit("ViT-S/16", layers=12, width=384, batch_size=8, size=96, patch=16, precision="bf16")
    else:
        convolutional = Workload("resnet18", "resnet18")
        transformer = _vit("ViT-S/16", layers=12, width=384, batch_size=16, size=96, patch=16, precision="float32")
        exact, exact_transformer, launch_bound = convolutional, transformer, transformer
        parameters = Workload("resnet50", "resnet50")
        exchanged = dataclasses.replace(convolutional, batch_size=8)
    no_gpu = None if on_gpu else "needs an NVIDIA GPU"
    no_second_gpu = f"needs {NUM_RANKS} GPUs" if on_gpu and torch.cuda.device_count() < NUM_RANKS else None
    ranks = f"forward and backward, {NUM_RANKS} processes"
    return [
        Switch("model.channels_last", (False, True), convolutional),
        Switch("model.compile", ("none", "blocks", "model"), convolutional),
        Switch("model.compile", ("none", "blocks", "model"), transformer),
        Switch(
            "model.compile_mode",
            ("default", "reduce-overhead"),
            launch_bound,
            fixed={"compile": "model"},
            lacks=no_gpu,
        ),
        Switch("optim.implementation", ("for_loop", "foreach", "fused"), parameters, "step of adamw"),
        Switch("clip_grad_norm_.foreach", (False, True), parameters, "clipping of gradients"),
        Switch("backends.matmul_precision", ("highest", "high", "medium"), exact_transformer),
        Switch("backends.cudnn_tf32", (False, True), exact, lacks=no_gpu),
        Switch("backends.cudnn_benchmark", (False, True), convolutional, lacks=no_gpu, apart=True),
        Switch("parallel.gradient_as_bucket_view", (False, True), exchanged, ranks, lacks=no_second_gpu),
        Switch("parallel.static_graph", (False, True), exchanged, ranks, lacks=no_second_gpu),
        Switch("parallel.bucket_mb", (25, 1, 100), exchanged, ranks, lacks=no_second_gpu),
        Switch("parallel.gradient_compression", ("none", "bf16"), exchanged, ranks, lacks=no_second_gpu),
    ]


def as_text(value: object) -> str:
    """Returns a value as YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
