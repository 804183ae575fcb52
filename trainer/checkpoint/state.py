"""What a run consists of, as flat names: into a checkpoint and out of it, under any strategy.

Tensors are named after the model's own parameters: `model.conv1.weight`, `optimizer.conv1.weight.exp_avg`,
`ema.conv1.weight`, and `ranks.3.generator.torch` for what rank 3 has to itself. What is not a tensor (settings of the
optimizer, the loss scale) is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from trainer.checkpoint.reading import Checkpoint
from trainer.checkpoint.tensor_table import own_name
from trainer.errors import UserError

_MOST_SHOWN = 10
SUMMED = ("window.loss_sum", "window.num_samples")  # since the last report, of each rank's own samples
SAME = ("guard.mean_loss", "guard.num_losses")  # on all ranks


@dataclass(frozen=True)
class State:
    """A run's state at one moment; the tensors are the run's own, not copies.

    Args:
        tensors: by name; the same names on all ranks, but for those of `ranks`.
        values: all that is not a tensor, as JSON would have it.
        guarded: names of the tensors that nothing but an optimizer's step changes.
    """

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]
    guarded: frozenset[str]


@dataclass(frozen=True)
class Parts:
    """What state is made of.

    Args:
        model: with its own names, whatever wraps it.
        optimizer: over the model's parameters.
        averages: EMA of parameters, by name; None without.
        scaler: fp16's; None in other precisions.
        own: what this rank has to itself, such as its generators. On another number of ranks `SUMMED` go to rank 0
            and `SAME` to all.
        rank: this process.
        num_ranks: of all processes.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    averages: Mapping[str, torch.Tensor] | None
    scaler: torch.amp.GradScaler | None
    own: Mapping[str, torch.Tensor]
    rank: int
    num_ranks: int

    def collect(self) -> State:
        """Returns the present state.

        Raises:
            UserError: something in it is of a kind that cannot be saved.
        """
        tensors: dict[str, torch.Tensor] = {}
        values: dict[str, Any] = {}
        for name, value in get_model_state_dict(self.model).items():
            if isinstance(value, torch.Tensor):
                tensors[f"model.{name}"] = value
            else:  # what a module returns from get_extra_state
                values[f"model.{name}"] = _as_json(value, f"model.{name}")
        parameters = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        guarded = {f"model.{name}" for name in parameters}
        for name, average in (self.averages or {}).items():
            tensors[f"ema.{name}"] = average
        optimizer, values["optimizer"] = self._optimizer_state()
        tensors |= optimizer
        guarded |= {name for name in tensors if name.startswith(("optimizer.", "ema."))}
        if self.scaler is not None:
            values["scaler"] = self.scaler.state_dict()
        tensors |= {own_name(self.rank, name): value for name, value in self.own.items()}
        return State(tensors, values, frozenset(guarded))

    def restore(self, checkpoint: Checkpoint, set_here: set[str]) -> dict[str, torch.Tensor]:
        """Makes a checkpoint the present state.

        Args:
            checkpoint: a verified one.
            set_here: settings of the optimizer that the config decides, whatever the checkpoint says.

        Returns:
            What this rank has to itself, for the caller to put back.

        Raises:
            UserError: it is of another model or optimizer. Nothing was changed yet.
        """
        model = get_model_state_dict(self.model)
        targets = {f"model.{name}": value for name, value in model.items() if isinstance(value, torch.Tensor)}
        # EMA that begins or ends here was allowed: the config was compared before.
        has_averages = bool(checkpoint.names("ema."))
        if has_averages:
            targets |= {f"ema.{name}": average for name, average in (self.averages or {}).items()}
        _check_same(targets, checkpoint, ("model.", "ema.") if has_averages and self.averages else ("model.",))
        optimizer_targets, optimizer_state = self._optimizer_targets(checkpoint, set_here)
        targets |= optimizer_targets
        manifest = checkpoint.manifest
        own: dict[str, torch.Tensor] = {}
        if manifest.num_ranks == self.num_ranks:
            saved = manifest.tensors.own_names(self.rank)
            own = {name: torch.empty_like(value) for name, value in self.own.items() if name in saved}
            targets |= {own_name(self.rank, name): value for name, value in own.items()}
        checkpoint.load_into(targets)
        if not has_averages:
            weights = dict(self.model.named_parameters(remove_duplicate=False))
            for name, average in (self.averages or {}).items():
                average.copy_(weights[name].detach())
        if manifest.num_ranks != self.num_ranks:
            own = self._sums_over_ranks(checkpoint)
            same = checkpoint.read_all(own_name(0, name) for name in SAME)
            own |= {name: same[own_name(0, name)] for name in SAME}
        extra = {name: manifest.values[f"model.{name}"] for name in model if f"model.{name}" in manifest.values}
        if extra:
            self.model.load_state_dict(extra, strict=False)
        self.optimizer.load_state_dict(optimizer_state)
        if self.scaler is not None and "scaler" in manifest.values:
            self.scaler.load_state_dict(manifest.values["scaler"])
        return own

    def _sums_over_ranks(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        if self.rank != 0:
            return {name: torch.zeros_like(self.own[name]) for name in SUMMED}
        ranks = range(checkpoint.manifest.num_ranks)
        saved = checkpoint.read_all(own_name(rank, name) for rank in ranks for name in SUMMED)
        return {name: torch.stack([saved[own_name(rank, name)] for rank in ranks]).sum(0) for name in SUMMED}

    # ---- the optimizer ------------------------------------------------------------------------------------
    # Not by torch's get_ and set_optimizer_state_dict: where an optimizer has no state yet (fp16 skipped all steps
    # so far) they take a step to make some, and that step would count.

    def _optimizer_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        tensors: dict[str, torch.Tensor] = {}
        settings: dict[str, dict[str, Any]] = {}  # state of a parameter that is not a tensor
        kept: dict[str, list[str]] = {}
        for parameter, state in self.optimizer.state.items():
            name = names[parameter]
            for key, value in state.items():
                path = f"optimizer.{name}.{key}"
                if isinstance(value, torch.Tensor):
                    if isinstance(parameter, DTensor) and not _is_scalar_or_like(value, parameter):
                        message = f"{path} has a shape of its own, which sharded training cannot restore"
                        raise UserError(f"{message}; use strategy: ddp", path="parallel.strategy")
                    tensors[path] = value
                    kept.setdefault(name, []).append(key)
                else:
                    settings.setdefault(name, {})[key] = _as_json(value, path)
        groups = []
        for i, group in enumerate(self.optimizer.param_groups):
            settings_of_group: dict[str, Any] = {}
            for key, value in group.items():
                if key == "params":
                    settings_of_group[key] = [names[parameter] for parameter in value]
                elif isinstance(value, torch.Tensor):
                    settings_of_group[key] = {"tensor": value.tolist()}  # such as lr where it is compiled
                else:
                    settings_of_group[key] = _as_json(value, f"optimizer.param_groups.{i}.{key}")
            groups.append(settings_of_group)
        return tensors, {"tensors": kept, "settings": settings, "groups": groups}

    def _optimizer_targets(
        self, checkpoint: Checkpoint, set_here: set[str]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Returns empty tensors for the optimizer's state by name, and the state dict that they are in."""
        saved = checkpoint.manifest.values["optimizer"]
        parameters = dict(self.model.named_parameters())
        indices: dict[str, int] = {}
        names = {parameter: name for name, parameter in parameters.items()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                indices[names[parameter]] = len(indices)
        here = [[names[parameter] for parameter in group["params"]] for group in self.optimizer.param_groups]
        if [group["params"] for group in saved["groups"]] != here:
            message = f"'{checkpoint.location}' has other groups of parameters"
            way_out = "with optim.layer_decay they are by memory.blocks: change that back, or choose another run.dir"
            raise UserError(f"{message}; {way_out}", path="optim")
        targets: dict[str, torch.Tensor] = {}
        state: dict[int, dict[str, Any]] = {}
        for name, keys in saved["tensors"].items():
            for key in keys:
                target = _empty_like(checkpoint, f"optimizer.{name}.{key}", parameters[name])
                targets[f"optimizer.{name}.{key}"] = target
                state.setdefault(indices[name], {})[key] = target
        for name, settings in saved["settings"].items():
            state.setdefault(indices[name], {}).update(settings)
        groups = []
        for now, before in zip(self.optimizer.param_groups, saved["groups"], strict=True):
            group = {key: _as_before(value, now.get(key)) for key, value in before.items()}
            group |= {key: value for key, value in now.items() if key in set_here}
            group["params"] = [indices[names[parameter]] for parameter in now["params"]]
            groups.append(group)
        return targets, {"state": state, "param_groups": groups}


def _check_same(targets: Mapping[str, torch.Tensor], checkpoint: Checkpoint, prefixes: tuple[str, ...]) -> None:
    """Refuses a checkpoint whose model differs, naming what differs by kind."""
    saved = {name for name in checkpoint.manifest.tensors.shared if name.startswith(prefixes)}
    reshaped = [
        f"{name} ({list(checkpoint.shape_and_dtype(name)[0])} there, {list(target.shape)} here)"
        for name, target in targets.items()
        if name in saved and checkpoint.shape_and_dtype(name)[0] != target.shape
    ]
    kinds = {
        "it lacks": [name for name in targets if name not in saved],
        "it also has": [name for name in checkpoint.manifest.tensors.shared if name in saved and name not in targets],
        "shapes differ:": reshaped,
    }
    told = [
        f"{kind} {', '.join(names[:_MOST_SHOWN])}{' and more' if len(names) > _MOST_SHOWN else ''}"
        for kind, names in kinds.items()
        if names
    ]
    if told:
        raise UserError(f"'{checkpoint.location}' is of another model: {'; '.join(told)}", path="run.dir")


def _is_scalar_or_like(value: torch.Tensor, parameter: torch.Tensor) -> bool:
    return value.ndim == 0 or value.shape == parameter.shape


def _empty_like(checkpoint: Checkpoint, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Returns an empty tensor for a piece of optimizer state: sharded as its parameter where it has its shape."""
    shape, dtype = checkpoint.shape_and_dtype(name)
    if shape == parameter.shape and parameter.ndim > 0:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)  # the optimizer puts it where it wants it


def _as_json(value: Any, name: str) -> Any:
    """Returns a value as JSON reads it back.

    Raises:
        UserError: it would not come back as it was.
    """
    plain = _without_tuples(value)
    try:
        if json.loads(json.dumps(plain)) == plain:
            return plain
    except (TypeError, ValueError):
        pass
    message = f"{name} is a {type(value).__name__}, which a checkpoint cannot hold: it takes tensors and plain values"
    raise UserError(message, path="checkpoint")


def _without_tuples(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_without_tuples(inner) for inner in value]
    return {key: _without_tuples(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _as_before(value: Any, example: Any) -> Any:
    """Returns a setting of an optimizer as the type that the optimizer has there."""
    if isinstance(value, dict) and value.keys() == {"tensor"}:
        reference = example if isinstance(example, torch.Tensor) else torch.empty(())
        return torch.tensor(value["tensor"], dtype=reference.dtype, device=reference.device)
    return tuple(value) if isinstance(example, tuple) else value
