"""Recording a few steps with torch's profiler, and the files that come of it.

Owns when it is on, the ranges that make a trace read like the loop, and that a trace that cannot be written ends no
run. What is in a trace is found by `trainer.profiling.traces`.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from trainer.config_reporting import ProfileConfig
from trainer.errors import UserError, one_line, one_line_text
from trainer.faults.judging import PROFILE
from trainer.profiling.tables import kernels_text
from trainer.profiling.traces import Analysis, analyse, read_trace, step_range
from trainer.telemetry.clock import Clock
from trainer.units import format_bytes

logger = logging.getLogger("lockstep")

_MOST_ALLOCATIONS = 1_000_000  # in a snapshot, a ring buffer of the last ones
_MOST_BYTES = 1 << 30  # of a trace that is looked into: each takes about five times that, in memory
_GZIP_LEVEL = 5  # 1% larger than the default of 9, in a third of the time
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
            if not self._steps:
                self._start()
            self._close_ranges()
            self._steps.append(step)
            self._is_whole = False
            self._open_range(step_range(step))
        elif step == self._first - 1:
            self._warm_up()
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
        """Writes what there is, where the run ends in the midst of the steps to trace."""
        if self._steps:
            self._write()
        self._stop()
        self._is_done = True

    def give_up(self) -> None:
        """The same for a run that failed. On several GPUs nothing is written, as nobody may wait for a device then."""
        if self._device.type == "cpu" or self._num_ranks == 1:
            with contextlib.suppress(Exception):  # what ended the run may end this as well
                self.close()

    # ---- the profiler -------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        if self._profiler is not None:
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", _QUIET)
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            profile_memory=self._config.memory,
            record_shapes=self._config.shapes,
            with_stack=self._config.stacks,
        )
        self._profiler.prepare_trace()
        self._is_warm = True

    def _start(self) -> None:
        """Begins to record, with an idle device: what it is still doing belongs to the steps before."""
        if self._profiler is None:
            self._warm_up()
            self._is_warm = False
        assert self._profiler is not None
        if self._records_snapshot:
            torch.cuda.memory._record_memory_history(
                context="alloc", stacks="python", max_entries=_MOST_ALLOCATIONS, clear_history=True
            )
        self._wait_for_device()
        self._profiler.start_trace()

    @property
    def _records_snapshot(self) -> bool:
        return self._config.memory and self._device.type == "cuda"

    def _stop(self) -> None:
        """Ends a profiler that warmed up, without a trace."""
        if self._profiler is not None:
            self._profiler.start_trace()
            self._profiler.stop_trace()
            self._profiler = None

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
            profiler.stop_trace()
            with self._tolerant(steps[-1]):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._remove_old()
                self._write_trace(profiler, steps)
            if self._records_snapshot:
                with self._tolerant(steps[-1]), self._replacing("memory.pickle") as staged:
                    torch.cuda.memory._dump_snapshot(str(staged))
                torch.cuda.memory._record_memory_history(enabled=None)
        self._at(PROFILE)

    @contextlib.contextmanager
    def _tolerant(self, step: int) -> Iterator[None]:
        """Makes a warning of whatever torch, a disk, or a trace unlike any seen does: training goes on."""
        try:
            yield
        except Exception as error:
            logger.warning("step %d: the profile is not whole in '%s': %s", step, self._folder, _why(error))
        self._at(PROFILE)

    def _write_trace(self, profiler: profile, steps: list[int]) -> None:
        with tempfile.TemporaryDirectory(prefix="lockstep-profile-") as folder:
            plain = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(plain))
            self._at(PROFILE)
            with (
                self._replacing("trace.json.gz") as staged,
                open(plain, "rb") as source,
                gzip.open(staged, "wb", compresslevel=_GZIP_LEVEL) as packed,
            ):
                shutil.copyfileobj(source, packed, 1 << 20)
            self._at(PROFILE)
            if plain.stat().st_size > _MOST_BYTES:
                size = format_bytes(plain.stat().st_size)
                raise ValueError(f"only the trace is there: {size} are too much to look into; trace fewer steps")
            with open(plain, encoding="utf-8", errors="replace") as stream:
                found = analyse(read_trace(stream), is_alone=self._num_ranks == 1)
        self._at(PROFILE)
        if self._config.memory and self._device.type != "cuda":
            self._write_text("memory.json", json.dumps(found.memory.table(found.start)))
        record = {**self._about(steps), **found.record()}
        self._write_text("kernels.json", json.dumps(record, indent=1))
        self._write_text("kernels.txt", kernels_text(record))
        if self._rank == 0:
            logger.info("profile    steps %d to %d: %s", steps[0], steps[-1], self._folder)
        self._warn_of_missing_kernels(found)

    def _warn_of_missing_kernels(self, found: Analysis) -> None:
        if self._device.type == "cuda" and not found.has_gpu:
            logger.warning("the profile has no GPU kernels: another profiler may be on, or the driver may not allow it")

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

    def _write_text(self, name: str, text: str) -> None:
        with self._replacing(name) as staged:
            staged.write_text(text, encoding="utf-8")

    @contextlib.contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        """Gives a file to write, which takes the place of this rank's file of that name once it is whole."""
        file = self._folder / f"rank-{self._rank}.{name}"
        staged = file.with_name(f".{file.name}.new")
        try:
            yield staged
            os.replace(staged, file)
        finally:
            with contextlib.suppress(OSError):
                staged.unlink()

    def _remove_old(self) -> None:
        """Removes this rank's files, and those of ranks that there are no more, which are of other steps."""
        for file in self._folder.glob("rank-*.*"):
            number = file.name.removeprefix("rank-").partition(".")[0]
            is_mine = number == str(self._rank)
            if is_mine or (self._rank == 0 and number.isdigit() and int(number) >= self._num_ranks):
                file.unlink()


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError | FileNotFoundError):  # torch says nothing where it cannot write
        return f"torch could not write the trace; is there room in '{tempfile.gettempdir()}'?"
    return one_line_text(error) if isinstance(error, OSError | ValueError) else one_line(error)
