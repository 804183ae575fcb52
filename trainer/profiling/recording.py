"""Recording a few steps with torch's profiler, and the trace that comes of it.

Owns when it is on, the ranges that make a trace read like the loop, and that a trace that cannot be written ends no
run. What is in a trace is found by `trainer.profiling.finding`, in a process of its own.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from trainer.config_reporting import ProfileConfig
from trainer.errors import UserError, one_line, one_line_text
from trainer.faults.judging import PROFILE
from trainer.files import replacing
from trainer.profiling.finding import MOST_BYTES, TRACE, about_text, begin_to_look_into, too_large
from trainer.profiling.traces import step_range
from trainer.telemetry.clock import Clock

logger = logging.getLogger("lockstep")

_MOST_ALLOCATIONS = 1_000_000  # in a snapshot, a ring buffer of the last ones
_GZIP_LEVEL = 5  # 1% larger than the default of 9, in a third of the time
_CHUNK = 1 << 20
_END = 16  # bytes in which a whole trace is closed
_KERNEL = b'"cat": "kernel"'
_PATIENCE = 5.0  # seconds that the end of a run waits for what is found in the trace
_QUIET = "99"  # level of what libkineto writes to stderr: nothing, as a machine without a GPU is an error to it


class Profiling:
    """Records the steps that `profile.steps` names, on this rank.

    While it is not recording, a step costs two comparisons.

    Args:
        config: what to record.
        folder: for the files, the same for all ranks.
        rank: of this process.
        num_ranks: how many there are.
        device: that the model is on.
        clock: of this attempt: the time of writing is no training.
        at: told again and again, while files are written, that this is what goes on.
    """

    def __init__(
        self,
        config: ProfileConfig,
        folder: Path,
        rank: int,
        num_ranks: int,
        device: torch.device,
        clock: Clock,
        at: Callable[[str], None],
    ) -> None:
        assert config.steps is not None
        self._config = config
        self._first, self._last = config.steps
        self._folder = folder
        self._rank, self._num_ranks = rank, num_ranks
        self._device = device
        self._clock = clock
        self._at = at
        self._profiler: profile | None = None  # once it warms up
        self._is_warm = False  # it was there for a whole step before the first one that it records
        self._steps: list[int] = []  # begun while recording
        self._is_whole = True  # the last one of them was made
        self._ranges: list[record_function] = []  # open ones: the step's, the place's
        self._looking: subprocess.Popen[bytes] | None = None  # into the trace that was written last
        self._is_done = False

    @classmethod
    def wanted(
        cls,
        config: ProfileConfig,
        folder: Path,
        rank: int,
        num_ranks: int,
        device: torch.device,
        clock: Clock,
        at: Callable[[str], None],
        total_steps: int,
    ) -> Profiling | None:
        """Returns it where the config asks for it.

        Raises:
            UserError: the run has no such steps; on every rank alike.
        """
        if config.steps is None:
            return None
        if config.steps[0] > total_steps:
            message = f"the run has {total_steps} steps, and the first to trace is {config.steps[0]}"
            raise UserError(message, path="profile.steps", agreed=True)
        return cls(config, folder, rank, num_ranks, device, clock, at)

    # ---- in the loop --------------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        """A step, counted from 1, is about to be made."""
        if self._is_done:
            return
        if self._steps and step != self._steps[-1] + 1:  # gone back to an earlier one: these will come again
            self._write()
        if self._first <= step <= self._last:
            if not self._steps and not self._start(step):
                return
            self._close_ranges()
            self._steps.append(step)
            self._is_whole = False
            self._open_range(step_range(step))
        elif step == self._first - 1:
            self._warm_up(step)
        elif self._profiler is not None:
            self._stop()

    def after_step(self, step: int) -> None:
        """A step was made."""
        if self._steps:
            self._is_whole = True
            if step >= self._last:
                self._write()
                self._is_done = True

    def at(self, place: str) -> None:
        """The main thread comes to a place of the loop."""
        if self._steps:
            if len(self._ranges) > 1:
                self._ranges.pop().__exit__(None, None, None)
            self._open_range(place)

    def close(self) -> None:
        """Writes what there is, where the run ends in the midst of the steps to trace; waits some seconds for tables.

        What is not looked into by then is left to its process, or to `python -m trainer profile`.
        """
        if self._steps:
            self._write()
        self._stop()
        self._is_done = True
        if self._looking is not None:
            with self._clock.phase("profile"), contextlib.suppress(subprocess.TimeoutExpired):
                self._at(PROFILE)
                self._looking.wait(_PATIENCE)
            self._looking = None

    def give_up(self) -> None:
        """The same for a run that failed. On several GPUs nothing is written, as nobody may wait for a device then."""
        if self._device.type == "cpu" or self._num_ranks == 1:
            with contextlib.suppress(Exception):  # what ended the run may end this as well
                self.close()

    # ---- the profiler -------------------------------------------------------------------------------------

    def _warm_up(self, step: int) -> None:
        if self._profiler is not None or self._is_refused(step):
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", _QUIET)
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with self._tolerant(step):
            profiler = profile(
                activities=activities,
                profile_memory=self._config.memory,
                record_shapes=self._config.shapes,
                with_stack=self._config.stacks,
            )
            profiler.prepare_trace()
            self._profiler, self._is_warm = profiler, True

    def _start(self, step: int) -> bool:
        """Begins to record, with an idle device: what it is still doing belongs to the steps before.

        Returns:
            Whether it does; if not, it never will.
        """
        if self._profiler is None:
            self._warm_up(step)
            self._is_warm = False
        profiler, self._profiler = self._profiler, None
        if profiler is not None and not self._is_refused(step):
            self._wait_for_device()
            with self._tolerant(step):
                profiler.start_trace()
                self._profiler = profiler
                self._start_snapshot()
        self._is_done = self._profiler is None
        return not self._is_done

    def _is_refused(self, step: int) -> bool:
        """Tells whether another profiler of torch's is on; a second one may end the process."""
        if not torch.autograd._profiler_enabled():
            return False
        self._is_done = True
        logger.warning("step %d: nothing is traced, as another profiler of torch's is on", step)
        return True

    def _start_snapshot(self) -> None:
        if self._records_snapshot:
            torch.cuda.memory._record_memory_history(
                context="alloc", stacks="python", max_entries=_MOST_ALLOCATIONS, clear_history=True
            )

    @property
    def _records_snapshot(self) -> bool:
        return self._config.memory and self._device.type == "cuda"

    def _stop(self) -> None:
        """Ends a profiler that warmed up, without a trace."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None and not torch.autograd._profiler_enabled():
            with self._tolerant(self._first):
                profiler.start_trace()
                profiler.stop_trace()

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _open_range(self, name: str) -> None:
        opened = record_function(name)
        opened.__enter__()
        self._ranges.append(opened)

    def _close_ranges(self) -> None:
        while self._ranges:
            self._ranges.pop().__exit__(None, None, None)

    # ---- the files ----------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Ends the recording and writes its files; a problem with these is a warning."""
        profiler, steps = self._profiler, self._steps
        assert profiler is not None
        with self._clock.phase("profile"):
            self._wait_for_device()  # within the last step, whose work this is
            self._close_ranges()
            self._profiler, self._steps = None, []
            self._at(PROFILE)
            with self._tolerant(steps[-1]):
                profiler.stop_trace()
                self._at(PROFILE)
                self._folder.mkdir(parents=True, exist_ok=True)
                self._remove_old()
                self._write_trace(profiler, steps)
            if self._records_snapshot:
                with self._tolerant(steps[-1]), replacing(self._file("memory.pickle")) as staged:
                    torch.cuda.memory._dump_snapshot(str(staged))
                with self._tolerant(steps[-1]):
                    torch.cuda.memory._record_memory_history(enabled=None)
        self._at(PROFILE)

    @contextlib.contextmanager
    def _tolerant(self, step: int) -> Iterator[None]:
        """Makes a warning of whatever torch, or a disk, does: training goes on."""
        try:
            yield
        except Exception as error:
            logger.warning("step %d: the profile is not whole in '%s': %s", step, self._folder, _why(error))

    def _write_trace(self, profiler: profile, steps: list[int]) -> None:
        """Writes the trace, and has it looked into by a process that takes no time from the training."""
        with tempfile.TemporaryDirectory(prefix="lockstep-profile-") as folder:
            plain = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(plain))
            self._at(PROFILE)
            if not plain.is_file():
                raise _HalfWritten
            num_bytes = plain.stat().st_size
            has_kernels = self._pack(plain, steps)
        if self._rank == 0:
            logger.info("profile    steps %d to %d: %s", steps[0], steps[-1], self._folder)
        if self._device.type == "cuda" and not has_kernels:
            logger.warning("the profile has no GPU kernels: another profiler may be on, or the driver may not allow it")
        if num_bytes > MOST_BYTES:
            raise ValueError(f"only the trace is there: {too_large(num_bytes)}")
        self._looking = begin_to_look_into(self._file(TRACE))

    def _pack(self, plain: Path, steps: list[int]) -> bool:
        """Compresses the file that torch wrote, and says in it of whom it is. Returns whether a GPU did anything."""
        with (
            open(plain, "rb") as source,
            replacing(self._file(TRACE)) as staged,
            gzip.open(staged, "wb", compresslevel=_GZIP_LEVEL) as packed,
        ):
            before, opened, rest = source.read(_CHUNK).partition(b"{")
            if before.strip() or not opened:
                raise _HalfWritten
            packed.write(about_text(self._about(steps)) + rest)
            has_kernels, end = _KERNEL in rest, rest[-_END:]
            while chunk := source.read(_CHUNK):
                has_kernels = has_kernels or _KERNEL in chunk
                packed.write(chunk)
                end = (end + chunk)[-_END:]
                self._at(PROFILE)
            if not end.rstrip().endswith(b"}"):
                raise _HalfWritten
        return has_kernels

    def _about(self, steps: list[int]) -> dict[str, Any]:
        is_cuda = self._device.type == "cuda"
        return {
            "rank": self._rank,
            "num_ranks": self._num_ranks,
            "host": socket.gethostname(),
            "device": torch.cuda.get_device_name(self._device) if is_cuda else "cpu",
            "torch": torch.__version__,
            "steps": steps,
            "given_up": None if self._is_whole else steps[-1],
            "is_warmed_up": self._is_warm,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(self._device) if is_cuda else None,
        }

    def _file(self, ending: str) -> Path:
        return self._folder / f"rank-{self._rank}.{ending}"

    def _remove_old(self) -> None:
        """Removes this rank's files, and those of ranks that there are no more, which are of other steps."""
        if self._looking is not None:  # into a trace that is about to go
            self._looking.kill()
            self._looking.wait()
            self._looking = None
        for file in [*self._folder.glob("rank-*.*"), *self._folder.glob(".rank-*.new")]:
            number = file.name.lstrip(".").removeprefix("rank-").partition(".")[0]
            is_mine = number == str(self._rank)
            if is_mine or (self._rank == 0 and number.isdigit() and int(number) >= self._num_ranks):
                file.unlink(missing_ok=True)


class _HalfWritten(Exception):
    """torch could not write a trace to its end, and said nothing."""


def _why(error: Exception) -> str:
    if isinstance(error, _HalfWritten):  # torch says nothing where it cannot write
        return f"torch could not write the trace; is there room in '{tempfile.gettempdir()}'?"
    return one_line_text(error) if isinstance(error, OSError | ValueError) else one_line(error)
