"""Running out of memory: telling it from other errors, and the report that the rank which ran out leaves behind.

Owns the report on stderr, `out-of-memory/rank-N.json` and the CUDA snapshot beside it, and the advice. What is done
about it at the next start is `trainer.memory.shrink`. Planning memory, so that it does not happen, is not here.
"""

from __future__ import annotations

import gc
import linecache
import logging
import math
import sys
import sysconfig
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.files import write_json
from trainer.memory.shrink import Shrink, folder_of, halved, read_shrink, write_shrink
from trainer.units import format_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trainer.config import Config
    from trainer.data.sampler import BatchPlan

logger = logging.getLogger("lockstep")

T = TypeVar("T")

NUM_TENSORS = 10  # shown in the report
_MAX_TEXT = 300  # characters of the error that are shown
_PACKAGE = Path(__file__).resolve().parent.parent

# What the libraries say, besides the exceptions that they have for it.
_HOST_TEXTS = ("can't allocate memory", "not enough memory")
_DEVICE_TEXTS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "Cuda failure 2 'out of memory'",  # NCCL
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
# Functions of this package that tell what was being done; the innermost one counts.
_PHASES = {
    "build": "startup",
    "prepare": "startup",
    "restore": "restoring a checkpoint",
    "step_batches": "loading a batch",
    "loss_and_count": "forward",
    "backward": "backward",
    "evaluate": "evaluation",
    "save": "saving a checkpoint",
}
_BETWEEN_STEPS = ("evaluation", "saving a checkpoint")


@dataclass(frozen=True)
class Situation:
    """What a trainer was doing, as far as it knows."""

    device: torch.device
    plan: BatchPlan
    step: int  # completed optimizer steps
    micro_batch: int  # of the step that was being made, counted from 0
    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    memory_plan: Callable[[], str | None] | None = None  # gives the memory planner's table


@dataclass(frozen=True)
class LiveTensor:
    """One piece of memory that tensors refer to."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    num_bytes: int


@dataclass
class Report:
    """The facts, as `rank-N.json` holds them."""

    rank: int
    error: str
    phase: str = "training"
    step: int | None = None  # the optimizer step that was being made, counted from 1
    micro_batch: int | None = None  # counted from 1
    num_micro_batches: int | None = None
    micro_batch_size: int | None = None
    where: str | None = None
    device: str | None = None
    device_bytes: dict[str, int] = field(default_factory=dict)
    host_bytes: dict[str, int] = field(default_factory=dict)
    memory_plan: str | None = None
    tensors: list[LiveTensor] = field(default_factory=list)
    num_tensors: int = 0
    tensor_bytes: int = 0
    advice: str = ""
    next_micro_batch_size: int | None = None  # recorded for the next start
    snapshot: str | None = None
    time: float = field(default_factory=lambda: round(time.time(), 3))

    def plan_text(self) -> str:
        """Returns what was planned, for a person."""
        plan = self.memory_plan or ""
        return "\n".join(["  planned", *(f"    {line}" for line in plan.splitlines()), ""])

    def text(self, files: Iterable[Path]) -> str:
        """Returns the report for a person."""
        what = "ran out of memory"
        if self.step is not None and self.phase in _BETWEEN_STEPS:
            what += f" during {self.phase} after step {self.step - 1}"
        elif self.step is not None:
            what += f" in step {self.step}, micro-batch {self.micro_batch} of {self.num_micro_batches} ({self.phase})"
        else:
            what += f" during {self.phase}"
        lines = [f"error: rank {self.rank} {what}", f"  asked    {self.error}"]
        if self.where is not None:
            lines.append(f"  in       {self.where}")
        if self.device_bytes:
            sizes = ", ".join(f"{format_bytes(size)} {name}" for name, size in self.device_bytes.items())
            lines.append(f"  device   {self.device}: {sizes}")
        if self.host_bytes:
            sizes = ", ".join(f"{format_bytes(size)} {name}" for name, size in self.host_bytes.items())
            lines.append(f"  host     {sizes}")
        if self.tensors:
            whole = f"{format_bytes(self.tensor_bytes)} in {self.num_tensors}"
            lines.append(f"  tensors  {whole}, without what autograd keeps for backward; the largest:")
        for tensor in self.tensors:
            shape = "x".join(map(str, tensor.shape)) or "scalar"
            place = f"{tensor.dtype} {shape} on {tensor.device}"
            lines.append(f"    {format_bytes(tensor.num_bytes):>10}  {tensor.name}  ({place})")
        lines.append(f"  try      {self.advice}")
        if self.next_micro_batch_size is not None:
            lines.append(f"  next     the next start takes {self.next_micro_batch_size} (memory.on_oom: shrink)")
        written = ", ".join(map(str, files))
        if written:
            lines.append(f"  files    {written}")
        return "\n".join(lines) + "\n"


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an error, or the one behind it, is that the device or the host has no memory left."""
    return any(_kind(link) is not None for link in _chain(error))


def handle_out_of_memory(
    error: BaseException, config: Config, rank: int, situation: Callable[[], Situation] | None = None
) -> None:
    """Records a smaller micro-batch if `memory.on_oom` is `shrink`, and reports. Never raises, talks to no rank.

    Args:
        error: one for which `is_out_of_memory` is true.
        config: the whole run.
        rank: of this process.
        situation: tells what the trainer was doing; None if it could not even be built.
    """
    link = next(link for link in _chain(error) if _kind(link) is not None)
    report = Report(rank, _first_line(link))
    known = _guarded(situation) if situation is not None else None
    frames = [pair for e in _chain(error, until=link) for pair in traceback.walk_tb(e.__traceback__)]
    _guarded(lambda: _tell_place(report, known, frames))
    # First what the next start needs: a launcher may be about to end this process.
    fits_smaller = known is not None and (_kind(link) == "device" or known.device.type == "cpu")
    if known is not None and fits_smaller and config.memory.on_oom == "shrink":
        report.next_micro_batch_size = _guarded(lambda: _record_shrink(report, config, known))
    report.advice = (
        _guarded(lambda: advice(config, known.plan if known else None, report.phase)) or "a device with more memory"
    )
    folder = folder_of(config.run_dir)
    _guarded(lambda: folder.mkdir(parents=True, exist_ok=True))
    _guarded(lambda: _tell_memory(report, known, folder / f"rank-{rank}-snapshot.pickle"))
    _guarded(lambda: _tell_tensors(report, known))
    file = folder / f"rank-{rank}.json"
    _guarded(lambda: write_json(file, asdict(report)))
    files = [file, folder / report.snapshot] if report.snapshot is not None else [file]
    _guarded(lambda: _show(report.text(path for path in files if path.exists())))
    # Last, for it simulates a step: a launcher that ends this process now ends a complete report.
    if known is not None and known.memory_plan is not None:
        _guarded(lambda: _tell_plan(report, known))
        _guarded(lambda: _show(report.plan_text()))
        _guarded(lambda: write_json(file, asdict(report)))


def advice(config: Config, plan: BatchPlan | None, phase: str = "training") -> str:
    """Returns the setting to try first: a line that can be typed behind the command, and why."""
    if plan is None or phase == "startup":
        return "a device with more memory: the model and its optimizer state alone do not fit"
    share = plan.batch_size // plan.num_ranks
    smaller = halved(plan.micro_batch_size, share, plan.group_size)
    if phase == "evaluation":
        size = config.eval.batch_size or plan.micro_batch_size
        if size > 1:
            return f"eval.batch_size={size // 2}  (half of the present {size}; the same result)"
    elif smaller is not None:
        return f"train.micro_batch_size={smaller}  (instead of {plan.micro_batch_size}; the same optimisation)"
    elif config.memory.checkpointing in ("none", "every_2", "selective"):
        return "memory.checkpointing=full  (recomputes activations in backward; the same optimisation)"
    return "a device with more memory: no setting is left that leaves the optimisation as it is"


# ---- the error --------------------------------------------------------------------------------------------


def _chain(error: BaseException, until: BaseException | None = None) -> Iterator[BaseException]:
    """Yields an error and those behind it, as Python shows them, down to `until`."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        if link is until:
            return
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _kind(error: BaseException) -> str | None:
    """Returns whose memory an error says is used up, `device` or `host`, or None."""
    if isinstance(error, MemoryError):
        return "host"
    if any(base.__name__ == "OutOfMemoryError" and base.__module__ == "torch" for base in type(error).__mro__):
        return "device"
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if any(part in text for part in _DEVICE_TEXTS):
        return "device"
    return "host" if "DefaultCPUAllocator" in text and any(part in text for part in _HOST_TEXTS) else None


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}{': ' if line else ''}{line[:_MAX_TEXT]}"


# ---- the facts --------------------------------------------------------------------------------------------


def _guarded(call: Callable[[], T]) -> T | None:
    """Calls; what goes wrong is logged, so that one missing fact costs no other."""
    try:
        return call()
    except Exception:
        logger.warning("a part of the out-of-memory report failed", exc_info=True)
        return None


def _tell_place(report: Report, known: Situation | None, frames: list[tuple[FrameType, int]]) -> None:
    report.phase = "startup" if known is None else "training"
    for frame, _ in frames:
        file, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if report.phase in ("startup", "evaluation"):  # whatever they call
            break
        if _PACKAGE in file.parents:
            report.phase = _PHASES.get(name, report.phase)
        elif name == "step" and file.parent.name == "optim":
            report.phase = "optimizer step"
    if known is not None and report.phase not in ("startup", "restoring a checkpoint"):
        report.step = known.step + 1
        report.micro_batch = known.micro_batch + 1
        report.num_micro_batches = known.plan.num_micro_batches
        report.micro_batch_size = known.plan.micro_batch_size
    report.where = _where(known.model if known is not None else None, frames)


def _where(model: nn.Module | None, frames: list[tuple[FrameType, int]]) -> str | None:
    """Returns the last line that ran in the user's model, and the innermost module there."""
    import torch
    from torch import nn

    if not frames:
        return None
    libraries = [Path(torch.__file__).parent, _PACKAGE]
    standard = Path(sysconfig.get_paths()["stdlib"])
    in_models, elsewhere = [], []
    innermost: nn.Module | None = None
    for frame, line in frames:
        file = Path(frame.f_code.co_filename)
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            innermost = owner
        if isinstance(owner, nn.Module) and libraries[0] not in file.parents:
            in_models.append((frame, line))
        is_standard = standard in file.parents and "site-packages" not in file.parts
        if not is_standard and not any(library in file.parents for library in libraries):
            elsewhere.append((frame, line))
    frame, line = (in_models or elsewhere or frames)[-1]
    file_name, function = frame.f_code.co_filename, frame.f_code.co_name
    code = linecache.getline(file_name, line).strip()
    place = f"{file_name}:{line} in {function}{': ' + code if code else ''}"
    if model is None or innermost is None:
        return place
    names = {id(module): name for name, module in model.named_modules()}
    name = names.get(id(innermost))
    return place if name is None else f"{name or 'the model'} ({type(innermost).__name__}), {place}"


def _tell_memory(report: Report, known: Situation | None, snapshot: Path) -> None:
    import psutil
    import torch

    from trainer.telemetry.memory import device_memory, memory_use

    if known is not None:
        report.device = str(known.device)
    machine = psutil.virtual_memory()
    resident = psutil.Process().memory_info().rss
    report.host_bytes = {"in this process": resident, "available": machine.available, "in all": machine.total}
    has_cuda = known.device.type == "cuda" if known is not None else torch.cuda.is_initialized()
    if not has_cuda:
        return
    device = known.device if known is not None else torch.device("cuda", torch.cuda.current_device())
    report.device = str(device)
    use = memory_use(device)
    report.device_bytes = {"allocated": use.allocated, "reserved": use.reserved or 0, "in all": device_memory(device)}
    torch.cuda.memory._dump_snapshot(str(snapshot))
    report.snapshot = snapshot.name


def _tell_plan(report: Report, known: Situation | None) -> None:
    if known is not None and known.memory_plan is not None:
        report.memory_plan = known.memory_plan()


def _tell_tensors(report: Report, known: Situation | None) -> None:
    tensors = live_tensors(known.model, known.optimizer) if known is not None else live_tensors()
    report.num_tensors = len(tensors)
    report.tensor_bytes = sum(tensor.num_bytes for tensor in tensors)
    report.tensors = tensors[:NUM_TENSORS]


def live_tensors(model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None) -> list[LiveTensor]:
    """Returns every piece of memory that a Python tensor refers to, the largest first.

    Args:
        model: gives its parameters, their gradients and its buffers their names.
        optimizer: whose state is named after the parameters.
    """
    import torch
    from torch._subclasses import FakeTensor

    found = _named_tensors(model, optimizer)
    named = set(found)
    for thing in gc.get_objects():
        kind = type(thing)  # not isinstance: it runs code of lazy objects and proxies
        if not issubclass(kind, torch.Tensor) or issubclass(kind, FakeTensor):  # a plan's tensors hold no memory
            continue
        try:
            key, num_bytes = _storage(thing)
            if num_bytes == 0 or key in named or (key in found and math.prod(found[key].shape) >= thing.numel()):
                continue
            is_parameter = isinstance(thing, torch.nn.Parameter)
            found[key] = _describe(thing, "a parameter" if is_parameter else "a tensor", num_bytes)
        except (RuntimeError, NotImplementedError, AttributeError):  # of a kind that has no memory of its own
            continue
    return sorted(found.values(), key=lambda tensor: tensor.num_bytes, reverse=True)


def _describe(tensor: torch.Tensor, name: str, num_bytes: int) -> LiveTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return LiveTensor(name, tuple(tensor.shape), dtype, str(tensor.device), num_bytes)


def _storage(tensor: torch.Tensor) -> tuple[tuple[str, int], int]:
    """Returns which memory a tensor refers to, and its size in bytes; 0 for one without memory."""
    local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
    storage = local.untyped_storage()
    pointer = storage.data_ptr()
    return (str(local.device), pointer), storage.nbytes() if pointer else 0


def _named_tensors(
    model: nn.Module | None, optimizer: torch.optim.Optimizer | None
) -> dict[tuple[str, int], LiveTensor]:
    """Returns what the model and the optimizer hold; what shares memory is named after the first of them."""
    import torch

    found: dict[tuple[str, int], LiveTensor] = {}
    num_sharing: Counter[tuple[str, int]] = Counter()
    for name, tensor in _names(model, optimizer):
        if not isinstance(tensor, torch.Tensor):
            continue
        key, num_bytes = _storage(tensor)
        if num_bytes:
            num_sharing[key] += 1
            found.setdefault(key, _describe(tensor, name, num_bytes))
    for key, count in num_sharing.items():
        if count > 1:  # gradients in one of DDP's buckets
            found[key] = replace(found[key], name=f"{found[key].name} and {count - 1} more")
    return found


def _names(model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, Any]]:
    parameters = dict(model.named_parameters()) if model is not None else {}
    for name, parameter in parameters.items():
        yield name, parameter
        yield f"gradient of {name}", parameter.grad
    if model is not None:
        yield from model.named_buffers()
    by_parameter = {id(parameter): name for name, parameter in parameters.items()}
    states = optimizer.state if optimizer is not None else {}
    for key, state in states.items():
        owner = by_parameter.get(id(key), "a parameter")
        for what, value in state.items() if isinstance(state, dict) else ():
            yield f"optimizer state of {owner}: {what}", value


def _record_shrink(report: Report, config: Config, known: Situation) -> int | None:
    """Leaves a smaller micro-batch for the next start; None where that would not help or there is none."""
    plan = known.plan
    in_own_batches = report.phase == "evaluation" and config.eval.batch_size is not None
    smaller = halved(plan.micro_batch_size, plan.batch_size // plan.num_ranks, plan.group_size)
    if smaller is None or in_own_batches or report.step is None:
        return None
    before = read_shrink(config.run_dir)
    configured = config.train.micro_batch_size
    attempt = before.attempt + 1 if before is not None and before.configured == configured else 1
    record = Shrink(smaller, plan.micro_batch_size, configured, report.step, report.rank, attempt, report.time)
    write_shrink(config.run_dir, record)
    return smaller


def _show(text: str) -> None:
    sys.stderr.write(text)  # at once: other ranks may be writing theirs
    sys.stderr.flush()
