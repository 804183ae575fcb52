"""What may change between two starts of a run, and what would make it another run.

Owns the comparison of a config with the one that a checkpoint was written under. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from trainer.config import Config, flatten
from trainer.errors import Problem, UserError

# The order of samples and the kind of state, of which groups of parameters are a part: a position in one run means
# nothing in another.
_NEVER = (
    "run.seed",
    "train.batch_size",
    "data.drop_last",
    "data.augment_repeats",
    "data.eval_share",
    "model.name",
    "model.freeze",
    "optim.name",
    "optim.no_weight_decay",
    "optim.rest.name",
    "optim.rest.match",
)
# Another value is another rate; with none the groups are others.
_NEVER_BEGINS_OR_ENDS = ("optim.layer_decay",)
# What the numbers of a step depend on. `checkpoint.allow_changes` lets these change.
_NOT_SILENTLY = (
    "data.train",
    "data.transforms.train",
    "data.augment",
    "data.normalize",
    "data.cache.max_size",
    "data.cache.encoding",
    "data.cache.quality",
    "model.args",
    "model.dtype",
    "task",
    "optim",
    "schedule",
    "precision",
    "parallel.sync_batchnorm",
    "parallel.gradient_compression",
)
# Of these: how, not what.
_FREELY = ("optim.implementation", "task.metrics")
# Arguments of a data set that say where it is.
_PLACES = {"root", "path", "file", "folder", "dir", "directory", "data_dir", "root_dir", "download"}


@dataclass(frozen=True)
class Changes:
    """What a config says other than a checkpoint's, as lines `key: before -> now`."""

    allowed: tuple[str, ...]
    refused: tuple[Problem, ...]


def compare(before: Mapping[str, Any], now: Config) -> Changes:
    """Compares a config with the one of a checkpoint, given as the plain values of its YAML."""
    old, new = flatten(before), flatten(now.model_dump(mode="json"))
    allowed, refused = [], []
    for key in {**old, **new}:
        if old.get(key) == new.get(key) or _is_section_of(key, old, new) or not _was_known(key, old):
            continue
        line = f"{key}: {_text(old.get(key))} -> {_text(new.get(key))}"
        if _is_under(key, _NEVER) or (key in _NEVER_BEGINS_OR_ENDS and None in (old.get(key), new.get(key))):
            message = f"{_text(old.get(key))} in the checkpoint, {_text(new.get(key))} now; this cannot change in a run"
            refused.append(Problem(message, key))
        elif _is_free(key, old.get(key), new.get(key)) or _is_under(key, now.checkpoint.allow_changes):
            allowed.append(line)
        else:
            message = f"{_text(old.get(key))} in the checkpoint, {_text(new.get(key))} now; this changes the training"
            hint = f"change it back, choose another run.dir, or set checkpoint.allow_changes=[{key}]"
            refused.append(Problem(f"{message}: {hint}", key))
    renamed = {p.path.removesuffix(".name") for p in refused if p.path.endswith(".name")}
    refused = [p for p in refused if p.path.partition(".args")[0] not in renamed]  # its arguments go without saying
    return Changes(tuple(allowed), tuple(refused))


def check_resumable(before: Mapping[str, Any], num_samples_before: int, now: Config, num_samples: int) -> Changes:
    """Compares, and refuses what would make it another run.

    Raises:
        UserError: one problem per setting that must not change, or other training data.
    """
    changes = compare(before, now)
    problems = list(changes.refused)
    if num_samples != num_samples_before and not any(_is_under(p.path, ("data.train",)) for p in problems):
        message = f"{num_samples_before} samples in the checkpoint, {num_samples} now; their order would be another"
        problems.append(Problem(message, "data.train"))
    if problems:
        raise UserError(*problems)
    return changes


def _is_free(key: str, before: Any, now: Any) -> bool:
    if not _is_under(key, _NOT_SILENTLY) or _is_under(key, _FREELY):
        return True
    if not key.startswith("data.train.args."):
        return False
    name = key.rpartition(".")[2]
    return name in _PLACES or all(isinstance(value, str) and len(PurePath(value).parts) > 1 for value in (before, now))


def _is_under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _is_section_of(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """A section that is null on one side shows key by key on the other."""
    return any(other.startswith(f"{key}.") for other in {**old, **new})


def _was_known(key: str, old: Mapping[str, Any]) -> bool:
    """A checkpoint of an older version lacks the newer settings; their sections are not null there but absent."""
    names = key.split(".")
    return "args" in names or any(".".join(names[:depth]) in old for depth in range(1, len(names) + 1))


def _text(value: Any) -> str:
    return "unset" if value is None else str(value)
