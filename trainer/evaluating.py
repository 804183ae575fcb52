"""Evaluation: when it is due, one pass over the evaluation set, and what the best one so far is.

What the metrics are is the task's business (`trainer.tasks`); how ranks put together what each has seen is
`trainer.tally`. The loop is `trainer.loop`.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import nullcontext

import torch

from trainer.data.feed import MicroBatch
from trainer.data.sampler import EvalSampler
from trainer.errors import UserError
from trainer.eval_media import Collector, EvalMedia
from trainer.faults.judging import EVALUATION, METRICS
from trainer.observed import Observed
from trainer.parallel import in_lockstep
from trainer.random_state import generator_states, restore_generators
from trainer.tally import Tally


class Evaluating(Observed):
    """A run that is evaluated."""

    media: EvalMedia | None = None  # of the last evaluation, on rank 0

    def is_over(self) -> bool:
        """Tells whether no step is left to make: all are made, or the run has ended early."""
        return self.progress.step >= self.total_steps or self.early_stopping.has_ended(self.progress)

    def evaluation_due(self) -> bool:
        """Tells whether the current step still has to be evaluated."""
        step = self.progress.step
        if self.eval_feed is None or step == 0 or self.progress.evaluated_step == step:
            return False
        return self.due(self.config.eval.every)

    def _open_step(self) -> int | None:
        """Returns the present step, if it is still to be evaluated."""
        return self.progress.step if self.evaluation_due() else None

    @torch.no_grad()
    def evaluate(self, batch_size: int | None = None) -> dict[str, float] | None:
        """Evaluates every sample of the evaluation set once.

        Args:
            batch_size: where neither the config nor the task says another; None: as in training.

        Returns:
            All metrics, on every rank; None where a request to stop came in the middle.
        """
        assert self.eval_feed is not None
        # Not the wrapped model: its forward exchanges buffers, and ranks may have uneven batch counts. Each rank's
        # BatchNorm statistics are its own until the next training step, so all evaluate with rank 0's, as saved.
        self.runtime.broadcast(self.buffers.now())
        model = self.bare_model
        modes = {module: module.training for module in model.modules()}
        model.eval()
        batch_size = (
            self.config.eval.batch_size or self.task.eval_batch_size or batch_size or self.plan.micro_batch_size
        )
        tally = Tally(self.task, self.user_metrics, self.runtime)
        num_examples = self.config.tracking.samples
        collector = Collector(self.task, num_examples if self.runtime.is_main else 0) if num_examples else None
        # Ranks may have uneven counts of batches, but ask as often as the one with the most.
        most = EvalSampler.most_batches(len(self.eval_feed.dataset), batch_size, self.runtime.num_ranks)
        batches = self._eval_batches(batch_size, most)
        try:
            for _ in range(most):
                self.at(EVALUATION)
                batch = next(batches, None)
                if batch is not None and (batch.num_samples or self.runtime.is_sharded):
                    outputs = self.task.forward(model, batch.data)
                if batch is not None and batch.num_samples:
                    tally.add(outputs, batch)
                    if collector is not None:
                        collector.add(outputs, batch.data)
                if self.decisions.stops_here():
                    return None
        finally:
            batches.close()
            for module, mode in modes.items():  # a part that the user keeps in eval mode stays in it
                module.training = mode
            self.runtime.end_evaluation(model)
        if collector is not None:
            tables = self.runtime.sum_tables(collector.tables)
            if self.runtime.is_main:
                names = self.task.class_names or self.class_names
                self.media = collector.media(tables, names, self.config.data.normalize)
        tally.gather()
        self.at(METRICS)  # which rank 0 may take long for, while the others wait
        metrics = tally.metrics()
        self.at(EVALUATION)
        return metrics

    def _eval_batches(self, batch_size: int, most: int) -> Generator[MicroBatch, None, None]:
        """Returns this rank's evaluation batches; with a sharded model also stand-ins, which must not count."""
        assert self.eval_feed is not None
        runtime = self.runtime
        batches = self.eval_feed.eval_batches(batch_size, runtime.rank, runtime.num_ranks)
        if not runtime.is_sharded:
            return batches
        return in_lockstep(batches, most, runtime.rank, runtime.device, runtime.gather)

    def evaluate_and_save(self, is_saved: bool) -> None:
        """Evaluates, and saves where this is the best evaluation so far, or adds it to the checkpoint of this step.

        Args:
            is_saved: there is a checkpoint of this step.
        """
        with self.clock.phase("checkpoint"):
            self.saver.before_update()
        with self.clock.phase("evaluation"):
            generators = generator_states(self.runtime.device)
            with self.ema.swapped_in() if self.ema is not None else nullcontext():
                metrics = self.evaluate()
            restore_generators(generators, self.runtime.device)  # so that evaluating changes nothing that follows
        if metrics is None:
            return
        progress = self.progress
        progress.evaluated_step, progress.eval_metrics = progress.step, metrics
        if self.reporter is not None:
            self.reporter.publish(progress.step, {f"eval/{k}": v for k, v in metrics.items()})
        is_best = self._is_best(metrics)
        self._count_for_early_stopping(metrics)
        if self.reporter is not None and self.media is not None:
            self.reporter.show(progress.step, self.media, progress.best_step)
        if self.reporter is not None:
            self.reporter.end_step(progress.step)
        if is_best or is_saved or self.is_over():
            self.save()

    def _count_for_early_stopping(self, metrics: Mapping[str, float]) -> None:
        """Counts an evaluation. What rank 0 counted holds for all: none of them can go on without the others."""
        progress = self.progress
        try:
            self.early_stopping.count(progress, metrics)
        except UserError:
            self.save()
            raise
        progress.num_not_better = self.runtime.from_main(lambda: progress.num_not_better)

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        """Tells whether this is the best evaluation so far, and remembers it."""
        progress = self.progress
        if self.best_metric is None:
            return False
        if self.best_metric not in metrics:
            self.save()
            message = f"evaluation has no metric '{self.best_metric}'; it has: {', '.join(metrics)}"
            path = "checkpoint.best.metric" if self.config.checkpoint.best is not None else "task.name"
            raise UserError(message, path=path, agreed=True)
        value, best = metrics[self.best_metric], progress.best_value
        better = best is None or (value > best if self.best_mode == "max" else value < best)
        if not better or math.isnan(value):
            return False
        progress.best_step, progress.best_value = progress.step, value
        progress.best_of = self.best_of
        return True
