"""The buffers of a model, such as BatchNorm's statistics: finding them in every step, and undoing what a forward did.

Owns the copy only: parameters are changed by the optimizer's step alone, and who leaves that out needs no copy of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class BufferCopy:
    """A model's buffers, and what they were at one moment, on their device.

    Args:
        model: whose buffers are whole tensors, not shares, and keep their names.
    """

    def __init__(self, model: nn.Module) -> None:
        # Walking through a large model takes a tenth of a millisecond, which is too much in every step.
        self._owners = [(module, name) for module in model.modules() for name in module._buffers]
        self._copies: list[torch.Tensor] = []

    def now(self) -> list[torch.Tensor]:
        """Returns the present buffers; a forward may have put other tensors in their place."""
        found = (module._buffers[name] for module, name in self._owners)
        return list({id(buffer): buffer for buffer in found if buffer is not None and buffer.numel()}.values())

    @torch.no_grad()
    def keep(self) -> None:
        """Copies the buffers as they are now."""
        self._copies = [_flat(group) for group in self._groups()]

    @torch.no_grad()
    def put_back(self, where: torch.Tensor | None = None) -> None:
        """Gives the buffers what they held at `keep`.

        Args:
            where: a boolean scalar on their device: put back if it is true, else keep what they hold now. Nobody waits
                for it. None for true.
        """
        for kept, group in zip(self._copies, self._groups(), strict=True):
            copy = kept if where is None else torch.where(where, kept, _flat(group))
            parts = copy.split([buffer.numel() for buffer in group])
            shaped = [part.view(buffer.shape) for part, buffer in zip(parts, group, strict=True)]
            torch._foreach_copy_(group, shaped)

    def _groups(self) -> list[list[torch.Tensor]]:
        """Returns the buffers by type: of each type a copy, a choice and a way back are a kernel, however many."""
        by_type: dict[torch.dtype, list[torch.Tensor]] = {}
        for buffer in self.now():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        return list(by_type.values())


def _flat(group: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([buffer.detach().reshape(-1) for buffer in group])
