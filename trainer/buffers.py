"""A copy of a model's buffers, such as BatchNorm's statistics, to undo what a forward did to them.

Owns the copy only: parameters are changed by the optimizer's step alone, and who leaves that out needs no copy of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class BufferCopy:
    """The buffers of a model as they were at one moment, on their device.

    Args:
        buffers: all of a model's; whole tensors, not shares.
    """

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for buffer in buffers:
            if buffer.numel():
                by_dtype.setdefault(buffer.dtype, []).append(buffer)
        # One flat tensor per type: a copy, a choice and a way back are then a kernel each, however many buffers.
        self._groups = list(by_dtype.values())
        self._copies: list[torch.Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Copies the buffers as they are now."""
        self._copies = [_flat(group) for group in self._groups]

    @torch.no_grad()
    def put_back(self, where: torch.Tensor | None = None) -> None:
        """Gives the buffers what they held at `keep`.

        Args:
            where: a boolean scalar on their device: put back if it is true, else keep what they hold now. Nobody waits
                for it. None for true.
        """
        for kept, group in zip(self._copies, self._groups, strict=True):
            copy = kept if where is None else torch.where(where, kept, _flat(group))
            parts = copy.split([buffer.numel() for buffer in group])
            shaped = [part.view(buffer.shape) for part, buffer in zip(parts, group, strict=True)]
            torch._foreach_copy_(group, shaped)


def _flat(group: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([buffer.detach().reshape(-1) for buffer in group])
