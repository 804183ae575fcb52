"""Models of timm, of Hugging Face's transformers and of torchvision, as `trainer.model` builds them.

Owns how the first two packages' own ways of building become a function of `args`, which of their arguments is the
number of classes, which models come with weights, how they are built without, and what is said where weights cannot be
downloaded. timm and transformers are imported only where they are named.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from trainer.errors import UserError, nearest, one_line_text

TIMM = "timm:"
_FROM_PRETRAINED = "from_pretrained"
_TORCHVISIONS_WEIGHTS = ("weights", "weights_backbone", "pretrained", "pretrained_backbone")


def timm_model(name: str, path: str) -> Callable[..., nn.Module]:
    """Returns `timm.create_model` for the model of a name such as `timm:resnet50` or `timm:resnet50.a1_in1k`.

    Raises:
        UserError: timm is not installed, or has no such model.
    """
    try:
        import timm
    except ModuleNotFoundError:
        raise UserError("no module 'timm': pip install 'lockstep-trainer[timm]'", path=path) from None
    model_name = name.removeprefix(TIMM)
    architecture = model_name.partition(".")[0]  # what follows is the tag of its weights
    if ":" not in model_name and not timm.is_model(architecture):  # timm:hf-hub:OWNER/NAME is on the Hub
        raise UserError(f"timm has no model '{architecture}'{nearest(architecture, timm.list_models())}", path=path)
    create = functools.partial(timm.create_model, model_name)
    return explained_download(create) if ":" in model_name else create


def check_from_pretrained(target: Callable[..., Any], args: Mapping[str, Any], name: str) -> None:
    """Refuses an Auto class of transformers that is not asked for weights, and a `from_pretrained` without a name.

    Raises:
        UserError: either.
    """
    if inspect.isclass(target) and hasattr(target, "_model_mapping"):
        raise UserError(f"write '{name}.{_FROM_PRETRAINED}'", path="model.name")
    is_theirs = name.endswith(f".{_FROM_PRETRAINED}") and is_of_transformers(target)
    if is_theirs and not args.get("pretrained_model_name_or_path"):
        message = "name a folder or a model of the Hub as pretrained_model_name_or_path"
        raise UserError(message, path="model.args")


def is_of_transformers(target: Callable[..., Any]) -> bool:
    """Tells whether `target` is a model class of transformers, or one derived from such, or its `from_pretrained`."""
    is_class = inspect.isclass(target)
    if not is_class and getattr(target, "__name__", "") != _FROM_PRETRAINED:
        return False
    owner = target if is_class else getattr(target, "__self__", None)
    is_theirs = any(c.__module__.startswith("transformers.") for c in getattr(owner, "__mro__", ()))
    return is_theirs and (not is_class or getattr(owner, "config_class", None) is not None)


def transformers_model(
    target: Callable[..., Any], num_classes: int | None, is_fresh: bool
) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """Returns what builds a model of transformers, and what it is given where the config's `args` do not say it.

    Args:
        target: a model class, which is built from its `config_class(**args)`, or a `from_pretrained`.
        num_classes: number of classes, or of different tokens, of the data, if known; given to a model class only.
        is_fresh: no weights are to be read.
    """
    if not inspect.isclass(target):
        owner = target.__self__  # type: ignore[attr-defined]
        return (functools.partial(_fresh, owner), {}) if is_fresh else (target, {"dtype": "float32"})
    given = {} if num_classes is None else {transformers_class_argument(target): num_classes}
    return functools.partial(_from_config, target), given


def transformers_class_argument(target: Any) -> str:
    """Returns which argument of a model class of transformers, or of its `from_pretrained`, is its number of classes.

    For language models that is the number of different tokens.
    """
    from transformers.models.auto import modeling_auto

    name = (target if inspect.isclass(target) else target.__self__).__name__
    of_tokens = {
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values(),
    }
    return "vocab_size" if name in of_tokens else "num_labels"


def without_cache(model: nn.Module) -> None:
    """Has a model of transformers keep no cache of keys and values, which a block that runs again would fill twice."""
    config: Any = model.config
    if getattr(config, "use_cache", False):
        config.use_cache = False


def explained_download(target: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Returns `target`, which then says in one line that weights cannot be had."""

    @functools.wraps(target)
    def build(**args: Any) -> nn.Module:
        try:
            return target(**args)
        except OSError as error:  # of the Hub's library, too
            message = f"its weights are not on this machine and cannot be downloaded: {one_line_text(error)}"
            raise UserError(message) from error

    return build


def reads_weights(target: Callable[..., Any], args: Mapping[str, Any]) -> bool:
    """Tells whether a model starts from weights that its own package finds, and may download.

    Args:
        target: what builds it, as its name resolves.
        args: the config's; of what they leave out torchvision's own defaults count.
    """
    if not is_of_torchvision(target):
        return bool(args.get("pretrained")) or getattr(target, "__name__", "") == _FROM_PRETRAINED
    parameters = inspect.signature(target).parameters
    defaults = {name: parameters[name].default for name in _TORCHVISIONS_WEIGHTS if name in parameters}
    given = {**defaults, **args}
    return any(bool(given.get(name)) for name in _TORCHVISIONS_WEIGHTS)


def is_of_torchvision(target: Callable[..., Any]) -> bool:
    """Tells whether `target` is a model or a model's builder of torchvision."""
    return str(getattr(target, "__module__", "")).startswith("torchvision.models.")


def torchvision_without_weights(target: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Returns `target`, a builder of torchvision's, which then builds the same model and reads no weights."""

    @functools.wraps(target)
    def build(**args: Any) -> nn.Module:
        with _no_weights():
            return target(**args)

    return build


@contextmanager
def _no_weights() -> Iterator[None]:
    """Has torchvision find no weights, and load nothing.

    Not by `weights=None`, with which it builds another model: without an auxiliary head, with other classes, with
    BatchNorm that is not frozen.
    """
    from torchvision.models import WeightsEnum

    nothing: dict[str, Any] = {}
    get, load = WeightsEnum.get_state_dict, nn.Module.load_state_dict

    def load_unless_nothing(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return None if state_dict is nothing else load(module, state_dict, *args, **kwargs)

    WeightsEnum.get_state_dict = lambda *_, **__: nothing
    nn.Module.load_state_dict = load_unless_nothing  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        WeightsEnum.get_state_dict, nn.Module.load_state_dict = get, load  # type: ignore[method-assign]


def _from_config(model_class: Any, **args: Any) -> nn.Module:
    config_class = model_class.config_class
    known = config_class()  # which takes any name without a word
    for key in args:
        if not hasattr(known, key):
            hint = nearest(key, [name for name in known.to_dict() if not name.startswith("_")])
            raise UserError(f"{config_class.__name__} has no '{key}'{hint}", path=f"model.args.{key}")
    model: nn.Module = model_class(config_class(**args))
    return model


def _fresh(model_class: Any, pretrained_model_name_or_path: str, **args: Any) -> nn.Module:
    """Builds what `from_pretrained` would, from its config alone."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **args)
    build = getattr(model_class, "from_config", model_class)  # of the Auto classes
    model: nn.Module = build(config)
    return model
