"""Makes things go wrong on purpose: the one way in which tests and `python -m launch chaos` do.

Owns the deeds, and that each happens once over all attempts at a run: it is noted on disk before it is done. What is to
happen, and in which run, is `trainer.faults.plan`; what a run does about a fault is not here.
"""

from __future__ import annotations

import ctypes
import logging
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trainer.errors import UserError
from trainer.faults import plan as plans
from trainer.faults.judging import LOADING, PLACES
from trainer.faults.plan import ACTIONS, SPIKE_FACTOR, VARIABLE, WITHOUT_PLACE, Event, Plan

if TYPE_CHECKING:
    import torch

    from trainer.checkpoint.reading import Checkpoint

logger = logging.getLogger("lockstep")

_QUIET_SECONDS = 0.5  # without a save that is under way


class Injector:
    """Follows a plan on one rank. The main thread says where it is, and meets its fate there.

    Args:
        file: the plan's.
        plan: what it says.
        rank: of this process.
    """

    def __init__(self, file: Path, plan: Plan, rank: int) -> None:
        self.file = file
        self.plan = plan
        self.rank = rank
        self._happened = {record["event"] for record in plans.read_notes(plans.done_file(file))}
        self._mine = [
            (i, event)
            for i, event in enumerate(plan.events)
            if event.rank == rank and (event.repeats or i not in self._happened)
        ]
        self._first: dict[int, int] = {}  # event -> the step at which it began to happen, in this attempt
        self._latest: dict[int, int] = {}  # event -> the step at which it happened last, in this attempt
        self._step = -1
        self._in_turn = [i for i, event in enumerate(plan.events) if event.in_turn]
        self._turn: tuple[int | None, float] = (None, 0.0)  # the event whose turn it is, and from when its time counts
        self._plan_begun_at = self._noted_begin()  # of the first step under this plan, in whichever attempt
        self._attempt_begun_at: float | None = None  # when this rank began its first step

    @classmethod
    def from_environment(cls, run_dir: Path, rank: int) -> Injector | None:
        """Returns the injector that the environment asks for; None, as nearly always, where it asks for none.

        Raises:
            UserError: it asks for one that is not for this run or not for this day, so that the run must not start.
        """
        name = os.environ.get(VARIABLE)
        if not name:
            return None
        file = Path(name).absolute()
        plan, now = plans.read_plan(file), time.time()
        if plan.run_dir != run_dir.resolve():
            message = f"{plans.named(file)}, which breaks another run on purpose, '{plan.run_dir}': unset {VARIABLE}"
            raise UserError(message)
        if plan.written > now + plans.CLOCK_TOLERANCE or not 0 < plan.until - plan.written <= plans.MOST_SECONDS_VALID:
            message = "must be written in the past and end within a day of that"
            raise UserError(f"{plans.named(file)}, which breaks this run on purpose and {message}: unset {VARIABLE}")
        if now > plan.until:
            message = f"{plans.named(file)}, which breaks this run on purpose and ended {now - plan.until:.0f} s ago"
            raise UserError(f"{message}: unset {VARIABLE}")
        if rank == 0:
            message = "FAULTS ARE INJECTED INTO THIS RUN ON PURPOSE: %s, for %.0f minutes from now; %d events"
            logger.warning(message, plans.named(file), math.ceil((plan.until - now) / 60), len(plan.events))
        return cls(file, plan, rank)

    # ---- what the training calls --------------------------------------------------------------------------

    def at(self, place: str, step: int) -> None:
        """Does what is due where the main thread has come to.

        Args:
            place: one of `PLACES`.
            step: that is being made, counted from 1, or that was made last.

        Raises:
            RuntimeError, UserError, torch.OutOfMemoryError: that is what was due.
        """
        assert place in PLACES, place
        if step != self._step or place == "restoring a checkpoint":  # a step that is made again is another one
            self._latest = {i: latest for i, latest in self._latest.items() if not self.plan.events[i].repeats}
            self._step = step
        if place == LOADING:
            self._begin_step(step)
        for index, event in self._mine:
            here = event.action not in WITHOUT_PLACE and (event.place or LOADING) == place
            if not here or not self._is_due(index, event, step):
                continue
            deed = self._deed(event)
            if deed is not None:
                self._note(index, event, step, place)
                deed()

    def spoil(self, data: Any, step: int) -> Any:
        """Returns a batch with NaN in the floating numbers of its first sample where that is due."""
        for index, event in self._due("nan", step):
            spoiled, count = _with_nan(data)
            self._note(index, event, step, "forward")
            if count:
                data = spoiled
            else:
                logger.warning("rank %d, step %d: a batch without floating numbers stays as it is", self.rank, step)
        return data

    def loss(self, value: torch.Tensor, step: int) -> torch.Tensor:
        """Returns a micro-batch's loss, too large or with an infinite gradient where that is due."""
        for index, event in self._due("spike", step):
            self._note(index, event, step, "forward")
            value = value * SPIKE_FACTOR
        for index, event in self._due("inf-gradient", step):
            self._note(index, event, step, "backward")
            value = value * 1.0  # not the caller's own tensor
            value.register_hook(lambda gradient: gradient * math.inf)
        return value

    def stops_after(self, step: int) -> bool:
        """Tells whether the run is to end with this step as if it were asked to stop; the same on all ranks."""
        for index, event in enumerate(self.plan.events):
            if event.action == "stop-at" and event.step is not None and step >= event.step:
                if self.rank == 0:
                    self._note(index, event, step, "exchange of decisions")
                return True
        return False

    def done(self) -> list[dict[str, Any]]:
        """Returns what has happened so far, on all ranks and in all attempts, oldest first."""
        return [
            {key: record[key] for key in ("action", "rank", "step", "place", "time")}
            for record in plans.read_notes(plans.done_file(self.file))
        ]

    # ---- what is due --------------------------------------------------------------------------------------

    def _due(self, action: str, step: int) -> list[tuple[int, Event]]:
        return [(i, event) for i, event in self._mine if event.action == action and self._is_due(i, event, step)]

    def _is_due(self, index: int, event: Event, step: int) -> bool:
        if step <= self._latest.get(index, -1):  # once in a step, however many micro-batches it has
            return False
        first = self._first.get(index, event.step if event.repeats else None)
        if first is not None:  # it has begun
            return first <= step < first + event.times and time.time() < self.plan.until
        if event.step is not None and step < event.step:
            return False
        begun_at = self._plan_begun_at
        if event.in_turn:
            turn, begun_at = self._turn
            if turn != index:
                return False
        now = time.time()
        is_time = event.after_seconds is None or (begun_at is not None and now >= begun_at + event.after_seconds)
        return is_time and now < self.plan.until

    def _noted_begin(self) -> float | None:
        starts = plans.read_notes(plans.starts_file(self.file))  # by rank 0
        return starts[0]["time"] if starts else None

    def _begin_step(self, step: int) -> None:
        """Notes when the attempt began, and finds out what other ranks have done meanwhile."""
        now = time.time()
        if self._attempt_begun_at is None:
            self._attempt_begun_at = now
            if self.rank == 0:
                plans.note(plans.starts_file(self.file), {"step": step, "time": now, "attempt": _attempt()})
        if self._plan_begun_at is None:
            self._plan_begun_at = self._noted_begin()
        if self._in_turn:
            done = {note["event"]: note["time"] for note in plans.read_notes(plans.done_file(self.file))}
            turn = next((i for i in self._in_turn if i not in done), None)
            before = max((done[i] for i in self._in_turn if i in done), default=0.0)
            self._turn = turn, max(before, self._attempt_begun_at)

    def _note(self, index: int, event: Event, step: int, place: str) -> None:
        is_new = index not in self._first and (event.repeats or index not in self._happened)
        self._first.setdefault(index, step)
        self._latest[index] = step
        if is_new:
            what = {"event": index, "action": event.action, "rank": self.rank, "step": step, "place": place}
            plans.note(plans.done_file(self.file), {**what, "time": time.time(), "attempt": _attempt()})
            logger.warning("rank %d, step %d (%s): injected: %s", self.rank, step, place, ACTIONS[event.action])

    def _deed(self, event: Event) -> Callable[[], None] | None:
        """Returns what will carry an event out; None where there is nothing yet that it could happen to."""
        kind, _, argument = event.action.partition(":")
        if kind == "signal":
            return lambda: os.kill(os.getpid(), getattr(signal, argument))
        if kind == "signal-launcher":
            return lambda: os.kill(_launcher(), getattr(signal, argument))
        if kind.endswith("-worker"):
            worker = _loader_worker()
            number = signal.SIGKILL if kind == "kill-worker" else signal.SIGSTOP
            return None if worker is None else lambda: os.kill(worker, number)
        if "checkpoint" in kind:
            file = _file_of_newest_checkpoint(self.plan.run_dir / "checkpoints")
            return None if file is None else lambda: _damage(kind, file)
        if kind == "stop-file":
            return (self.plan.run_dir / "STOP").touch
        if kind == "delay":
            return lambda: time.sleep(event.seconds)
        return _SIMPLE[kind]


def _attempt() -> str:
    """Returns what all ranks of an attempt have in common, and no other attempt."""
    agent = os.environ.get("TORCHELASTIC_RUN_ID")
    return str(os.getpid()) if agent is None else f"{agent}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"


# ---- the deeds --------------------------------------------------------------------------------------------


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_all() -> None:
    import psutil

    own = psutil.Process()
    command = own.cmdline()
    for process in psutil.Process(os.getppid()).children():
        try:
            if process.pid != own.pid and process.cmdline() == command:  # the same command started every rank
                process.kill()
        except psutil.Error:
            continue
    _kill()


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _raise() -> NoReturn:
    raise RuntimeError("injected")


def _raise_user_error() -> NoReturn:
    raise UserError("injected")


def _run_out_of_memory() -> NoReturn:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected).")


def _exit() -> NoReturn:
    os._exit(plans.EXIT_CODE)


def _crash() -> None:
    ctypes.string_at(0)


def _hang() -> NoReturn:
    while True:
        time.sleep(3600)


def _hang_with_gil() -> NoReturn:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # which would end the pause
    while True:
        ctypes.PyDLL(None).pause()  # unlike a CDLL's, its functions keep the GIL


_SIMPLE: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "kill-all": _kill_all,
    "stop": _stop,
    "raise": _raise,
    "raise-user-error": _raise_user_error,
    "oom": _run_out_of_memory,
    "exit": _exit,
    "segfault": _crash,
    "hang": _hang,
    "hang-with-gil": _hang_with_gil,
}


def _launcher() -> int:
    """Returns the process that started the ranks: the parent, or this one where a launcher became it."""
    import psutil

    names = {"launch", "torchrun", "accelerate", "torch.distributed.run"}
    parent = os.getppid()
    try:
        is_launcher = any(os.path.basename(part) in names for part in psutil.Process(parent).cmdline())
    except psutil.Error:
        is_launcher = False
    return parent if is_launcher else os.getpid()


def _loader_worker() -> int | None:
    """Returns a loader worker's process id, if this rank has one that lives."""
    workers = [p for p in multiprocessing.active_children() if p.name.startswith("lockstep-loader-")]
    return workers[0].pid if workers else None


def _file_of_newest_checkpoint(folder: Path) -> Path | None:
    """Returns a file with tensors of the newest checkpoint, if that is good, and another one to go back to is, too."""
    from trainer.checkpoint.folder import CheckpointFolder
    from trainer.checkpoint.manifest import Damaged
    from trainer.checkpoint.storage import LocalStorage

    _let_saves_end(folder)  # or one that is under way would be the newest, and good, when it comes to restoring
    checkpoints = CheckpointFolder(LocalStorage(folder), keep=1)
    good: list[Checkpoint] = []
    for step in reversed(checkpoints.steps()):
        try:
            checkpoint = checkpoints.open(step)
            checkpoint.verify()
        except Damaged:  # or deleted in this moment
            if not good:
                return None
            continue
        good.append(checkpoint)
        if len(good) == 2:
            records = good[0].manifest.files
            return folder / good[0].name / max(records, key=lambda name: records[name].size)
    return None


def _let_saves_end(folder: Path) -> None:
    """Waits until nothing has been written to a checkpoint folder for a while, or for ten seconds."""
    from trainer.checkpoint.storage import STAGING

    ends, quiet_since = time.monotonic() + 10, time.monotonic()
    while (now := time.monotonic()) < min(ends, quiet_since + _QUIET_SECONDS):
        if any(folder.glob(f"{STAGING}*")):
            quiet_since = now
        time.sleep(0.01)


def _damage(kind: str, file: Path) -> None:
    try:
        size = file.stat().st_size
        if kind == "remove-checkpoint-file":
            file.unlink()
        elif kind == "truncate-checkpoint":
            os.truncate(file, size // 2)
        else:
            _flip(file, size // 2, min(64, size - size // 2))
    except OSError as error:  # such as deleted in this moment; then it is a kill like any other
        logger.warning("cannot damage '%s': %s", file, error.strerror)
    _kill()


def _flip(file: Path, begin: int, count: int) -> None:
    with open(file, "r+b") as stream:
        stream.seek(begin)
        data = stream.read(count)
        stream.seek(begin)
        stream.write(bytes(byte ^ 0xFF for byte in data))


def _with_nan(data: Any) -> tuple[Any, int]:
    """Returns a copy of a batch with NaN in its first sample, and in how many tensors."""
    from trainer.data.nested import map_tensors

    spoiled: list[torch.Tensor] = []

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.dim() == 0 or len(tensor) == 0:
            return tensor
        tensor = tensor.clone()  # its memory may be used again, or be the data set itself
        tensor[0] = math.nan
        spoiled.append(tensor)
        return tensor

    return map_tensors(spoil, data), len(spoiled)
