"""How much of a device's arithmetic a run uses: FLOPs of a sample, counted, against the peak of the device.

Model FLOPs utilisation (MFU; the PaLM paper, https://arxiv.org/abs/2204.02311, appendix B): what the model's forward
and backward need once, whatever is recomputed, over what the devices could have done in that time.
"""

from __future__ import annotations

import copy
import functools
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from trainer.data.loader import preserved_generators
from trainer.data.nested import map_tensors
from trainer.errors import one_line
from trainer.memory.devices import known_device
from trainer.tasks.base import Task

logger = logging.getLogger("lockstep")

_MOST_PRODUCTS = 20  # of large matrices, of which the fastest counts
_PRODUCT_SECONDS = 0.2  # and the time after which those that there are must do


class FlopCounter:
    """Counts what forward and backward of a sample take, on a copy of the model without memory.

    Args:
        model: as built, before it is sharded, compiled or recomputes anything. None is kept of it but shapes.
        task: what a batch means. The forward of its teacher counts, too.
        peak: FLOP/s of a device, from `peak_flops`; None on ranks that nobody asks.
    """

    def __init__(self, model: nn.Module, task: Task, peak: float | None) -> None:
        self._task = task
        self.peak = peak
        self._model: nn.Module | None = None
        self._teacher: nn.Module | None = None
        self.per_sample: float | None = None
        """FLOPs, once they are counted and where they can be."""
        self.num_operations: int | None = None
        """Of torch, for forward and backward of a micro-batch, once they are counted and where they can be."""
        if not task.stacks:  # such models select by values, and shapes alone do not tell what they do
            logger.info("no MFU: FLOPs are not counted where a batch is a list of samples")
            return
        try:
            self._model = _without_memory(model).train()
            self._teacher = _without_memory(task.teacher.model) if task.teacher is not None else None
        except Exception as error:  # of a user's model: it may hold what cannot be copied
            logger.info("no MFU: the model cannot be copied to count its FLOPs: %s", one_line(error))

    @property
    def is_due(self) -> bool:
        """Whether `count` is still to be called."""
        return self._model is not None

    def count(self, data: Any, num_samples: int) -> None:
        """Counts with the shapes of a micro-batch. Where that fails, nothing is known of MFU and all else goes on."""
        assert self._model is not None
        try:
            flops, operations = FlopCounterMode(display=False), OperationCounter()
            with preserved_generators(), torch.enable_grad(), flops, operations:
                if self._teacher is not None:
                    with torch.no_grad():
                        self._task.forward(self._teacher, _shapes_for(self._teacher, data))
                outputs = self._task.forward(self._model, _shapes_for(self._model, data))
                totals = [t.sum() for t in _tensors_in(outputs) if t.requires_grad]
                if totals:
                    torch.stack([total.float() for total in totals]).sum().backward()
            self.num_operations = operations.num_operations
            self.per_sample = flops.get_total_flops() / num_samples
        except Exception as error:  # code of the user's that needs numbers, an operation without a shape function, ...
            logger.info("no MFU: FLOPs cannot be counted: %s", one_line(error))
        self._model = self._teacher = None

    def utilisation(self, samples_per_second: float) -> float | None:
        """Returns the MFU of a device that trains so many samples per second; None where FLOPs are not known."""
        if self.per_sample is None or self.peak is None:
            return None
        return self.per_sample * samples_per_second / self.peak


class OperationCounter(TorchDispatchMode):
    """Counts the operations of torch that run in its body, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operations += 1
        return func(*args, **(kwargs or {}))


def _shapes_for(model: nn.Module, data: Any) -> Any:
    """Returns a batch without memory, in the type of a model's parameters.

    The step casts as it goes; counting needs one type only, and FLOPs are the same in all.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return map_tensors(lambda t: t.to("meta", dtype if t.is_floating_point() else t.dtype), data)


def _without_memory(model: nn.Module) -> nn.Module:
    """Returns a copy of a model whose parameters and buffers have shapes only."""
    instead: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()
    }
    instead |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, instead)


def _tensors_in(outputs: Any) -> Iterator[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, outputs)  # type: ignore[func-returns-value]
    return iter(found)


def peak_flops(device: torch.device, dtype: torch.dtype, is_fp8: bool, allow_tf32: bool) -> float:
    """Returns the FLOP/s that matrix products reach at most on a device.

    By its data sheet where the table of `trainer.memory.devices` has it; else, and on CPUs, measured with the product
    of two large matrices, which takes a moment.

    Args:
        device: that the step runs on.
        dtype: of the step.
        is_fp8: whether its matrix products are in 8 bits; where the peak has to be measured, that of `dtype` counts.
        allow_tf32: whether products in float32 may round to TF32.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known = known_device(properties.name, properties.total_memory)
        if known is not None:
            return known.flops.of("float8" if is_fp8 else str(dtype).removeprefix("torch."), allow_tf32)
    with torch.no_grad():
        settings = torch.get_num_threads(), torch.get_float32_matmul_precision()
        if device.type == "cpu":  # some have no units for half precision and are far slower in it than in float32
            floats = _measured_flops(device, torch.float32, 1024, settings)
            return max(floats, _measured_flops(device, dtype, 256, settings))
        return _measured_flops(device, dtype, 4096, settings)


@functools.cache
def _measured_flops(device: torch.device, dtype: torch.dtype, size: int, settings: tuple[int, str]) -> float:
    """Measures once in a process, for each number of threads and precision of products that a run had."""
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    started = time.perf_counter()
    seconds: list[float] = []
    while len(seconds) < _MOST_PRODUCTS and (len(seconds) < 2 or time.perf_counter() - started < _PRODUCT_SECONDS):
        seconds.append(_product_seconds(matrix))
    return 2 * size**3 / min(seconds)


def _product_seconds(matrix: torch.Tensor) -> float:
    _wait(matrix.device)
    started = time.perf_counter()
    torch.mm(matrix, matrix)
    _wait(matrix.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
