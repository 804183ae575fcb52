"""Memory that loader workers and the training process share: a batch is written once and never pickled.

A slot holds one batch. Its memory is anonymous (memfd), so the size of /dev/shm does not matter, and it grows to
the largest batch that it has held. In the training process it is registered with CUDA, which makes it pinned.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import tempfile
from contextlib import suppress
from multiprocessing import reduction
from typing import Any, NamedTuple

import torch

from trainer.data.nested import map_tensors

logger = logging.getLogger("lockstep")

_ALIGNMENT = 64  # bytes: vector loads
_GROWTH = 1 << 20  # bytes: a slot's size is a multiple of it
_NOBODY = -1  # no process's id


class SlotTensor(NamedTuple):
    """Where in its slot a tensor is."""

    offset: int  # bytes
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Slot:
    """A piece of shared memory for one batch at a time; every process maps it for itself.

    Args:
        pin: register the memory with CUDA, in the process that makes the slot.
    """

    def __init__(self, pin: bool = False) -> None:
        self._file = _anonymous_file()
        self._pinned_by = os.getpid() if pin else _NOBODY
        self._registered: torch.Tensor | None = None
        # uint8, the slot as this process has it mapped: now (the last), and before it grew for the batch in it.
        self._mappings: list[torch.Tensor] = []
        self._used = 0

    # Only workers that are not forked need these; forked ones inherit the file.
    def __getstate__(self) -> Any:
        return reduction.DupFd(self._file)

    def __setstate__(self, state: Any) -> None:
        self._file, self._pinned_by, self._registered, self._mappings, self._used = state.detach(), _NOBODY, None, [], 0

    @property
    def num_bytes(self) -> int:
        """Its size: that of the largest batch that it has held."""
        return os.fstat(self._file).st_size if self._file >= 0 else 0

    def clear(self) -> None:
        """Makes room for a new batch."""
        self._used = 0
        del self._mappings[:-1]

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Returns an uninitialised tensor in the slot, which grows where it must."""
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        self._used = start + math.prod(shape) * dtype.itemsize
        return self._map(self._used)[start : self._used].view(dtype).view(shape)

    @torch.no_grad()
    def put(self, data: Any) -> Any:
        """Returns `data` with its tensors moved into the slot and replaced by `SlotTensor`s."""
        return map_tensors(self._put, data)

    def get(self, data: Any) -> Any:
        """Returns `data` with its `SlotTensor`s replaced by tensors that share the slot's memory."""
        return map_tensors(self._view, data, SlotTensor)  # type: ignore[arg-type]

    def close(self) -> None:
        """Gives the memory back, once no tensor uses it."""
        self._unpin()
        self._mappings = []
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _put(self, tensor: torch.Tensor) -> SlotTensor:
        if tensor.numel() == 0:
            return SlotTensor(0, tensor.dtype, tuple(tensor.shape), tensor.stride())
        offset = self._offset_of(tensor)
        if offset is None:
            strides = torch.empty_like(tensor.as_subclass(torch.Tensor), device="meta").stride()  # as `clone` has them
            copy = self.allocate((tensor.numel(),), tensor.dtype).as_strided(tensor.shape, strides)
            copy.copy_(tensor)
            tensor, offset = copy, self._offset_of(copy)
            assert offset is not None
        return SlotTensor(offset, tensor.dtype, tuple(tensor.shape), tensor.stride())

    def _view(self, place: SlotTensor) -> torch.Tensor:
        size = math.prod(place.shape) * place.dtype.itemsize
        memory = self._map(place.offset + size)[place.offset : place.offset + size]
        return memory.view(place.dtype).as_strided(place.shape, place.strides)

    def _offset_of(self, tensor: torch.Tensor) -> int | None:
        """Returns where in the slot a tensor lies, in bytes; None where it does not, or has gaps."""
        memory = tensor.untyped_storage().data_ptr()
        if not _is_dense(tensor) or all(mapping.data_ptr() != memory for mapping in self._mappings):
            return None
        return tensor.data_ptr() - memory

    def _map(self, size: int) -> torch.Tensor:
        if not self._mappings or len(self._mappings[-1]) < size:
            rounded = max(-(-max(size, 1) // _GROWTH) * _GROWTH, os.fstat(self._file).st_size)
            os.ftruncate(self._file, rounded)
            self._unpin()
            # What is mapped already stays mapped while tensors use it: the same memory at another address.
            self._mappings.append(torch.frombuffer(mmap.mmap(self._file, rounded), dtype=torch.uint8))
            if self._pinned_by == os.getpid():
                self._pin(self._mappings[-1])
        return self._mappings[-1]

    def _pin(self, memory: torch.Tensor) -> None:
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        if int(error) == 0:
            self._registered = memory
        else:
            with suppress(RuntimeError):  # CUDA reports the failed call once more, with the next kernel
                torch.zeros(1, device="cuda")
            logger.warning("cannot pin %d MiB of host memory (CUDA error %s)", memory.numel() >> 20, error)

    def _unpin(self) -> None:
        # A slot grows or closes only when no copy to the device reads it any more.
        if self._registered is not None and self._pinned_by == os.getpid():
            torch.cuda.cudart().cudaHostUnregister(self._registered.data_ptr())
        self._registered = None


def _is_dense(tensor: torch.Tensor) -> bool:
    """Tells whether the elements fill a contiguous piece of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("lockstep-slot")
    file, path = tempfile.mkstemp(prefix="lockstep-slot-")  # systems other than Linux
    os.unlink(path)
    return file
