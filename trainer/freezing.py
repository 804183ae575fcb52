"""Parts of the model that are not trained.

Owns `model.freeze`: which parameters it is, and the mode that modules train in. What patterns mean is
`trainer.param_groups`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trainer.errors import UserError
from trainer.param_groups import parameters_named


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes the parameters that patterns name, and puts the model in the mode in which it trains.

    Modules of which no parameter is trained are in eval mode, with all that is in them: BatchNorm uses its statistics
    and leaves them as they are, dropout drops nothing. All others are in training mode.

    Args:
        model: as built; it is changed.
        patterns: of names of parameters or modules.

    Raises:
        UserError: a pattern names nothing, or nothing is left to train.
    """
    model.train()
    if not patterns:
        return
    for parameter in parameters_named(model, patterns, "model.freeze"):
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("nothing is left to train", path="model.freeze")
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()
