"""Models and batches without memory: fake tensors, which have a shape and a type but no numbers.

Owns what makes a training step run on them: answers where code asks for a number, the kernels of a GPU on a machine
that has none, and other processes to talk to. Fake tensors are said to be on the CPU always, because torch's autograd
refuses fake CUDA tensors where CUDA finds no device; what a GPU would do otherwise than a CPU with the same tensors is
done here:

- autocast computes in float32 what it does on a GPU (normalisation, softmax, sums);
- dropout keeps a mask of one byte per element;
- attention is one fused operation, also with dropout or with a mask that is trained.

Kernels' workspaces are not known to fake tensors, and neither is cuDNN's choice of algorithm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FakeProcessGroup, _register_process_group, _unregister_process_group
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.autograd.graph import _engine_run_backward
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.data.nested import map_tensors

_ATEN = torch.ops.aten
_LOW = (torch.bfloat16, torch.float16)
_AUTOCAST_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

# What autocast casts to float32 on a GPU (torch's aten/src/ATen/autocast_mode.h); those that a CPU casts too are
# left to it.
_IN_FLOAT32 = [
    "acos",
    "asin",
    "cosh",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "reciprocal",
    "rsqrt",
    "sinh",
    "tan",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "softplus",
    "layer_norm",
    "native_layer_norm",
    "group_norm",
    "cosine_similarity",
    "poisson_nll_loss",
    "cosine_embedding_loss",
    "nll_loss",
    "nll_loss2d",
    "hinge_embedding_loss",
    "kl_div",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "mse_loss",
    "margin_ranking_loss",
    "multilabel_margin_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "multi_margin_loss",
    "binary_cross_entropy_with_logits",
    "dist",
    "pdist",
    "cdist",
    "renorm",
    "logsumexp",
    "softmax.int",
    "log_softmax.int",
    "norm.Scalar",
    "norm.ScalarOpt_dim",
]
_SUMMED_IN_FLOAT32 = ["sum", "sum.dim_IntList", "cumsum", "cumprod", "prod", "prod.dim_int"]  # with an argument `dtype`


class CannotSimulate(RuntimeError):
    """The step needs numbers that fake tensors lack, or an operation that they do not know."""


class _Answers(TorchDispatchMode):
    """Answers with a number where code asks a tensor for one; skips fused optimizers, which allocate nothing.

    A bool is False: `trunc_normal_` draws anew as long as any number is out of bounds. Others are 1, so that a step's
    bias correction divides by something.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN._local_scalar_dense.default:
            if isinstance(args[0], FakeTensor) or args[0].is_meta:
                dtype = args[0].dtype
                return False if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        elif func._schema.name.startswith("aten::_fused_") and func._schema.name.endswith("_"):
            return None  # their fake versions trace a decomposition for seconds, or are missing
        return func(*args, **(kwargs or {}))


class _GpuKernels(TorchFunctionMode):
    """Calls of torch.nn.functional that take another path on a GPU than on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout:
            return _dropout(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is torch.Tensor.backward:
            with self:  # torch has left it, and checkpointed blocks run again in backward
                return _run_backward(*args, **kwargs)
        return func(*args, **kwargs)


def _run_backward(
    loss: torch.Tensor,
    gradient: torch.Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[torch.Tensor] | None = None,
) -> None:
    # What Tensor.backward ends in; anything before it would leave the mode once more.
    gradients = (torch.ones_like(loss) if gradient is None else gradient,)
    keep = create_graph if retain_graph is None else retain_graph
    only = () if inputs is None else tuple(inputs)
    _engine_run_backward((loss,), gradients, keep, create_graph, only, allow_unreachable=True, accumulate_grad=True)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    if inplace or not training or p in (0.0, 1.0):
        return functional.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    # The kernel on a CPU drops nothing and has no gradient of the mask, and would be replaced by its single steps.
    mask = attn_mask.detach() if attn_mask is not None else None
    return functional.scaled_dot_product_attention(query, key, value, mask, 0.0, *args, **kwargs)


def _low_floats(args: Any) -> bool:
    return any(isinstance(arg, torch.Tensor) and arg.dtype in _LOW for arg in args)


def _in_float32(operator: Any, has_dtype: bool) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_CPU):
            if not _low_floats(args):
                return operator(*args, **kwargs)
            if has_dtype:
                return operator(*args, **{"dtype": torch.float32, **kwargs})
            cast = [arg.float() if isinstance(arg, torch.Tensor) and arg.dtype in _LOW else arg for arg in args]
            return operator(*cast, **kwargs)

    return kernel


@contextmanager
def _autocast_as_on_a_gpu() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    try:
        for names, has_dtype in ((_IN_FLOAT32, False), (_SUMMED_IN_FLOAT32, True)):
            for name in names:
                packet, _, overload = name.partition(".")
                operator = getattr(getattr(_ATEN, packet), overload or "default", None)
                qualified = f"aten::{name}"
                if operator is None or torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "AutocastCPU"):
                    continue
                library.impl(name, _in_float32(operator, has_dtype), "AutocastCPU")
        yield
    finally:
        library._destroy()


@contextmanager
def fake_step(device_type: str) -> Iterator[None]:
    """Inside, new tensors are fake and a training step runs on them as it would on a device of this type.

    Raises:
        CannotSimulate: from within, where the step needs numbers.
    """
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Answers())
        if device_type != "cpu":
            stack.enter_context(_autocast_as_on_a_gpu())
            stack.enter_context(_GpuKernels())
        try:
            yield
        except (
            DataDependentOutputException,
            DynamicOutputShapeException,
            UnsupportedFakeTensorException,
            UnsupportedOperatorException,
        ) as error:
            raise CannotSimulate(f"fake tensors cannot do {error}") from error


@contextmanager
def fake_mesh(num_ranks: int, rank: int = 0) -> Iterator[DeviceMesh]:
    """Yields a mesh of processes of which only this one is there, as `rank`: what they send is nothing.

    Apart from the process's own groups, if it has any.
    """
    group = dist.ProcessGroup(dist.HashStore(), rank, num_ranks)
    backend = dist.ProcessGroup.BackendType.CUSTOM
    group._set_default_backend(backend)
    create: Any = FakeProcessGroup._create_internal  # whose signature depends on torch's version
    group._register_backend(torch.device("cpu"), backend, create(rank, num_ranks, None))
    # torch remembers how it sharded an operation on a mesh like this one, and with it the name of that one's group.
    name: Any = f"lockstep-fake-{num_ranks}-{rank}"
    group._set_group_name(name)
    _register_process_group(name, group)
    try:
        with unset_fake_temporarily():  # a mesh holds a tensor with the ranks
            mesh = DeviceMesh("cpu", torch.arange(num_ranks), _init_backend=False, _rank=rank)
        mesh._dim_group_names = [name]  # instead of groups that are made of the process's own
        yield mesh
    finally:
        _unregister_process_group(name)


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, every parameter that a module gets is fake: a model of any size is built in no memory.

    Its initialisation runs, on nothing. Buffers and other tensors are real, as some models compute their layers from
    them. For all modules of the process; one thread should build at a time.
    """
    register = nn.Module.register_parameter
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def register_fake(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and type(param) is nn.Parameter and not isinstance(param.data, FakeTensor):
            with mode:
                param = nn.Parameter(empty_copy(param), param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_fake  # type: ignore[method-assign, assignment]
    try:
        with _Answers():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def empty_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of the same shape, strides and type on the CPU, without the numbers; fake in a `fake_step`."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def fake_batch(batch: Any) -> Any:
    """Returns a batch of the same structure with fake tensors; to be called in a `fake_step`."""
    return map_tensors(empty_copy, batch)


class _EmptyCopies(TorchFunctionMode):
    """Copies a tensor's shape where copy.deepcopy would copy its numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = empty_copy(tensor).requires_grad_(tensor.requires_grad)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def fake_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of a real or fake model with fake tensors; to be called in a `fake_step`.

    An instance's own `forward` (a wrapper bound to the real module, of gradient checkpointing or autocast) is left out.
    """
    memo: dict[int, Any] = {
        id(param): nn.Parameter(empty_copy(param), param.requires_grad) for param in model.parameters()
    }
    with _EmptyCopies():
        fake = copy.deepcopy(model, memo)
    for module in fake.modules():
        vars(module).pop("forward", None)
    return fake
