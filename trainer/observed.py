"""How a run says how it goes: reports while it trains, the summary at its end.

Owns what is asked of which part of the run, and that all ranks ask together. What is measured is `trainer.telemetry`,
what is written and shown is `trainer.reporting`; the loop is `trainer.loop`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Literal

import torch

from trainer.advice.measured import Advice
from trainer.advice.survey import Survey
from trainer.config import Config
from trainer.errors import one_line
from trainer.faults.fault import next_attempt
from trainer.faults.injection import Injector
from trainer.faults.lookout import Lookout
from trainer.faults.pace import Pace, Straggler, find_straggler, waited_share
from trainer.parallel import watch_exchanges
from trainer.profiling.recording import Profiling
from trainer.resumable import Resumable
from trainer.run_folder import RANKS_FILE, RunFolder
from trainer.runtime import Runtime
from trainer.telemetry.clock import Clock
from trainer.telemetry.observer import Observation, Observer, rank_record
from trainer.telemetry.stopwatch import Stopwatch
from trainer.window import Window

logger = logging.getLogger("lockstep")


class Observed(Resumable):
    """A run that is observed: by its reports, and by the other ranks."""

    survey: Survey | None = None  # on rank 0, once it trains
    straggler: Straggler | None = None  # at the last report
    injector: Injector | None = None  # where faults are injected
    skipped_samples = 0  # that could not be read, on all ranks, at the last report

    def __init__(self, clock: Clock, config: Config, runtime: Runtime, folder: RunFolder, to_train: bool) -> None:
        super().__init__(clock, config, runtime, folder, to_train)
        if to_train:
            ledger = self.ledger
            attempt = runtime.from_main(lambda: next_attempt(folder.path, ledger.number if ledger is not None else 1))
            self.lookout = Lookout(
                config.faults,
                runtime,
                folder.path,
                attempt,
                self._describe_feeds,
                lambda fault: self.summarise("failed", str(fault)),
            )
            self.injector = self.lookout.injector

    def build(self) -> None:
        """Builds all that is observed, and what observes it."""
        super().build()
        config, runtime = self.config, self.runtime
        self.pace = Pace(runtime.device) if runtime.num_ranks > 1 else None  # one that is alone meets nobody
        self.observer = Observer(runtime, self.feed, self.stopwatch)
        if self.stopwatch is not None:
            self._time_parts(self.stopwatch)
        if self.to_train:
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

    def _describe_feeds(self) -> list[str]:
        """Returns what is being read at this moment; called on the watch's thread."""
        feeds = [getattr(self, "feed", None), getattr(self, "eval_feed", None)]  # built one after the other
        return [line for feed in feeds if feed is not None for line in feed.readings()]

    def report(self) -> None:
        """Reports the steps since the last report. The only place where training waits for the device."""
        self.at("report")
        window, step = self.window, self.progress.step
        totals = self.runtime.sum(
            {
                "loss": window.loss_sum,
                "count": window.num_counted,
                "timed": torch.tensor(window.num_timed_samples),
                "skipped": torch.tensor(self.num_skipped()),
            }
        )
        self.skipped_samples = int(totals["skipped"])
        if self.numbers.policy == "skip":
            self.count_bad_steps()
        seconds = window.train_seconds(self.clock)
        record = self._training_record(totals, seconds)
        seen = self.runtime.gather(self.observer.observe(self.pace.mean_seconds() if self.pace is not None else 0.0))
        record |= self.observer.figures(seen)
        if self.pace is not None:
            step_seconds = seconds / max(window.num_timed_steps, 1)
            record["train/straggler_wait"] = self._look_for_straggler([r.to_exchange for r in seen], step_seconds)
        if self.ledger is not None:
            self.ledger.saved(self.saver.saved_step)
            self.ledger.update(step, *self.times())
            record["goodput"] = self.ledger.summary().goodput
        if self.reporter is not None:
            self.reporter.publish(step, record)
            self.reporter.advise(step, self._advice(seen))
            if len(seen) > 1:
                self.folder.append(RANKS_FILE, {"step": step, **rank_record(seen)})
        self.window = Window(self.runtime, self.clock)

    def _training_record(self, totals: Mapping[str, float], seconds: float) -> dict[str, float]:
        """Returns how the training itself went since the last report.

        Args:
            totals: of all ranks: `loss` of `count` samples, `timed` samples in that time.
            seconds: in steps.
        """
        rate = totals["timed"] / seconds
        record = {
            "train/loss": totals["loss"] / totals["count"] if totals["count"] else math.nan,
            "train/lr": self.learning_rate(self.progress.step - 1),
            "train/samples_per_second": rate,
            "train/samples_per_second_per_device": rate / self.runtime.num_ranks,
        }
        if self.window.grad_norm is not None:
            record["train/grad_norm"] = float(self.window.grad_norm)
        if self.task.tokens_per_sample is not None:
            record["train/tokens_per_second"] = rate * self.task.tokens_per_sample
        mfu = self.flops.utilisation(rate / self.runtime.num_ranks) if self.flops is not None else None
        if mfu is not None:
            record["train/mfu"] = mfu
        return record

    def _advice(self, seen: Sequence[Observation]) -> list[Advice]:
        """Returns what is new to be said about how this run could be faster. Whatever goes wrong in it ends no run."""
        if self.survey is None:
            return []
        try:
            return self.survey.report(self.progress.step, self.window.num_timed_steps, seen, self.straggler)
        except Exception as error:
            logger.warning("no more advice in this attempt: %s", one_line(error))
            self.survey = None
            return []

    def _last_advice(self) -> list[Advice]:
        try:
            return self.survey.conclude() if self.survey is not None else []
        except Exception as error:
            logger.warning("no advice: %s", one_line(error))
            return []

    def measure_from_here(self) -> None:
        """What came before, such as start-up, counts no more."""
        self.window.restart(self.clock)
        self.observer.restart()

    def _look_for_straggler(self, by_rank: list[float], step_seconds: float) -> float:
        """Names a rank that the others wait for, when it is another than before. Returns the share of a step lost."""
        found = find_straggler(by_rank, step_seconds)
        before = self.straggler.rank if self.straggler is not None else None
        if found is not None and found.rank != before and self.runtime.is_main:
            logger.warning("step %d: %s", self.progress.step, found)
        self.straggler = found
        return waited_share(by_rank, step_seconds)

    def summarise(self, status: Literal["finished", "stopped", "failed"], error: str | None = None) -> None:
        """Writes what the run came to. Waits for no other rank."""
        if self.ledger is not None and self.ledger.has_begun:
            self.ledger.saved(self.saver.saved_step)
            self.ledger.end(status, self.progress.step, *self.times())
        if self.reporter is not None and self.ledger is not None:
            wait = self.feed.data_wait_seconds
            # Other ranks' skips are those of their last report: a failed run must not wait for them.
            skipped = max(self.skipped_samples, self.num_skipped())
            self.reporter.summarise(
                status,
                self.progress,
                self.best_metric,
                self.clock,
                wait,
                skipped,
                self.saver.statistics,
                self.ledger.summary(),
                self._last_advice(),
                {
                    "time_split": self.observer.time_split(to_the_end=status != "failed"),
                    "stopped_by": self.decisions.stopping or None,
                    "stopped_early": self.early_stopping.summary(self.progress),
                    "straggler": asdict(self.straggler) if self.straggler is not None else None,
                    "injected_faults": self.injector.done() if self.injector is not None else [],
                },
                error,
            )

    def num_skipped(self) -> int:
        """Returns how often this rank could not read a sample."""
        return self.feed.num_skipped + (self.eval_feed.num_skipped if self.eval_feed is not None else 0)
