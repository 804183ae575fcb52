"""The memory of one training step: every storage that its operations create, from its birth to its death.

Owns the tracker, which counts fake and real tensors alike; the step that is simulated with it is
`trainer.memory.simulation`. It counts what torch's allocator is asked for: neither the allocator's fragments, nor
kernels' workspaces, nor the CUDA context. Estimates of time are `trainer.memory.roofline`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from trainer.memory.checkpointing import is_kept_by_selective
from trainer.memory.devices import Device
from trainer.memory.roofline import op_seconds

CATEGORIES = ("parameters", "buffers", "gradients", "optimizer", "inputs", "activations", "temporary", "communication")
CUDA_GRANULARITY = 512  # bytes that CUDA's caching allocator rounds up to
CPU_GRANULARITY = 64
_MAX_POINTS = 2000
_NUM_LARGEST = 10
_DEVICE_OF = torch.ops.prim.device.default  # asked of fake tensors all the time; creates nothing
_COLLECTIVES = ("c10d", "_c10d_functional", "fsdp")  # namespaces of operations; also of FSDP2's copies for them


@dataclass(frozen=True)
class Point:
    """The live bytes by category after one allocation or release, in a phase."""

    phase: str
    num_bytes: Mapping[str, int]


@dataclass(frozen=True)
class LargeTensor:
    """One storage alive at the peak: the shape of the tensor it was made for, and the operation or parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    category: str
    origin: str
    num_bytes: int


@dataclass
class BlockTrace:
    """A watched block's forward.

    Args:
        kept_bytes: live after it minus before: what its backward needs, and its output.
        seconds: of its operations.
        cheap_seconds: of those that are no matrix product, convolution or attention.
        before_bytes: live when its forward began.
        backward_peak_bytes: the most that is live from the start of its backward to that of the block before it.
    """

    kept_bytes: int = 0
    seconds: float = 0.0
    cheap_seconds: float = 0.0
    before_bytes: int = 0
    backward_peak_bytes: int = 0


@dataclass
class _Storage:
    num_bytes: int
    category: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str
    reference: Any = None


@dataclass
class _Event:
    phase: str
    storage: _Storage
    num_bytes: int  # negative where it is released


class MemoryTrace(TorchDispatchMode):
    """Counts the storages created while it is active, and those registered before.

    A storage's category is set where it is created: activations in the phase `forward`, temporary in others (also
    activations that gradient checkpointing computes anew). What turns out to be a gradient, optimizer state or
    exchanged between processes is counted as such from its birth. One trace serves one step and one thread at a time:
    autograd's threads call it for tensors on a GPU, while the main thread waits.

    Args:
        granularity: bytes that each storage is rounded up to.
        device: what the seconds are estimated for; None: no seconds.
        allow_tf32: whether the seconds of float32 products are those of tf32.
    """

    def __init__(
        self,
        granularity: int = CUDA_GRANULARITY,
        device: Device | None = None,
        allow_tf32: bool = False,
    ) -> None:
        super().__init__()
        assert granularity > 0
        self.granularity = granularity
        self.device = device
        self.allow_tf32 = allow_tf32
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peak_by_phase: dict[str, int] = {}
        self.seconds_by_phase: dict[str, float] = {}
        self.blocks: dict[str, BlockTrace] = {}
        self._phase = "setup"
        self._alive: dict[int, _Storage] = {}  # by the storage's address, which is its own as long as it lives
        self._events: list[_Event] = []
        self._peak_event = -1
        self._running: list[BlockTrace] = []
        self._in_backward_of: BlockTrace | None = None
        self._head = BlockTrace()  # whatever comes between the last block's forward and its backward
        self._handles: list[Any] = []
        self._resize: Any = None

    def __enter__(self) -> MemoryTrace:
        # FSDP2 frees and allocates the whole parameters by resizing their storages, which is no operation.
        resize = self._resize = torch.UntypedStorage.resize_

        def noted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._note_size(storage)
            return result

        torch.UntypedStorage.resize_ = noted  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, allocations and seconds count for the phase `name`."""
        before, self._phase = self._phase, name
        self.seconds_by_phase.setdefault(name, 0.0)
        self._note_peak_of_phase()
        try:
            yield
        finally:
            self._phase = before

    def register(self, tensors: Mapping[str, torch.Tensor] | Iterable[torch.Tensor], category: str) -> None:
        """Counts tensors that exist already, or gives those counted another category; a mapping's keys name them."""
        assert category in CATEGORIES
        named = tensors.items() if isinstance(tensors, Mapping) else ((category, tensor) for tensor in tensors)
        for name, tensor in named:
            for plain in _plain(tensor):
                storage = plain.untyped_storage()
                known = self._alive.get(storage._cdata)
                if known is None:
                    self._add(storage, plain, category, name)
                else:
                    known.category = category

    def watch_gradients(self, model: nn.Module) -> None:
        """Counts what becomes a parameter's gradient as such, until `close()`."""
        for name, param in model.named_parameters():
            if param.requires_grad:
                hook = param.register_post_accumulate_grad_hook(self._gradient_hook(name))
                self._handles.append(hook)

    def _gradient_hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def hook(param: torch.Tensor) -> None:
            if param.grad is not None:
                self.register({f"{name}.grad": param.grad}, "gradients")

        return hook

    def watch_blocks(self, blocks: Mapping[str, nn.Module]) -> None:
        """Notes in `blocks` what every forward of these modules keeps and takes, until `close()`.

        What gradient checkpointing runs again in backward does not count.
        """
        for name, block in blocks.items():
            self.blocks[name] = BlockTrace()
            self._handles += self._watch(block, self.blocks[name])

    def _watch(self, block: nn.Module, cost: BlockTrace) -> list[Any]:
        def enter(*_: Any) -> None:
            if self._phase == "forward":
                self._in_backward_of = None
                cost.before_bytes = cost.before_bytes or self.live_bytes
                cost.kept_bytes -= self.live_bytes
                self._running.append(cost)

        def begin_backward(_: torch.Tensor) -> None:
            self._in_backward_of = cost
            self._note_peak_of_phase()

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._phase == "forward":
                cost.kept_bytes += self.live_bytes
                self._running.remove(cost)
                self._in_backward_of, self._head.backward_peak_bytes = self._head, self.live_bytes
                for tensor in _tensors_in(output):
                    if tensor.requires_grad:
                        tensor.register_hook(begin_backward)

        return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]

    def close(self) -> None:
        """Removes the hooks of `watch_gradients` and `watch_blocks`, and counts nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._alive.clear()  # and with it the callbacks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is _DEVICE_OF:
            return result
        outputs = [plain for tensor in _tensors_in(result) for plain in _plain(tensor)]
        inputs = [*_tensors_in(args), *_tensors_in(list(kwargs.values()))]
        if func.namespace in _COLLECTIVES:
            self._count_as_communication(inputs)
        storages = [tensor.untyped_storage() for tensor in outputs]
        given: set[int] | None = None
        is_new = False
        for tensor, storage in zip(outputs, storages, strict=True):
            if storage._cdata in self._alive:
                continue
            if given is None:
                given = {plain.untyped_storage()._cdata for tensor in inputs for plain in _plain(tensor)}
            if storage._cdata in given:  # a view of what nobody registered
                continue
            is_new = True
            self._add(storage, tensor, "activations" if self._phase == "forward" else "temporary", str(func))
        if self.device is not None and (is_new or func._schema.is_mutable):
            self._add_seconds(func, args, kwargs, result, [*inputs, *outputs])
        return result

    def _add_seconds(self, func: Any, args: Any, kwargs: Any, result: Any, tensors: list[torch.Tensor]) -> None:
        assert self.device is not None
        seconds = op_seconds(self.device, func, args, kwargs, result, tensors, self.allow_tf32)
        self.seconds_by_phase[self._phase] = self.seconds_by_phase.get(self._phase, 0.0) + seconds
        for cost in self._running:
            cost.seconds += seconds
            if not is_kept_by_selective(func):
                cost.cheap_seconds += seconds

    def _add(self, storage: torch.UntypedStorage, tensor: torch.Tensor, category: str, origin: str) -> None:
        num_bytes = -(-storage.nbytes() // self.granularity) * self.granularity
        if num_bytes == 0:
            return
        self._enter(storage, _Storage(num_bytes, category, tuple(tensor.shape), tensor.dtype, origin))

    def _enter(self, storage: torch.UntypedStorage, entry: _Storage) -> None:
        address = storage._cdata

        def released(_: Any) -> None:
            if self._alive.get(address) is entry:
                del self._alive[address]
                self._count(entry, -entry.num_bytes)

        # The storage's Python object lives as long as the storage itself, whoever else refers to it: autograd's saved
        # tensors do so from C++. torch.distributed's memory tracker stands on the same.
        entry.reference = weakref.ref(storage, released)
        self._alive[address] = entry
        self._count(entry, entry.num_bytes)

    def _count(self, entry: _Storage, num_bytes: int) -> None:
        if num_bytes == 0:
            return
        self._events.append(_Event(self._phase, entry, num_bytes))
        self.live_bytes += num_bytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self._peak_event = self.live_bytes, len(self._events) - 1
        if num_bytes > 0:
            self._note_peak_of_phase()

    def _note_size(self, storage: torch.UntypedStorage) -> None:
        """Counts a known storage with the size it has now: to the trace it is another one, that may have no bytes."""
        before = self._alive.get(storage._cdata)
        if before is not None:
            num_bytes = -(-storage.nbytes() // self.granularity) * self.granularity
            self._count(before, -before.num_bytes)
            self._enter(storage, replace(before, num_bytes=num_bytes, reference=None))

    def _count_as_communication(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            for plain in _plain(tensor):
                known = self._alive.get(plain.untyped_storage()._cdata)
                if known is not None and known.category in ("activations", "temporary"):
                    known.category = "communication"

    def _note_peak_of_phase(self) -> None:
        self.peak_by_phase[self._phase] = max(self.live_bytes, self.peak_by_phase.get(self._phase, 0))
        part = self._in_backward_of
        if part is not None and self._phase in ("forward", "backward"):
            part.backward_peak_bytes = max(part.backward_peak_bytes, self.live_bytes)

    @property
    def head_peak_bytes(self) -> int:
        """The most that was live between the last block's forward and its backward."""
        return self._head.backward_peak_bytes

    def live_by_category(self) -> dict[str, int]:
        """Returns the bytes alive now by category."""
        live = dict.fromkeys(CATEGORIES, 0)
        for entry in self._alive.values():
            live[entry.category] += entry.num_bytes
        return live

    def timeline(self, max_points: int = _MAX_POINTS) -> tuple[Point, ...]:
        """Returns the live bytes after every event, or after some of them, the peak always among them."""
        every = max(1, -(-len(self._events) // max_points))
        live = dict.fromkeys(CATEGORIES, 0)
        points = []
        for i, event in enumerate(self._events):
            live[event.storage.category] += event.num_bytes
            if i % every == 0 or i in (self._peak_event, len(self._events) - 1):
                points.append(Point(event.phase, dict(live)))
        return tuple(points)

    def _entries_at_peak(self) -> list[_Storage]:
        alive: dict[int, _Storage] = {}
        for event in self._events[: self._peak_event + 1]:
            if event.num_bytes > 0:
                alive[id(event.storage)] = event.storage
            else:
                alive.pop(id(event.storage))
        return list(alive.values())

    def at_peak(self) -> dict[str, int]:
        """Returns the bytes by category at the moment of the peak."""
        at_peak = dict.fromkeys(CATEGORIES, 0)
        for entry in self._entries_at_peak():
            at_peak[entry.category] += entry.num_bytes
        return at_peak

    def largest_at_peak(self) -> tuple[LargeTensor, ...]:
        """Returns the largest storages at the moment of the peak, the largest first."""
        largest = sorted(self._entries_at_peak(), key=lambda entry: -entry.num_bytes)[:_NUM_LARGEST]
        return tuple(LargeTensor(x.shape, x.dtype, x.category, x.origin, x.num_bytes) for x in largest)


def _tensors_in(data: Any) -> Iterator[torch.Tensor]:
    if isinstance(data, torch.Tensor):
        yield data
    elif isinstance(data, list | tuple):
        for part in data:
            yield from _tensors_in(part)


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Returns the tensors with storages of their own that a tensor consists of."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
        return [plain for part in parts if isinstance(part, torch.Tensor) for plain in _plain(part)]
    return [tensor] if tensor.layout is torch.strided else []
