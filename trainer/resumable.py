"""Saving and restoring a run: what its state is, when a checkpoint is due, and the way back from one.

Owns what `trainer.checkpoint` is told. How a checkpoint is written and read is there; the loop is `trainer.loop`.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from trainer.agreement import Decisions
from trainer.assembly import Assembly
from trainer.buffers import BufferCopy
from trainer.checkpoint.compatibility import check_resumable
from trainer.checkpoint.folder import open_folder
from trainer.checkpoint.manifest import Manifest, Progress
from trainer.checkpoint.reading import Checkpoint
from trainer.checkpoint.state import Parts, State
from trainer.checkpoint.writing import SaveFailed, Saver
from trainer.config import Config
from trainer.config_values import Interval, Minutes
from trainer.data.feed import MicroBatch
from trainer.ema import Ema
from trainer.errors import UserError
from trainer.faults.fault import Fault
from trainer.faults.judging import WITHIN_A_STEP
from trainer.faults.lookout import Lookout
from trainer.faults.numbers import NumberGuard, bad_step_report
from trainer.faults.stopping import StopRequests
from trainer.ledger import Ledger
from trainer.profiling.recording import Profiling
from trainer.random_state import generator_states, restore_generators
from trainer.reporting import Reporter
from trainer.run_folder import RunFolder
from trainer.runtime import Runtime
from trainer.telemetry.clock import Clock, Timer
from trainer.telemetry.stopwatch import PART_OF_PLACE, Stopwatch
from trainer.window import Window

logger = logging.getLogger("lockstep")


class Resumable(Assembly):
    """A run that can be saved and restored.

    Args:
        clock: of this attempt.
        config: the whole run.
        runtime: this process among its peers.
        folder: where the run leaves its files.
        to_train: whether it will train.
    """

    lookout: Lookout | None = None  # where it trains
    profiling: Profiling | None = None  # where steps are to be traced
    reporter: Reporter | None = None  # on rank 0, once the run has started

    def __init__(self, clock: Clock, config: Config, runtime: Runtime, folder: RunFolder, to_train: bool) -> None:
        super().__init__(config, runtime, folder, to_train)
        self.clock = clock
        self.progress = Progress()
        self.first_step = 0  # of this attempt
        self.stop_requests = StopRequests()
        self.decisions = Decisions(runtime, self.stop_requests)
        self.ledger = Ledger(folder) if to_train and runtime.is_main else None
        self.stopwatch = Stopwatch(runtime.device) if to_train and config.log.time_split else None

    def build(self) -> None:
        """Builds every component, wraps model and optimizer for this world, and opens the checkpoints."""
        config, runtime = self.config, self.runtime
        self.at("building")
        self.checkpoints = runtime.agree(lambda: open_folder(config, self.is_kept_for_good))
        super().build()
        self.model, self.optimizer = runtime.prepare(self.bare_model, self.bare_optimizer, self.shared_blocks.values())
        self.ema = Ema(self.bare_model, config.optim.ema) if config.optim.ema is not None else None
        # Not where a forward is a collective: a rank that runs out of memory in it would leave the others waiting.
        if self.planned is not None and not runtime.in_lockstep:
            self.split_batch(self.plan.num_samples, self.confirmed_micro_batch())
        host_group, in_background = runtime.new_host_group(), config.checkpoint.async_save
        self.saver = Saver(self.checkpoints, runtime, host_group, in_background, runtime.device, self.beat)
        every = config.checkpoint.every
        self.save_timer = Timer(60 * every.count) if isinstance(every, Minutes) and runtime.is_main else None
        is_scaled = runtime.scaler is not None
        self.numbers = NumberGuard(config.faults, runtime.num_ranks, runtime.zero(), is_scaled)
        self.buffers = BufferCopy(self.bare_model)
        self.window = Window(runtime, self.clock)

    # ---- when ---------------------------------------------------------------------------------------------

    def due(self, every: Interval) -> bool:
        """Tells whether something is due after the current step; at the end of training everything is."""
        step = self.progress.step
        return step % every.steps(self.plan.steps_per_epoch) == 0 or step == self.total_steps

    def save_due(self) -> bool:
        """Tells whether a checkpoint is due after the current step, by its number."""
        every = self.config.checkpoint.every
        return self.progress.step == self.total_steps if isinstance(every, Minutes) else self.due(every)

    def is_kept_for_good(self, step: int) -> bool:
        every = self.config.checkpoint.keep_every
        return every is not None and step % every.steps(self.plan.steps_per_epoch) == 0

    # ---- what ---------------------------------------------------------------------------------------------

    def _parts(self) -> Parts:
        generators = generator_states(self.runtime.device)
        return Parts(
            model=self.bare_model,
            optimizer=self.bare_optimizer,
            averages=self.ema.averages if self.ema is not None else None,
            scaler=self.runtime.scaler,
            own={
                **{f"generator.{name}": state for name, state in generators.items()},
                **{f"window.{name}": value for name, value in self.window.totals().items()},
                **{f"guard.{name}": value for name, value in self.numbers.state().items()},
            },
            rank=self.runtime.rank,
            num_ranks=self.runtime.num_ranks,
        )

    def state(self) -> State:
        # Ranks' BatchNorm statistics are their own until the next step, and the planner lets any rank write them.
        self.runtime.broadcast(self.buffers.now())
        return self._parts().collect()

    # ---- there and back -----------------------------------------------------------------------------------

    def save(self) -> None:
        """Saves the current step behind the training; every rank calls it."""
        self.at("saving a checkpoint")
        if self.numbers.policy == "skip":
            self.count_bad_steps()
        if self.ledger is not None:
            self.ledger.saved(self.saver.saved_step)
            self.ledger.update(self.progress.step, *self.times(), saves=True)
        with self.clock.phase("checkpoint"):
            state = self.state()
            manifest = Manifest(
                progress=self.progress,
                config=self.config.model_dump(mode="json"),
                num_samples=self.plan.num_samples,
                num_ranks=self.runtime.num_ranks,
                values={**state.values, **(self.task.teacher.values() if self.task.teacher is not None else {})},
            )
            self.saver.save(state, manifest)

    def has_time_to_save(self) -> bool:
        """Tells whether a save fits into what is left of `faults.grace`, on the rank that has the least left."""
        left = self.config.faults.grace.seconds - self.stop_requests.seconds_ago()
        is_needed = self.saver.saved_step is None
        fits = is_needed or self.saver.saved_step == self.progress.step or self._longest_save() <= left
        if all(self.runtime.gather(fits)):  # asked by all: a save that just ends may be known to some ranks only
            return True
        logger.warning(
            "no checkpoint of step %d, that of step %d stands: saves take up to %.1f s, and faults.grace leaves %.1f s",
            self.progress.step,
            self.saver.saved_step,
            self._longest_save(),
            max(left, 0.0),
        )
        return False

    def _longest_save(self) -> float:
        return self.saver.statistics.longest_seconds

    def wait_for_the_last_save(self, must_be_there: bool) -> None:
        with self.clock.phase("checkpoint"):
            self.saver.wait()
        if self.saver.saved_step != self.progress.step:
            self.save()  # once more: what failed may have passed
            with self.clock.phase("checkpoint"):
                self.saver.wait()
        if self.saver.saved_step is None or (must_be_there and self.saver.saved_step != self.progress.step):
            why = "; ".join(self.saver.failures[-1:])
            raise SaveFailed(f"the last step, {self.progress.step}, could not be saved: {why}")

    def restore(self) -> None:
        """Continues from the newest checkpoint that is good, if the run has one.

        Raises:
            UserError: no checkpoint is good, it is of another run or model, or may not be resumed.
        """
        self.at("restoring a checkpoint")
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
            teacher, allowed = self.task.teacher, self.config.checkpoint.allow_changes
            if teacher is not None:
                self.runtime.agree(lambda: teacher.check_same(manifest.values, allowed))
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
        optim = self.config.optim
        set_here = {"lr", "lr_scale", "weight_decay", "fused", "foreach", *optim.args}
        set_here.update(optim.rest.args if optim.rest is not None else ())
        own = self.runtime.agree(lambda: self._parts().restore(checkpoint, set_here))
        num_ranks = checkpoint.manifest.num_ranks
        if num_ranks == self.runtime.num_ranks:
            restore_generators(_under("generator.", own), self.runtime.device)
        else:
            logger.info("written by %d processes, read by %d", num_ranks, self.runtime.num_ranks)
        self.window.load(**_under("window.", own))
        self.numbers.load(_under("guard.", own))
        progress = checkpoint.manifest.progress
        if progress.best_of != self.best_of:  # values of another metric do not compare
            progress.best_step = progress.best_value = None
        self.progress = progress

    # ---- steps whose numbers are wrong ----------------------------------------------------------------------

    def count_bad_steps(self) -> None:
        """Counts the steps that were left out. All ranks know the same ones once the device has done its work."""
        self.numbers.settle()
        if self.numbers.found:
            self.progress.bad_steps += len(self.note_bad_steps())

    def note_bad_steps(self) -> list[Fault]:
        """Writes down which steps are known to be bad, and with which samples; returns them, oldest first."""
        mine = [(bad, self.sampler.samples(bad.step)) for bad in self.numbers.found]
        found = self.runtime.gather((mine, socket.gethostname(), os.getpid()))
        by_rank = [seen for seen, _, _ in found]
        self.numbers.found.clear()
        faults = []
        for step in sorted({bad.step for seen in by_rank for bad, _ in seen}):
            seen_by = [next((entry for entry in seen if entry[0].step == step), None) for seen in by_rank]
            fault, record = bad_step_report(seen_by)
            _, host, pid = found[fault.rank]
            fault = replace(fault, host=host, pid=pid)
            faults.append(fault)
            if self.reporter is not None:
                self.reporter.bad_step(fault, record)
        return faults

    # ---- where this rank is ---------------------------------------------------------------------------------

    def at(self, place: str, batch: MicroBatch | None = None) -> None:
        """Says where this rank is."""
        if self.stopwatch is not None and place in PART_OF_PLACE:
            self.stopwatch.enter(PART_OF_PLACE[place])
        if self.lookout is not None:
            step = self.progress.step + (place in WITHIN_A_STEP)
            self.lookout.at(place, step, batch, is_first=self.progress.step == self.first_step)
        if self.profiling is not None:
            self.profiling.at(place)

    def inside(self, part: str) -> AbstractContextManager[None]:
        """Time in the body is spent on `part` of a step."""
        return self.stopwatch.inside(part) if self.stopwatch is not None else nullcontext()

    def beat(self) -> None:
        if self.lookout is not None:
            self.lookout.watch.beat()

    def times(self) -> tuple[dict[str, float], float, int]:
        """Returns what the ledger wants to know of this attempt."""
        # fp16's scaler leaves bad steps out, and counts them among those that it skips.
        left_out = self.progress.skipped_steps
        if self.runtime.scaler is None:
            left_out += self.progress.bad_steps
        return self.clock.split(), self.feed.data_wait_seconds, left_out


def _under(prefix: str, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns what has names that begin so, without that."""
    return {name.removeprefix(prefix): value for name, value in own.items() if name.startswith(prefix)}
