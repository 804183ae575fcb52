"""The sections of how a model fits and runs on its devices: `backends`, `memory`, `parallel`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config_values import Amount, Bool, MemoryAmount, PositiveFloat, PositiveInt, Section


class BackendsConfig(Section):
    """Shortcuts that torch's kernels may take, and the memory they work in."""

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
    huge_pages: Bool = Field(
        True,
        description="Ask Linux for huge pages for large tensors in host memory, as torch does under the environment "
        "variable `THP_MEM_ALLOC_ENABLE=1`: a step on a CPU then waits for a fraction of the page faults. Where the "
        "variable is set already it is left so. torch reads it at the first tensor of a process, and never again.",
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
