"""Metrics of torchmetrics that a config asks for by name (`task.metrics`), and which names evaluations have.

Owns building them, which of them can be merged exactly over ranks, and the merge. torchmetrics is imported late.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from trainer.components import build
from trainer.config_values import Component
from trainer.errors import UserError, nearest, one_line
from trainer.memory.out_of_memory import is_out_of_memory
from trainer.tasks.base import Task

if TYPE_CHECKING:
    from torchmetrics import Metric

    from trainer.world import World


class UserMetrics:
    """The metrics that `task.metrics` asks for; false where there are none.

    Each rank updates its own, on the device and without an exchange. `gather` brings their states to rank 0, which
    merges them: sums, counts, extremes and lists of values, of which nothing depends on who saw which sample.

    Args:
        components: by name, as the config has them.
        task: what a batch means.
        device: of the outputs.

    Raises:
        UserError: one cannot be built or merged, has the name of a metric of the task's, or the task has no use for it.
    """

    def __init__(self, components: Mapping[str, Component], task: Task, device: torch.device) -> None:
        if components and type(task).metric_inputs is Task.metric_inputs:
            message = "the task does not say what metrics are updated with: it needs a method metric_inputs"
            raise UserError(message, path="task.metrics")
        self._device = device
        self._metrics: dict[str, Metric] = {}
        for name, component in components.items():
            path = f"task.metrics.{name}"
            if name in task.metric_names:
                raise UserError("the task has a metric of this name; choose another", path=path)
            metric = _mergeable(build("metric", component, path), component.name, path)
            _check_arguments(metric, task.num_classes, path)
            self._metrics[name] = metric.to(device)
        self._merged: dict[str, Metric] = {}

    def __bool__(self) -> bool:
        return bool(self._metrics)

    def reset(self) -> None:
        """An evaluation begins."""
        for metric in self._metrics.values():
            metric.reset()

    def update(self, task: Task, outputs: Any, data: Any) -> None:
        """Takes a batch.

        Raises:
            UserError: outputs and targets are not what a metric takes.
        """
        if not self._metrics:
            return
        inputs = task.metric_inputs(outputs, data)
        for name, metric in self._metrics.items():
            try:
                metric.update(*inputs)
            except (ValueError, TypeError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                message = f"does not take what the task gives it: {one_line(error)}"
                raise UserError(message, path=f"task.metrics.{name}") from error

    def gather(self, world: World) -> None:
        """Merges what all ranks have seen, on rank 0; all call it together."""
        if not self._metrics:
            return
        own = {name: copy.deepcopy(metric).cpu() for name, metric in self._metrics.items()}
        self.reset()
        by_rank = world.gather_on_main(own)
        for name in own:
            seen = [metrics[name] for metrics in by_rank if metrics[name].update_called]
            if seen:
                merged = seen.pop()
                while seen:  # what comes is put in front: lists of values end up in the order of ranks
                    merged.merge_state(seen.pop())
                self._merged[name] = merged

    def compute(self) -> dict[str, float]:
        """Returns the metrics of what was merged; called on rank 0.

        Raises:
            UserError: one gives something other than a number, or numbers by name.
        """
        found: dict[str, float] = {}
        for name, metric in self._merged.items():
            value = metric.compute()
            parts = {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {}
            for key, part in (parts or {name: value}).items():
                if not isinstance(part, int | float) and not (isinstance(part, torch.Tensor) and part.numel() == 1):
                    raise UserError("does not give one number", path=f"task.metrics.{name}")
                found[key] = float(part)
        self._merged.clear()
        return found


def check_name(name: str, task: Task, components: Mapping[str, Component], path: str) -> None:
    """Refuses the name of a metric that no evaluation will have, where all of them are known before the first one.

    Args:
        name: of the metric; one of `task.metrics` that gives several has theirs after a slash.
        task: what a batch means.
        components: the section `task.metrics`.
        path: where the name stands in the config.

    Raises:
        UserError: neither the task nor `task.metrics` has such a metric.
    """
    if "metric_names" not in vars(type(task)) or name.partition("/")[0] in components or name in task.metric_names:
        return
    known = (*task.metric_names, *components)
    raise UserError(f"evaluation has no metric '{name}'; it has: {', '.join(known)}{nearest(name, known)}", path=path)


def _mergeable(metric: Any, name: str, path: str) -> Metric:
    """Returns a metric that takes no part in exchanges of its own.

    Raises:
        UserError: it is no metric, or what ranks have seen of it cannot be merged exactly.
    """
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum

    if not isinstance(metric, Metric):
        raise UserError(f"'{name}' is not a torchmetrics.Metric", path=f"{path}.name")
    merges_itself = type(metric).merge_state is not Metric.merge_state
    is_whole = metric.full_state_update is False and not metric.dist_sync_on_step
    exact = (dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum)
    if not merges_itself and not (is_whole and all(reduce in exact for reduce in metric._reductions.values())):
        message = f"'{name}' cannot be merged exactly over processes, so it would depend on their number"
        raise UserError(message, path=f"{path}.name")
    metric.distributed_available_fn = _never
    return metric


def _check_arguments(metric: Metric, num_classes: int | None, path: str) -> None:
    """Refuses what would fail with the first evaluation."""
    if getattr(metric, "average", "") in (None, "none"):
        message = "gives a number per class: write micro, macro or weighted"
        raise UserError(message, path=f"{path}.args.average")
    classes = getattr(metric, "num_classes", None)
    if isinstance(classes, int) and num_classes is not None and classes < num_classes:
        raise UserError(f"{classes} classes, where the data has {num_classes}", path=f"{path}.args.num_classes")


def _never() -> bool:
    """Tells torchmetrics that there is nobody to exchange with."""
    return False
