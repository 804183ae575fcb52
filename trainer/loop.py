"""The training loop: `Trainer.fit`, one step, what is due between two, and the end.

Reads as nouns and verbs; how each is done is in the module named after it. The trainer stands on what a run consists of
(`trainer.assembly`), can be saved (`trainer.resumable`), observed (`trainer.observed`) and evaluated
(`trainer.evaluating`).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Literal

import torch

from trainer.advice.survey import Survey
from trainer.checkpoint.writing import SaveFailed
from trainer.config import Config
from trainer.data.feed import MicroBatch
from trainer.errors import one_line
from trainer.evaluating import Evaluating
from trainer.faults.fault import Fault
from trainer.memory.checkpointing import check_compiled_buffers
from trainer.memory.out_of_memory import Situation
from trainer.model_errors import explained_model_errors
from trainer.normalising import Normaliser
from trainer.random_state import generator_states, restore_generators
from trainer.recovery import Recovery
from trainer.reporting import Reporter
from trainer.run_folder import RunFolder
from trainer.runtime import Runtime
from trainer.tasks.misfit import explained_misfit
from trainer.telemetry.clock import Clock
from trainer.tracking import reminder
from trainer.update import Update
from trainer.window import either

logger = logging.getLogger("lockstep")

_IN_STEP = 8  # most exchanges of decisions within a step, between groups of micro-batches


class Trainer(Evaluating):
    """One run, from a config to a trained model.

    Args:
        config: the whole run.
        to_train: whether it will train; else the training data is neither packed nor moved to the device.

    Raises:
        UserError: the config cannot be carried out here; on every rank alike.
    """

    def __init__(self, config: Config, to_train: bool = True) -> None:
        clock = Clock()
        with clock.phase("startup"):
            super().__init__(clock, config, Runtime(config), RunFolder(config), to_train)
            with self.lookout.last_words() if self.lookout is not None else nullcontext():
                self.build()

    def build(self) -> None:
        """Builds and wraps everything."""
        super().build()
        self.update = Update(self.runtime, self.optimizer, self.config.optim, self.numbers, self.buffers)
        self.recovery = Recovery(self)
        self._micro_batch = 0  # of the present step
        self._on_computed: Callable[[], None] | None = None  # what a backward calls before it waits for other ranks
        if self.stopwatch is not None and self.runtime.num_ranks > 1:
            self._on_computed = partial(self.stopwatch.enter, "communication")

    # ---- the run ------------------------------------------------------------------------------------------

    def fit(self) -> str:
        """Trains to the end, or until asked to stop. Returns the status: `finished` or `stopped`.

        Raises:
            BadNumbers: a loss or a gradient is not finite, and the run is not to go on.
            SaveFailed: a checkpoint that must be there could not be written.
        """
        self.stop_requests.install()
        self.restore()
        if self.complete():
            logger.info("already %s", self._end_text("finished"))
            unsent = reminder(self.config, self.folder.path) if self.runtime.is_main else None
            if unsent is not None:
                logger.warning("%s", unsent)
            self.close()
            return "finished"
        self.start()
        if self.evaluation_due():  # ended after a step, before it was evaluated
            self.evaluate_and_save(is_saved=True)
        while not self.is_over() and not self.decisions.stopping:
            if self.profiling is not None:
                self.profiling.before_step(self.progress.step + 1)
            if self.train_step():
                if self.profiling is not None:
                    self.profiling.after_step(self.progress.step)
                self.after_step()
        return self.finish()

    def train_step(self) -> bool:
        """One optimizer step over the global batch, however it is split over ranks and micro-batches.

        Returns:
            Whether it was made; a request to stop that comes in the middle of it undoes what it has done so far.
        """
        step = self.progress.step
        if step in self.progress.avoided_steps:
            return self._leave_out()
        undo = self._undo() if self._asks_within(step) else None
        self._begin_step(step)
        normaliser = Normaliser(self.runtime, self.plan, step, partial(self.inside, "communication"))
        loss_sum, num_samples = self.runtime.zero(), 0
        for i, batch in enumerate(self._batches(step)):
            self._micro_batch = i
            loss_sum += self.forward_backward(batch, normaliser)
            num_samples += batch.num_samples
            if undo is not None and self._stops_within(i):
                undo()
                return False
        self.at("optimizer")
        factor, has_no_loss = normaliser.settle(self.optimizer), None
        if factor is not None:
            loss_sum *= factor
            has_no_loss = factor == 0  # nothing in the global batch counts
        num_all = self.plan.step_samples(step)
        is_left_out = self.update.judge_and_clip(step, loss_sum, num_samples, num_all, has_no_loss)
        self.window.add(loss_sum, num_samples, either(is_left_out, has_no_loss))
        self.window.grad_norm = self.update.gradient_norm
        if self.saver.holds_state:  # the last save may still be copying what the next line changes
            with self.clock.phase("checkpoint"):
                self.saver.before_update()
        self.progress.skipped_steps += self.update.step(unless=is_left_out)
        self.update.zero_grad()
        self.progress.step += 1
        if self.ema is not None:
            self.ema.update(self.progress.step)
        if step == self.first_step:  # now the optimizer has the state that there is to save
            self.saver.prepare(self.state())
        check_compiled_buffers(self.compiled_blocks)  # looks after the first step only
        return True

    def _begin_step(self, step: int) -> None:
        learning_rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if self.numbers.policy == "skip":
            self.buffers.keep()
        if self.runtime.num_ranks > 1:
            with self.inside("communication"):
                self.runtime.broadcast(self.buffers.now())
        if self.stopwatch is not None:
            self.stopwatch.begin_step()
        if self.pace is not None:
            self.pace.begin_step()

    def _batches(self, step: int) -> Iterator[MicroBatch]:
        """Yields the micro-batches of a step, and says where this rank is."""
        batches = self.feed.step_batches(step)
        for i in itertools.count():
            self.at("loading a batch")
            batch = next(batches, None)
            if batch is None:
                return
            if self.pace is not None and i == 0 and self.runtime.in_lockstep:
                self.pace.meet()
            self.at("forward", batch)
            if self.injector is not None:
                batch = replace(batch, data=self.injector.spoil(batch.data, step + 1))
            yield batch

    def forward_backward(self, batch: MicroBatch, normaliser: Normaliser) -> torch.Tensor:
        """Runs a micro-batch forward and backward; the last one of a step exchanges gradients with the other ranks.

        Returns:
            Its summed loss.
        """
        if self.flops is not None and self.flops.is_due:  # on every rank: a user's forward may hold a collective
            self.flops.count(batch.data, len(batch.sample_ids))
        with self.runtime.accumulate(self.model, batch.is_last):
            loss, count = self.loss_and_count(batch)
            if self.injector is not None:
                loss = self.injector.loss(loss, self.progress.step + 1)
            is_first_exchange = batch.is_last if count is None else self._micro_batch == 0
            if self.pace is not None and is_first_exchange and not self.runtime.in_lockstep:
                self.pace.meet()
            scale = normaliser.scale(count)
            self.at("backward", batch)
            with explained_model_errors():  # blocks may run again in backward
                self.runtime.backward(loss * scale, self._on_computed if batch.is_last else None)
        return loss.detach()

    def loss_and_count(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the summed loss of a micro-batch, and what it is to be divided by where that is not samples.

        A stand-in keeps this rank in step without weight.
        """
        is_first = self.progress.step == self.first_step
        with explained_misfit(batch.data) if is_first else nullcontext():
            with explained_model_errors():
                outputs = self.task.forward(self.model, batch.data)
            loss_sum = self.task.training_loss_sum(outputs, batch.data)
            count = self.task.loss_count(outputs, batch.data)
        if batch.num_samples:
            return loss_sum, count
        return loss_sum * 0.0, count if count is None else torch.zeros_like(count)

    def _leave_out(self) -> bool:
        """Lets the batch of this step pass by, and changes nothing but the position."""
        step = self.progress.step
        self.at("loading a batch")
        for _ in self.feed.step_batches(step):
            self.at("loading a batch")
        self.progress.step += 1
        if step == self.first_step:  # the next one is the first that is made
            self.first_step += 1
        return True

    def after_step(self) -> None:
        """What is due between two steps."""
        save_by_clock, is_alarmed = self.agree()
        save_due, evaluation_due = save_by_clock or self.save_due(), self.evaluation_due()
        # What is wrong is known late; before anything is kept it has to be known.
        report_due = self.due(self.config.log.every)
        # Trackers cannot take back what they were told of a step that will be made again.
        is_final = save_due or evaluation_due or (report_due and self.config.faults.non_finite == "rollback")
        if is_alarmed or (is_final and self.recovery.is_due()):
            self.recovery.recover()
            return
        if report_due:
            self.report()
            if self.reporter is not None and not evaluation_due:
                self.reporter.end_step(self.progress.step)
        if self.decisions.stopping:
            return
        if save_due:  # before the evaluation, which may take long; what it finds is added to the checkpoint
            self.save()
        if evaluation_due:
            self.evaluate_and_save(is_saved=save_due)

    # ---- decisions of all ranks ---------------------------------------------------------------------------

    def agree(self) -> tuple[bool, bool]:
        """Tells whether a checkpoint is due by the clock, and whether any rank saw bad numbers: the same on every rank.

        Raises:
            SaveFailed: a checkpoint could not be written, and `checkpoint.on_error` is `raise`; on every rank.
        """
        self.at("exchange of decisions")
        by_clock = self.save_timer is not None and self.save_timer.rings()
        has_failed = self.config.checkpoint.on_error == "raise" and bool(self.saver.failures)
        decided = self.decisions.after_step(by_clock, has_failed, self.numbers.is_alarmed)
        if decided.save_has_failed:
            self.saver.wait()
            raise SaveFailed(f"checkpoint.on_error is raise, and a checkpoint failed: {'; '.join(self.saver.failures)}")
        if self.injector is not None and self.injector.stops_after(self.progress.step):
            self.decisions.stopping = "a plan of faults"
        return decided.save_by_clock, decided.is_alarmed

    def _asks_within(self, step: int) -> bool:
        """Tells whether ranks exchange decisions within a step.

        Not where some have fewer micro-batches than others: these wait in the exchange of gradients meanwhile.
        """
        return self.plan.num_micro_batches > 1 and self.plan.step_samples(step) == self.plan.batch_size

    def _stops_within(self, micro_batch: int) -> bool:
        """Tells whether to stop after a micro-batch that is not the last one of its step."""
        num_done, num_all = micro_batch + 1, self.plan.num_micro_batches
        asks = num_done < num_all and num_done % math.ceil(num_all / _IN_STEP) == 0
        return asks and self.decisions.stops_here()

    def _undo(self) -> Callable[[], None]:
        """Returns what makes it as if this step had never begun."""
        self.buffers.keep()
        generators = generator_states(self.runtime.device)

        def undo() -> None:
            self.update.zero_grad()
            self.buffers.put_back()
            restore_generators(generators, self.runtime.device)

        return undo

    # ---- begin and end ------------------------------------------------------------------------------------

    def complete(self) -> bool:
        """Tells whether nothing is left to do."""
        return self.is_over() and not self.evaluation_due()

    def start(self) -> None:
        """Writes what this run is, starts its trackers and its feed, and takes over the stop signals."""
        with self.clock.phase("startup"):
            if self.runtime.is_main:
                assert self.flops is not None
                self.reporter = Reporter(
                    self.config,
                    self.runtime,
                    self.folder,
                    self.plan,
                    self.total_steps,
                    self.progress,
                    self.bare_model,
                    (self.best_metric, self.best_mode),
                    self.feed,
                    self.planned,
                    self.flops,
                )
                reporter = self.reporter
                self.saver.on_saved = lambda progress: reporter.checkpoint_saved(self.checkpoints, progress)
                self.checkpoints.clean()
                self.stop_requests.watch_file(self.folder.path)
            self.feed.start(self.sampler, self.progress.step, self.total_steps)
        if self.ledger is not None:
            self.ledger.begin(self.progress.step, self.runtime.num_ranks, self.times()[2])
            self.survey = Survey(self)
        self.first_step = self.progress.step
        self.measure_from_here()
        if self.config.faults.non_finite == "rollback" and self.saver.saved_step is None:
            self.save()  # there must be something to go back to

    def finish(self) -> str:
        """Waits for the last checkpoint, writes the summary and closes everything. Returns the status.

        Raises:
            SaveFailed: the end of the run is not saved, or there is no checkpoint at all to go on from.
        """
        self.at("ending")
        if self.profiling is not None:
            self.profiling.close()
        if self.recovery.is_due():
            self.recovery.recover()
        status: Literal["finished", "stopped"] = "finished" if self.complete() else "stopped"
        if status == "finished" or self.has_time_to_save():
            self.wait_for_the_last_save(must_be_there=status == "finished")
        if self.numbers.policy == "skip":
            self.count_bad_steps()
        self.skipped_samples = int(self.runtime.sum({"skipped": torch.tensor(self.num_skipped())})["skipped"])
        self.summarise(status)
        if self.runtime.is_main:
            self.stop_requests.fulfilled()
        self.close()
        logger.info("%s", self._end_text(status))
        return status

    def _end_text(self, status: str) -> str:
        ended = self.early_stopping.summary(self.progress)
        early = f", early: {ended['reason']}" if ended is not None else ""
        return f"{status} at step {self.progress.step} of {self.total_steps}{early}: {self.folder.path}"

    def tell(self, error: BaseException) -> None:
        """Tells the other ranks, at once, that this one fails, if that is news to them."""
        if self.lookout is not None:
            self.lookout.tell(error)

    def ended_by(self) -> Fault | None:
        """Returns which rank ended the job, if that is known; waits a moment for the news."""
        return self.lookout.ended_by() if self.lookout is not None else None

    def abandon(self, error: BaseException) -> None:
        """Ends a run that failed: leaves a summary and no process behind. Waits for no other rank."""
        with self.lookout.leaving() if self.lookout is not None else nullcontext():
            self.saver.give_up(seconds=3)
            if self.profiling is not None:
                self.profiling.give_up()
            fault = self.ended_by()
            self.summarise("failed", str(fault) if fault is not None else one_line(error))
            self._close_feeds()
            self.stop_requests.release_signals()
            if self.reporter is not None:
                self.reporter.close(failed=True, open_step=self._open_step(), beat=self.beat)

    def close(self) -> None:
        """Ends workers and trackers, and leaves the process group."""
        self._close_feeds()
        if self.reporter is not None:
            # Not all that is left of the grace: there is more to do than to wait for a tracker's server.
            left = (self.config.faults.grace.seconds - self.stop_requests.seconds_ago()) / 2
            seconds = left if self.stop_requests.requested else None
            self.reporter.close(False, self._open_step(), seconds, self.beat)  # which is no hang
        self.decisions.forget()
        self.saver.wait()
        del self.model, self.optimizer, self.update, self.bare_model, self.bare_optimizer
        if self.lookout is not None:
            self.lookout.close()
        self.runtime.close()
        self.stop_requests.release_signals()

    def _close_feeds(self) -> None:
        self.feed.close()
        if self.eval_feed is not None:
            self.eval_feed.close()

    def situation(self) -> Situation:
        """Returns what is being done at this moment, for the report of running out of memory."""
        return Situation(
            device=self.runtime.device,
            plan=self.plan,
            step=self.progress.step,
            micro_batch=self._micro_batch,
            model=self.bare_model,
            optimizer=self.bare_optimizer,
            memory_plan=self.memory_table,
        )
