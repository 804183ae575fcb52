"""Fills in what the rules look at, from the parts of a run, at each report of rank 0; and asks the rules.

Owns which figures go where, and what of an attempt counts: not its first steps. Nothing here waits for a device.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from trainer.advice.adviser import LEAST_SECONDS, LEAST_STEPS, Adviser, advice
from trainer.advice.measured import Advice, Batch, Exchange, Host, Loading, Measured, Memory, Pauses
from trainer.checkpoint.writing import Saver
from trainer.config import Config
from trainer.config_values import Minutes
from trainer.data.build import is_packable
from trainer.data.feed import DeviceFeed
from trainer.data.loader import preserved_generators
from trainer.data.modes import choose_route
from trainer.data.transforms import build_transforms
from trainer.errors import UserError
from trainer.faults.pace import Straggler
from trainer.memory.blocks import repeated_blocks
from trainer.resumable import Resumable
from trainer.runtime import Runtime
from trainer.telemetry.efficiency import OperationCounter
from trainer.telemetry.memory import memory_use
from trainer.telemetry.observer import Observation
from trainer.telemetry.stopwatch import PARTS

if TYPE_CHECKING:
    from trainer.memory.planner import Prediction

_WARM_UP_STEPS = 5  # which compile, allocate and fill queues; a window that they are in does not count
_AT_ONCE = 0.3  # of a step: a device that is through so soon after the host is the faster one
_COPIED_BYTES = 16 * 2**20
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
    num_looks: int = 0
    num_at_once: int = 0

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
            "num_looks",
            "num_at_once",
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
        self._total_steps = run.total_steps
        self._feed = feed
        self._saver = run.saver
        self._flops = run.flops
        self._adviser = Adviser()
        self._all = _Stretch()
        self._recent = _Stretch()  # since the rules were last asked
        self._straggler: Straggler | None = None  # the one that cost most
        self._straggler_steps = 0  # in windows that had one
        self._worker_bytes: list[tuple[float, int]] = []
        self._seen: Sequence[Observation] = ()  # at the last report that counts
        self._is_cuda = runtime.device.type == "cuda"
        self._num_threads = 1 if self._is_cuda else torch.get_num_threads()
        self._operation_times = None if self._is_cuda else _OperationTimes()
        self._memory_before = memory_use(runtime.device).allocated
        self._num_blocks, self._recomputed = _recomputation(config, model, run.planned)
        self._has_batchnorm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        self._parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        trained = [p for p in model.parameters() if p.requires_grad]
        self._gradient_bytes = sum(p.numel() * p.element_size() for p in trained)
        self._cheaper_ways = cheaper_ways(config, feed, runtime)
        self._copied_per_second = copied_per_second()
        self._device_busy: float | None = None  # as it was sampled last
        self._num_windows = 0
        self._since = _Since(feed, run.saver)

    def report(
        self,
        step: int,
        num_steps: int,
        seen: Sequence[Observation],
        straggler: Straggler | None,
        device_wait: float,
    ) -> list[Advice]:
        """Looks at the steps since the last report, and returns advice that is new.

        Args:
            step: the last of them.
            num_steps: how many they are.
            seen: what every rank saw.
            straggler: the rank that the others waited for, if there was one.
            device_wait: seconds that the host waited at this report until the device was through.
        """
        self._num_windows += 1
        window = self._since.take(step, num_steps, seen)
        workers_bytes = seen[0].workers_bytes
        if workers_bytes is not None:
            self._worker_bytes.append((time.monotonic(), workers_bytes))
        if num_steps == 0 or seen[0].seconds is None:
            return []
        if self._num_windows == 1 or (self._all.num_steps == 0 and step - num_steps < _WARM_UP_STEPS):
            return []
        window.num_looks = 1
        window.num_at_once = int(device_wait < _AT_ONCE * math.fsum(window.seconds.values()) / num_steps)
        self._all.add(window)
        self._recent.add(window)
        if straggler is not None:
            self._straggler_steps += num_steps
            if self._straggler is None or straggler.share > self._straggler.share:
                self._straggler = straggler
        self._seen = seen
        if self._recent.num_steps < LEAST_STEPS or math.fsum(self._recent.seconds.values()) < LEAST_SECONDS:
            return []
        recent, self._recent = self._recent, _Stretch()
        return self._adviser.ask(self._measured(recent, seen, straggler))

    def conclude(self) -> list[Advice]:
        """Returns advice for the next run, from this attempt without its first steps, the most useful first."""
        return advice(self._measured(self._all, self._seen, self._lasting_straggler())) if self._all.num_steps else []

    def _lasting_straggler(self) -> Straggler | None:
        """Returns the slow rank, with what it cost over all steps."""
        if self._straggler is None:
            return None
        return replace(self._straggler, share=self._straggler.share * self._straggler_steps / self._all.num_steps)

    # ---- the figures ------------------------------------------------------------------------------------------

    def _measured(self, stretch: _Stretch, seen: Sequence[Observation], straggler: Straggler | None) -> Measured:
        seconds = math.fsum(stretch.seconds.values())
        return Measured(
            seconds=seconds,
            num_steps=stretch.num_steps,
            shares={part: value / seconds for part, value in stretch.seconds.items()},
            num_left=self._total_steps - stretch.last_step,
            steps_per_epoch=self._plan.steps_per_epoch,
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
            host=self._host(stretch, seen),
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
            tuple(self._worker_bytes),
        )

    def _host(self, stretch: _Stretch, seen: Sequence[Observation]) -> Host:
        figures, index = seen[0].machine or {}, self._runtime.device.index
        # Where this process does not see all GPUs of its machine, nobody knows which of them is its own.
        if self._is_cuda and f"gpu{torch.cuda.device_count()}_percent" not in figures:
            busy = figures.get(f"gpu{index}_percent")
            self._device_busy = busy / 100 if busy is not None else self._device_busy
        return Host(
            self._runtime.num_cores,
            self._num_threads,
            self._operation_times.median() if self._operation_times is not None else 0.0,
            (self._flops.num_operations if self._flops is not None else None) or 0,
            self._is_cuda and stretch.num_at_once > 0.8 * stretch.num_looks,
            self._device_busy,
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
        )

    def _exchange(self, stretch: _Stretch, seen: Sequence[Observation], straggler: Straggler | None) -> Exchange:
        parallel, hosts = self._config.parallel, [rank.host for rank in seen]
        totals = [math.fsum(rank.values()) for rank in stretch.by_rank]
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
        save, evaluate = self._config.checkpoint.every, self._config.eval.every
        if isinstance(save, Minutes):
            unit: Literal["steps", "epochs", "minutes"] = "minutes"
            due = math.floor(seconds / 60 / save.count)
        else:
            unit, due = save.unit, _due(save.steps(self._plan.steps_per_epoch), stretch)
        statistics = self._saver.statistics
        num_written = max(statistics.num_saved + statistics.num_failed, 1)
        return Pauses(
            save.count,
            unit,
            self._saver.behind,
            max(stretch.num_saved, due),
            due,
            statistics.write_seconds / num_written,
            statistics.num_bytes / self._runtime.num_ranks / self._copied_per_second,
            evaluate.count,
            evaluate.unit,
            _due(evaluate.steps(self._plan.steps_per_epoch), stretch) if self._config.data.eval is not None else 0,
        )


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


def cheaper_ways(config: Config, feed: DeviceFeed, runtime: Runtime) -> tuple[str, ...]:
    """Returns which other ways of `data.feed`, or a cache, this data and this device have."""
    if feed.mode not in ("host", "device_decode"):
        return ()
    found = []
    if runtime.device.type == "cuda":
        transforms = build_transforms(config.data.transforms.train, "data.transforms.train")
        for mode in ("resident", "device_decode"):
            with suppress(UserError):
                if mode != feed.mode:
                    asked = config.data.model_copy(update={"feed": mode})
                    memory, ranks = runtime.device_memory, runtime.num_ranks
                    choose_route(feed.dataset, asked, "train", transforms, runtime.device, ranks, memory)
                    found.append(mode)
    if config.data.cache is None and is_packable(feed.dataset):
        found.append("cache")
    return tuple(found)


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

    def median(self) -> float:
        """Returns the median of the trials so far, and makes another one where they are few.

        A trial is over too soon to see what else the machine does. So its time on the core counts, and what this thread
        has waited for a core since the last call is added in proportion.
        """
        if len(self._times) < _TRIALS:
            self._pass()  # a step, too, finds its code in the caches
            started = time.thread_time()
            self._pass()
            self._times.append((time.thread_time() - started) / self._num_operations)
        now = _run_and_waited()
        (run_before, waited_before), self._before = self._before, now
        crowding = (now[1] - waited_before) / max(now[0] - run_before, 1e-6)
        return statistics.median(self._times) * (1 + crowding)

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


def copied_per_second() -> float:
    """Returns how many bytes the host copies in a second."""
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    started = time.perf_counter()
    target.copy_(source)
    return _COPIED_BYTES / (time.perf_counter() - started)
