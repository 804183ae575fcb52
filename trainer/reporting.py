"""What a run shows and writes while it runs: reports, trackers, `summary.json`, `report.html`.

Exists on rank 0 only. What a terminal shows is `trainer.terminal`; what is measured and when a report is due is the
loop's business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

from trainer.advice.measured import Advice
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Progress
from trainer.checkpoint.writing import SaveStatistics
from trainer.config import Config
from trainer.data.feed import DeviceFeed
from trainer.data.sampler import BatchPlan
from trainer.eval_media import EvalMedia, write_media
from trainer.faults.fault import Fault
from trainer.goodput import Goodput
from trainer.report import write_page
from trainer.run_folder import RunFolder
from trainer.runtime import Runtime
from trainer.telemetry.clock import Clock
from trainer.telemetry.efficiency import FlopCounter
from trainer.telemetry.memory import peak_memory_bytes
from trainer.terminal import ProgressDisplay, banner
from trainer.tracking import Trackers

if TYPE_CHECKING:
    from trainer.memory.planner import Prediction

logger = logging.getLogger("lockstep")


class Reporter:
    """The voice of one attempt at a run, from the step it starts at.

    Args:
        config: the whole run.
        runtime: for the world and the device.
        folder: where files go.
        plan: the batch arithmetic.
        total_steps: where the run ends.
        progress: where this attempt starts; its W&B id is filled in.
        model: the bare model, for its size.
        best: the metric that decides the best checkpoint, if any, and whether that is the largest or the smallest.
        feed: of the training data.
        planned: what the planner chose, where it was asked.
        flops: of a sample, and of the device.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        folder: RunFolder,
        plan: BatchPlan,
        total_steps: int,
        progress: Progress,
        model: nn.Module,
        best: tuple[str | None, str],
        feed: DeviceFeed,
        planned: Prediction | None,
        flops: FlopCounter,
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.folder = folder
        self.plan = plan
        self.flops = flops
        self.total_steps = total_steps
        self.first_step = progress.step
        folder.describe(runtime.num_ranks, runtime.device)
        records = folder.cut_metrics(progress.step, progress.evaluated_step)
        best_metric, best_mode = best
        goals = {"train/loss": "min", "eval/loss": "min"}
        if best_metric is not None:
            goals[f"eval/{best_metric}"] = best_mode
        self.trackers = Trackers(config, folder.path, progress.step, progress.wandb_id, records, goals)
        progress.wandb_id = self.trackers.wandb_id
        for line in banner(config, runtime, plan, total_steps, progress.step, model, feed, planned):
            logger.info("%s", line)
        self.display = ProgressDisplay(total_steps, progress.step)

    def publish(self, step: int, values: Mapping[str, float]) -> None:
        """Sends values of a step to metrics.jsonl, the trackers and the terminal."""
        position = {"epoch": round(step / self.plan.steps_per_epoch, 6), "samples": self.plan.samples_before(step)}
        self.folder.log({"step": step, **position, **values})
        self.trackers.log({**position, **values}, step)
        self.display.show(step, position["epoch"], values)

    def show(self, step: int, media: EvalMedia, best_step: int | None) -> None:
        """Writes the samples and tables of an evaluation to the run folder, and sends them to the trackers."""
        write_media(self.folder.path, step, media, best_step)
        self.trackers.show(media, step)

    def end_step(self, step: int) -> None:
        """Tells the trackers that nothing more comes of a step."""
        self.trackers.end_step(step)

    def checkpoint_saved(self, checkpoints: CheckpointFolder, progress: Progress) -> None:
        """Tells the trackers of a checkpoint that is there now; called on the thread that wrote it."""
        self.trackers.checkpoint(checkpoints, progress)

    def summarise(
        self,
        status: str,
        progress: Progress,
        best_metric: str | None,
        clock: Clock,
        data_wait_seconds: float,
        skipped_samples: int,
        saves: SaveStatistics,
        goodput: Goodput,
        advice: Sequence[Advice],
        events: Mapping[str, Any],
        error: str | None = None,
    ) -> None:
        """Writes summary.json and the page: the run so far with its goodput, this attempt's time and throughput.

        Args:
            advice: what to change for the next run, the most useful first.
            events: what else happened, by the keys that it gets there.
        """
        split = clock.split()
        samples = self.plan.samples_before(progress.step)
        rate = (samples - self.plan.samples_before(self.first_step)) / split["train"]
        rate_per_device = rate / self.runtime.num_ranks
        best = {"step": progress.best_step, "metric": best_metric, "value": progress.best_value}
        self.folder.summarise(
            {
                "status": status,
                "error": error,
                "step": progress.step,
                "total_steps": self.total_steps,
                "epoch": progress.step / self.plan.steps_per_epoch,
                "samples": samples,
                "metrics": {f"eval/{k}": v for k, v in progress.eval_metrics.items()},
                "best": best if progress.best_step is not None else None,
                "skipped_steps": progress.skipped_steps,
                "skipped_samples": skipped_samples,
                "samples_per_second": rate,
                "samples_per_second_per_device": rate_per_device,
                "flops_per_sample": self.flops.per_sample,
                "mfu": self.flops.utilisation(rate_per_device),
                "bad_steps": progress.bad_steps,
                "num_rollbacks": progress.num_rollbacks,
                "avoided_steps": [step + 1 for step in progress.avoided_steps],
                "goodput": goodput.goodput,
                "goodput_seconds": goodput.seconds,
                "num_attempts": goodput.num_attempts,
                "peak_memory_bytes": peak_memory_bytes(self.runtime.device),
                "seconds": {**split, "data_wait": data_wait_seconds},
                "checkpoints": asdict(saves),
                "num_processes": self.runtime.num_ranks,
                "micro_batch_size": self.plan.micro_batch_size,
                "advice": [said.record() for said in advice],
                **events,
            }
        )
        write_page(self.folder.path, self.folder.curves)
        told: dict[str, Any] = {"goodput": goodput.goodput, "advice": _as_text(advice), "status": status}
        if progress.best_step is not None:
            told |= {f"best/eval/{best_metric}": progress.best_value, "best/step": progress.best_step}
        if events.get("stopped_early"):
            told["stopped_early"] = events["stopped_early"]["reason"]
            self.display.ends_at(progress.step)
        self.trackers.summarise(told, progress.step)
        logger.info("%s", goodput.line())
        for said in advice:
            logger.info("advice: %s", said.text)

    def advise(self, step: int, advice: Sequence[Advice]) -> None:
        """Tells of advice as soon as it is known."""
        for said in advice:
            logger.info("step %d: advice: %s", step, said.text)
        if advice:
            self.trackers.summarise({"advice": _as_text(advice)}, step)

    def bad_step(self, fault: Fault, record: Mapping[str, Any]) -> None:
        """Tells of a step whose numbers are wrong, and keeps which samples it had in `faults/bad-steps.jsonl`."""
        logger.warning("step %s: %s", fault.step, fault.message)
        self.folder.append("faults/bad-steps.jsonl", record)

    def close(
        self,
        failed: bool = False,
        open_step: int | None = None,
        seconds: float | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Closes the progress bar and the trackers.

        Args:
            failed: the run ended with an error.
            open_step: a step that is still to be evaluated, which the next attempt does.
            seconds: for trackers to wait for their servers; None for as long as is configured.
            beat: called while they wait.
        """
        self.display.close()
        self.trackers.finish(failed, open_step, seconds, beat)


def _as_text(advice: Sequence[Advice]) -> str:
    return "\n".join(said.text for said in advice) or "none"
