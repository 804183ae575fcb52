"""What an evaluation comes to: what every rank has seen of it, put together exactly, and the metrics of that.

Owns the exchange between ranks. What is added up or recorded is the task's (`trainer.tasks.base`); metrics that the
user asked for are `trainer.tasks.metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainer.data.feed import MicroBatch
from trainer.errors import UserError
from trainer.tasks.base import Task
from trainer.tasks.metrics import UserMetrics
from trainer.world import World


class Tally:
    """Adds up one evaluation: `add` per batch, then `gather` and `metrics`, which all ranks call together.

    Args:
        task: what a batch means.
        user_metrics: what `task.metrics` asks for.
        world: the processes that train together.
    """

    def __init__(self, task: Task, user_metrics: UserMetrics, world: World) -> None:
        self._task, self._user_metrics, self._world = task, user_metrics, world
        self._totals: dict[str, torch.Tensor] = {}
        self._records: dict[int, Any] | None = None  # by sample, where the task has any
        user_metrics.reset()

    def add(self, outputs: Any, batch: MicroBatch) -> None:
        """Takes a batch of samples, each of which comes once over all ranks.

        Raises:
            UserError: not as many records as samples.
        """
        for name, value in self._task.eval_sums(outputs, batch.data).items():
            self._totals[name] = self._totals.get(name, 0) + self._world.exact(value)  # on its device: nobody waits
        self._user_metrics.update(self._task, outputs, batch.data)
        records = self._task.eval_records(outputs, batch.data)
        if records is not None:
            if len(records) != batch.num_samples:
                message = f"eval_records returned {len(records)} records for {batch.num_samples} samples"
                raise UserError(message, path="task.name")
            self._records = self._records or {}
            self._records.update(zip(batch.sample_ids.tolist(), records, strict=True))

    def gather(self) -> None:
        """Brings all that ranks have seen together; waits for the device."""
        world = self._world
        # A rank without a sample (a tiny evaluation set) has no totals of its own, and adds zeros.
        by_rank = world.gather(({name: total.shape for name, total in self._totals.items()}, self._records is not None))
        shapes: dict[str, torch.Size] = next(filter(None, (shapes for shapes, _ in by_rank)), {})
        zero = torch.zeros(())
        self._sums: dict[str, Any] = dict.fromkeys(shapes)
        self._sums |= world.sum({name: self._totals.get(name, zero) for name in shapes if not shapes[name]})
        for name, shape in shapes.items():
            if shape:
                total = self._totals.get(name)
                total = torch.zeros(shape) if total is None else total
                self._sums[name] = world.sum_tensor(total).to("cpu", torch.float64)
        self._all_records: list[Any] | None = None
        self._has_records = any(has_records for _, has_records in by_rank)
        if self._has_records:
            parts = world.gather_on_main(self._records or {})
            by_sample = {sample: record for part in parts for sample, record in part.items()}
            self._all_records = [by_sample[sample] for sample in sorted(by_sample)]
        self._user_metrics.gather(world)

    def metrics(self) -> dict[str, float]:
        """Returns all metrics, the same on every rank. What takes long is computed on rank 0 only.

        Raises:
            UserError: two metrics have the same name; on every rank alike.
        """
        found = dict(self._task.metrics(self._sums))
        if not self._has_records and not self._user_metrics:
            return found
        world = self._world
        # `agree`, so that a problem that only rank 0 sees is everybody's.
        more = world.agree(lambda: self._long_ones(found) if world.is_main else {})
        return found | world.from_main(lambda: more)

    def _long_ones(self, found: Mapping[str, float]) -> dict[str, float]:
        of_records = self._task.metrics_of_records(self._all_records) if self._all_records is not None else {}
        own = {**found, **{name: float(value) for name, value in of_records.items()}}
        asked = self._user_metrics.compute()
        clash = next((name for name in asked if name in own), None)
        if clash is not None:
            raise UserError("the task has a metric of this name; choose another", path=f"task.metrics.{clash}")
        return {**own, **asked}
