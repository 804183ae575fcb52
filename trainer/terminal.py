"""What a person at a terminal sees of a run: the banner at its start, and a progress bar or lines while it goes on.

On a terminal a bar stands below the lines of the log; where the output goes to a file, reports are lines.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from trainer.config import Config
from trainer.data.sampler import BatchPlan
from trainer.runtime import Runtime
from trainer.units import format_bytes

if TYPE_CHECKING:
    from trainer.data.feed import DeviceFeed
    from trainer.memory.planner import Prediction

logger = logging.getLogger("lockstep")


# ---- the banner ------------------------------------------------------------------------------------------------


def banner(
    config: Config,
    runtime: Runtime,
    plan: BatchPlan,
    total_steps: int,
    first_step: int,
    model: nn.Module,
    feed: DeviceFeed,
    planned: Prediction | None,
) -> list[str]:
    """Returns what will run, in ten lines.

    Args:
        config: the whole run.
        runtime: this process among its peers.
        plan: the batch arithmetic.
        total_steps: where the run ends.
        first_step: where this attempt begins.
        model: the bare model; of one that is sharded, parameters count whole.
        feed: of the training data.
        planned: what the planner chose, where it was asked.
    """
    goes_on = f"goes on from step {first_step}" if first_step else "from the start"
    lines = {
        "run": f"{config.run.name}, {goes_on}",
        "model": _model_line(config, model),
        "task": f"{config.task.name}, {config.optim.name} lr {config.optim.lr:g}, schedule {config.schedule.name}",
        "device": f"{runtime.num_ranks} x {runtime.device.type}{_device_name(runtime)}, {_parallel(config, runtime)}",
        "precision": _precision_line(config),
        "batch": _batch_line(plan, runtime.num_ranks),
        "length": f"{total_steps} steps, {plan.steps_per_epoch} per epoch, {plan.num_samples} samples",
        "memory": _memory_line(config, runtime, planned),
        "feed": f"{feed.mode}, {feed.workers_text}",
        "run folder": str(config.run_dir),
    }
    return [f"{name:<10} {text}" for name, text in lines.items()]


def _model_line(config: Config, model: nn.Module) -> str:
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    text = f"{config.model.name}, {total:,} parameters"
    return text if trained == total else f"{text}, {trained:,} of them trained"


def _device_name(runtime: Runtime) -> str:
    return f" ({torch.cuda.get_device_name(runtime.device)})" if runtime.device.type == "cuda" else ""


def _parallel(config: Config, runtime: Runtime) -> str:
    if runtime.num_ranks == 1:
        return "alone"
    if runtime.is_sharded:
        return f"{config.parallel.strategy}, {runtime.shard_size} share a copy"
    return "ddp"


def _precision_line(config: Config) -> str:
    text = "float32" if config.precision == "no" else config.precision
    if config.model.compile != "none":
        return f"{text}, compiled ({config.model.compile}): the first step takes longer"
    return f"{text}, not compiled"


def _batch_line(plan: BatchPlan, num_ranks: int) -> str:
    text = f"{plan.batch_size} = {num_ranks} processes x {plan.micro_batch_size}"
    return f"{text} x {plan.num_micro_batches} micro-batches" if plan.num_micro_batches > 1 else text


def _memory_line(config: Config, runtime: Runtime, planned: Prediction | None) -> str:
    whole = format_bytes(runtime.device_memory)
    if planned is not None:
        return f"{planned.describe()} of {whole}"
    return f"{whole} per process, checkpointing {config.memory.checkpointing}, not planned"


# ---- while it goes on ------------------------------------------------------------------------------------------


class ProgressDisplay:
    """Reports as a bar on a terminal, else as lines.

    Args:
        total_steps: where the run ends.
        first_step: where this attempt begins.
    """

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total_steps = total_steps
        self._started = time.monotonic()
        self._first_step = first_step
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            bar_format = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(
                total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, bar_format=bar_format
            )

    def show(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Shows a report or an evaluation of a step."""
        is_report = "train/loss" in values
        text = report_text(values, self._seconds_left(step)) if is_report else _evaluation_text(values)
        if self._bar is not None:
            self._bar.n = step
            if is_report:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.refresh()
        if self._bar is None or not is_report:
            logger.info("step %d/%d  epoch %.2f  %s", step, self._total_steps, epoch, text)

    def _seconds_left(self, step: int) -> float | None:
        done = step - self._first_step
        if done <= 0:
            return None
        return (time.monotonic() - self._started) / done * (self._total_steps - step)

    def ends_at(self, step: int) -> None:
        """The run has ended before its last step: that is all of it."""
        self._total_steps = step
        if self._bar is not None:
            self._bar.total = self._bar.n = step
            self._bar.refresh()

    def close(self) -> None:
        """Leaves the bar where it is."""
        if self._bar is not None:
            self._bar.close()


def report_text(values: Mapping[str, float], seconds_left: float | None) -> str:
    """Returns a report in a line: loss, rate, waiting for data, time left. All of it is in the files and trackers."""
    parts = [f"loss {values['train/loss']:.4g}", f"lr {values['train/lr']:.3g}"]
    if "train/grad_norm" in values:
        parts.append(f"grad norm {values['train/grad_norm']:.3g}")
    parts.append(f"{_count(values['train/samples_per_second'])} samples/s")
    if "train/tokens_per_second" in values:
        parts.append(f"{_count(values['train/tokens_per_second'])} tokens/s")
    if "train/mfu" in values:
        parts.append(f"MFU {values['train/mfu']:.0%}")
    if "time/data_wait" in values:
        parts.append(f"data wait {values['time/data_wait']:.0%}")
    if seconds_left is not None:
        parts.append(f"ETA {clock(seconds_left)}")
    return "  ".join(parts)


def _evaluation_text(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """Returns a time such as `0:42`, `12:05`, `3:12:05` or `2d 3:12:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02}:{rest:02}" if hours or days else f"{minutes}:{rest:02}"
    return f"{days}d {text}" if days else text
