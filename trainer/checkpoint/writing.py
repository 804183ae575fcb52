"""Saving beside the training: a copy of the state, a thread that writes it, and the commit of all ranks together.

`Saver.save` copies what a step may change at any time and lets the training go on; the rest, which only the optimizer's
step changes, is copied while the next forward and backward run, and `Saver.before_update` waits for it. One thread per
rank writes; at most one save is in flight. Owns when and how; what is kept is `trainer.checkpoint.folder`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.layout import Item, Layout, Ranks, make_layout
from trainer.checkpoint.manifest import FileRecord, Manifest, Progress, new_checksum
from trainer.checkpoint.state import State
from trainer.errors import UserError, one_line, one_line_text
from trainer.memory.sharding import local_part
from trainer.units import format_bytes

logger = logging.getLogger("lockstep")

T = TypeVar("T")

_PIECE = 32 * 2**20  # bytes that are hashed and then written, while they are in the processor's cache


class SaveFailed(RuntimeError):
    """A checkpoint could not be written, and the run must not go on without it."""


@dataclass
class SaveStatistics:
    """What saving has come to in this attempt, on this rank."""

    num_saved: int = 0
    num_failed: int = 0
    write_seconds: float = 0.0  # that the thread was at work behind the training
    num_bytes: int = 0  # of the last checkpoint, of all ranks
    longest_seconds: float = 0.0  # from the call of `save` to a checkpoint that is there


@dataclass
class _Save:
    """One save on its way."""

    manifest: Manifest  # without its files
    layout: Layout
    state: State
    started: float
    is_copied: threading.Event = field(default_factory=threading.Event)
    device_event: torch.cuda.Event | None = None  # when the GPU has copied all of it
    versions: list[tuple[torch.Tensor, int]] = field(default_factory=list)  # of what must not change meanwhile
    is_released: threading.Event = field(default_factory=threading.Event)  # by the training: the copy is a good one
    was_changed: bool = False
    error: str | None = None  # what went wrong on any rank, the same on all

    @property
    def step(self) -> int:
        return self.manifest.progress.step


class Saver:
    """Writes the checkpoints of a run; all ranks call its methods together.

    Args:
        folder: where to.
        ranks: the processes.
        group: a gloo group of its own, for the thread behind the training; None for a single process.
        behind: write behind the training (`checkpoint.async_save`); else `save` returns when all is written.
        device: where the state is.
        beat: called whenever a piece is written, on the thread: the save gets on.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        ranks: Ranks,
        group: dist.ProcessGroup | None,
        behind: bool,
        device: torch.device,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.ranks = ranks
        self.behind = behind
        self.statistics = SaveStatistics()
        self.saved_step: int | None = None  # of the newest checkpoint that is there
        self.failures: list[str] = []  # what went wrong with each save that failed
        # Told, on rank 0, of each checkpoint that is there and of what becomes known of it later; on either thread.
        self.on_saved: Callable[[Progress], None] = lambda progress: None
        self._group = group
        self._device = device
        self._beat = beat
        self._layout: Layout | None = None
        self._form: object = None
        self._memory: _HostMemory | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and behind else None
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None

    # ---- called by the training ---------------------------------------------------------------------------

    def prepare(self, state: State) -> None:
        """Plans who writes what and gets memory for the copy, so that the first save need not.

        Raises:
            UserError: something in the state cannot be saved.
        """
        self._plan(state)

    def save(self, state: State, manifest: Manifest) -> None:
        """Begins to save the present state. On return everything may change but what `before_update` guards.

        Args:
            state: what to save.
            manifest: all but the tensors and the files.
        """
        started = time.perf_counter()
        self.wait()
        if self.saved_step == manifest.progress.step:
            self._replace_progress(manifest.progress)
            return
        layout = self._plan(state)
        manifest = replace(manifest, progress=replace(manifest.progress), tensors=layout.tensors)
        self._save = save = _Save(manifest, layout, state, started)
        if self._memory is not None and not self._memory.is_there():
            logger.warning("checkpoint: no host memory for a copy of the state, so that training waits for each save")
            self._memory, self.behind = None, False
        if self._memory is not None:
            self._begin_copy(save)
        elif self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the thread's own stream reads it
        self._thread = threading.Thread(target=self._run, args=[save], name="checkpoint", daemon=True)
        self._thread.start()
        if not self.behind:
            self.wait()

    @property
    def holds_state(self) -> bool:
        """Whether `before_update` has to be called before weights change."""
        return self._save is not None and not self._save.is_released.is_set()

    def before_update(self) -> None:
        """Waits until weights and optimizer state may change: call it before an optimizer's step, and the like."""
        save = self._save
        if save is None or save.is_released.is_set():
            return
        if save.device_event is not None:
            torch.cuda.current_stream(self._device).wait_event(save.device_event)  # the host does not wait
        elif self._memory is not None:
            save.is_copied.wait()
        else:
            self._join()
        save.was_changed = any(tensor._version != version for tensor, version in save.versions)
        save.versions.clear()
        save.is_released.set()

    def wait(self) -> None:
        """Waits until nothing is in flight."""
        self.before_update()
        self._join()

    def give_up(self, seconds: float) -> None:
        """Gives a save in flight so long to end, where training has failed: other ranks may never take part in it."""
        if self._thread is not None:
            self.before_update()
            self._thread.join(seconds)

    def _join(self) -> None:
        if self._thread is not None and self._save is not None:
            self._thread.join()
            self._thread = self._save = None

    def _replace_progress(self, progress: Progress) -> None:
        """The step is saved already: only what is known of it is new."""
        if self.ranks.rank != 0:
            return
        try:
            self.folder.replace_progress(progress)
        except OSError as error:
            self._note_failure(one_line_text(error))
            logger.warning("checkpoint of step %d: results not added: %s", progress.step, one_line_text(error))
            return
        self.on_saved(progress)

    # ---- the plan and the copy ----------------------------------------------------------------------------

    def _plan(self, state: State) -> Layout:
        form = [(name, tensor.shape, tensor.dtype) for name, tensor in state.tensors.items()]
        # The form changes when the optimizer takes its first real step, and hardly ever again.
        if any(self.ranks.gather(form != self._form)):
            self.wait()
            self._memory = None
            try:
                self._layout = make_layout(state.tensors, self.ranks)
            except ValueError as error:
                raise UserError(f"this state cannot be saved: {one_line_text(error)}", path="checkpoint") from error
            self._form = form
            if self.behind:
                self._memory = _HostMemory(self._layout.num_bytes, pinned=self._device.type == "cuda")
        assert self._layout is not None
        return self._layout

    def _begin_copy(self, save: _Save) -> None:
        """Copies what may change at any time. On a GPU it also begins to copy the rest, on a stream of its own."""
        guarded, free = _split(save)
        for item in guarded:
            tensor = _local(save.state, item)
            save.versions.append((tensor, tensor._version))
        if self._stream is None:
            self._copy(save, free)
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)  # for the step that made the state
        with torch.cuda.stream(self._stream):
            self._copy(save, free)
            current.wait_event(self._stream.record_event())  # before the next forward
            self._copy(save, guarded)
            save.device_event = self._stream.record_event()

    def _copy(self, save: _Save, items: Iterable[Item]) -> None:
        assert self._memory is not None
        for item in items:
            source = _local(save.state, item)
            self._memory.part(item).copy_(source, non_blocking=True)
            if self._stream is not None and source.device.type == "cuda":
                # Whoever frees this tensor must not reuse its memory before the copy has read it.
                source.record_stream(self._stream)

    # ---- the thread ---------------------------------------------------------------------------------------

    def _run(self, save: _Save) -> None:
        """Writes this rank's file and takes part in the commit. Never raises: `save.error` tells."""
        started = time.perf_counter()
        try:
            save.error = self._write_and_commit(save)
        except Exception as error:  # a peer is gone, and the training fails by itself
            save.error = one_line(error)
        save.is_copied.set()
        self.statistics.write_seconds += time.perf_counter() - started
        if save.error is None:
            self.saved_step = save.step
            self.statistics.num_saved += 1
            seconds = time.perf_counter() - save.started
            self.statistics.longest_seconds = max(self.statistics.longest_seconds, seconds)
        else:
            self._note_failure(save.error)
        if self.ranks.rank == 0:
            self._tell(save)
        if self.ranks.rank == 0 and save.error is None:
            self.on_saved(save.manifest.progress)

    def _note_failure(self, error: str) -> None:
        self.failures.append(error)
        self.statistics.num_failed += 1

    def _tell(self, save: _Save) -> None:
        if save.error is None:
            size, seconds = format_bytes(self.statistics.num_bytes), time.perf_counter() - save.started
            logger.info("checkpoint step %d: %s, written in %.1f s", save.step, size, seconds)
        else:
            stands = f"that of step {self.saved_step} stands" if self.saved_step is not None else "there is none yet"
            logger.warning("checkpoint of step %d failed, and %s: %s", save.step, stands, save.error)

    def _write_and_commit(self, save: _Save) -> str | None:
        """Returns what went wrong on any rank, the same on all; None where the checkpoint is there."""
        storage, name = self.folder.storage, self.folder.name(save.step)
        staged, error = self._from_rank_0(lambda: storage.begin(name))
        if staged is None:
            return error
        record, error = _attempt(lambda: self._write_file(save, staged))
        outcomes = self._gather((save.layout.file, record, error))
        errors = [f"rank {rank}: {error}" for rank, (_, _, error) in enumerate(outcomes) if error is not None]
        if errors:
            if self.ranks.rank == 0:
                self.folder.give_up(staged)
            return errors[0]
        files = {file: record for file, record, _ in outcomes if file is not None and record is not None}
        self.statistics.num_bytes = sum(record.size for record in files.values())
        _, error = self._from_rank_0(lambda: self.folder.publish(staged, replace(save.manifest, files=files)))
        if error is not None and self.ranks.rank == 0:
            self.folder.give_up(staged)  # or it takes the room that the next one needs
        return error

    def _write_file(self, save: _Save, staged: str) -> FileRecord | None:
        if self._memory is not None:
            if save.device_event is not None:
                save.device_event.synchronize()
            else:
                self._copy(save, _split(save)[0])
            save.is_copied.set()
            save.is_released.wait()
            if save.was_changed:
                raise OSError(
                    "weights were changed outside of the optimizer's step while they were copied; "
                    "set checkpoint.async_save to false"
                )
        if save.layout.file is None:
            return None
        found, size = new_checksum(), 0

        def parts() -> Iterator[memoryview]:
            nonlocal size
            for whole in (memoryview(save.layout.header), *self._data(save)):
                for begin in range(0, len(whole), _PIECE):
                    piece = whole[begin : begin + _PIECE]
                    found.update(piece)
                    size += len(piece)
                    yield piece
                    self._beat()

        self.folder.storage.write(staged, save.layout.file, parts())
        return FileRecord(size, found.hexdigest())

    def _data(self, save: _Save) -> Iterator[memoryview]:
        """Yields what follows the header in this rank's file."""
        if self._memory is not None:
            yield self._memory.view()
            return
        for item in save.layout.items:
            tensor = _local(save.state, item).cpu().contiguous()
            yield tensor.reshape(-1).view(torch.uint8).numpy().data

    def _gather(self, value: T) -> list[T]:
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * self.ranks.num_ranks
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def _from_rank_0(self, action: Callable[[], T]) -> tuple[T | None, str | None]:
        """Does something on rank 0, and returns its result or what went wrong there on every rank."""
        outcome = _attempt(action) if self.ranks.rank == 0 else (None, None)
        return self._gather(outcome)[0]


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """Returns the result of an action and None, or None and what went wrong."""
    try:
        return action(), None
    except OSError as error:
        return None, one_line_text(error)
    except Exception as error:
        return None, one_line(error)


def _split(save: _Save) -> tuple[list[Item], list[Item]]:
    """Returns what only an optimizer's step changes, and what may change at any time."""
    guarded = [item for item in save.layout.items if item.name in save.state.guarded]
    return guarded, [item for item in save.layout.items if item.name not in save.state.guarded]


def _local(state: State, item: Item) -> torch.Tensor:
    """Returns this rank's part of a tensor."""
    return local_part(state.tensors[item.name])


class _HostMemory:
    """Memory for the copy, got in a thread: touching a GiB for the first time takes up to a second.

    Args:
        num_bytes: of data in this rank's file.
        pinned: such that a GPU copies to it by itself.
    """

    def __init__(self, num_bytes: int, pinned: bool) -> None:
        self._num_bytes = num_bytes
        self._pinned = pinned
        self._buffer: torch.Tensor | None = None
        self._thread = threading.Thread(target=self._get, name="checkpoint-memory", daemon=True)
        self._thread.start()

    def _get(self) -> None:
        try:
            buffer = torch.empty(self._num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
            if not self._pinned:
                buffer.zero_()
            self._buffer = buffer
        except (RuntimeError, MemoryError):
            return

    def is_there(self) -> bool:
        """Waits for the memory, and tells whether there is any."""
        self._thread.join()
        return self._buffer is not None

    def part(self, item: Item) -> torch.Tensor:
        """Returns the place of an item, in its shape."""
        assert self._buffer is not None
        return self._buffer[item.begin : item.begin + item.num_bytes].view(item.dtype).view(item.sizes)

    def view(self) -> memoryview:
        """Returns all of it."""
        assert self._buffer is not None
        return self._buffer.numpy().data
