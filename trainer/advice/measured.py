"""What the rules look at: figures of a stretch of training and facts of the run, and what a rule says of them.

Owns no measurement (`trainer.advice.survey`) and no judgement (the modules of rules).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the run page reads advice, and imports no torch
    from trainer.faults.pace import Straggler

DeviceType = str
FeedMode = Literal["host", "device_decode", "resident", "made_on_device"]
Setting = int | float | bool | str
Unit = Literal["steps", "epochs", "minutes"]


@dataclass(frozen=True)
class Loading:
    """How samples reach the device, on rank 0.

    Args:
        mode: the way of the data.
        num_workers: worker processes per rank; 0 loads in the thread of the step.
        seconds: that one of them takes to load a micro-batch.
        cpu_seconds: of these on a core; the rest it waits, for a disk or a network.
        prefetch_factor: micro-batches that each worker has ready or in work.
        alternatives: cheaper ways that this data and this device have: `cache`, `device_decode`, `resident`.
        batch_bytes: host memory of a micro-batch that waits for the step; 0 where not known.
        resident_bytes: that the data takes on this rank's device where it lives there (`resident`).
        bytes_per_worker: memory of one worker now; 0 where not known.
        worker_bytes: the same over time, since there are as many as now and they have settled: (seconds, bytes).
    """

    mode: FeedMode = "host"
    num_workers: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    prefetch_factor: int = 2
    alternatives: tuple[str, ...] = ()
    batch_bytes: int = 0
    resident_bytes: int = 0
    bytes_per_worker: int = 0
    worker_bytes: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class Batch:
    """How a rank's share of the global batch is split.

    Args:
        size: samples of all ranks in a step.
        micro_batch_size: samples of a forward.
        num_micro_batches: forwards of a rank in a step.
        sizes: micro-batches that split the share evenly, ascending.
        has_batchnorm: whether results depend on the micro-batch.
    """

    size: int = 1
    micro_batch_size: int = 1
    num_micro_batches: int = 1
    sizes: tuple[int, ...] = (1,)
    has_batchnorm: bool = False


@dataclass(frozen=True)
class Host:
    """What the host does for a device.

    Args:
        num_cores: that a rank and its workers may keep busy.
        num_threads: that computing keeps busy: 1 where a GPU computes.
        operation_seconds: of one operation of torch that has nothing to compute; 0 where not measured.
        num_operations: in forward and backward of a micro-batch; 0 where not counted.
        is_behind: whether a GPU had nothing left to do at nearly every step's begin, though nobody had waited for it.
        free_memory: bytes on the machine that a rank and its workers may still take; None where not known.
    """

    num_cores: int = 1
    num_threads: int = 1
    operation_seconds: float = 0.0
    num_operations: int = 0
    is_behind: bool = False
    free_memory: int | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of the fullest rank; on the CPU, of its process.

    Args:
        peak: the most at once.
        fixed: of it what does not grow with the micro-batch, at least.
        target: what a step may take (`memory.target`).
        checkpointing: `memory.checkpointing`.
        recomputed: share of the blocks that backward computes again; None where only parts of blocks.
        num_blocks: repeated blocks of the model.
        is_planned: whether `auto` can be: the planner knows such steps.
    """

    peak: int = 0
    fixed: int = 0
    target: int = 0
    checkpointing: str = "none"
    recomputed: float | None = 0.0
    num_blocks: int = 0
    is_planned: bool = True


@dataclass(frozen=True)
class Exchange:
    """What ranks exchange, and how long they wait for each other.

    Args:
        num_ranks: processes that train.
        num_nodes: machines that they are on.
        strategy: `parallel.strategy`; `ddp` also where a copy is shared with nobody.
        share: of the time, exchanging gradients and parameters, not hidden behind computing: on the rank that waits
            least for others.
        gradient_bytes: that a rank sends in a step.
        compression: `parallel.gradient_compression`.
        bucket_mb: `parallel.bucket_mb`.
        reshard_after_forward: `parallel.reshard_after_forward`.
        parameter_bytes: of the whole model, as it is gathered.
        straggler: the rank that the others wait for, if there is one.
        hosts: name of each rank's machine.
        data_wait: each rank's share of the time, waiting for data.
    """

    num_ranks: int = 1
    num_nodes: int = 1
    strategy: str = "ddp"
    share: float = 0.0
    gradient_bytes: int = 0
    compression: str = "none"
    bucket_mb: float = 25.0
    reshard_after_forward: bool = True
    parameter_bytes: int = 0
    straggler: Straggler | None = None
    hosts: tuple[str, ...] = ("",)
    data_wait: tuple[float, ...] = ()


@dataclass(frozen=True)
class Pauses:
    """Checkpoints and evaluations.

    Args:
        save_every: `checkpoint.every`: a number of steps, of epochs, or of minutes.
        save_unit: which of them.
        is_async: whether saves are to be written behind the training (`checkpoint.async_save`).
        lacks_memory: whether they are not, as the host had no memory for a copy of the state.
        num_saves: in this stretch.
        num_due: of these, by the interval; the others are of new best results.
        write_seconds: of one save, from its beginning until it is on the disk.
        copy_bytes: of a rank's copy in host memory, which writing behind the training needs.
        copy_seconds: that making it takes; None where that was not tried.
        evaluate_every: `eval.every`.
        evaluate_unit: which of steps and epochs.
        num_evaluations: in this stretch.
    """

    save_every: float = 1
    save_unit: Unit = "epochs"
    is_async: bool = True
    lacks_memory: bool = False
    num_saves: int = 0
    num_due: int = 0
    write_seconds: float = 0.0
    copy_bytes: int = 0
    copy_seconds: float | None = None
    evaluate_every: int = 1
    evaluate_unit: Unit = "epochs"
    num_evaluations: int = 0


@dataclass(frozen=True)
class Measured:
    """A stretch of training, without its first steps.

    Args:
        seconds: its length.
        num_steps: optimizer steps in it.
        steps_per_epoch: of the run.
        total_steps: of the run, from its beginning to its end.
        shares: of the time, by part, mean over ranks; they add up to 1.
        device: `cuda`, `cpu`, ...
        compiles: whether the model is compiled.
    """

    seconds: float
    num_steps: int
    shares: Mapping[str, float]
    steps_per_epoch: int = 1
    total_steps: int = 1
    device: DeviceType = "cpu"
    compiles: bool = False
    loading: Loading = field(default_factory=Loading)
    batch: Batch = field(default_factory=Batch)
    host: Host = field(default_factory=Host)
    memory: Memory = field(default_factory=Memory)
    exchange: Exchange = field(default_factory=Exchange)
    pauses: Pauses = field(default_factory=Pauses)

    def share(self, part: str) -> float:
        """Returns the share of the time that a part took."""
        return self.shares.get(part, 0.0)

    @property
    def micro_batch_seconds(self) -> float:
        """Seconds from one micro-batch of a rank to the next, everything included."""
        return self.seconds / (self.num_steps * self.batch.num_micro_batches)

    @property
    def step_seconds(self) -> float:
        """Seconds from step to step, everything included."""
        return self.seconds / self.num_steps

    def run_length(self, unit: Unit) -> float:
        """Returns how long the whole run is: an interval of so much comes once, at its end."""
        if unit == "minutes":
            return self.total_steps * self.step_seconds / 60
        return self.total_steps if unit == "steps" else math.ceil(self.total_steps / self.steps_per_epoch)


@dataclass(frozen=True)
class Advice:
    """What to change.

    Args:
        rule: the name of the rule that says it.
        text: one or two sentences with figures and the config line.
        settings: the change, by dotted key; empty where it is no setting.
        gain: expected speed-up as a share of the present speed, such as 0.3; None where it cannot be known.
        at_stake: share of the time that the problem takes, for the order of advice whose gain is not known.
    """

    rule: str
    text: str
    settings: Mapping[str, Setting]
    gain: float | None
    at_stake: float = 0.0

    @property
    def rank(self) -> float:
        """How much it matters."""
        return self.gain if self.gain is not None else speed_up(self.at_stake) / 2

    def record(self) -> dict[str, Any]:
        """Returns what summary.json has of it."""
        values = asdict(self)
        del values["at_stake"]
        return {**values, "gain": None if self.gain is None else round(self.gain, 3)}


def speed_up(saved: float) -> float:
    """Returns how much faster a run gets, as a share of its speed, that saves a share of its time."""
    return saved / (1 - min(saved, 0.99))


def percent(share: float) -> str:
    """Writes a share."""
    return f"{100 * share:.0f}%"


def line(settings: Mapping[str, Setting]) -> str:
    """Writes settings as they stand on a command line."""
    return " ".join(f"{key}={_written(value)}" for key, value in settings.items())


def _written(value: Setting) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"'{text}'" if " " in text else text
