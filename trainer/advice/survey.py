"""Fills in what the rules look at, from the parts of a run, at each report of rank 0; and asks the rules.

Owns which figures go where, and what of an attempt counts: not its first steps. Windows are added up in
`trainer.advice.stretches`. What is tried (`trainer.advice.trials`) is tried in a report, where the device has nothing
to do, and never in the conclusion: that may come from a thread beside a run that hangs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import torch
from torch import nn

from trainer.advice.adviser import LEAST_SECONDS, LEAST_STEPS, Adviser, advice
from trainer.advice.measured import Advice, Batch, Exchange, Host, Loading, Measured, Memory, Pauses, Unit
from trainer.advice.pauses import SAVES
from trainer.advice.stretches import Since, Stragglers, Stretch, WorkerMemory
from trainer.advice.trials import OperationTimes, copied_per_second
from trainer.config import Config
from trainer.config_values import Minutes
from trainer.data.build import is_packable
from trainer.data.feed import DeviceFeed
from trainer.data.modes import choose_route, why_host_only
from trainer.data.resident import estimate_bytes
from trainer.data.transforms import build_transforms
from trainer.errors import UserError
from trainer.faults.pace import Straggler
from trainer.memory.blocks import repeated_blocks
from trainer.resumable import Resumable
from trainer.runtime import Runtime
from trainer.telemetry.memory import memory_use
from trainer.telemetry.observer import Observation
from trainer.update import leaves_out_on_device

if TYPE_CHECKING:
    from trainer.memory.planner import Prediction

_WARM_UP_STEPS = 5  # which compile, allocate and fill queues; a window that they are in does not count
_IDLE = 0.8  # of the steps, at whose begin a GPU has nothing left to do: the host is the slower one
_ENOUGH = 0.5  # of the steps, which nothing that waits for the GPU comes just before


class Survey:
    """Looks at a run on rank 0, from its first step on.

    Args:
        run: built and restored.
    """

    def __init__(self, run: Resumable) -> None:
        config, runtime, model, feed = run.config, run.runtime, run.bare_model, run.feed
        self._config = config
        self._runtime = runtime
        self._plan = run.plan
        self._is_planned = run.task.stacks and config.task.teacher is None  # what `plan_job` refuses
        self._total_steps = run.total_steps
        self._feed = feed
        self._saver = run.saver
        self._flops = run.flops
        self._adviser = Adviser()
        self._is_cuda = runtime.device.type == "cuda"
        self._all = Stretch()
        self._recent = Stretch()  # since the rules were last asked
        self._stragglers = Stragglers()
        self._workers = WorkerMemory()
        self._knows_idle = self._is_known_when_idle(run)
        self._seen: Sequence[Observation] = ()  # at the last report that counts
        self._num_threads = 1 if self._is_cuda else torch.get_num_threads()
        self._operation_times = None if self._is_cuda else OperationTimes()
        self._memory_before = memory_use(runtime.device).allocated
        self._num_blocks, self._recomputed = _recomputation(config, model, run.planned)
        self._has_batchnorm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        self._parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        trained = [p for p in model.parameters() if p.requires_grad]
        self._gradient_bytes = sum(p.numel() * p.element_size() for p in trained)
        self._cheaper_ways, self._resident_bytes = cheaper_ways(config, feed, runtime)
        self._copied_per_second: float | None = None  # once it matters
        self._num_windows = 0
        self._since = Since(feed, run.saver)

    def report(
        self,
        step: int,
        num_steps: int,
        seen: Sequence[Observation],
        straggler: Straggler | None,
    ) -> list[Advice]:
        """Looks at the steps since the last report, and returns advice that is new.

        Args:
            step: the last of them.
            num_steps: how many they are.
            seen: what every rank saw.
            straggler: the rank that the others waited for, if there was one.
        """
        self._num_windows += 1
        window = self._since.take(step, num_steps, seen)
        self._workers.add(seen[0].num_workers, seen[0].worker_bytes)
        if num_steps == 0 or seen[0].seconds is None:
            return []
        if self._num_windows == 1 or (self._all.num_steps == 0 and step - num_steps < _WARM_UP_STEPS):
            return []
        window.num_evaluated = self._evaluations_in(window)
        window.num_idle = (seen[0].idle_share or 0.0) * num_steps
        window.num_after_pauses = 1 + window.num_evaluated + window.num_saved
        self._all.add(window)
        self._recent.add(window)
        self._stragglers.add(straggler, num_steps)
        self._seen = seen
        self._try(window)
        if self._recent.num_steps < LEAST_STEPS or math.fsum(self._recent.seconds.values()) < LEAST_SECONDS:
            return []
        recent, self._recent = self._recent, Stretch()
        return self._adviser.ask(self._measured(recent, seen, straggler))

    def conclude(self) -> list[Advice]:
        """Returns advice for the next run, from this attempt without its first steps, the most useful first."""
        return advice(self._measured(self._all, self._seen, self._stragglers.worst())) if self._all.num_steps else []

    def _try(self, window: Stretch) -> None:
        """Tries how fast this machine is at what the rules have to know."""
        if self._operation_times is not None:
            self._operation_times.try_again()
        is_long = window.seconds["checkpoint"] > SAVES * math.fsum(window.seconds.values())
        if is_long and self._copied_per_second is None and not self._config.checkpoint.async_save:
            self._copied_per_second = copied_per_second(self._runtime.device)

    def _is_known_when_idle(self, run: Resumable) -> bool:
        """Tells whether a GPU without work tells of a slow host: not where the host waits for it in each step."""
        is_left_out_there = not self._runtime.is_sharded and leaves_out_on_device(run.bare_optimizer)
        waits = self._config.faults.non_finite == "skip" and not is_left_out_there
        return self._is_cuda and self._runtime.scaler is None and not waits

    # ---- the figures ------------------------------------------------------------------------------------------

    def _measured(self, stretch: Stretch, seen: Sequence[Observation], straggler: Straggler | None) -> Measured:
        seconds = max(math.fsum(stretch.seconds.values()), 1e-9)
        return Measured(
            seconds=seconds,
            num_steps=stretch.num_steps,
            shares={part: value / seconds for part, value in stretch.seconds.items()},
            steps_per_epoch=self._plan.steps_per_epoch,
            total_steps=self._total_steps,
            device=self._runtime.device.type,
            compiles=self._config.model.compile != "none",
            loading=self._loading(stretch),
            batch=Batch(
                self._plan.batch_size,
                self._plan.micro_batch_size,
                self._plan.num_micro_batches,
                self._plan.micro_batch_sizes,
                self._has_batchnorm,
            ),
            host=self._host(stretch),
            memory=self._memory(seen),
            exchange=self._exchange(stretch, seen, straggler),
            pauses=self._pauses(stretch, seconds),
        )

    def _loading(self, stretch: Stretch) -> Loading:
        feed, count = self._feed, max(stretch.num_loaded, 1)
        return Loading(
            feed.mode,
            feed.num_workers,
            stretch.load_seconds / count,
            stretch.load_cpu_seconds / count,
            self._config.data.prefetch_factor,
            self._cheaper_ways,
            feed.batch_bytes(),
            self._resident_bytes,
            self._workers.latest,
            tuple(self._workers.series),
        )

    def _host(self, stretch: Stretch) -> Host:
        return Host(
            self._runtime.num_cores,
            self._num_threads,
            self._operation_times.seconds if self._operation_times is not None else 0.0,
            (self._flops.num_operations if self._flops is not None else None) or 0,
            self._knows_idle and is_behind(stretch.num_steps, stretch.num_idle, stretch.num_after_pauses),
            psutil.virtual_memory().available // self._runtime.num_local_ranks,
        )

    def _memory(self, seen: Sequence[Observation]) -> Memory:
        # On a GPU what is allocated between two steps; on a CPU the process as it was before the first one.
        fixed = max(rank.memory.allocated for rank in seen) if self._is_cuda else self._memory_before
        return Memory(
            max(rank.memory.peak for rank in seen),
            fixed,
            self._config.memory.target.of(self._runtime.device_memory),
            self._config.memory.checkpointing,
            self._recomputed,
            self._num_blocks,
            self._is_planned,
        )

    def _exchange(self, stretch: Stretch, seen: Sequence[Observation], straggler: Straggler | None) -> Exchange:
        parallel, hosts = self._config.parallel, [rank.host for rank in seen]
        totals = [max(math.fsum(rank.values()), 1e-9) for rank in stretch.by_rank]
        waits = [rank["data_wait"] / total for rank, total in zip(stretch.by_rank, totals, strict=True)]
        exchanged = [rank["communication"] / total for rank, total in zip(stretch.by_rank, totals, strict=True)]
        size = 2 if parallel.gradient_compression != "none" else 4
        return Exchange(
            self._runtime.num_ranks,
            len(set(hosts)),
            parallel.strategy if self._runtime.is_sharded else "ddp",
            min(exchanged) if len(seen) > 1 else 0.0,
            self._gradient_bytes * size // 4,
            parallel.gradient_compression,
            parallel.bucket_mb,
            parallel.reshard_after_forward,
            self._parameter_bytes,
            straggler,
            tuple(hosts),
            tuple(waits),
        )

    def _pauses(self, stretch: Stretch, seconds: float) -> Pauses:
        save, evaluate, saver = self._config.checkpoint.every, self._config.eval.every, self._saver
        if isinstance(save, Minutes):
            unit: Unit = "minutes"
            due = math.floor(seconds / 60 / save.count)
        else:
            unit, due = save.unit, stretch.times_due(save.steps(self._plan.steps_per_epoch))
        statistics, is_async = saver.statistics, self._config.checkpoint.async_save
        num_written = max(statistics.num_saved + statistics.num_failed, 1)
        copy_bytes = statistics.num_bytes // self._runtime.num_ranks
        return Pauses(
            save.count,
            unit,
            is_async,
            is_async and not saver.behind,
            max(stretch.num_saved, due),
            due,
            statistics.write_seconds / num_written,
            copy_bytes,
            copy_bytes / self._copied_per_second if self._copied_per_second is not None else None,
            evaluate.count,
            evaluate.unit,
            self._evaluations_in(stretch),
        )

    def _evaluations_in(self, stretch: Stretch) -> int:
        if not self._config.data.evaluates:
            return 0
        return stretch.times_due(self._config.eval.every.steps(self._plan.steps_per_epoch))


def is_behind(num_steps: int, num_idle: float, num_after_pauses: int) -> bool:
    """Tells whether a GPU waits for the host: it has nothing left to do when steps begin, and not because of a pause.

    Args:
        num_steps: steps that were looked at.
        num_idle: of these, at whose begin the GPU had nothing left to do.
        num_after_pauses: steps that come after something that waits for the GPU, and so find it idle.
    """
    others = num_steps - num_after_pauses
    return others >= _ENOUGH * num_steps > 0 and num_idle - num_after_pauses > _IDLE * others


def _recomputation(config: Config, model: nn.Module, planned: Prediction | None) -> tuple[int, float | None]:
    """Returns how many repeated blocks there are, and which share of them is recomputed, as far as it is whole ones."""
    try:
        names = list(repeated_blocks(model, config.memory.blocks))
    except UserError:  # a pattern that the run does not use
        names = []
    setting = config.memory.checkpointing
    if setting == "auto":
        policies = list(planned.policies.values()) if planned is not None else []
        if any(policy not in ("none", "full") for policy in policies):
            return len(names), None
        return len(names), sum(policy == "full" for policy in policies) / max(len(policies), 1)
    if setting == "every_2":
        return len(names), math.ceil(len(names) / 2) / max(len(names), 1)
    return len(names), {"none": 0.0, "full": 1.0}.get(setting)


def cheaper_ways(config: Config, feed: DeviceFeed, runtime: Runtime) -> tuple[tuple[str, ...], int]:
    """Returns which other ways of `data.feed`, or a cache, this data has on this device.

    Whether it fits there beside the model is not judged: the bytes that it takes of it are returned as well.
    """
    if feed.mode not in ("host", "device_decode"):
        return (), 0
    found, resident_bytes = [], 0
    if runtime.device.type == "cuda":
        transforms = build_transforms(config.data.transforms.train, "data.transforms.train")
        for mode in ("resident", "device_decode"):
            with suppress(UserError):
                if mode != feed.mode:
                    asked = config.data.model_copy(update={"feed": mode})
                    memory, ranks, reason = runtime.device_memory, runtime.num_ranks, why_host_only(feed.task)
                    data, device = feed.dataset, runtime.device
                    route = choose_route(data, asked, "train", transforms, device, ranks, memory, reason)
                    if mode == "resident":
                        resident_bytes = estimate_bytes(route.dataset) // (ranks if route.is_sharded else 1)
                    found.append(mode)
    if config.data.cache is None and is_packable(feed.dataset):
        found.append("cache")
    return tuple(found), resident_bytes
