"""When a run ends before its last step, because its evaluations no longer get better (`train.early_stopping`).

Owns the rule, Lightning's and Keras's: a value counts as better where it is by more than `min_delta`, and the run ends
with the evaluation that is the `patience`-th in a row not to be. What is counted is part of `Progress`, so of every
checkpoint; whether the run has ended follows from the count and the config, so that more patience lets it go on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.checkpoint.manifest import Progress
from trainer.config_run import EarlyStoppingConfig
from trainer.errors import UserError


class EarlyStopping:
    """The rule of one run.

    Args:
        config: the `train.early_stopping` section, if there is one; without it no run ends early.
        best_metric: the metric that decides the best checkpoint.
        best_mode: whether its largest or its smallest value is the best.

    Raises:
        UserError: the mode is not set, and the metric is another one.
    """

    def __init__(self, config: EarlyStoppingConfig | None, best_metric: str | None, best_mode: str) -> None:
        self._config = config
        self._of: str | None = None
        if config is None:
            return
        if config.mode is None and config.metric != best_metric:
            message = f"set it to max or min: only of {best_metric or 'a best metric'} is known what is better"
            raise UserError(message, path="train.early_stopping.mode")
        self._mode = config.mode or best_mode
        self._of = f"{self._mode} {config.metric}"

    def has_ended(self, progress: Progress) -> bool:
        """Tells whether the run is over."""
        if self._config is None or progress.better_of != self._of:
            return False
        return progress.num_not_better >= self._config.patience

    def count(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Counts an evaluation; begins anew where the count so far is of another metric. NaN is never better.

        Raises:
            UserError: it has no such metric.
        """
        if progress.better_of != self._of:
            progress.better_of, progress.better_value, progress.num_not_better = self._of, None, 0
        config = self._config
        if config is None:
            return
        if config.metric not in metrics:
            message = f"evaluation has no metric '{config.metric}'; it has: {', '.join(metrics)}"
            raise UserError(message, path="train.early_stopping.metric", agreed=True)
        value, best = metrics[config.metric], progress.better_value
        if best is None:
            is_better = not math.isnan(value)
        else:
            is_better = (value - best if self._mode == "max" else best - value) > config.min_delta
        progress.better_value = value if is_better else best
        progress.num_not_better = 0 if is_better else progress.num_not_better + 1

    def summary(self, progress: Progress) -> dict[str, Any] | None:
        """Returns where and why the run has ended early, for `summary.json`; None where it has not."""
        if self._config is None or not self.has_ended(progress):
            return None
        return {"step": progress.step, "metric": self._config.metric, "reason": self.reason(progress)}

    def reason(self, progress: Progress) -> str:
        """Returns why the run has ended early, in words."""
        assert self._config is not None
        best = "no number" if progress.better_value is None else f"better than {progress.better_value:.6g}"
        by = f" by more than {self._config.min_delta:g}" if self._config.min_delta else ""
        num = progress.num_not_better
        return f"{self._config.metric} was not {best}{by} in {num} evaluation{'' if num == 1 else 's'}"
