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
from trainer.errors import UserError, one_line_text
from trainer.profiling.tables import kernels_text
from trainer.profiling.traces import Analysis, analyse, step_range
from trainer.telemetry.clock import Clock

logger = logging.getLogger("lockstep")

_MOST_ALLOCATIONS = 1_000_000  # in a snapshot, a ring buffer of the last ones
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
        beat: called between long pieces of work.
    """

    def __init__(
        self,
        config: ProfileConfig,
        folder: Path,
        rank: int,
        num_ranks: int,
        device: torch.device,
        clock: Clock,
        beat: Callable[[], None],
    ) -> None:
        assert config.steps is not None
        self._config = config
        self._first, self._last = config.steps
        self._folder = folder
        self._rank, self._num_ranks = rank, num_ranks
        self._device = device
        self._clock = clock
        self._beat = beat
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
        beat: Callable[[], None],
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
        return cls(config, folder, rank, num_ranks, device, clock, beat)

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
            profiler.stop_trace()
            self._profiler, self._steps = None, []
            self._beat()
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                if self._rank == 0:
                    self._remove_others()
                if self._records_snapshot:
                    with self._replacing("memory.pickle") as staged:
                        torch.cuda.memory._dump_snapshot(str(staged))
                    self._beat()
                self._write_trace(profiler, steps)
            except (OSError, ValueError, RuntimeError) as error:  # torch has RuntimeErrors for full disks
                where = f"'{self._folder}'"
                logger.warning("step %d: the profile cannot be written to %s: %s", steps[-1], where, _why(error))
            finally:
                if self._records_snapshot:
                    torch.cuda.memory._record_memory_history(enabled=None)
        self._beat()

    def _write_trace(self, profiler: profile, steps: list[int]) -> None:
        with tempfile.TemporaryDirectory(prefix="lockstep-profile-") as folder:
            plain = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(plain))
            self._beat()
            with open(plain, encoding="utf-8", errors="replace") as stream:
                trace = json.load(stream)
            self._beat()
            found = analyse(trace, is_alone=self._num_ranks == 1)
            self._beat()
            with (
                self._replacing("trace.json.gz") as staged,
                open(plain, "rb") as source,
                gzip.open(staged, "wb", compresslevel=_GZIP_LEVEL) as packed,
            ):
                shutil.copyfileobj(source, packed, 1 << 20)
        self._beat()
        if self._config.memory and self._device.type != "cuda":
            self._write_text("memory.json", json.dumps(found.allocations()))
        record = {**self._about(steps), **found.record()}
        self._write_text("kernels.json", json.dumps(record, indent=1))
        self._write_text("kernels.txt", kernels_text(record))
        if self._rank == 0:
            logger.info("profile    steps %d to %d: %s", steps[0], steps[-1], self._folder)
        self._warn_of_missing_kernels(found)

    def _warn_of_missing_kernels(self, found: Analysis) -> None:
        if self._device.type == "cuda" and not found.has_gpu:
            message = "the profile has no GPU kernels: the driver may keep its counters to administrators"
            logger.warning("%s (NVreg_RestrictProfilingToAdminUsers)", message)

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

    def _remove_others(self) -> None:
        """Removes the files of ranks that the run had more of before: they are of other steps."""
        for file in self._folder.glob("rank-*.*"):
            number = file.name.removeprefix("rank-").partition(".")[0]
            if number.isdigit() and int(number) >= self._num_ranks:
                file.unlink()


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"torch's trace is cut short; is there room in '{tempfile.gettempdir()}'?"
    return one_line_text(error)
