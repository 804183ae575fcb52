"""Fills in what the rules look at, from the parts of a run, at each report of rank 0; and asks the rules.

Owns which figures go where, and what of an attempt counts: not its first steps. What is tried is tried in a report,
where the device has nothing to do, and never in the conclusion: that may come from a thread beside a run that hangs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import nn

from trainer.advice.adviser import LEAST_SECONDS, LEAST_STEPS, Adviser, advice
from trainer.advice.measured import Advice, Batch, Exchange, Host, Loading, Measured, Memory, Pauses, Unit
from trainer.advice.pauses import SAVES
from trainer.checkpoint.writing import Saver
from trainer.config import Config
from trainer.config_values import Minutes
from trainer.data.build import is_packable
from trainer.data.feed import DeviceFeed
from trainer.data.loader import preserved_generators
from trainer.data.modes import choose_route, why_host_only
from trainer.data.resident import estimate_bytes
from trainer.data.transforms import build_transforms
from trainer.errors import UserError
from trainer.faults.pace import LEAST_SHARE, Straggler
from trainer.memory.blocks import repeated_blocks
from trainer.resumable import Resumable
from trainer.runtime import Runtime, leaves_out_on_device
from trainer.telemetry.efficiency import OperationCounter
from trainer.telemetry.memory import memory_use
from trainer.telemetry.observer import Observation
from trainer.telemetry.stopwatch import PARTS

if TYPE_CHECKING:
    from trainer.memory.planner import Prediction

_WARM_UP_STEPS = 5  # which compile, allocate and fill queues; a window that they are in does not count
WORKERS_SETTLE_SECONDS = 60.0  # after their start, in which they read all that they go on to use
_IDLE = 0.8  # of the steps, at whose begin a GPU has nothing left to do: the host is the slower one
_ENOUGH = 0.5  # of the steps, which nothing that waits for the GPU comes just before
_COPIED_BYTES = 256 * 2**20  # more than caches hold
_COPIED_PIECE = 32 * 2**20
_ROOM = 4  # times what a trial takes must be free
_TRIED_LAYERS = 8
_TRIALS = 3


@dataclass
class _Stretch:
    """What happened in some windows, added up."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))  # by part, mean over ranks
    by_rank: list[dict[str, float]] = field(default_factory=list)
    num_steps: int = 0
    first_step: int = 0
    last_step: int = 0
    load_seconds: float = 0.0
    load_cpu_seconds: float = 0.0
    num_loaded: int = 0
    num_saved: int = 0
    write_seconds: float = 0.0
    num_evaluated: int = 0
    num_idle: float = 0.0  # steps at whose begin the GPU had nothing left to do
    num_after_pauses: int = 0  # steps that reports, evaluations and saves, which wait for the GPU, come just before

    def add(self, other: _Stretch) -> None:
        """Adds the window that follows."""
        if not self.num_steps:
            self.first_step = other.first_step
        self.last_step = other.last_step
        for part in PARTS:
            self.seconds[part] += other.seconds[part]
        if not self.by_rank:
            self.by_rank = [dict.fromkeys(PARTS, 0.0) for _ in other.by_rank]
        for mine, theirs in zip(self.by_rank, other.by_rank, strict=True):
            for part in PARTS:
                mine[part] += theirs[part]
        for name in (
            "num_steps",
            "load_seconds",
            "load_cpu_seconds",
            "num_loaded",
            "num_saved",
            "write_seconds",
            "num_evaluated",
            "num_idle",
            "num_after_pauses",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))


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
        self._all = _Stretch()
        self._recent = _Stretch()  # since the rules were last asked
        self._stragglers = _Stragglers()
        self._workers = _WorkerMemory()
        self._knows_idle = self._is_known_when_idle(run)
        self._seen: Sequence[Observation] = ()  # at the last report that counts
        self._num_threads = 1 if self._is_cuda else torch.get_num_threads()
        self._operation_times = None if self._is_cuda else _OperationTimes()
        self._memory_before = memory_use(runtime.device).allocated
        self._num_blocks, self._recomputed = _recomputation(config, model, run.planned)
        self._has_batchnorm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        self._parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        trained = [p for p in model.parameters() if p.requires_grad]
        self._gradient_bytes = sum(p.numel() * p.element_size() for p in trained)
        self._cheaper_ways, self._resident_bytes = cheaper_ways(config, feed, runtime)
        self._copied_per_second: float | None = None  # once it matters
        self._num_windows = 0
        self._since = _Since(feed, run.saver)

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
        recent, self._recent = self._recent, _Stretch()
        return self._adviser.ask(self._measured(recent, seen, straggler))

    def conclude(self) -> list[Advice]:
        """Returns advice for the next run, from this attempt without its first steps, the most useful first."""
        return advice(self._measured(self._all, self._seen, self._stragglers.worst())) if self._all.num_steps else []

    def _try(self, window: _Stretch) -> None:
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

    def _measured(self, stretch: _Stretch, seen: Sequence[Observation], straggler: Straggler | None) -> Measured:
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

    def _loading(self, stretch: _Stretch) -> Loading:
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

    def _host(self, stretch: _Stretch) -> Host:
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

    def _exchange(self, stretch: _Stretch, seen: Sequence[Observation], straggler: Straggler | None) -> Exchange:
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

    def _pauses(self, stretch: _Stretch, seconds: float) -> Pauses:
        save, evaluate, saver = self._config.checkpoint.every, self._config.eval.every, self._saver
        if isinstance(save, Minutes):
            unit: Unit = "minutes"
            due = math.floor(seconds / 60 / save.count)
        else:
            unit, due = save.unit, _due(save.steps(self._plan.steps_per_epoch), stretch)
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

    def _evaluations_in(self, stretch: _Stretch) -> int:
        if not self._config.data.evaluates:
            return 0
        return _due(self._config.eval.every.steps(self._plan.steps_per_epoch), stretch)


class _Since:
    """Running figures, and what was new in a window."""

    def __init__(self, feed: DeviceFeed, saver: Saver) -> None:
        self._feed = feed
        self._saver = saver
        self._before = self._now()

    def _now(self) -> tuple[float, ...]:
        feed, saves = self._feed, self._saver.statistics
        return feed.load_seconds, feed.load_cpu_seconds, feed.num_loaded, saves.num_saved, saves.write_seconds

    def take(self, step: int, num_steps: int, seen: Sequence[Observation]) -> _Stretch:
        now = self._now()
        load, cpu, num_loaded, num_saved, write = (b - a for a, b in zip(self._before, now, strict=True))
        self._before = now
        by_rank = [dict(rank.seconds or {}) for rank in seen]
        mean = {part: math.fsum(rank.get(part, 0.0) for rank in by_rank) / len(by_rank) for part in PARTS}
        return _Stretch(
            mean,
            by_rank,
            num_steps,
            step - num_steps,
            step,
            load,
            cpu,
            int(num_loaded),
            int(num_saved),
            write,
        )


class _Stragglers:
    """Adds up what each slow rank has cost."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._by_rank: dict[int, list[float]] = {}  # steps, and times them: share, seconds, seconds of the others

    def add(self, found: Straggler | None, num_steps: int) -> None:
        """Adds the steps of a window, and who was slow in it."""
        self._num_steps += num_steps
        if found is not None:
            sums = self._by_rank.setdefault(found.rank, [0.0] * 4)
            for i, figure in enumerate((1.0, found.share, found.seconds, found.others)):
                sums[i] += figure * num_steps

    def worst(self) -> Straggler | None:
        """Returns the rank that has cost most, with its share of all steps, if that is as much as matters."""
        if not self._by_rank or not self._num_steps:
            return None
        rank, (steps, lost, seconds, others) = max(self._by_rank.items(), key=lambda item: item[1][1])
        share = lost / self._num_steps
        return Straggler(rank, seconds / steps, others / steps, share) if share > LEAST_SHARE else None


class _WorkerMemory:
    """The memory of a worker over time, while there are as many, and once they have settled."""

    def __init__(self) -> None:
        self.series: list[tuple[float, int]] = []
        self.latest = 0
        self._num_workers = 0
        self._since = time.monotonic()

    def add(self, num_workers: int, worker_bytes: int | None) -> None:
        """Adds what one of so many workers takes now, where that was measured."""
        now = time.monotonic()
        if num_workers != self._num_workers:
            self._num_workers, self._since = num_workers, now
            self.series.clear()
        self.latest = worker_bytes or self.latest
        if worker_bytes is not None and now - self._since >= WORKERS_SETTLE_SECONDS:
            self.series.append((now, worker_bytes))


def is_behind(num_steps: int, num_idle: float, num_after_pauses: int) -> bool:
    """Tells whether a GPU waits for the host: it has nothing left to do when steps begin, and not because of a pause.

    Args:
        num_steps: steps that were looked at.
        num_idle: of these, at whose begin the GPU had nothing left to do.
        num_after_pauses: steps that come after something that waits for the GPU, and so find it idle.
    """
    others = num_steps - num_after_pauses
    return others >= _ENOUGH * num_steps > 0 and num_idle - num_after_pauses > _IDLE * others


def _due(every: int, stretch: _Stretch) -> int:
    """Returns how often something was due in a stretch: it comes after the report of its step."""
    return (stretch.last_step - 1) // every - (stretch.first_step - 1) // every


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


class _OperationTimes:
    """What one operation takes on a CPU that has next to nothing to compute, in forward and backward."""

    def __init__(self) -> None:
        with preserved_generators():
            parts = (part for _ in range(_TRIED_LAYERS) for part in (nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()))
            self._model = nn.Sequential(*parts)
            with OperationCounter() as counter:
                self._pass()
        self._num_operations = counter.num_operations
        self._times: list[float] = []
        self._before = _run_and_waited()
        self.seconds = 0.0
        """Of an operation, from the trials so far."""

    def try_again(self) -> None:
        """Makes another trial where there were few.

        A trial is over too soon to see what else the machine does. So its time on the core counts, and what this thread
        has waited for a core since the beginning is added in proportion.
        """
        if len(self._times) < _TRIALS:
            self._pass()  # a step, too, finds its code in the caches
            started = time.thread_time()
            self._pass()
            self._times.append((time.thread_time() - started) / self._num_operations)
        run, waited = (now - before for now, before in zip(_run_and_waited(), self._before, strict=True))
        self.seconds = statistics.median(self._times) * (1 + waited / max(run, 1e-6))

    def _pass(self) -> None:
        with torch.enable_grad():
            self._model(torch.ones(1, 4)).sum().backward()


def _run_and_waited() -> tuple[float, float]:
    """Returns the seconds that this thread has been on a core, and those that it could have been and had to wait."""
    try:
        run, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    except (OSError, ValueError):  # not on Linux
        return time.thread_time(), 0.0
    return int(run) / 1e9, int(waited) / 1e9


def copied_per_second(device: torch.device) -> float | None:
    """Returns how many bytes of a state are copied to host memory in a second; None where there is no room to try."""
    if psutil.virtual_memory().available < _ROOM * _COPIED_BYTES:
        return None
    is_cuda = device.type == "cuda"
    if is_cuda and torch.cuda.mem_get_info(device)[0] < _ROOM * _COPIED_PIECE:
        return None
    half = _COPIED_BYTES // 2
    if is_cuda:
        source = torch.ones(_COPIED_PIECE, dtype=torch.uint8, device=device)
        pieces = list(torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True).split(_COPIED_PIECE))
        pairs = [(piece, source) for piece in pieces]
        torch.cuda.synchronize(device)
    else:
        source = torch.ones(_COPIED_BYTES, dtype=torch.uint8)
        pairs = [(source[:half], source[half:])] * 2
    started = time.perf_counter()
    for target, piece in pairs:
        target.copy_(piece, non_blocking=True)
    if is_cuda:
        torch.cuda.synchronize(device)
    return _COPIED_BYTES / max(time.perf_counter() - started, 1e-9)
