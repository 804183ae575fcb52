"""The training loop: `Trainer.fit`, one step, evaluation, reports.

Reads as nouns and verbs; how each is done is in the module named after it.
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from trainer.checkpoint import CheckpointFolder, Identity, Progress
from trainer.config import Config, DataConfig, Interval
from trainer.data.build import build_data, packed
from trainer.data.datasets import SizedDataset, class_names
from trainer.data.feed import DeviceFeed, MicroBatch
from trainer.data.modes import device_memory
from trainer.data.resident import Share
from trainer.data.sampler import BatchPlan, StepSampler
from trainer.data.transforms import build_transforms
from trainer.errors import UserError, one_line
from trainer.faults import StopRequests
from trainer.memory.checkpointing import (
    check_compiled_buffers,
)
from trainer.memory.out_of_memory import Situation
from trainer.memory.shrink import Shrink, read_shrink
from trainer.model import build_model, compile_model, recompute_blocks, uses_channels_last
from trainer.optim import build_learning_rate, build_optimizer
from trainer.reporting import Reporter
from trainer.run_folder import RunFolder
from trainer.runtime import Runtime, explained_model_errors, seed_everything
from trainer.tasks import build_task
from trainer.telemetry import Clock
from trainer.tracking import check_trackers

if TYPE_CHECKING:
    from trainer.memory.planner import Planner, Prediction

logger = logging.getLogger("lockstep")


class Trainer:
    """One run, from a config to a trained model.

    Args:
        config: the whole run.
        to_train: whether it will train; else the training data is neither packed nor moved to the device.

    Raises:
        UserError: the config cannot be carried out here; on every rank alike.
    """

    def __init__(self, config: Config, to_train: bool = True) -> None:
        self.config = config
        self.to_train = to_train
        self.clock = Clock()
        with self.clock.phase("startup"):
            self.runtime = Runtime(config)
            self.folder = RunFolder(config)
            self.checkpoints = CheckpointFolder(config.run_dir / "checkpoints", config.checkpoint.keep)
            self.stop_requests = StopRequests(self.runtime.host_group)
            self._build()
            self.model, self.optimizer = self.runtime.prepare(self.bare_model, self.bare_optimizer)
            self.model.train()
            if self.planned is not None:
                self._split_batch(self.plan.num_samples, self._confirmed_micro_batch())
        self.progress = Progress()
        self._window = _Window(self.runtime, self.clock, self.feed)
        self._skipped_samples = 0  # that could not be read, on all ranks, at the last report
        self._micro_batch = 0  # of the present step
        self.reporter: Reporter | None = None  # on rank 0, once the run has started

    def _build(self) -> None:
        """Builds every component. A problem on any rank is raised on all; nothing is wrapped yet."""
        config, runtime = self.config, self.runtime
        runtime.agree(self._check_surroundings)
        train_set, eval_set = build_data(config.data, runtime)
        runtime.agree(self._check_transforms)
        num_classes = runtime.agree(lambda: class_count(config, train_set))
        shrink = runtime.from_main(lambda: read_shrink(config.run_dir)) if config.memory.on_oom == "shrink" else None
        runtime.agree(lambda: self._build_order_and_task(train_set, num_classes, shrink))
        runtime.agree(lambda: self._build_model(num_classes))
        # What takes long comes last, when all else is known to be good.
        data = config.data
        if self.to_train:
            train_set = packed(train_set, data, runtime)
        else:
            data = data.model_copy(update={"feed": "host"})  # which moves nothing
        memory = min(runtime.gather(device_memory(runtime.device)))
        self.feed = runtime.agree(lambda: self._feed(train_set, data, "train", memory))
        self.eval_feed: DeviceFeed | None = None
        if eval_set is not None:
            eval_set = packed(eval_set, config.data, runtime)
            left = min(runtime.gather(memory - self.feed.resident_bytes))
            self.eval_feed = runtime.agree(lambda: self._feed(eval_set, config.data, "eval", left))
        self.planned: Prediction | None = None
        if self.to_train and config.leaves_memory_open:
            from trainer.memory.fitting import Fitting  # takes a while to import, and most runs plan nothing

            self.fitting = Fitting(config, runtime, self._planner)
            self.planned = self.fitting.choose(self.plan.micro_batch_size)
            self._split_batch(self.plan.num_samples, self.planned.micro_batch_size)
        runtime.agree(self._shape_model)

    def _check_surroundings(self) -> None:
        check_trackers(self.config)
        self.folder.create()

    def _build_order_and_task(
        self, train_set: SizedDataset, num_classes: int | None, shrink: Shrink | None = None
    ) -> None:
        config = self.config
        train = config.train
        micro_batch_size = None if train.micro_batch_size == "auto" else train.micro_batch_size
        self._split_batch(len(train_set), micro_batch_size)
        if shrink is not None:
            limit = shrink.limit(
                train.micro_batch_size, train.batch_size // self.runtime.num_ranks, self.plan.group_size
            )
            if limit is not None:
                message = "train.micro_batch_size: %d instead of %d, which ran out of memory at step %d"
                logger.info(message, limit, shrink.was, shrink.step)
                self._split_batch(len(train_set), limit)
        self.total_steps = train.steps or (train.epochs or 0) * self.plan.steps_per_epoch
        self.learning_rate = build_learning_rate(
            config.optim, config.schedule, self.total_steps, self.plan.steps_per_epoch
        )
        self.task = build_task(config.task, num_classes)
        self.task.to(self.runtime.device)
        self.best_metric, best_mode = self.task.best_metric, self.task.best_mode
        if config.checkpoint.best is not None:
            self.best_metric, best_mode = config.checkpoint.best.metric, config.checkpoint.best.mode
        self.best_mode = best_mode
        self.best_of = f"{best_mode} {self.best_metric}"

    def _split_batch(self, num_samples: int, micro_batch_size: int | None) -> None:
        """Splits the global batch over ranks and micro-batches, and with it the order of samples."""
        config = self.config
        self.plan = BatchPlan.split(
            num_samples,
            config.train.batch_size,
            micro_batch_size,
            self.runtime.num_ranks,
            config.data.drop_last,
            group_size=2 if config.data.augment.mixes else 1,
        )
        self.sampler = StepSampler(self.plan, self.runtime.rank, config.run.seed)
        if config.parallel.static_graph and self.plan.num_micro_batches > 1:
            message = "DDP with a static graph cannot accumulate gradients over micro-batches"
            raise UserError(message, path="parallel.static_graph")

    def _build_model(self, num_classes: int | None) -> None:
        config = self.config
        seed_everything(config.run.seed)  # the same initial weights on every rank
        with self.runtime.main_first() if config.model.weights else nullcontext():  # weights may be downloaded
            self.bare_model = build_model(config.model, num_classes)
        self.bare_optimizer = build_optimizer(config.optim, self.bare_model, self.runtime.device.type)
        seed_everything(config.run.seed + 1 + self.runtime.rank)  # dropout differs per rank

    def _planner(self) -> Planner:
        """Returns the planner of this run's step on this device."""
        from trainer.memory.devices import this_device
        from trainer.memory.jobs import plan_job
        from trainer.memory.planner import Planner

        device = self.runtime.device
        job = plan_job(self.config, self.bare_model, self.task, self.feed, self.plan, device.type)
        return Planner(job, this_device(device))

    def _shape_model(self) -> None:
        """Memory format, gradient checkpointing, compile: in this order, and all of it before DDP."""
        config, model = self.config, self.bare_model
        if uses_channels_last(config.model, model):
            model.to(memory_format=torch.channels_last)
        self._compiled_blocks: dict[str, nn.Module] = {}
        if not self.to_train:  # one evaluation is not worth compiling for, and has no backward
            return
        blocks = recompute_blocks(config, model, self.planned.policies if self.planned is not None else {})
        compile_model(config.model, model, blocks)
        self._compiled_blocks = blocks if config.model.compile != "none" else {}

    def _confirmed_micro_batch(self) -> int:
        from trainer.memory.jobs import summed_loss

        assert self.planned is not None
        return self.fitting.confirm(self.bare_model, summed_loss(self.task), self.planned)

    def _check_transforms(self) -> None:
        for split in ("train", "eval"):
            build_transforms(getattr(self.config.data.transforms, split), f"data.transforms.{split}")

    def _feed(
        self, dataset: SizedDataset, data: DataConfig, split: Literal["train", "eval"], memory: int
    ) -> DeviceFeed:
        return DeviceFeed(
            dataset,
            data,
            split,
            self.runtime.device,
            self.config.run.seed,
            self.task,
            self.runtime.step_dtype,
            max_workers=max(self.runtime.num_cores - 1, 1),  # a core for the step
            ranks=Share(self.runtime.rank, self.runtime.num_ranks),
            memory=memory,
        )

    # ---- the run ------------------------------------------------------------------------------------------

    def fit(self) -> str:
        """Trains to the end, or until asked to stop. Returns the status: `finished` or `stopped`."""
        self.restore()
        if self.complete():
            logger.info("already finished: %d steps in %s", self.progress.step, self.folder.path)
            self.close()
            return "finished"
        self.start()
        if self.evaluation_due():  # stopped after a step, before it was evaluated
            self.evaluate_and_keep_best()
            self.save()
        stop = False
        while self.progress.step < self.total_steps and not stop:
            self.train_step()
            stop = self.stop_requests.agreed()
            if self.due(self.config.log.every):
                self.report()
            improved = not stop and self.evaluation_due() and self.evaluate_and_keep_best()
            if stop or improved or self.due(self.config.checkpoint.every):
                self.save()
        return self.finish()

    def train_step(self) -> None:
        """One optimizer step over the global batch, however it is split over ranks and micro-batches."""
        step = self.progress.step
        learning_rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # DDP averages gradients over ranks; this makes the average the mean over the global batch.
        scale = self.runtime.num_ranks / self.plan.step_samples(step)
        for i, batch in enumerate(self.feed.step_batches(step)):
            self._micro_batch = i
            with self.runtime.accumulate(self.model, batch.is_last):
                loss_sum = self.loss_sum(batch)
                with explained_model_errors():  # blocks may run again in backward
                    self.runtime.backward(loss_sum * scale)
            self._window.add(loss_sum, batch.num_samples)
        if self.config.optim.clip_norm is not None:
            self.runtime.unscale_gradients(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            self._window.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.optim.clip_norm)
        self.progress.skipped_steps += self.runtime.step(self.optimizer)
        self.optimizer.zero_grad()
        self.progress.step += 1
        check_compiled_buffers(self._compiled_blocks)  # looks after the first step only

    def loss_sum(self, batch: MicroBatch) -> torch.Tensor:
        """Returns the summed loss of a micro-batch; a stand-in keeps this rank in step without weight."""
        with explained_model_errors():
            outputs = self.task.forward(self.model, batch.data)
        loss_sum = self.task.loss_sum(outputs, batch.data)
        return loss_sum if batch.num_samples else loss_sum * 0.0

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Evaluates every sample of the evaluation set once and returns the task's metrics, on every rank."""
        assert self.eval_feed is not None
        # Not the wrapped model: its forward exchanges buffers, and ranks may have uneven batch counts. Each rank's
        # BatchNorm statistics are its own until the next training step, so all evaluate with rank 0's, as saved.
        self.runtime.broadcast_buffers(self.bare_model)
        model = self.bare_model
        modes = {module: module.training for module in model.modules()}
        model.eval()
        batch_size = self.config.eval.batch_size or self.plan.micro_batch_size
        totals: dict[str, torch.Tensor] = {}
        for batch in self.eval_feed.eval_batches(batch_size, self.runtime.rank, self.runtime.num_ranks):
            sums = self.task.eval_sums(self.task.forward(model, batch.data), batch.data)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0) + self.runtime.exact(value)  # on its device: nobody waits
        for module, mode in modes.items():  # a part that the user keeps in eval mode stays in it
            module.training = mode
        # A rank without a sample (a tiny evaluation set) has no totals of its own, and adds zeros.
        names = self.runtime.from_main(lambda: list(totals))
        zero = torch.zeros(())
        return self.task.metrics(self.runtime.sum({name: totals.get(name, zero) for name in names}))

    # ---- around the steps ---------------------------------------------------------------------------------

    def due(self, every: Interval) -> bool:
        """Tells whether something is due after the current step; at the end of training everything is."""
        step = self.progress.step
        return step % every.steps(self.plan.steps_per_epoch) == 0 or step == self.total_steps

    def complete(self) -> bool:
        """Tells whether nothing is left to do."""
        return self.progress.step >= self.total_steps and not self.evaluation_due()

    def evaluation_due(self) -> bool:
        """Tells whether the current step still has to be evaluated."""
        step = self.progress.step
        if self.eval_feed is None or step == 0 or self.progress.evaluated_step == step:
            return False
        return self.due(self.config.eval.every)

    def evaluate_and_keep_best(self) -> bool:
        """Evaluates, reports, and tells whether this is the best evaluation so far."""
        with self.clock.phase("evaluation"):
            metrics = self.evaluate()
        progress = self.progress
        progress.evaluated_step, progress.eval_metrics = progress.step, metrics
        if self.reporter is not None:
            self.reporter.publish(progress.step, {f"eval/{k}": v for k, v in metrics.items()})
        if self.best_metric is None:
            return False
        if self.best_metric not in metrics:
            self.save()
            message = f"evaluation has no metric '{self.best_metric}'; it has: {', '.join(metrics)}"
            path = "checkpoint.best.metric" if self.config.checkpoint.best is not None else "task.name"
            raise UserError(message, path=path, agreed=True)
        value, best = metrics[self.best_metric], progress.best_value
        better = best is None or (value > best if self.best_mode == "max" else value < best)
        if better and not math.isnan(value):
            progress.best_step, progress.best_value = progress.step, value
            progress.best_of = self.best_of
            return True
        return False

    def report(self) -> None:
        """Reports the steps since the last report. The only place where training waits for the device."""
        window, step = self._window, self.progress.step
        totals = self.runtime.sum(
            {
                "loss": window.loss_sum,
                "count": torch.tensor(window.num_samples),
                "skipped": torch.tensor(self._num_skipped()),
            }
        )
        self._skipped_samples = int(totals["skipped"])
        seconds = window.seconds(self.clock, self.feed)
        record = {
            "train/loss": totals["loss"] / totals["count"],
            "train/lr": self.learning_rate(step - 1),
            "train/samples_per_second": totals["count"] / seconds["train"],
            "train/data_wait": seconds["data_wait"] / seconds["train"],
        }
        if window.grad_norm is not None:
            record["train/grad_norm"] = float(window.grad_norm)
        if self.reporter is not None:
            self.reporter.publish(step, record)
        self._window = _Window(self.runtime, self.clock, self.feed)
        if self.reporter is not None and not math.isfinite(record["train/loss"]):
            logger.warning("step %d: the loss is %s", step, record["train/loss"])

    def start(self) -> None:
        """Writes what this run is, starts its trackers and its feed, and takes over the stop signals."""
        with self.clock.phase("startup"):
            if self.runtime.is_main:
                self.reporter = Reporter(
                    self.config,
                    self.runtime,
                    self.folder,
                    self.plan,
                    self.total_steps,
                    self.progress,
                    self.bare_model,
                )
            self.feed.start(self.sampler, self.progress.step, self.total_steps)
            self.stop_requests.install()
        self._window = _Window(self.runtime, self.clock, self.feed)

    def finish(self) -> str:
        """Writes the summary and closes everything. Returns the status."""
        status = "finished" if self.complete() else "stopped"
        self._skipped_samples = int(self.runtime.sum({"skipped": torch.tensor(self._num_skipped())})["skipped"])
        self._summarise(status)
        self.close()
        logger.info("%s at step %d of %d: %s", status, self.progress.step, self.total_steps, self.folder.path)
        return status

    def abandon(self, error: BaseException) -> None:
        """Ends a run that failed: leaves a summary and no process behind. Talks to no other rank."""
        try:
            self._summarise("failed", one_line(error))
        except OSError:  # the disk may be what failed
            logger.exception("cannot write the summary")
        self._close_feeds()
        self.stop_requests.release_signals()
        if self.reporter is not None:
            self.reporter.close(failed=True)

    def close(self) -> None:
        """Ends workers and trackers, and leaves the process group."""
        self._close_feeds()
        if self.reporter is not None:
            self.reporter.close()
        self.stop_requests.drain()
        del self.model, self.optimizer, self.bare_model, self.bare_optimizer
        self.runtime.close()
        self.stop_requests.release_signals()

    def _close_feeds(self) -> None:
        self.feed.close()
        if self.eval_feed is not None:
            self.eval_feed.close()

    def _summarise(self, status: str, error: str | None = None) -> None:
        if self.reporter is not None:
            wait = self.feed.data_wait_seconds
            # Other ranks' skips are those of their last report: a failed run must not wait for them.
            skipped = max(self._skipped_samples, self._num_skipped())
            self.reporter.summarise(status, self.progress, self.best_metric, self.clock, wait, skipped, error)

    def _num_skipped(self) -> int:
        """Returns how often this rank could not read a sample."""
        return self.feed.num_skipped + (self.eval_feed.num_skipped if self.eval_feed is not None else 0)

    def situation(self) -> Situation:
        """Returns what is being done at this moment, for the report of running out of memory."""
        return Situation(
            device=self.runtime.device,
            plan=self.plan,
            step=self.progress.step,
            micro_batch=self._micro_batch,
            model=self.bare_model,
            optimizer=self.bare_optimizer,
            memory_plan=self._memory_table,
        )

    def _memory_table(self) -> str:
        """Returns what the planner says of the present setting."""
        from trainer.memory.table import parts_table

        if self.planned is not None:
            planned = self.planned
            size = self.plan.micro_batch_size
            return parts_table(self.fitting.planner.predict(size, planned.checkpointing, planned.policies))
        return parts_table(self._planner().uniform(self.plan.micro_batch_size, self.config.memory.checkpointing))

    # ---- state --------------------------------------------------------------------------------------------

    @property
    def identity(self) -> Identity:
        """What a resuming run must agree on."""
        config = self.config
        return Identity(
            model=config.model.name,
            optimizer=config.optim.name,
            num_samples=self.plan.num_samples,
            batch_size=self.plan.batch_size,
            seed=config.run.seed,
            drop_last=self.plan.drop_last,
        )

    def save(self) -> None:
        """Writes a checkpoint of the current step; every rank calls it."""
        with self.clock.phase("checkpoint"):
            generators = self.runtime.gather(self.runtime.generator_states())
            if self.runtime.is_main:
                tensors: dict[str, Any] = {
                    "model": self.bare_model.state_dict(),
                    "optimizer": self.bare_optimizer.state_dict(),
                    "generators": generators,
                }
                if self.runtime.scaler is not None:
                    tensors["scaler"] = self.runtime.scaler.state_dict()
                self.checkpoints.write(self.progress, self.identity, tensors, self.runtime.num_ranks)
            self.runtime.barrier()

    def restore(self) -> None:
        """Continues from the newest checkpoint in the run folder, if there is one.

        Raises:
            UserError: the checkpoint is of another run or model, cannot be read, or may not be resumed.
        """
        with self.clock.phase("startup"):
            steps = self.runtime.from_main(self.checkpoints.steps)
            if not steps:
                return
            if self.config.checkpoint.resume == "never":
                message = f"'{self.folder.path}' already holds a run; choose another run.dir"
                raise UserError(message, path="checkpoint.resume", agreed=True)
            self.runtime.agree(lambda: self.load(steps[-1]))
        logger.info("continuing from step %d of %s", self.progress.step, self.folder.path)
        for change in self.folder.config_changes():
            logger.info("changed    %s", change)

    def load(self, step: int) -> None:
        """Loads the checkpoint of a step into model, optimizer, generators and progress."""
        progress, num_ranks = self.checkpoints.read(step, self.identity)
        where = self.checkpoints.path(step)
        try:
            self.bare_model.load_state_dict(self.checkpoints.load(step, "model"))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"'{where}' is of another model: {reason}", path="run.dir") from error
        # What the config says of the optimizer wins over what the checkpoint remembers.
        set_here = {"lr", "weight_decay", "fused", "foreach", *self.config.optim.args}
        state = self.checkpoints.load(step, "optimizer")
        # Before it is loaded: torch looks there for where the state of a fused optimizer belongs.
        for group, setting in zip(state["param_groups"], self.bare_optimizer.param_groups, strict=False):
            group.update({k: v for k, v in setting.items() if k in set_here})
        try:
            self.bare_optimizer.load_state_dict(state)
        except ValueError as error:
            raise UserError(f"'{where}' is of another optimizer: {error}", path="run.dir") from error
        if self.runtime.scaler is not None and self.checkpoints.has(step, "scaler"):
            self.runtime.scaler.load_state_dict(self.checkpoints.load(step, "scaler"))
        generators = self.checkpoints.load(step, "generators")
        if num_ranks == self.runtime.num_ranks:
            self.runtime.restore_generators(generators[self.runtime.rank])
        else:
            logger.info("written by %d processes, read by %d", num_ranks, self.runtime.num_ranks)
        if progress.best_of != self.best_of:  # values of another metric do not compare
            progress.best_step = progress.best_value = None
        self.progress = progress


class _Window:
    """What happened since the last report; sums stay on the device until then."""

    def __init__(self, runtime: Runtime, clock: Clock, feed: DeviceFeed) -> None:
        self.loss_sum = runtime.exact(torch.zeros((), device=runtime.device))
        self.num_samples = 0
        self.grad_norm: torch.Tensor | None = None
        self._train_seconds = clock.split()["train"]
        self._data_wait = feed.data_wait_seconds

    def add(self, loss_sum: torch.Tensor, num_samples: int) -> None:
        self.loss_sum += loss_sum.detach()
        self.num_samples += num_samples

    def seconds(self, clock: Clock, feed: DeviceFeed) -> dict[str, float]:
        return {
            "train": clock.split()["train"] - self._train_seconds,
            "data_wait": feed.data_wait_seconds - self._data_wait,
        }


def class_count(config: Config, train_set: SizedDataset) -> int | None:
    """Returns how many classes there are: what the model is told, else what the data set knows.

    Raises:
        UserError: the data set has more classes than the model.
    """
    names = class_names(train_set)
    in_data = len(names) if names is not None else None
    in_model = config.model.args.get("num_classes")
    if not isinstance(in_model, int):
        return in_data
    if in_data is not None and in_data > in_model:
        message = f"the model has {in_model} classes, data.train has {in_data}"
        raise UserError(message, path="model.args.num_classes")
    return in_model
