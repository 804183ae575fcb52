"""Names in YAML -> Python objects: built-ins by short name, anything else by import path.

Owns looking a name up, checking `args` against what will be called, and turning whatever goes wrong there
into a `UserError` that names the config path. What the objects then do is theirs.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from trainer.config_values import Component
from trainer.errors import UserError, nearest, one_line, place_at
from trainer.foreign_models import TIMM, timm_model
from trainer.memory.out_of_memory import is_out_of_memory

Kind = Literal["data set", "transform", "model", "task", "loss", "optimizer", "schedule", "metric"]

# Short names of built-ins. Data sets, transforms, models and optimizers fall back on a library's names below.
BUILT_INS: dict[Kind, dict[str, str]] = {
    "data set": {
        "digits": "trainer.data.datasets:Digits",
        "image_folder": "trainer.data.datasets:ImageFolder",
        "packed_images": "trainer.data.packed:PackedImages",
        "synthetic": "trainer.data.datasets:Synthetic",
        "token_file": "trainer.data.tokens:TokenFile",
        "torch_file": "trainer.data.datasets:TorchFile",
    },
    "transform": {},
    "model": {
        "small_cnn": "trainer.small_models:SmallCNN",
        "fast_cnn": "trainer.small_models:FastCNN",
        "resnet18_cifar": "trainer.small_models:resnet18_cifar",
        "mlp": "trainer.small_models:MLP",
    },
    "task": {
        "classification": "trainer.tasks.classification:Classification",
        "detection": "trainer.tasks.detection:Detection",
        "language_model": "trainer.tasks.language_model:LanguageModel",
        "segmentation": "trainer.tasks.segmentation:Segmentation",
    },
    "loss": {"cross_entropy": "trainer.tasks.classification:CrossEntropy"},
    "optimizer": {"sgd": "torch.optim:SGD", "adamw": "torch.optim:AdamW"},
    "metric": {},
    "schedule": {
        "constant": "trainer.schedule:constant",
        "cosine": "trainer.schedule:cosine",
        "exponential": "trainer.schedule:exponential",
        "linear": "trainer.schedule:linear",
        "multistep": "trainer.schedule:multistep",
        "one_cycle": "trainer.schedule:one_cycle",
        "polynomial": "trainer.schedule:polynomial",
        "step": "trainer.schedule:stepwise",
        "wsd": "trainer.schedule:wsd",
    },
}

_EXTRAS = {"transformers": "huggingface", "pycocotools": "detection"}  # what a missing package is installed with


def is_import_path(name: str) -> bool:
    """Tells `package.module:attribute` from a built-in's short name."""
    return ":" in name


def resolve(kind: Kind, name: str, path: str) -> Callable[..., Any]:
    """Returns the class or function that `name` stands for.

    Args:
        kind: what the name should be, for the lookup and for messages.
        name: a built-in's short name, a name from the library behind this kind, `timm:` and a model of timm, or an
            import path.
        path: dotted config path of the component; errors name `<path>.name`.

    Raises:
        UserError: no such name, or importing it failed.
    """
    target = BUILT_INS[kind].get(name) or (name if is_import_path(name) else None)
    if kind == "model" and name.startswith(TIMM):
        return timm_model(name, f"{path}.name")
    if target is not None:
        return _import(target, f"{path}.name")
    library = _library_names(kind)
    if name in library:
        return library[name]
    valid = [*BUILT_INS[kind], *library]
    hint = nearest(name, valid) or (f"; built-in: {', '.join(BUILT_INS[kind])}" if BUILT_INS[kind] else "")
    raise UserError(f"unknown {kind} '{name}'{hint}; your own: package.module:attribute", path=f"{path}.name")


def build(kind: Kind, component: Component, path: str, /, **given: Any) -> Any:
    """Resolves a component and calls it with its `args`, plus what the framework gives it.

    Args:
        kind: what to build.
        component: its name and arguments.
        path: dotted config path, for errors.
        **given: further keyword arguments; `args` of the config win over them.

    Raises:
        UserError: as `resolve`, or the arguments do not fit, or the call failed.
    """
    target = resolve(kind, component.name, path)
    return call(target, {**given, **component.args}, component.name, path)


def call(target: Callable[..., Any], args: Mapping[str, Any], name: str, path: str) -> Any:
    """Calls `target(**args)`; what goes wrong becomes a UserError at `<path>.args`."""
    check_args(target, args, name, path)
    try:
        return target(**args)
    except UserError as error:
        raise place_at(path, error) from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"'{name}' raised {one_line(error)}", path=path) from error


def check_args(target: Callable[..., Any], args: Mapping[str, Any], name: str, path: str) -> None:
    """Raises UserError where `target` has no parameter of a given name, or needs one that is not given."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # some C functions have no signature; the call itself will tell
        return
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        valid = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for key in args:
            if key not in valid:
                hint = nearest(key, valid) or f"; valid: {', '.join(valid) or 'none'}"
                raise UserError(f"'{name}' takes no argument '{key}'{hint}", path=f"{path}.args.{key}")
    for p in parameters.values():
        required = p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if required and p.name not in args:
            raise UserError(f"'{name}' needs the argument '{p.name}'", path=f"{path}.args")


def accepts(target: Callable[..., Any], argument: str, count_kwargs: bool = False) -> bool:
    """Tells whether `target` has a parameter of this name; `**kwargs` counts only where asked."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return False
    return argument in parameters or (count_kwargs and any(p.kind is p.VAR_KEYWORD for p in parameters.values()))


def _import(target: str, path: str) -> Any:
    """Imports `package.module:attribute`."""
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise UserError(f"'{target}' is not of the form package.module:attribute", path=path)
    try:
        value = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            extra = _EXTRAS.get(error.name)
            way_out = "install it, or start where it can be imported (PYTHONPATH)"
            message = f"no module '{error.name}'" + (
                f": pip install 'lockstep-trainer[{extra}]'" if extra else f"; {way_out}"
            )
            raise UserError(message, path=path) from None
        raise UserError(f"importing '{module_name}' raised {one_line(error)}", path=path) from error
    except Exception as error:
        raise UserError(f"importing '{module_name}' raised {one_line(error)}", path=path) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            hint = nearest(part, [n for n in dir(value) if not n.startswith("_")])
            raise UserError(f"'{module_name}' has no '{part}'{hint}", path=path)
        value = getattr(value, part)
    if not callable(value):
        raise UserError(f"'{target}' is not a class or function", path=path)
    return value


def _library_names(kind: Kind) -> dict[str, Callable[..., Any]]:
    """Returns the names that a library offers for a kind, besides the built-ins."""
    if kind == "model":
        from torchvision import models

        return {name: models.get_model_builder(name) for name in models.list_models()}
    if kind == "data set":
        from torchvision import datasets

        public = {name: getattr(datasets, name) for name in datasets.__all__}
        return {name: value for name, value in public.items() if name not in ("VisionDataset", "DatasetFolder")}
    if kind == "transform":
        from torch import nn
        from torchvision.transforms import v2

        classes = {n: v for n, v in vars(v2).items() if inspect.isclass(v) and n != "Transform"}
        return {n: v for n, v in classes.items() if issubclass(v, nn.Module)}
    if kind == "optimizer":
        import torch

        classes = {n: v for n, v in vars(torch.optim).items() if inspect.isclass(v)}
        return {
            name: value
            for name, value in classes.items()
            # LBFGS calls the model itself, several times a step; it cannot run in this loop.
            if issubclass(value, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS", "SparseAdam")
        }
    return {}
