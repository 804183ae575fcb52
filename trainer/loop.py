"""The training loop: `Trainer.fit`, one step, what is due between two.

Reads as nouns and verbs; how each is done is in the module named after it.
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
from trainer.agreement import Decisions
from trainer.buffers import BufferCopy
from trainer.checkpoint.folder import open_folder
from trainer.checkpoint.manifest import Progress
from trainer.checkpoint.writing import SaveFailed, Saver
from trainer.config import Config
from trainer.config_values import Minutes
from trainer.data.feed import MicroBatch
from trainer.ema import Ema
from trainer.errors import one_line
from trainer.evaluating import Evaluating
from trainer.faults.fault import Fault, next_attempt
from trainer.faults.lookout import Lookout
from trainer.faults.numbers import BadNumbers, NumberGuard
from trainer.faults.pace import Pace, Straggler
from trainer.faults.stopping import StopRequests
from trainer.ledger import Ledger
from trainer.memory.checkpointing import check_compiled_buffers
from trainer.memory.out_of_memory import Situation
from trainer.normalising import Normaliser
from trainer.parallel import watch_exchanges
from trainer.profiling.recording import Profiling
from trainer.random_state import generator_states, restore_generators
from trainer.reporting import Reporter
from trainer.run_folder import RunFolder
from trainer.runtime import Runtime, explained_model_errors
from trainer.tasks.misfit import explained_misfit
from trainer.telemetry.clock import Clock, Timer
from trainer.telemetry.observer import Observer
from trainer.telemetry.stopwatch import Stopwatch
from trainer.tracking import reminder
from trainer.window import Window, either

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
        self.clock = Clock()
        with self.clock.phase("startup"):
            super().__init__(config, Runtime(config), RunFolder(config), to_train)
            runtime = self.runtime
            self.progress = Progress()
            self.stop_requests = StopRequests()
            self.decisions = Decisions(runtime, self.stop_requests)
            self.reporter: Reporter | None = None  # on rank 0, once the run has started
            self.survey: Survey | None = None  # the same
            self.first_step = 0  # of this attempt
            self.media = None
            self.profiling: Profiling | None = None
            self._micro_batch = 0  # of the present step
            self.ledger = Ledger(self.folder) if to_train and runtime.is_main else None
            self.lookout = self._lookout() if to_train else None
            self.stopwatch = Stopwatch(runtime.device) if to_train and config.log.time_split else None
            self.injector = self.lookout.injector if self.lookout is not None else None
            with self.lookout.last_words() if self.lookout is not None else nullcontext():
                self._prepare()

    def _lookout(self) -> Lookout:
        ledger, path = self.ledger, self.folder.path
        attempt = self.runtime.from_main(lambda: next_attempt(path, ledger.number if ledger is not None else 1))
        return Lookout(
            self.config.faults,
            self.runtime,
            path,
            attempt,
            self._describe_feeds,
            lambda fault: self.summarise("failed", str(fault)),
        )

    def _prepare(self) -> None:
        """Builds and wraps everything."""
        config, runtime = self.config, self.runtime
        self.at("building")
        self.checkpoints = runtime.agree(lambda: open_folder(config, self.is_kept_for_good))
        self.build()
        self.model, self.optimizer = runtime.prepare(self.bare_model, self.bare_optimizer, self.shared_blocks.values())
        self._on_computed: Callable[[], None] | None = None  # what a backward calls before it waits for other ranks
        if self.stopwatch is not None:
            self._time_parts(self.stopwatch)
        self.ema = Ema(self.bare_model, config.optim.ema) if config.optim.ema is not None else None
        # Not where a forward is a collective: a rank that runs out of memory in it would leave the others waiting.
        if self.planned is not None and not runtime.in_lockstep:
            self.split_batch(self.plan.num_samples, self.confirmed_micro_batch())
        self.saver = Saver(
            self.checkpoints,
            runtime,
            runtime.new_host_group(),
            config.checkpoint.async_save,
            runtime.device,
            self.beat,
        )
        every = config.checkpoint.every
        self.save_timer = Timer(60 * every.count) if isinstance(every, Minutes) and runtime.is_main else None
        self.numbers = NumberGuard(
            config.faults,
            runtime.num_ranks,
            runtime.zero(),
            is_scaled=runtime.scaler is not None,
        )
        self.buffers = BufferCopy(self.bare_model)
        self.pace = Pace(runtime.device) if runtime.num_ranks > 1 else None  # one that is alone meets nobody
        self.straggler: Straggler | None = None  # at the last report
        self.window = Window(runtime, self.clock)
        self.observer = Observer(runtime, self.feed, self.stopwatch)
        self.skipped_samples = 0  # that could not be read, on all ranks, at the last report
        if self.lookout is not None:
            rank, num_ranks, folder = runtime.rank, runtime.num_ranks, self.folder.path / "profile"
            self.profiling = Profiling.wanted(
                config.profile, folder, rank, num_ranks, runtime.device, self.clock, self.at, self.total_steps
            )

    def _time_parts(self, stopwatch: Stopwatch) -> None:
        """Has the time that steps take split into parts, also where the loop itself does not come through."""
        self.clock.stopwatch = stopwatch
        self.feed.on_arrival = partial(stopwatch.enter, "forward")
        if self.runtime.is_sharded:
            watch_exchanges(self.model, stopwatch.exchange)
        if self.runtime.num_ranks > 1:
            self._on_computed = partial(stopwatch.enter, "communication")

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
        learning_rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if self.numbers.policy == "skip":
            self.buffers.keep()
        undo = self._undo() if self._asks_within(step) else None
        if self.runtime.num_ranks > 1:
            with self.inside("communication"):
                self.runtime.broadcast(self.buffers.now())
        if self.stopwatch is not None:
            self.stopwatch.begin_step()
        if self.pace is not None:
            self.pace.begin_step()
        normaliser = Normaliser(self.runtime, self.plan, step, partial(self.inside, "communication"))
        loss_sum, num_samples = self.runtime.zero(), 0
        for i, batch in enumerate(self._batches(step)):
            self._micro_batch = i
            if self.flops is not None and self.flops.is_due:  # on every rank: a user's forward may hold a collective
                self.flops.count(batch.data, len(batch.sample_ids))
            with self.runtime.accumulate(self.model, batch.is_last):
                loss, count = self.loss_and_count(batch)
                if self.injector is not None:
                    loss = self.injector.loss(loss, step + 1)
                is_first_exchange = batch.is_last if count is None else i == 0
                if self.pace is not None and is_first_exchange and not self.runtime.in_lockstep:
                    self.pace.meet()
                scale = normaliser.scale(count)
                self.at("backward", batch)
                with explained_model_errors():  # blocks may run again in backward
                    self.runtime.backward(loss * scale, self._on_computed if batch.is_last else None)
            loss_sum += loss.detach()
            num_samples += batch.num_samples
            if undo is not None and self._stops_within(i):
                undo()
                return False
        self.at("optimizer")
        factor, has_no_loss = normaliser.settle(self.optimizer), None
        if factor is not None:
            loss_sum *= factor
            has_no_loss = factor == 0  # nothing in the global batch counts
        is_left_out = self.judge(step, loss_sum, num_samples, has_no_loss)
        self.window.add(loss_sum, num_samples, either(is_left_out, has_no_loss))
        if self.saver.holds_state:  # the last save may still be copying what the next line changes
            with self.clock.phase("checkpoint"):
                self.saver.before_update()
        self.progress.skipped_steps += self.runtime.step(self.optimizer, unless=is_left_out)
        self.runtime.zero_grad(self.optimizer)
        self.progress.step += 1
        if self.ema is not None:
            self.ema.update(self.progress.step)
        if step == self.first_step:  # now the optimizer has the state that there is to save
            self.saver.prepare(self.state())
        check_compiled_buffers(self.compiled_blocks)  # looks after the first step only
        return True

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

    def judge(
        self, step: int, loss_sum: torch.Tensor, num_samples: int, has_no_loss: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Looks at the numbers of a step and clips its gradients. Returns what says whether it is left out, if any."""
        numbers, runtime = self.numbers, self.runtime
        max_norm, max_value = self.config.optim.clip_norm, self.config.optim.clip_value
        num_all = self.plan.step_samples(step)
        is_left_out = None
        if runtime.scaler is not None:  # which skips the step itself, where it then finds that the gradients overflow
            is_left_out = numbers.judge(step, loss_sum, num_samples, num_all, None, has_no_loss)
            if is_left_out is not None:
                runtime.overflow(self.optimizer, is_left_out)
        if max_norm is not None or max_value is not None:
            runtime.unscale_gradients(self.optimizer)
        if max_norm is not None or numbers.wants_gradient_norm:
            self.window.grad_norm = norm = runtime.gradient_norm(self.optimizer)
            if max_norm is not None:
                runtime.clip_norm(self.optimizer, max_norm, norm)
        if max_value is not None:
            runtime.clip_values(self.optimizer, max_value)
        if runtime.scaler is None:
            is_left_out = numbers.judge(step, loss_sum, num_samples, num_all, self.window.grad_norm, has_no_loss)
        if is_left_out is not None:  # the forward has changed BatchNorm's statistics
            self.buffers.put_back(is_left_out)
        return is_left_out

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
        if is_alarmed or (is_final and self._any_alarm()):
            self.recover()
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
            self.runtime.zero_grad(self.optimizer)
            self.buffers.put_back()
            restore_generators(generators, self.runtime.device)

        return undo

    # ---- numbers that go wrong ----------------------------------------------------------------------------

    def _any_alarm(self) -> bool:
        """Waits until the last step is judged, and tells whether any rank must not go on with it."""
        if self.numbers.policy == "skip":
            return False
        self.numbers.settle()
        return any(self.runtime.gather(self.numbers.is_alarmed))

    def recover(self) -> None:
        """Does what `faults.non_finite` says about bad numbers, on all ranks together.

        Raises:
            BadNumbers: the run is not to go on.
        """
        self.decisions.forget()
        self.numbers.settle()
        faults = self.config.faults
        bad = self.note_bad_steps()[0]
        message = bad.message
        if faults.non_finite == "rollback":
            if self.progress.num_rollbacks < faults.max_rollbacks:
                self.roll_back(bad)
                return
            message += f"; faults.max_rollbacks ({faults.max_rollbacks}) are used up"
        elif not self.numbers.wants_gradient_norm and self.config.optim.clip_norm is None:
            message += ", or of the step before: gradients were not looked at"
        self.saver.wait()
        stands = self.saver.saved_step
        stands_text = f"the checkpoint of step {stands} stands" if stands is not None else "there is no checkpoint yet"
        raise BadNumbers(replace(bad, message=f"{message}; {stands_text}"))

    def roll_back(self, bad: Fault) -> None:
        """Goes back to the last checkpoint, and leaves the batch of a step out from then on."""
        assert bad.step is not None
        before = self.progress
        self.at("restoring a checkpoint")
        with self.clock.phase("checkpoint"):
            self.saver.wait()
            checkpoint = self.checkpoints.choose(self.runtime)
            if checkpoint is None:
                raise BadNumbers(replace(bad, message=f"{bad.message}; there is no checkpoint to go back to"))
            self.load(checkpoint)
            self.saver.saved_step = checkpoint.step
            progress = self.progress
            progress.num_rollbacks = before.num_rollbacks + 1
            progress.avoided_steps = sorted({*before.avoided_steps, bad.step - 1})
            progress.wandb_id = before.wandb_id
            self.numbers.forget()
            self.feed.start(self.sampler, progress.step, self.total_steps)
            if self.reporter is not None:
                self.folder.cut_metrics(progress.step, progress.evaluated_step)
        if self.ledger is not None:
            self.ledger.rolled_back(before.step, progress.step, *self.times())
        self.save()  # of the same step, so that only the progress is new: the next attempt avoids that batch, too
        self.measure_from_here()
        logger.warning("going back to step %d, and leaving out the batch of step %d", progress.step, bad.step)

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
        if self._any_alarm():
            self.recover()
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
        del self.model, self.optimizer, self.bare_model, self.bare_optimizer
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

    def _describe_feeds(self) -> list[str]:
        """Returns what is being read at this moment; called on the watch's thread."""
        feeds = [getattr(self, "feed", None), getattr(self, "eval_feed", None)]
        return [line for feed in feeds if feed is not None for line in feed.readings()]
