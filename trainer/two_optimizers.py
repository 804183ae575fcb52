"""Two optimizers that train one model and look like one: for `optim.rest`."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class TwoOptimizers(Optimizer):
    """Steps two optimizers over different parameters, after one another.

    Parameter groups and state are theirs, not copies: whoever sets a rate, exchanges a parameter for its shard or reads
    state by parameter (the loop, FSDP, GradScaler, checkpoints) does so in the optimizer that uses it.

    Args:
        first: over some parameters, without state.
        second: over others, without state.
    """

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self.parts = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], {})
        self._join()

    def _join(self) -> None:
        first, second = self.parts
        self.param_groups = [*first.param_groups, *second.param_groups]
        first.state.update(second.state)
        self.state = second.state = first.state

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether both leave a step out on the device, told by `found_inf`: what torch's GradScaler asks of one."""
        return all(getattr(part, "_step_supports_amp_scaling", False) for part in self.parts)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes a step of each."""
        assert closure is None, "a closure would be evaluated twice"
        scaling: dict[str, Any] = {key: vars(self)[key] for key in ("grad_scale", "found_inf") if key in vars(self)}
        for part in self.parts:
            vars(part).update(scaling)
            try:
                part.step()
            finally:
                for key in scaling:
                    delattr(part, key)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, each part in the way of its own."""
        groups = state_dict["param_groups"]
        first, second = self.parts
        num_first = len(first.param_groups)
        for part, part_groups in ((first, groups[:num_first]), (second, groups[num_first:])):
            own = {index for group in part_groups for index in group["params"]}
            state = {index: value for index, value in state_dict["state"].items() if index in own}
            part.load_state_dict({"state": state, "param_groups": part_groups})
        self._join()
