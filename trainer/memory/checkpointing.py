"""Gradient checkpointing of blocks: what a block's forward does not keep for backward is computed again there.

Owns the policies and the forward that computes again with the same results: random draws, precision and buffers as
they were. Which modules are blocks is `trainer.memory.blocks`; choosing a policy for each is up to the caller.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointError, CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.errors import UserError, one_line_text
from trainer.sync_batchnorm import CpuSyncBatchNorm

logger = logging.getLogger("lockstep")

Policy = Literal["none", "selective", "full"]
Setting = Literal["none", "full", "every_2", "selective"]

# Buffers up to this size are always kept as they were before a forward; bigger ones only if forward changes them.
_SMALL_BYTES = 1 << 16

_STATE = "_lockstep_checkpointing"  # the attribute of a block that holds its _State

# Their training forward writes its buffers and reads none of them, unless it averages over all steps.
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, CpuSyncBatchNorm)

_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in (
        *("mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "addbmm", "linear", "mkldnn_linear"),
        *("_scaled_mm", "_scaled_mm_v2", "_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2"),
        *("convolution", "_convolution", "cudnn_convolution", "cudnn_convolution_transpose", "mkldnn_convolution"),
        *("miopen_convolution", "miopen_depthwise_convolution", "_slow_conv2d_forward", "slow_conv3d_forward"),
        *("conv_depthwise3d", "_conv_depthwise2d"),
    )
)


def uniform_policies(names: Sequence[str], setting: Setting) -> dict[str, Policy]:
    """Returns the policy of each block for one setting of all; `every_2` is `full` for the first, third and so on.

    Raises:
        ValueError: there is no such setting.
    """
    if setting not in get_args(Setting):
        raise ValueError(f"no such setting: {setting!r}; there are {', '.join(get_args(Setting))}")
    if setting == "every_2":
        return {name: "none" if position % 2 else "full" for position, name in enumerate(names)}
    return dict.fromkeys(names, setting)


def apply_checkpointing(
    blocks: Mapping[str, nn.Module], policies: Mapping[str, Policy], for_compile: bool = False
) -> None:
    """Makes each block's forward keep only what its policy says; replaces what an earlier call has made of it.

    `full` keeps a block's inputs. `selective` also keeps what matrix products, convolutions, attention and
    collectives return, and switches off `inplace` in the activations and dropouts of torch.nn inside the block, for
    they would overwrite that. Results, gradients and buffers are the same bits as without; names, classes and the
    state dict stay. To be called before the model is wrapped for several processes or compiled.

    Forward hooks of a block itself run once, outside of what is computed again. State that a forward changes must
    be in buffers: plain attributes are changed twice.

    Args:
        blocks: the blocks by name, none inside another.
        policies: the policy of each; blocks without one keep everything.
        for_compile: the blocks will run under torch.compile, as a whole model or each alone. Compiled code changes
            buffers once by itself, but computes again with their new values, which is right for BatchNorm alone:
            call `check_compiled_buffers` after the first step.

    Raises:
        ValueError: a policy is for no block, or is none.
    """
    for name, policy in policies.items():
        if name not in blocks:
            raise ValueError(f"no such block: {name!r}")
        if policy not in get_args(Policy):
            raise ValueError(f"no such policy: {policy!r}; there are {', '.join(get_args(Policy))}")
    for name, block in blocks.items():
        _undo(block)
        policy = policies.get(name, "none")
        if policy != "none":
            state = _State(name, policy, block.__dict__.get("forward"), block.forward)
            if policy == "selective":
                state.made_out_of_place = [m for m in block.modules() if _works_in_place(m)]
                for module in state.made_out_of_place:
                    module.__dict__["inplace"] = False
            if for_compile:
                state.at_first = [(m, n, b.detach().clone()) for m, n, b in _buffers_that_matter(block)]
            setattr(block, _STATE, state)
            # A bound method, for a deep copy of the model binds it to the copy of the block.
            forward = _compilable_forward if for_compile else _checkpointed_forward
            block.forward = types.MethodType(forward, block)


def check_compiled_buffers(blocks: Mapping[str, nn.Module]) -> None:
    """After the first training step of compiled blocks, sees that they change no buffers other than BatchNorm's.

    Later calls do nothing. Buffers that something else has changed meanwhile, such as a checkpoint that was loaded,
    count as well.

    Raises:
        UserError: a block has changed a buffer, and backward has computed with its new value.
    """
    for name, block in blocks.items():
        state: _State | None = block.__dict__.get(_STATE)
        if state is None:
            continue
        at_first, state.at_first = state.at_first, []
        for module, buffer_name, value in at_first:
            now = module._buffers.get(buffer_name)  # another tensor, if the model has moved to a GPU since
            if now is None or not torch.equal(value.to(now.device), now):
                raise UserError(
                    f"block {name} changes its buffer {buffer_name} in forward, and torch.compile with "
                    f"'{state.policy}' computes wrong gradients from that; leave the block out of memory.blocks, use "
                    "'none', or do not compile",
                    path="memory.checkpointing",
                )


def _buffers_that_matter(block: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in block.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(module, _BATCH_NORMS):
                yield module, name, buffer


def explain_checkpointing_error(error: BaseException) -> UserError | None:
    """Returns what a user can do about an error out of forward or backward; None if it is not about checkpointing."""
    text = one_line_text(error)
    path = "memory.checkpointing"
    if "cached during selective activation checkpoint has been mutated" in text:
        return UserError(
            "a block changes the result of a matrix product, convolution or attention in place (such as F.relu_(x) "
            "or x += y), which 'selective' keeps for backward; use 'full', or change it out of place",
            path=path,
        )
    if "backward once on any region computed under selective activation checkpoint" in text:
        return UserError("the loss is differentiated twice, which 'selective' cannot; use 'full'", path=path)
    if isinstance(error, CheckpointError) or ("during backward" in text and "not found in storage" in text):
        return UserError(
            "a block's forward did something else when it was computed again in backward: it depends on random draws "
            "outside of torch or on state that is not in buffers; make it repeatable, leave it out of memory.blocks, "
            f"or use 'none' ({text[:160]})",
            path=path,
        )
    if type(error).__module__.startswith("torch._dynamo") and "torch.utils.checkpoint" in text:
        return UserError(
            "torch.compile cannot take a checkpointed block in one piece, which it has to be; leave the block out of "
            f"memory.blocks, use 'none', or do not compile ({text[:160]})",
            path=path,
        )
    if "modified by an inplace operation" in text and _raised_in_checkpoint(error):
        return UserError(
            "the input of a block is changed in place after the block has used it, but it is needed again in "
            "backward; change it out of place, leave the block out of memory.blocks, or use 'none'",
            path=path,
        )
    return None


def _raised_in_checkpoint(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename == torch.utils.checkpoint.__file__ for frame in frames)


# ---- a block ---------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """What is known of a checkpointed block; deep copies follow the copy of the block."""

    name: str
    policy: Policy
    own_forward: Callable[..., Any] | None  # the attribute that was set on the block itself
    former: Callable[..., Any]
    made_out_of_place: list[nn.Module] = field(default_factory=list)
    # With for_compile, until the first step has been checked: module, name of the buffer and its value.
    at_first: list[tuple[nn.Module, str, torch.Tensor]] = field(default_factory=list)
    # By training or not: the big buffers that forward changes, as (module, name); None before the first forward.
    changing: dict[bool, set[tuple[nn.Module, str]]] = field(default_factory=dict)


def _undo(block: nn.Module) -> None:
    state: _State | None = block.__dict__.pop(_STATE, None)
    if state is not None:
        block.__dict__.pop("forward", None)  # a copy made for a simulation has none
        if state.own_forward is not None:
            block.forward = state.own_forward
        for module in state.made_out_of_place:
            module.__dict__["inplace"] = True


def _works_in_place(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.") and getattr(module, "inplace", False) is True


def _compilable_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.compiler.is_compiling():
        return _checkpointed_forward(block, *args, **kwargs)
    # Dynamo takes no other contexts than those of selective checkpointing.
    state: _State = getattr(block, _STATE)
    if not torch.is_grad_enabled():
        return state.former(*args, **kwargs)
    settings: dict[str, Any] = {"context_fn": _selective_contexts} if state.policy == "selective" else {}
    # Pieces of a block between graph breaks would be computed again as eager code is, changing buffers twice.
    with torch._dynamo.error_on_graph_break(True):
        return checkpoint(state.former, *args, use_reentrant=False, **settings, **kwargs)


def _checkpointed_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    state: _State = getattr(block, _STATE)
    if not torch.is_grad_enabled():
        return state.former(*args, **kwargs)
    # All tensors as arguments of their own, for checkpoint looks for devices and saves inputs only there.
    leaves, structure = pytree.tree_flatten((args, kwargs))
    selective = state.policy == "selective"

    def run(*leaves: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        with _no_cached_casts() if selective else contextlib.nullcontext():
            return state.former(*args, **kwargs)

    before = _Buffers(block, state)

    def contexts() -> tuple[Any, Any]:
        if selective:
            keeping, kept = _selective_contexts()
            return keeping, before.put_back_around(kept)
        return contextlib.nullcontext(), before.put_back_around(contextlib.nullcontext())

    result = checkpoint(run, *leaves, use_reentrant=False, context_fn=contexts, preserve_rng_state=True, **_hooks_too())
    before.learn()
    return result


@functools.cache
def _hooks_too() -> dict[str, Any]:
    """Newer versions of torch want to be told that what is kept goes through saved-tensor hooks like all else."""
    name = "respect_saved_tensors_hooks"
    return {name: True} if name in inspect.signature(checkpoint).parameters else {}


@contextlib.contextmanager
def _no_cached_casts() -> Iterator[None]:
    """A cast that is cached in forward would be an additional operation in backward, where the cache is empty."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


# ---- selective -------------------------------------------------------------------------------------------------


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_selective_policy)


def _selective_policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    save, dropout_at = _is_kept(op)
    if save and dropout_at is not None:
        # An operation that is not run again draws no random numbers: all draws after it would be others.
        dropout = kwargs.get("dropout_p", args[dropout_at] if dropout_at < len(args) else 0.0)
        save = not dropout
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _is_kept(op: Any) -> tuple[bool, int | None]:
    """Returns whether the results of an operation are kept, and the position of its `dropout_p` if it has one."""
    name: str = op.name()
    namespace, _, base = name.partition(".")[0].rpartition("::")
    attention = ("attention" in base or "flash_attn" in base or "flash_attn" in namespace) and "backward" not in base
    save = name.partition(".")[0] in _PRODUCTS or attention or namespace.strip("_") == "c10d_functional"
    arguments = op._schema.arguments if isinstance(op, torch._ops.OpOverload) else ()
    return save, next((i for i, argument in enumerate(arguments) if argument.name == "dropout_p"), None)


def is_kept_by_selective(op: Any) -> bool:
    """Tells whether `selective` keeps the results of an operation; it computes all others again."""
    return _is_kept(op)[0]


# ---- buffers ---------------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """A buffer before a forward."""

    module: nn.Module
    name: str
    buffer: torch.Tensor
    version: int
    value: torch.Tensor | None  # None: it does not matter, or it is big and did not change so far
    is_big: bool
    is_only_written: bool


class _Buffers:
    """The buffers of a block as they are before one forward, for computing that forward again."""

    def __init__(self, block: nn.Module, state: _State) -> None:
        self._state = state
        self._mode = block.training
        changing = state.changing.get(self._mode)
        self._kept: list[_Kept] = []
        with torch.no_grad():
            for module in block.modules():
                only_written = type(module) in _BATCH_NORMS and module.training and module.momentum is not None
                for name, buffer in module._buffers.items():
                    if buffer is None:
                        continue
                    is_big = buffer.numel() * buffer.element_size() > _SMALL_BYTES
                    is_known_constant = is_big and changing is not None and (module, name) not in changing
                    value = None if only_written or is_known_constant else buffer.detach().clone()
                    kept = _Kept(module, name, buffer, buffer._version, value, is_big, only_written)
                    self._kept.append(kept)

    def learn(self) -> None:
        """After forward: drops the values of big buffers that it has not changed."""
        first = self._mode not in self._state.changing
        changing = self._state.changing.setdefault(self._mode, set())
        for position, kept in enumerate(self._kept):
            if not kept.is_big or kept.is_only_written:
                continue
            changed = kept.module._buffers.get(kept.name) is not kept.buffer or kept.buffer._version != kept.version
            if first and not changed:  # writing through `.data` leaves no other trace
                assert kept.value is not None
                changed = not torch.equal(kept.value, kept.buffer)
            if changed and kept.value is None:
                logger.warning(
                    "block %s: its buffer %s changed in a forward for the first time; the gradients of this step may "
                    "have used its new values",
                    self._state.name,
                    kept.name,
                )
            if changed:
                changing.add((kept.module, kept.name))
            elif kept.value is not None and (kept.module, kept.name) not in changing:
                self._kept[position] = kept._replace(value=None)

    @contextlib.contextmanager
    def _put_back(self) -> Iterator[None]:
        now: list[tuple[nn.Module, str, torch.Tensor | None]] = []
        stand_ins: dict[int, torch.Tensor] = {}  # modules may share a buffer
        try:
            with torch.no_grad():
                for kept in self._kept:
                    changing = self._state.changing[self._mode]
                    if kept.value is None and not kept.is_only_written and (kept.module, kept.name) not in changing:
                        continue
                    current = kept.module._buffers[kept.name]
                    now.append((kept.module, kept.name, current))
                    if id(kept.buffer) not in stand_ins:
                        stand_ins[id(kept.buffer)] = self._stand_in(kept)
                    kept.module._buffers[kept.name] = stand_ins[id(kept.buffer)]
            yield
        finally:
            for module, name, buffer in now:
                module._buffers[name] = buffer

    def _stand_in(self, kept: _Kept) -> torch.Tensor:
        if kept.is_only_written:
            return torch.empty_like(kept.buffer)
        # A copy, for backward may come here again with retain_graph.
        return (kept.buffer.detach() if kept.value is None else kept.value).clone()

    def put_back_around(self, inner: contextlib.AbstractContextManager[Any]) -> contextlib.AbstractContextManager[None]:
        """Returns a context, to be entered any number of times, with the buffers as they were and `inner` in it."""
        return _Reentered(self._put_back, inner)


class _Reentered:
    """Enters a fresh context of `make`, then `inner`, each time that it is entered."""

    def __init__(
        self,
        make: Callable[[], contextlib.AbstractContextManager[None]],
        inner: contextlib.AbstractContextManager[Any],
    ) -> None:
        self._make = make
        self._inner = inner
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._make())
            stack.enter_context(self._inner)
            self._stack = stack.pop_all()

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)
