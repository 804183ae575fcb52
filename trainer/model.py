"""The model: built by name, started from given weights, its head fitted to the number of classes, then put in shape.

Owns what happens to a model before Accelerate prepares it, in the one right order: memory format, gradient
checkpointing, compile. Wrapping and precision are `trainer.runtime`, weights to start from `trainer.weights`, what is
not trained `trainer.freezing`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trainer.components import accepts, call, is_import_path, resolve
from trainer.config import Config
from trainer.config_model import ModelConfig
from trainer.errors import UserError
from trainer.foreign_models import (
    TIMM,
    check_from_pretrained,
    explained_download,
    is_of_torchvision,
    is_of_transformers,
    reads_weights,
    torchvision_without_weights,
    transformers_class_argument,
    transformers_model,
    without_cache,
)
from trainer.freezing import freeze
from trainer.memory.blocks import repeated_blocks
from trainer.memory.checkpointing import Policy, apply_checkpointing, uniform_policies
from trainer.weights import start_from_weights

logger = logging.getLogger("lockstep")

# torchvision models whose training outputs are tuples with auxiliary logits unless told otherwise.
_PLAIN_OUTPUT = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}

# Arguments of models that are the number of classes, and of what.
CLASS_COUNTS = {"num_classes": "classes", "num_labels": "classes", "vocab_size": "different tokens"}


def build_model(config: ModelConfig, num_classes: int | None, is_fresh: bool = False) -> nn.Module:
    """Builds the model on the host, in float32 unless the config says otherwise, and in the mode in which it trains.

    Args:
        config: the `model` section.
        num_classes: number of classes, or of different tokens, of the data, if known. It becomes the model's
            `num_classes`, or in transformers `num_labels` or `vocab_size`, where the config sets none; never for
            another model by import path, which is called with `args` and nothing else.
        is_fresh: read no weights, neither `model.weights` nor what the model's own package would find.

    Raises:
        UserError: the model or its weights cannot be built or do not fit.
    """
    given: dict[str, Any] = {}
    target = resolve("model", config.name, "model")
    args = config.args
    has_weights = reads_weights(target, args)
    if is_fresh and "pretrained" in args and not is_of_torchvision(target):
        args = {**args, "pretrained": False}
    check_from_pretrained(target, args, config.name)
    is_foreign = is_of_transformers(target)
    if is_foreign:
        target, given = transformers_model(target, num_classes, is_fresh)
    elif config.name.startswith(TIMM):
        given = {} if num_classes is None else {"num_classes": num_classes}
    elif not is_import_path(config.name):
        given.update(_PLAIN_OUTPUT.get(config.name, {}))
        if num_classes is not None and (is_of_torchvision(target) or accepts(target, "num_classes")):
            given["num_classes"] = num_classes
    if is_fresh and is_of_torchvision(target):
        target = torchvision_without_weights(target)
    elif has_weights and not is_fresh:
        target = explained_download(target)
    model = call(target, {**given, **args}, config.name, "model")
    if not isinstance(model, nn.Module):
        raise UserError(f"'{config.name}' returned a {type(model).__name__}, not a torch.nn.Module", path="model.name")
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"'{config.name}' has no parameter to train", path="model.name")
    if is_foreign:
        without_cache(model)
    if config.weights is not None and not is_fresh:
        start_from_weights(model, config)
    if config.dtype != "float32":
        _convert_parameters(model, getattr(torch, config.dtype))
    freeze(model, config.freeze)
    return model


def class_argument(config: ModelConfig) -> str | None:
    """Returns which of `CLASS_COUNTS` the model takes as its number of classes, if one, by its signature."""
    target = resolve("model", config.name, "model")
    if is_of_transformers(target):
        return transformers_class_argument(target)
    if config.name.startswith(TIMM) or is_of_torchvision(target):
        return "num_classes"
    return next((key for key in CLASS_COUNTS if accepts(target, key)), None)


def may_download(config: ModelConfig, path: str = "model") -> bool:
    """Tells whether building the model of `path` may download weights, so that one rank should do it first."""
    return config.weights is not None or reads_weights(resolve("model", config.name, path), config.args)


def _convert_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives the model's parameters another type, but for BatchNorm's, whose statistics need their bits; and no buffer.

    Not by `Module.to`, which cannot convert the fake parameters of a plan.
    """
    converted: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                if parameter not in converted:
                    converted[parameter] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
                setattr(module, name, converted[parameter])


def uses_channels_last(config: ModelConfig, model: nn.Module) -> bool:
    """Tells whether the weights of the model's 2D convolutions are to be kept in channels_last memory."""
    if config.channels_last == "auto":
        return any(isinstance(module, nn.Conv2d) for module in model.modules())
    return config.channels_last


def recompute_blocks(config: Config, model: nn.Module, chosen: Mapping[str, Policy]) -> dict[str, nn.Module]:
    """Applies `memory.checkpointing` to the model's repeated blocks and returns these; none where nobody needs them.

    Args:
        config: the whole run.
        model: it is changed.
        chosen: the policies of `checkpointing: auto`.

    Raises:
        UserError: checkpointing is asked for, and the model has no repeated blocks.
    """
    setting, compiles = config.memory.checkpointing, config.model.compile != "none"
    if setting == "none" and config.model.compile != "blocks":
        return {}
    blocks = repeated_blocks(model, config.memory.blocks)
    if setting != "none":
        if not blocks:
            message = f"'{config.model.name}' has no repeated blocks; name them in memory.blocks"
            raise UserError(message, path="memory.checkpointing")
        policies = chosen if setting == "auto" else uniform_policies(list(blocks), setting)
        apply_checkpointing(blocks, policies, for_compile=compiles)
        num_recomputed = sum(policy != "none" for policy in policies.values())
        logger.info("memory     %s: %d of %d blocks recomputed in backward", setting, num_recomputed, len(blocks))
    return blocks


def compile_model(config: ModelConfig, model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    """Compiles the model in place: all of it, or each of its repeated blocks. Names and state stay as they are.

    Raises:
        UserError: blocks are asked for, and the model has none.
    """
    if config.compile == "blocks" and not blocks:
        message = f"'{config.name}' has no repeated blocks; name them in memory.blocks, or use compile: model"
        raise UserError(message, path="model.compile")
    mode = None if config.compile_mode == "default" else config.compile_mode
    for module in {"none": (), "blocks": blocks.values(), "model": (model,)}[config.compile]:
        module.compile(mode=mode)
