"""The sections of a run's name, length and safety: `run`, `train`, `eval`, `checkpoint`, `faults`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config_values import (
    Bool,
    Every,
    EveryOrMinutes,
    Interval,
    MicroBatchSize,
    NonNegativeFloat,
    PositiveInt,
    Seconds,
    Section,
    TimeSpan,
)


class RunConfig(Section):
    """Who this run is and where it leaves its files."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="Name of the run; also its default folder under `runs/` and its name in trackers."
    )
    dir: Annotated[str, Field(min_length=1)] | None = Field(None, description="Run folder. Default: `runs/<run.name>`.")
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = Field(
        0, description="Seed of initial weights, sample order, augmentation and dropout."
    )


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
