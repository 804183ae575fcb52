"""A whole run as a typed, frozen model, `Config`, and the strict way to it from a file.

Owns the whole, and the checks between sections; the sections are the `config_*` files beside this one. Reading YAML is
`trainer.yaml_source`; turning component names into objects is `trainer.components`. Imports no torch: `--help` and
config errors answer at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails

from trainer import yaml_source
from trainer.config_data import DataConfig
from trainer.config_devices import BackendsConfig, MemoryConfig, ParallelConfig
from trainer.config_launch import LaunchConfig
from trainer.config_model import ModelConfig, OptimConfig, ScheduleConfig, TaskConfig
from trainer.config_reporting import LogConfig, ProfileConfig, TrackingConfig
from trainer.config_run import CheckpointConfig, EvalConfig, FaultsConfig, RunConfig, TrainConfig
from trainer.config_values import Section
from trainer.errors import Problem, UserError, nearest

Precision = Literal["no", "bf16", "fp16", "fp8"]

SectionT = TypeVar("SectionT", bound=Section)


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
        default_factory=BackendsConfig,
        description="Shortcuts that torch's kernels may take, and the memory they work in.",
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

    @property
    def shapes_blocks(self) -> bool:
        """Whether repeated blocks are recomputed, compiled or sharded one by one."""
        compiles = self.model.compile == "blocks"
        return self.memory.checkpointing != "none" or compiles or self.parallel.strategy != "ddp"

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
    problems = _mismatches(config)
    if problems:
        raise UserError(*map(config.locate, problems))
    return config


def _mismatches(config: Config) -> list[Problem]:
    """Returns what does not go together in different sections: the first that is found, or all about `parallel`."""
    if not config.data.evaluates:
        if config.checkpoint.best is not None:
            return [Problem("without data.eval nothing is ever the best", "checkpoint.best")]
        if config.train.early_stopping is not None:
            return [Problem("without data.eval there is nothing that gets better", "train.early_stopping")]
        if config.task.metrics:
            return [Problem("without data.eval nothing is evaluated", "task.metrics")]
    if config.model.dtype == "bfloat16" and config.precision != "bf16":
        return [Problem("bfloat16 parameters need precision: bf16", "model.dtype")]
    if config.data.eval_share is not None and config.task.name in ("detection", "language_model", "segmentation"):
        message = f"the task {config.task.name} asks its data sets more than samples: set data.eval"
        return [Problem(message, "data.eval_share")]
    unteachable = _teacher_problem(config) if config.task.teacher is not None else None
    if unteachable is not None:
        return [unteachable]
    may_accumulate = config.train.micro_batch_size == "auto" or config.memory.on_oom == "shrink"
    if config.parallel.static_graph and may_accumulate:
        message = (
            "DDP with a static graph cannot accumulate gradients, which micro_batch_size: auto and on_oom: shrink do"
        )
        return [Problem(message, "parallel.static_graph")]
    for i, key in enumerate(config.checkpoint.allow_changes):
        if not _is_key(key):
            return [Problem(f"'{key}' is no setting{nearest(key, all_keys())}", f"checkpoint.allow_changes.{i}")]
    problems = _parallel_problems(config)
    if problems:
        return problems
    if config.memory.blocks and not config.shapes_blocks and config.optim.layer_decay is None:
        message = (
            "has no effect without memory.checkpointing, model.compile: blocks, parallel.strategy: fsdp or hsdp, or "
            "optim.layer_decay"
        )
        return [Problem(message, "memory.blocks")]
    return []


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
    return key in all_keys() or any(key.startswith(f"{known}.") for known in all_keys() if known.endswith(".args"))


def all_keys(section: type[Section] | None = None, prefix: str = "") -> list[str]:
    """Returns the dotted paths of all sections and settings."""
    keys = []
    for name, field in (section or Config).model_fields.items():
        keys.append(prefix + name)
        inside = _section_inside(field.annotation)
        if inside is not None:
            keys += all_keys(inside, f"{prefix}{name}.")
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
