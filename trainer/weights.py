"""Weights by name: out of a checkpoint or a file, and into a model, with a report of what does not fit.

Owns `model.weights` and which of a checkpoint's weights are meant, the last ones or their averages (EMA). Never runs
code from a file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Damaged
from trainer.checkpoint.reading import Checkpoint
from trainer.checkpoint.storage import MANIFEST, LocalStorage, open_storage
from trainer.components import is_import_path
from trainer.config_model import ModelConfig
from trainer.errors import UserError, nearest, one_line, one_line_text

logger = logging.getLogger("lockstep")

Kind = Literal["raw", "ema"]

_MOST_SHOWN = 10
_PREFIXES = ("model.", "module.", "_orig_mod.")  # of what wrapped the model when it was saved
_WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema")  # as timm and torchvision's reference save them
_COUNTER = "n_averaged"  # beside the averages of torch.optim.swa_utils.AveragedModel
_EXTRA_STATE = "_extra_state"  # what a module has besides tensors, under this name of torch's


class CheckpointWeights:
    """The weights in a checkpoint.

    Args:
        checkpoint: a verified one.
        kind: `ema` for averages in place of the parameters that have one; None for `ema` where there are any.

    Raises:
        UserError: averages are asked for, and there are none.
    """

    def __init__(self, checkpoint: Checkpoint, kind: Kind | None = None) -> None:
        averaged = checkpoint.names("ema.")
        if kind == "ema" and not averaged:
            message = f"'{checkpoint.location}' has no averages: the run has no optim.ema"
            raise UserError(message)
        self.checkpoint = checkpoint
        self.kind: Kind = kind or ("ema" if averaged else "raw")
        of_average = {name: f"ema.{name}" for name in averaged} if self.kind == "ema" else {}
        self._stored = {name: of_average.get(name, f"model.{name}") for name in checkpoint.names("model.")}
        values = checkpoint.manifest.values
        self.extra_state = {
            name.removeprefix("model."): value
            for name, value in values.items()
            if name.startswith("model.") and name.endswith(_EXTRA_STATE)
        }
        """What modules have besides tensors."""

    @property
    def names(self) -> list[str]:
        """The model's own names of its tensors."""
        return list(self._stored)

    def shape_and_dtype(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Returns the shape and the type of a tensor."""
        return self.checkpoint.shape_and_dtype(self._stored[name])

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor into host memory.

        Raises:
            UserError: a file cannot be read.
        """
        return self.checkpoint.read(self._stored[name])

    def state_dict(self) -> dict[str, Any]:
        """Returns what the model's own `state_dict` would."""
        tensors = self.checkpoint.read_all(self._stored.values())
        return {**{name: tensors[stored] for name, stored in self._stored.items()}, **self.extra_state}

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Fills all of a model that has these weights.

        Raises:
            UserError: it is another model.
        """
        own = _tensors(model.state_dict())
        problems = [f"it lacks {name}" for name in own if name not in self._stored]
        problems += [f"it has {name}, the model has not" for name in self.names if name not in own]
        for name in own.keys() & self._stored.keys():
            shape = self.shape_and_dtype(name)[0]
            if shape != own[name].shape:
                problems.append(f"{name} is {list(shape)}, the model has {list(own[name].shape)}")
        if problems:
            raise UserError(f"'{self.checkpoint.location}' is of another model: {_listed(problems)}", path="model")
        self.checkpoint.load_into({self._stored[name]: tensor for name, tensor in own.items()})
        if self.extra_state:
            model.load_state_dict(self.extra_state, strict=False)

    def __str__(self) -> str:
        what = "averages (EMA)" if self.kind == "ema" else "weights"
        return f"{what} of step {self.checkpoint.step}"


# ---- model.weights ------------------------------------------------------------------------------------------


def start_from_weights(model: nn.Module, config: ModelConfig, new_head: bool = True) -> None:
    """Loads what `model.weights` names.

    Args:
        model: it is changed.
        config: the section `model`.
        new_head: whether a final layer of another size may keep its fresh values.

    Raises:
        UserError: there is nothing of that name, or it does not fit.
    """
    assert config.weights is not None
    load_weights(model, _read(config), config.weights, config.weights_strict, new_head)


def load_weights(
    model: nn.Module, state: Mapping[str, Any], source: str, strict: bool = True, new_head: bool = True
) -> None:
    """Loads a state dict; a final layer of another size keeps its fresh values, and that is said.

    Args:
        model: it is changed.
        state: name -> tensor.
        source: where it is from, for messages.
        strict: refuse missing and unknown names, and other shapes but those of the last layer; else load what fits.
        new_head: whether the last layer may be of another size.

    Raises:
        UserError: it does not fit, or nothing in it does.
    """
    everything = model.state_dict()
    own = _tensors(everything)
    state = {name: value for name, value in state.items() if name != _COUNTER or name in own}
    state = _without_prefix(state, own, source)
    given = _tensors(state)
    reshaped = [k for k in own if k in given and given[k].shape != own[k].shape]
    fits = [k for k in own if k in given and k not in reshaped]
    missing = [k for k in own if k not in given]
    # torchvision's auxiliary heads are not part of the model that we build.
    unexpected = [k for k in given if k not in own and not k.startswith(("aux", "AuxLogits"))]
    last_layer = list(own)[-1].rpartition(".")[0]
    is_new = [k for k in reshaped if new_head and k.rpartition(".")[0] == last_layer]
    shapes = [
        f"{k} is {list(given[k].shape)}, the model has {list(own[k].shape)}"
        for k in reshaped
        if not strict or k not in is_new
    ]
    problems = []
    if missing:
        problems.append(f"'{source}' lacks {_listed(missing)}{nearest(missing[0], unexpected)}")
    if unexpected:
        problems.append(f"'{source}' has unknown {_listed(unexpected)}{nearest(unexpected[0], missing)}")
    if shapes:
        problems.append(f"'{source}': {_listed(shapes)}")
    if not fits:
        problems.append(f"'{source}' has nothing that fits the model")
    if problems and strict and (missing or unexpected or shapes):
        # Of a teacher all of it has to fit.
        problems[-1] += "; weights_strict: false loads what fits" if fits and new_head else ""
    if problems and (strict or not fits):
        raise UserError(*problems, path="model.weights")
    extra = {k: v for k, v in state.items() if k in everything and k not in own}
    model.load_state_dict({**{k: given[k] for k in fits}, **extra}, strict=False)
    of_all = f" of {len(own)}" if len(fits) < len(own) else ""
    logger.info("weights %s: %d%s tensors loaded", source, len(fits), of_all)
    for problem in problems:
        logger.warning("weights %s", problem)
    for key in is_new if strict else ():
        logger.info("weights: %s is new, %s instead of %s", key, list(own[key].shape), list(given[key].shape))


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _listed(texts: Sequence[str]) -> str:
    """Returns `a`, or `12: a, b, ... and 2 more`."""
    if len(texts) == 1:
        return texts[0]
    more = f" and {len(texts) - _MOST_SHOWN} more" if len(texts) > _MOST_SHOWN else ""
    return f"{len(texts)} tensors: {', '.join(texts[:_MOST_SHOWN])}{more}"


def _without_prefix(state: Mapping[str, Any], own: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Takes off what wrappers put before all names, if more of the model's names are there without it."""
    best, most, prefix, best_prefix = state, sum(k in own for k in state), "", ""
    while state and (found := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None)):
        state, prefix = {k.removeprefix(found): v for k, v in state.items()}, prefix + found
        if (count := sum(k in own for k in state)) > most:
            best, most, best_prefix = state, count, prefix
    if best_prefix:
        logger.info("weights %s: '%s' before all names taken off", source, best_prefix)
    return best


def _read(config: ModelConfig) -> Mapping[str, Any]:
    """Reads what `model.weights` names: a run, a checkpoint, a file, or a torchvision weights name."""
    assert config.weights is not None
    path = Path(config.weights).expanduser()
    if "://" in config.weights or path.is_dir():
        weights = CheckpointWeights(_open_checkpoint(config.weights))
        logger.info("weights %s: %s", config.weights, weights)
        return weights.state_dict()
    if path.suffix in (".safetensors", ".pt", ".pth", ".bin") or path.exists():
        return read_state_dict(path)
    from torchvision import models

    if is_import_path(config.name) or config.name not in models.list_models():
        message = f"no such file: '{config.weights}' (and '{config.name}' has no named weights)"
        raise UserError(message, path="model.weights")
    named = models.get_model_weights(config.name)
    names = ["DEFAULT", *(w.name for w in named)]
    if config.weights not in names:
        hint = nearest(config.weights, names) or f"; it has: {', '.join(names)}"
        raise UserError(f"'{config.name}' has no weights '{config.weights}'{hint}", path="model.weights")
    try:
        return named[config.weights].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        way_out = "null starts fresh, and a file of weights on this machine is taken, too"
        message = f"cannot get '{config.weights}': {one_line(error)}; {way_out}"
        raise UserError(message, path="model.weights") from error


def settled_weights(config: ModelConfig) -> ModelConfig:
    """Returns the section with a checkpoint in place of a run, which may be training: all ranks must read the same."""
    if config.weights is None or "://" in config.weights or not Path(config.weights).expanduser().is_dir():
        return config
    try:
        return config.model_copy(update={"weights": _open_checkpoint(config.weights).location})
    except UserError:
        return config  # whoever reads it says what is wrong, the same on all ranks


def _open_checkpoint(location: str) -> Checkpoint:
    """Opens a checkpoint by its folder or URL, or the newest good one of a run by the run's folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = Path(location).expanduser()
    try:
        if "://" in location or (folder / MANIFEST).is_file():
            root, _, name = (
                location.rstrip("/").rpartition("/") if "://" in location else (folder.parent, "", folder.name)
            )
            checkpoint = Checkpoint(open_storage(str(root)), name)
            checkpoint.verify()
            return checkpoint
        if (folder / "config.yaml").is_file():
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            location = config["checkpoint"]["dir"] or str(folder / "checkpoints")
            return CheckpointFolder(open_storage(location), keep=1).newest()
        if any(folder.glob(f"*/{MANIFEST}")):  # what `checkpoint.dir` names
            return CheckpointFolder(LocalStorage(folder), keep=1).newest()
    except Damaged as error:
        raise UserError(f"'{folder}': {error}", path="model.weights") from error
    except UserError as error:
        raise UserError(*(problem.message for problem in error.problems), path="model.weights") from error
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"cannot read '{folder}': {one_line_text(error)}", path="model.weights") from error
    raise UserError(f"'{folder}' is neither a run folder nor a checkpoint", path="model.weights")


def read_state_dict(file: Path) -> Mapping[str, Any]:
    """Reads a .safetensors file, or a state dict that torch.save wrote; never runs code from the file.

    Raises:
        UserError: the file is missing or is not a state dict.
    """
    if not file.is_file():
        raise UserError(f"no such file: '{file}'", path="model.weights")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise types of their own for a broken file
        message = f"cannot read '{file}': {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise UserError(message, path="model.weights") from error
    if isinstance(state, Mapping):
        for wrapper in _WRAPPERS:
            if isinstance(state.get(wrapper), Mapping):
                state = state[wrapper]
        if state and all(map(_is_entry, state.keys(), state.values())):
            return state
    raise UserError(f"'{file}' is not a state dict", path="model.weights")


def _is_entry(name: Any, value: Any) -> bool:
    return isinstance(name, str) and (isinstance(value, torch.Tensor) or name.endswith(_EXTRA_STATE))
