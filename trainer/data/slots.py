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
from multiprocessing import reduction
from typing import Any, NamedTuple

import torch

from trainer.data.nested import map_tensors

logger = logging.getLogger("lockstep")

_ALIGNMENT = 64  # bytes: vector loads
_GROWTH = 1 << 20  # bytes: a slot's size is a multiple of it


class SlotTensor(NamedTuple):
    """Where in its slot a tensor is."""

    offset: int  # bytes
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Slot:
    """A piece of shared memory for one batch at a time; every process maps it for itself."""

    def __init__(self) -> None:
        self._file = _anonymous_file()
        self._bytes: torch.Tensor | None = None  # uint8, the whole slot as this process has it mapped
        self._registered: list[torch.Tensor] = []
        self._used = 0

    # Only spawned workers need these; forked ones inherit the file.
    def __getstate__(self) -> Any:
        return reduction.DupFd(self._file)

    def __setstate__(self, state: Any) -> None:
        self._file, self._bytes, self._registered, self._used = state.detach(), None, [], 0

    def clear(self) -> None:
        """Makes room for a new batch."""
        self._used = 0

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Returns an uninitialised tensor in the slot, which grows where it must."""
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        self._used = start + math.prod(shape) * dtype.itemsize
        return self._map(self._used)[start : self._used].view(dtype).view(shape)

    def put(self, data: Any) -> Any:
        """Returns `data` with its tensors moved into the slot and replaced by `SlotTensor`s."""
        return map_tensors(self._put, data)

    def get(self, data: Any, pin: bool) -> Any:
        """Returns `data` with its `SlotTensor`s replaced by tensors that share the slot's memory."""

        def view(place: SlotTensor) -> torch.Tensor:
            size = math.prod(place.shape) * place.dtype.itemsize
            memory = self._map(place.offset + size, pin)[place.offset : place.offset + size]
            return memory.view(place.dtype).as_strided(place.shape, place.strides)

        return map_tensors(view, data, SlotTensor)  # type: ignore[arg-type]

    def close(self) -> None:
        """Gives the memory back, once no tensor uses it."""
        for memory in self._registered:
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
        self._registered, self._bytes = [], None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _put(self, tensor: torch.Tensor) -> SlotTensor:
        if not self._holds(tensor):
            copy = self.allocate(tuple(tensor.shape), tensor.dtype)
            copy.copy_(tensor)
            tensor = copy
        assert self._bytes is not None
        offset = tensor.data_ptr() - self._bytes.data_ptr() if tensor.numel() else 0
        return SlotTensor(offset, tensor.dtype, tuple(tensor.shape), tensor.stride())

    def _holds(self, tensor: torch.Tensor) -> bool:
        if self._bytes is None:
            return False
        offset = tensor.data_ptr() - self._bytes.data_ptr()
        is_dense = tensor.untyped_storage().data_ptr() == self._bytes.data_ptr() and _is_dense(tensor)
        return is_dense and 0 <= offset < self._used

    def _map(self, size: int, pin: bool = False) -> torch.Tensor:
        if self._bytes is None or len(self._bytes) < size:
            rounded = max(-(-size // _GROWTH) * _GROWTH, os.fstat(self._file).st_size)
            os.ftruncate(self._file, rounded)
            # What is mapped already stays mapped while tensors use it: the same memory at another address.
            self._bytes = torch.frombuffer(mmap.mmap(self._file, rounded), dtype=torch.uint8)
            if pin:
                self._pin(self._bytes)
        return self._bytes

    def _pin(self, memory: torch.Tensor) -> None:
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        if int(error) == 0:
            self._registered.append(memory)
        else:
            logger.warning("cannot pin %d MiB of host memory (CUDA error %s)", memory.numel() >> 20, error)


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
