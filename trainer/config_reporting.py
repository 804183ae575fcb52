"""The sections that say what a run tells of itself: `log`, `tracking` and `profile`. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from trainer.config_values import Bool, Every, Interval, NonNegativeInt, PositiveInt, Seconds, Section, TimeSpan

TrackerName = Literal[
    "wandb", "tensorboard", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio"
]  # Accelerate's names

MOST_PROFILED_STEPS = 100  # a step of a large model has thousands of events


class LogConfig(Section):
    """Reports: the only moments when the host waits for the device."""

    every: Every = Field(Interval(50), description="Report this often: steps, or like `1 epoch`.")
    time_split: Bool = Field(
        True,
        description="Say in every report where the time went: waiting for data, copies, forward, backward, "
        "communication, optimizer, checkpoints, evaluation, the host.",
    )


class WandbConfig(Section):
    """Weights & Biases, used when `tracking.trackers` names it."""

    mode: Literal["online", "offline", "disabled"] | None = Field(
        None, description="Default: WANDB_MODE if set, else online where an API key is found, else offline."
    )
    project: str = Field(
        "lockstep", description="Project that the run belongs to; also that of the other trackers that have projects."
    )
    entity: str | None = Field(None, description="User or team. Default: the account's own.")
    name: str | None = Field(None, min_length=1, description="Name of the run as W&B shows it. Default: `run.name`.")
    group: str | None = Field(None, description="Group of runs shown together.")
    tags: tuple[str, ...] = Field((), description="Tags of the run.")
    notes: str | None = Field(None, description="A longer description of the run.")
    checkpoints: Literal["none", "best", "last", "all"] = Field(
        "none",
        description="Checkpoints to upload as artifacts, behind the training: each new best one, the last one when "
        "the run ends, or all.",
    )
    finish_timeout: Seconds = Field(
        TimeSpan(60.0),
        description="How long the end of a run waits for trackers, such as `60 s`. What is left of W&B then stays in "
        "the run folder, for `python -m trainer sync`.",
    )


class TrackingConfig(Section):
    """Experiment trackers, through Accelerate, on rank 0 only. `metrics.jsonl` is always written."""

    trackers: tuple[TrackerName, ...] = Field(("wandb",), description="Trackers to write to; an empty list for none.")
    wandb: WandbConfig = Field(default_factory=WandbConfig, description="Weights & Biases settings.")
    init: dict[TrackerName, dict[str, Any]] = Field(
        default_factory=dict,
        description="By tracker, what its own start is called with, such as `{mlflow: {experiment_name: cats}}`.",
    )
    samples: NonNegativeInt = Field(
        16,
        description="Samples of each evaluation to keep with their predictions, beside the confusion matrix; 0 keeps "
        "neither.",
    )


class ProfileConfig(Section):
    """Traces of a few steps by torch's profiler, a file per rank, in `profile` in the run folder."""

    steps: tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        description="First and last step to trace, such as `[10, 15]`, counted from 1; at most 100. None: none.",
    )
    memory: Bool = Field(True, description="With `steps`: also write down every allocation, as a memory snapshot.")
    stacks: Bool = Field(False, description="With `steps`: also record where in Python each operation was called.")
    shapes: Bool = Field(False, description="With `steps`: also record the shapes that each operation was called with.")

    @field_validator("steps")
    @classmethod
    def _few(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None:
            first, last = steps
            if first > last:
                raise ValueError(f"the first step ({first}) comes after the last ({last})")
            if last - first >= MOST_PROFILED_STEPS:
                raise ValueError(
                    f"{last - first + 1} steps, and a trace that can be opened has at most {MOST_PROFILED_STEPS}"
                )
        return steps
