"""A rank of test_checkpointing_dist.py: trains each model plainly and checkpointed under DDP or FSDP2, and compares."""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist
from checkpointed_models import build, images, mixed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trainer.memory.blocks import repeated_blocks
from trainer.memory.checkpointing import apply_checkpointing, uniform_policies

PLANS = ("full", "selective", "mixed")


def trained(name: str, plan: str, wrapping: str) -> tuple[dict[str, torch.Tensor], int]:
    """Returns losses, gradients and buffers after two micro-batches, and how often the blocks' insides ran."""
    model = build(name, short=True)
    blocks = repeated_blocks(model)
    names = list(blocks)
    if plan != "none":
        apply_checkpointing(blocks, mixed(names) if plan == "mixed" else uniform_policies(names, plan))  # type: ignore[arg-type]
    calls: list[str] = []
    for block_name, block in blocks.items():
        norm = next(
            m for m in block.modules() if "Norm" in type(m).__name__ and type(m).__module__.startswith("torch.nn")
        )
        norm.register_forward_hook(lambda *_, b=block_name: calls.append(b))
    wrapped: nn.Module = model
    if wrapping == "ddp":
        wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in (*blocks.values(), model):
            fully_shard(block, mesh=mesh)
    torch.manual_seed(1 + dist.get_rank())
    seen: dict[str, torch.Tensor] = {}
    for micro in range(2):
        loss = wrapped(images(name, 2, seed=2 * micro + dist.get_rank())).square().mean()
        loss.backward()
        seen[f"loss {micro}"] = loss.detach()
    for key, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, key
        seen[f"gradient {key}"] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    seen.update((f"buffer {key}", buffer) for key, buffer in model.named_buffers())
    return seen, len(calls)


def main(wrapping: str, *names: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in names:
        started = time.monotonic()
        expected, num_plain = trained(name, "none", wrapping)
        assert all(value.isfinite().all() for value in expected.values())
        assert sum(bool(value.any()) for value in expected.values()) > len(expected) / 2
        for plan in PLANS:
            got, num_calls = trained(name, plan, wrapping)
            assert list(got) == list(expected)
            different = [key for key in got if not torch.equal(got[key], expected[key])]
            assert not different, (name, plan, different)
            assert num_calls > num_plain if plan == "mixed" else num_calls == 2 * num_plain, (name, plan, num_calls)
            if dist.get_rank() == 0:
                print(f"same: {name} {plan}", flush=True)
        if dist.get_rank() == 0:
            print(f"{name} took {time.monotonic() - started:.1f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
