"""The training loop: `Trainer.fit`, one step, evaluation, reports.

Reads as nouns and verbs; how each is done is in the module named after it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from trainer.agreement import StepVotes
from trainer.checkpoint.compatibility import check_resumable
from trainer.checkpoint.folder import open_folder
from trainer.checkpoint.manifest import Manifest, Progress
from trainer.checkpoint.reading import Checkpoint
from trainer.checkpoint.state import Parts, State
from trainer.checkpoint.writing import SaveFailed, Saver
from trainer.config import Config, DataConfig, ModelConfig
from trainer.config_values import Interval, Minutes
from trainer.data.build import build_data, packed
from trainer.data.datasets import SizedDataset, class_names
from trainer.data.feed import DeviceFeed, MicroBatch
from trainer.data.loader import preserved_generators
from trainer.data.modes import device_memory
from trainer.data.resident import Share
from trainer.data.sampler import BatchPlan, EvalSampler, StepSampler
from trainer.data.transforms import build_transforms
from trainer.ema import Ema
from trainer.errors import UserError, one_line
from trainer.faults.stopping import StopRequests
from trainer.memory.blocks import repeated_blocks
from trainer.memory.checkpointing import (
    check_compiled_buffers,
)
from trainer.memory.out_of_memory import Situation
from trainer.memory.shrink import Shrink, read_shrink
from trainer.model import build_model, compile_model, recompute_blocks, uses_channels_last
from trainer.optim import build_learning_rate, build_optimizer
from trainer.parallel import in_lockstep
from trainer.random_state import generator_states, restore_generators
from trainer.reporting import Reporter
from trainer.run_folder import RunFolder
from trainer.runtime import Runtime, explained_model_errors, seed_everything
from trainer.sync_batchnorm import synchronise_batchnorm
from trainer.tasks import build_task
from trainer.telemetry import Clock, Timer
from trainer.tracking import check_trackers
from trainer.weights import settled_weights

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
            self.checkpoints = self.runtime.agree(lambda: open_folder(config, self._is_kept_for_good))
            self.stop_requests = StopRequests()
            self.votes = StepVotes(self.runtime.host_group, num_questions=3)
            self._build()
            self.model, self.optimizer = self.runtime.prepare(
                self.bare_model, self.bare_optimizer, self._shared_blocks.values()
            )
            self.ema = Ema(self.bare_model, config.optim.ema) if config.optim.ema is not None else None
            self.model.train()
            # Not where a forward is a collective: a rank that runs out of memory in it would leave the others waiting.
            if self.planned is not None and not self.runtime.in_lockstep:
                self._split_batch(self.plan.num_samples, self._confirmed_micro_batch())
            self.saver = Saver(
                self.checkpoints,
                self.runtime,
                self.runtime.new_host_group(),
                config.checkpoint.async_save,
                self.runtime.device,
            )
        self.progress = Progress()
        self._first_step = 0  # of this attempt
        every = config.checkpoint.every
        self.save_timer = Timer(60 * every.count) if isinstance(every, Minutes) and self.runtime.is_main else None
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
        settled = runtime.from_main(lambda: settled_weights(config.model))
        runtime.agree(lambda: self._build_model(settled, num_classes))
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
            in_lockstep=self.runtime.in_lockstep,
        )
        self.sampler = StepSampler(self.plan, self.runtime.rank, config.run.seed)
        if config.parallel.static_graph and self.plan.num_micro_batches > 1:
            message = "DDP with a static graph cannot accumulate gradients over micro-batches"
            raise UserError(message, path="parallel.static_graph")

    def _build_model(self, model: ModelConfig, num_classes: int | None) -> None:
        config = self.config
        self._num_classes = num_classes
        seed_everything(config.run.seed)  # the same initial weights on every rank
        with self.runtime.main_first() if model.weights else nullcontext():  # weights may be downloaded
            self.bare_model = build_model(model, num_classes)
        self.bare_optimizer = build_optimizer(config.optim, self.bare_model, self.runtime.device.type)
        seed_everything(config.run.seed + 1 + self.runtime.rank)  # dropout differs per rank

    def _planner(self) -> Planner:
        """Returns the planner of this run's step on this device."""
        from trainer.memory.devices import this_device
        from trainer.memory.jobs import plan_job
        from trainer.memory.planner import Planner

        device = self.runtime.device
        model = self._model_without_memory() if self.runtime.in_lockstep else self.bare_model
        job = plan_job(self.config, model, self.task, self.feed, self.plan, device.type, self.runtime.shard_size)
        return Planner(job, this_device(device))

    def _model_without_memory(self) -> nn.Module:
        """Returns the model as built: of one that is sharded, or has a BatchNorm of all ranks, no plan can be made."""
        from trainer.memory.fakes import fake_tensors

        with preserved_generators(), fake_tensors():
            return build_model(self.config.model.model_copy(update={"weights": None}), self._num_classes)

    def _shape_model(self) -> None:
        """Memory format, gradient checkpointing, compile: in this order, and all of it before DDP."""
        config = self.config
        if config.parallel.sync_batchnorm:
            self.bare_model = synchronise_batchnorm(self.bare_model, self.runtime.num_ranks, self.runtime.device.type)
            self._check_even_batches()
        model = self.bare_model
        # FSDP shards rows of row-major weights; images arrive in channels_last all the same.
        if uses_channels_last(config.model, model) and not self.runtime.is_sharded:
            model.to(memory_format=torch.channels_last)
        self._compiled_blocks: dict[str, nn.Module] = {}
        self._shared_blocks = repeated_blocks(model, config.memory.blocks) if self.runtime.is_sharded else {}
        if not self.to_train:  # one evaluation is not worth compiling for, and has no backward
            return
        blocks = recompute_blocks(config, model, self.planned.policies if self.planned is not None else {})
        compile_model(config.model, model, blocks)
        self._compiled_blocks = blocks if config.model.compile != "none" else {}

    def _check_even_batches(self) -> None:
        """Refuses stand-ins, which keep a rank in step, where they would count in BatchNorm's statistics."""
        last = self.plan.steps_per_epoch - 1
        if self.runtime.in_lockstep and self.total_steps > last and self.plan.needs_stand_ins(last):
            message = (
                f"the last batch of an epoch has {self.plan.step_samples(last)} samples, which are not as many "
                f"micro-batches on each of {self.runtime.num_ranks} processes, as sync_batchnorm needs: leave it out"
            )
            raise UserError(message, path="data.drop_last")

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
        if self.evaluation_due():  # ended after a step, before it was evaluated
            self.evaluate_and_keep_best()
            self.save()
        stop = False
        while self.progress.step < self.total_steps and not stop:
            self.train_step()
            stop, by_clock = self.agree()
            if self.due(self.config.log.every):
                self.report()
            # Before the evaluation, which may take long; what it finds is added to the checkpoint.
            saved = stop or by_clock or self.save_due()
            if saved:
                self.save()
            if not stop and self.evaluation_due() and (self.evaluate_and_keep_best() or saved):
                self.save()
        return self.finish()

    def train_step(self) -> None:
        """One optimizer step over the global batch, however it is split over ranks and micro-batches."""
        step = self.progress.step
        learning_rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.runtime.begin_step(self.model)
        # DDP and FSDP average gradients over ranks; this makes the average the mean over the global batch.
        scale = self.runtime.num_ranks / self.plan.step_samples(step)
        for i, batch in enumerate(self.feed.step_batches(step)):
            self._micro_batch = i
            with self.runtime.accumulate(self.model, batch.is_last):
                loss_sum = self.loss_sum(batch)
                with explained_model_errors():  # blocks may run again in backward
                    self.runtime.backward(loss_sum * scale)
            self._window.add(loss_sum, batch.num_samples)
        if self.config.optim.clip_norm is not None:
            self._window.grad_norm = self.runtime.clip_gradients(self.optimizer, self.config.optim.clip_norm)
        if self.saver.holds_state:  # the last save may still be copying what the next line changes
            with self.clock.phase("checkpoint"):
                self.saver.before_update()
        self.progress.skipped_steps += self.runtime.step(self.optimizer)
        self.optimizer.zero_grad()
        self.progress.step += 1
        if self.ema is not None:
            self.ema.update(self.progress.step)
        if step == self._first_step:  # now the optimizer has the state that there is to save
            self.saver.prepare(self._state())
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
        for batch in self._eval_batches(batch_size):
            outputs = self.task.forward(model, batch.data)
            if not batch.num_samples:
                continue
            for name, value in self.task.eval_sums(outputs, batch.data).items():
                totals[name] = totals.get(name, 0) + self.runtime.exact(value)  # on its device: nobody waits
        for module, mode in modes.items():  # a part that the user keeps in eval mode stays in it
            module.training = mode
        self.runtime.end_evaluation(model)
        # A rank without a sample (a tiny evaluation set) has no totals of its own, and adds zeros.
        names: list[str] = next(filter(None, self.runtime.gather(list(totals))), [])
        zero = torch.zeros(())
        return self.task.metrics(self.runtime.sum({name: totals.get(name, zero) for name in names}))

    def _eval_batches(self, batch_size: int) -> Iterator[MicroBatch]:
        """Returns this rank's evaluation batches; with a sharded model also stand-ins, which must not count."""
        assert self.eval_feed is not None
        runtime = self.runtime
        batches = self.eval_feed.eval_batches(batch_size, runtime.rank, runtime.num_ranks)
        if not runtime.is_sharded:
            return batches
        most = EvalSampler.most_batches(len(self.eval_feed.dataset), batch_size, runtime.num_ranks)
        return in_lockstep(batches, most, runtime.rank, runtime.device, runtime.gather)

    # ---- around the steps ---------------------------------------------------------------------------------

    def due(self, every: Interval) -> bool:
        """Tells whether something is due after the current step; at the end of training everything is."""
        step = self.progress.step
        return step % every.steps(self.plan.steps_per_epoch) == 0 or step == self.total_steps

    def save_due(self) -> bool:
        """Tells whether a checkpoint is due after the current step, by its number."""
        every = self.config.checkpoint.every
        return self.progress.step == self.total_steps if isinstance(every, Minutes) else self.due(every)

    def _is_kept_for_good(self, step: int) -> bool:
        every = self.config.checkpoint.keep_every
        return every is not None and step % every.steps(self.plan.steps_per_epoch) == 0

    def agree(self) -> tuple[bool, bool]:
        """Tells whether to stop now, and whether a checkpoint is due by the clock: the same on every rank.

        Raises:
            SaveFailed: a checkpoint could not be written, and `checkpoint.on_error` is `raise`; on every rank.
        """
        by_clock = self.save_timer is not None and self.save_timer.rings()
        has_failed = self.config.checkpoint.on_error == "raise" and bool(self.saver.failures)
        stop, by_clock, has_failed = self.votes.exchange([self.stop_requests.requested, by_clock, has_failed])
        if has_failed:
            self.saver.wait()
            raise SaveFailed(f"checkpoint.on_error is raise, and a checkpoint failed: {'; '.join(self.saver.failures)}")
        return stop, by_clock

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
        with self.clock.phase("checkpoint"):
            self.saver.before_update()
        with self.clock.phase("evaluation"):
            generators = generator_states(self.runtime.device)
            with self.ema.swapped_in() if self.ema is not None else nullcontext():
                metrics = self.evaluate()
            restore_generators(generators, self.runtime.device)  # so that evaluating changes nothing that follows
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
                "timed": torch.tensor(window.num_timed_samples),
                "skipped": torch.tensor(self._num_skipped()),
            }
        )
        self._skipped_samples = int(totals["skipped"])
        seconds = window.seconds(self.clock, self.feed)
        record = {
            "train/loss": totals["loss"] / totals["count"],
            "train/lr": self.learning_rate(step - 1),
            "train/samples_per_second": totals["timed"] / seconds["train"],
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
                self.checkpoints.clean()
            self.feed.start(self.sampler, self.progress.step, self.total_steps)
            self.stop_requests.install()
        self._first_step = self.progress.step
        self._window.restart(self.clock, self.feed)

    def finish(self) -> str:
        """Waits for the last checkpoint, writes the summary and closes everything. Returns the status.

        Raises:
            SaveFailed: the end of the run is not saved, or there is no checkpoint at all to go on from.
        """
        status = "finished" if self.complete() else "stopped"
        self._wait_for_the_last_save(must_be_there=status == "finished")
        self._skipped_samples = int(self.runtime.sum({"skipped": torch.tensor(self._num_skipped())})["skipped"])
        self._summarise(status)
        self.close()
        logger.info("%s at step %d of %d: %s", status, self.progress.step, self.total_steps, self.folder.path)
        return status

    def _wait_for_the_last_save(self, must_be_there: bool) -> None:
        with self.clock.phase("checkpoint"):
            self.saver.wait()
        if self.saver.saved_step != self.progress.step:
            self.save()  # once more: what failed may have passed
            with self.clock.phase("checkpoint"):
                self.saver.wait()
        if self.saver.saved_step is None or (must_be_there and self.saver.saved_step != self.progress.step):
            why = "; ".join(self.saver.failures[-1:])
            raise SaveFailed(f"the last step, {self.progress.step}, could not be saved: {why}")

    def abandon(self, error: BaseException) -> None:
        """Ends a run that failed: leaves a summary and no process behind. Talks to no other rank."""
        self._summarise("failed", one_line(error))
        self._close_feeds()
        self.saver.give_up(seconds=5)
        self.stop_requests.release_signals()
        if self.reporter is not None:
            self.reporter.close(failed=True)

    def close(self) -> None:
        """Ends workers and trackers, and leaves the process group."""
        self._close_feeds()
        if self.reporter is not None:
            self.reporter.close()
        self.votes.drain()
        self.saver.wait()
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
            saves = self.saver.statistics
            self.reporter.summarise(status, self.progress, self.best_metric, self.clock, wait, skipped, saves, error)

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

    def _parts(self) -> Parts:
        return Parts(
            model=self.bare_model,
            optimizer=self.bare_optimizer,
            averages=self.ema.averages if self.ema is not None else None,
            scaler=self.runtime.scaler,
            own={
                **{f"generator.{name}": state for name, state in generator_states(self.runtime.device).items()},
                **{f"window.{name}": value for name, value in self._window.totals().items()},
            },
            rank=self.runtime.rank,
            num_ranks=self.runtime.num_ranks,
        )

    def _state(self) -> State:
        # Ranks' BatchNorm statistics are their own until the next step, and the planner lets any rank write them.
        self.runtime.broadcast_buffers(self.bare_model)
        return self._parts().collect()

    def save(self) -> None:
        """Saves the current step behind the training; every rank calls it."""
        with self.clock.phase("checkpoint"):
            state = self._state()
            manifest = Manifest(
                progress=self.progress,
                config=self.config.model_dump(mode="json"),
                num_samples=self.plan.num_samples,
                num_ranks=self.runtime.num_ranks,
                values=state.values,
                tensors={},
                files={},
            )
            self.saver.save(state, manifest)

    def restore(self) -> None:
        """Continues from the newest checkpoint that is good, if the run has one.

        Raises:
            UserError: no checkpoint is good, it is of another run or model, or may not be resumed.
        """
        with self.clock.phase("startup"):
            if self.config.checkpoint.resume == "never" and self.runtime.from_main(self.checkpoints.steps):
                message = f"'{self.checkpoints.location}' already holds a run; choose another run.dir"
                raise UserError(message, path="checkpoint.resume", agreed=True)
            checkpoint = self.checkpoints.choose(self.runtime)
            if checkpoint is None:
                return
            manifest = checkpoint.manifest
            changes = self.runtime.agree(
                lambda: check_resumable(manifest.config, manifest.num_samples, self.config, self.plan.num_samples)
            )
            self.load(checkpoint)
            self.saver.saved_step = checkpoint.step
        logger.info("continuing from step %d of %s", self.progress.step, self.folder.path)
        for change in changes.allowed:
            logger.info("changed    %s", change)

    def load(self, checkpoint: Checkpoint) -> None:
        """Loads a verified checkpoint into model, optimizer, generators and progress; all ranks call it together.

        Raises:
            UserError: it is of another model or optimizer.
        """
        # What the config says of the optimizer wins over what the checkpoint remembers.
        set_here = {"lr", "weight_decay", "fused", "foreach", *self.config.optim.args}
        own = self._parts().restore(checkpoint, self.runtime.host_group, set_here)
        num_ranks = checkpoint.manifest.num_ranks
        if num_ranks == self.runtime.num_ranks:
            prefix = "generator."
            generators = {name.removeprefix(prefix): state for name, state in own.items() if name.startswith(prefix)}
            restore_generators(generators, self.runtime.device)
        else:
            logger.info("written by %d processes, read by %d", num_ranks, self.runtime.num_ranks)
        self._window.load(own["window.loss_sum"], own["window.num_samples"])
        progress = checkpoint.manifest.progress
        if progress.best_of != self.best_of:  # values of another metric do not compare
            progress.best_step = progress.best_value = None
        self.progress = progress


class _Window:
    """What happened since the last report; sums stay on the device until then."""

    def __init__(self, runtime: Runtime, clock: Clock, feed: DeviceFeed) -> None:
        self.loss_sum = runtime.exact(torch.zeros((), device=runtime.device))
        self.num_samples = 0
        self.grad_norm: torch.Tensor | None = None
        self.restart(clock, feed)

    def restart(self, clock: Clock, feed: DeviceFeed) -> None:
        """Measures time from now on."""
        self._num_samples_before = self.num_samples  # of an earlier attempt, whose time is not ours
        self._train_seconds = clock.split()["train"]
        self._data_wait = feed.data_wait_seconds

    def add(self, loss_sum: torch.Tensor, num_samples: int) -> None:
        self.loss_sum += loss_sum.detach()
        self.num_samples += num_samples

    @property
    def num_timed_samples(self) -> int:
        """Samples since `restart`."""
        return self.num_samples - self._num_samples_before

    def totals(self) -> dict[str, torch.Tensor]:
        """Returns what a checkpoint keeps, so that a report tells the same wherever the run was interrupted."""
        return {"loss_sum": self.loss_sum, "num_samples": torch.tensor(self.num_samples)}

    def load(self, loss_sum: torch.Tensor, num_samples: torch.Tensor) -> None:
        self.loss_sum.copy_(loss_sum)
        self.num_samples = int(num_samples)

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
