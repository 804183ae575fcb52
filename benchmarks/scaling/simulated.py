"""One rank of very many, of which the others are not running: what it costs, in a process of its own.

    python -m benchmarks.scaling.simulated sampler|layout|manifest|planner NUM_RANKS

Prints a JSON object: seconds, peak memory of the process, and counts that do not depend on the machine. Runs the real
code of the sampler, of a checkpoint's layout and manifest, and of the planner, on torch's fake process groups.
"""

from __future__ import annotations

import json
import math
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torchvision
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.checkpoint.layout import Told, make_layout
from trainer.checkpoint.manifest import FileRecord, Manifest, Progress, checksum
from trainer.checkpoint.reading import parts_to_read
from trainer.checkpoint.tensor_table import file_of_rank
from trainer.data.sampler import BatchPlan, StepSampler
from trainer.memory.fakes import fake_mesh

T = TypeVar("T")

NUM_SAMPLES = 1_281_167  # of ImageNet
NUM_SAMPLES_OF_RANK = 64  # in a step
MODEL = "vit_h_14"
STATE = ("model.{}", "ema.{}", "optimizer.{}.exp_avg", "optimizer.{}.exp_avg_sq")
SCALARS = ("optimizer.{}.step",)  # which all ranks hold


class CountedElements(TorchDispatchMode):
    """Counts the elements of all tensors that operations return in its body."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_elements += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


def sampler(num_ranks: int, num_steps: int = 20) -> dict[str, Any]:
    """Asks for the samples of a step, as the last rank; the global batch grows with the ranks."""
    batch_size = num_ranks * NUM_SAMPLES_OF_RANK
    num_samples = max(NUM_SAMPLES, 2 * batch_size)
    plan = BatchPlan.split(num_samples, batch_size, None, num_ranks, drop_last=False)
    asked = StepSampler(plan, num_ranks - 1, seed=0)
    first, _ = _timed(lambda: asked.keys(0))
    with CountedElements() as counted:
        asked.keys(0)
    each = [_timed(lambda: asked.keys(1))[0] for _ in range(num_steps)]
    return {
        "samples": num_samples,
        "first_seconds": first,  # with the order of the epoch
        "step_seconds": statistics.median(each),
        "elements": counted.num_elements,
        "order_bytes": 8 * num_samples,
    }


# ---- checkpoints -------------------------------------------------------------------------------------------------


class Simulated:
    """`layout.Ranks` of which one is there. What it tells rank 0 is kept; the others would tell the same names."""

    def __init__(self, rank: int, num_ranks: int, others: Sequence[Told] = ()) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.others = others
        self.told: Any = None

    def gather(self, value: T) -> list[T]:
        return [value] * self.num_ranks

    def gather_on_main(self, value: T) -> list[Any]:
        self.told = value
        return [value, *self.others] if self.rank == 0 else []

    def from_main(self, value: Callable[[], T]) -> T:
        return value() if self.rank == 0 else None  # type: ignore[return-value]


def shapes(model: str = MODEL) -> dict[str, torch.Size]:
    """Returns the tensors of a model, its average and AdamW's state, by name."""
    with torch.device("meta"):
        parameters = dict(torchvision.models.get_model(model).named_parameters())
    found = {form.format(name): parameter.shape for form in STATE for name, parameter in parameters.items()}
    return found | {form.format(name): torch.Size() for form in SCALARS for name in parameters}


@contextmanager
def sharded_state(whole: dict[str, torch.Size], rank: int, num_ranks: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yields a rank's state as FSDP shards it, without memory, and a generator of its own."""
    with fake_mesh(num_ranks, rank) as mesh:
        state: dict[str, torch.Tensor] = {}
        for name, shape in whole.items():
            if not shape:
                state[name] = torch.empty(shape, device="meta")
                continue
            _, rows = _rows(shape[0], rank, num_ranks)
            local = torch.empty((rows, *shape[1:]), device="meta")
            stride = torch.empty(shape, device="meta").stride()
            state[name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        state[f"ranks.{rank}.generator.torch"] = torch.empty(5056, dtype=torch.uint8, device="meta")
        yield state


def told_by_others(whole: dict[str, torch.Size], num_ranks: int) -> list[Told]:
    """Returns what each rank but 0 with such a state tells rank 0, without building it. The scalars are rank 0's."""
    num_bytes = np.full(num_ranks, 5056)
    for shape in filter(None, whole.values()):
        _, most = _rows(shape[0], 0, num_ranks)
        rows = np.clip(shape[0] - most * np.arange(num_ranks), 0, most)
        num_bytes += 4 * rows * math.prod(shape[1:])
    return [Told([], {}, {"generator.torch": (torch.uint8, (5056,))}, int(size), None) for size in num_bytes[1:]]


def _rows(num_rows: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """Returns the first row of a rank's shard, and how many it has, as torch.chunk splits them."""
    most = -(-num_rows // num_ranks)
    first = min(rank * most, num_rows)
    return first, min(most, num_rows - first)


def layout_of_one(num_ranks: int, num_times: int = 3) -> dict[str, Any]:
    """Lays out the checkpoint of rank 1, several times: all but rank 0 do this and no more.

    Of a very large number of ranks, most have no row of most tensors; rank 1 has one of each that has two.
    """
    with sharded_state(shapes(), 1, num_ranks) as state:
        ranks = Simulated(1, num_ranks)
        before = _peak_bytes()
        seconds, made = _timed(lambda: make_layout(state, ranks))
        after = _peak_bytes()
        again = [_timed(lambda: make_layout(state, ranks))[0] for _ in range(num_times - 1)]
    return {
        "tensors": len(state),
        "items": len(made.items),
        "header_bytes": len(made.header),
        "told_bytes": len(pickle.dumps(ranks.told)),
        "seconds": statistics.median([seconds, *again]),
        "added_bytes": after - before,
    }


def manifest(num_ranks: int) -> dict[str, Any]:
    """Makes, writes and reads the manifest of all ranks: rank 0 makes it, in every save, and all ranks read it."""
    whole = shapes()
    others = told_by_others(whole, num_ranks)
    files = {file_of_rank(rank): FileRecord(10**9, checksum(str(rank).encode())) for rank in range(num_ranks)}
    with sharded_state(whole, 0, num_ranks) as state:
        layout_seconds, made = _timed(lambda: make_layout(state, Simulated(0, num_ranks, others)))
        content = Manifest(Progress(step=1), {}, NUM_SAMPLES, num_ranks, {}, made.tensors, files)
        first, data = _timed(content.to_bytes)
        again, _ = _timed(content.to_bytes)
        read, found = _timed(lambda: Manifest.from_bytes(data))
        assert found.tensors == made.tensors
        look, parts = _timed(lambda: [part for name, part in parts_to_read(found.tensors, state)])
    return {
        "parts": num_ranks
        + sum(-(-shape[0] // _rows(shape[0], 0, num_ranks)[1]) if shape else 1 for shape in whole.values()),
        "parts_to_read": len(parts),
        "files_to_read": len({part.file for part in parts}),
        "bytes": len(data),
        "tensor_bytes": len(made.tensors.text),
        "layout_seconds": layout_seconds,
        "first_seconds": first,
        "seconds": again,
        "read_seconds": read + look,
    }


# ---- the planner -------------------------------------------------------------------------------------------------


def planner(num_ranks: int) -> dict[str, Any]:
    """Predicts the memory of a step under FSDP with the recipe's setting, as `python -m launch plan` does."""
    from launch.plan import _planner, _with_stand_in
    from trainer.config import load_config
    from trainer.memory.devices import find_device

    config = load_config("configs/fsdp_vit_h_14.yaml", [f"train.batch_size={num_ranks * NUM_SAMPLES_OF_RANK}"])
    config = _with_stand_in(config, (3, 224, 224), 1000)
    plans, _ = _planner(config, find_device("h100-80g"), num_ranks)
    seconds, found = _timed(lambda: plans.uniform(NUM_SAMPLES_OF_RANK, "full"))
    return {"seconds": seconds, "predicted_bytes": found.peak_bytes}


def _timed(run: Callable[[], T]) -> tuple[float, T]:
    before = time.perf_counter()
    result = run()
    return time.perf_counter() - before, result


def _peak_bytes() -> int:
    """Returns the most memory that this process held; what `getrusage` knows is its parent's where that had more."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "sampler": sampler,
    "layout": layout_of_one,
    "manifest": manifest,
    "planner": planner,
}


def main() -> None:
    """Runs one part and prints what it found."""
    part, num_ranks = sys.argv[1], int(sys.argv[2])
    found = PARTS[part](num_ranks)
    json.dump({"ranks": num_ranks, **found, "peak_bytes": _peak_bytes()}, sys.stdout)


if __name__ == "__main__":
    main()
