"""A rank of test_memory_dist.py: measures a training step of each model under DDP and FSDP2, and predicts it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from memory_models import CASES, MODELS, NUM_SAMPLES, batch_of, loss_of, sgd
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trainer.memory.blocks import repeated_blocks
from trainer.memory.devices import find_device
from trainer.memory.measure import measure_cpu_peak
from trainer.memory.planner import Job, Planner
from trainer.memory.sharding import shard


class InPlaceAllGather:
    """Gathers as NCCL does, taking no memory; gloo makes copies, and releases some of them in threads of its own."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        parts = output_tensor.chunk(group.size())
        assert parts[group.rank()].data_ptr() == input_tensor.data_ptr()
        for rank, part in enumerate(parts):
            dist.broadcast(part, rank, group)
        time.sleep(0.002)  # until gloo's threads let go: what they release, the profiler does not see


class InPlaceReduceScatter(InPlaceAllGather):
    """Sums in the memory of what is summed."""

    def __call__(  # type: ignore[override]
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> None:
        dist.all_reduce(input_tensor, dist.ReduceOp.SUM, group)
        time.sleep(0.002)
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the bytes of the tensors' storages here, each once: shares of a parameter come with their padding."""
    plain = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in plain)}.values())


def measured(model: nn.Module, name: str, strategy: str, num_micro_batches: int) -> int:
    """Returns the most that is alive in a step: DDP's third, as it makes its buckets anew in the second."""
    wrapped = model
    if strategy == "ddp":
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        shard(model, repeated_blocks(model).values(), mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(InPlaceAllGather())  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(InPlaceReduceScatter())  # type: ignore[arg-type]
    optimizer = sgd(wrapped)
    batch = batch_of(name)

    def step() -> None:
        for i in range(num_micro_batches):
            is_last = i == num_micro_batches - 1
            if isinstance(wrapped, DistributedDataParallel):
                wrapped.require_backward_grad_sync = is_last
            else:
                wrapped.set_requires_gradient_sync(is_last)  # type: ignore[operator]
            loss_of(wrapped, batch).backward()
        optimizer.step()

    for _ in range(2 if strategy == "ddp" else 1):
        step()
        optimizer.zero_grad()
    states = [value for values in optimizer.state.values() for value in values.values()]
    before = num_bytes([*model.parameters(), *model.buffers(), *batch.values(), *states])
    if strategy == "ddp":
        before += sum(param.numel() * param.itemsize for param in model.parameters())  # the buckets
    return before + measure_cpu_peak(step)


def built(name: str) -> nn.Module:
    """Returns a model with zeros everywhere, in a fraction of the time that random numbers take."""
    with torch.device("meta"):
        model = MODELS[name]()
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().zero_()
    return model


def predicted(name: str, num_micro_batches: int) -> dict[str, tuple[dict[str, int], float]]:
    """Returns the parts that are predicted for each strategy, and the seconds that each prediction takes."""
    share, samples = num_micro_batches * NUM_SAMPLES[name], NUM_SAMPLES[name]
    job = Job(MODELS[name](), loss_of, sgd, batch_of(name), share, [samples], num_ranks=2, device_type="cpu")
    planner = Planner(job, find_device("a100-40g"))
    times = [time.monotonic()]
    ddp = planner.uniform(samples, "none")
    times.append(time.monotonic())
    fsdp2 = planner.sharded(ddp)
    times.append(time.monotonic())
    return {"ddp": (dict(ddp.parts), times[1] - times[0]), "fsdp2": (dict(fsdp2.parts), times[2] - times[1])}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, num_micro_batches in CASES:
        expected = predicted(name, num_micro_batches) if dist.get_rank() == 0 else {}
        for strategy in ("ddp", "fsdp2"):
            found = measured(built(name), name, strategy, num_micro_batches)
            if dist.get_rank() == 0:
                result = {"strategy": strategy, "model": name, "micro_batches": num_micro_batches, "measured": found}
                parts, seconds = expected[strategy]
                print("RESULT", json.dumps(result | {"predicted": parts, "seconds": seconds}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
