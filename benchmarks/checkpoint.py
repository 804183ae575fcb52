"""What a checkpoint costs: Lockstep's against `torch.save`, `accelerator.save_state` and plain DCP `async_save`.

`python -m benchmarks.checkpoint --folder DIR --json FILE` saves a ViT-L/16 with AdamW's state (3.65 GB) by one method
after the other, in rounds. `stall` is how long training cannot go on, `total` until the checkpoint is there: synced to
disk with ours and with DCP's writer, in the page cache with `save_state` and `torch.save`, which is also measured with
fsync.

A step's forward and backward do not change what is saved, so ours copies while they run, and the optimizer's step waits
for the copy. Hence two stalls of ours: `overlapped` with a step that computes for `--step-seconds`, and `bare`, where
the optimizer's step comes at once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchvision
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Manifest, Progress
from trainer.checkpoint.state import Parts, State
from trainer.checkpoint.storage import LocalStorage
from trainer.checkpoint.writing import Saver

BAR_STALL = 0.1  # of the time of torch.save
BAR_TOTAL = 1.2  # of DCP's


@dataclass(frozen=True)
class Cost:
    """One save, in seconds."""

    stall: float
    total: float


class Job:
    """What is saved."""

    def __init__(self, model: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model: nn.Module = torchvision.models.get_model(model).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), foreach=True)
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def num_bytes(self) -> int:
        tensors = [*self.model.state_dict().values()]
        tensors += [v for state in self.optimizer.state.values() for v in state.values()]
        return sum(tensor.nbytes for tensor in tensors)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Ours:
    """`Saver`, as the Trainer uses it: the memory for the copy is got once."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.step = 0
        self.folder = CheckpointFolder(LocalStorage(folder), keep=1)
        self.saver = Saver(self.folder, _Alone(), None, True, job.device)
        self.saver.prepare(self._state())

    def _state(self) -> State:
        return Parts(self.job.model, self.job.optimizer, None, None, {}, 0, 1).collect()

    def save(self, step_seconds: float = 0.0) -> Cost:
        """Saves, with a step that computes so long before its update."""
        self.step += 1
        started = time.perf_counter()
        state = self._state()
        self.saver.save(state, Manifest(Progress(step=self.step), {}, 1, 1, state.values, {}, {}))
        stall = time.perf_counter() - started
        _compute(step_seconds, self.job)
        waits = time.perf_counter()
        self.saver.before_update()
        self.job.synchronize()
        stall += time.perf_counter() - waits
        self.saver.wait()
        assert self.saver.failures == []
        return Cost(stall, time.perf_counter() - started)

    def reads_back(self) -> bool:
        """Tells whether the last checkpoint is what the job is, bit for bit."""
        checkpoint = self.folder.newest()
        state = self._state()
        return all(checkpoint.read(name).equal(tensor.cpu()) for name, tensor in state.tensors.items())


class _Alone:
    rank = 0
    num_ranks = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


class TorchSave:
    """`torch.save` of both state dicts into one file."""

    def __init__(self, job: Job, folder: Path, sync: bool) -> None:
        self.job = job
        self.file = folder / "checkpoint.pt"
        self.sync = sync

    def save(self) -> Cost:
        started = time.perf_counter()
        torch.save({"model": self.job.model.state_dict(), "optimizer": self.job.optimizer.state_dict()}, self.file)
        if self.sync:
            with open(self.file, "rb+") as file:
                os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        return Cost(seconds, seconds)


class SaveState:
    """`accelerator.save_state`."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.folder = folder
        self.accelerator = Accelerator(cpu=job.device.type == "cpu")
        self.accelerator.prepare(job.model, job.optimizer)

    def save(self) -> Cost:
        started = time.perf_counter()
        self.accelerator.save_state(str(self.folder))
        seconds = time.perf_counter() - started
        return Cost(seconds, seconds)


class PlainDcp:
    """`torch.distributed.checkpoint.async_save` with its own writer and defaults."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.folder = folder
        self.number = 0

    def save(self) -> Cost:
        self.number += 1
        started = time.perf_counter()
        model, optimizer = get_state_dict(self.job.model, self.job.optimizer)
        future: Any = dcp.async_save(
            {"model": model, "optimizer": optimizer}, checkpoint_id=self.folder / f"step-{self.number}"
        )
        stall = time.perf_counter() - started
        assert isinstance(future, Future)
        future.result()
        return Cost(stall, time.perf_counter() - started)


def _compute(seconds: float, job: Job) -> None:
    """Stands for a step's forward and backward: one core, or the device, is busy."""
    end = time.perf_counter() + seconds
    data = torch.randn(256, 256, device=job.device)
    while time.perf_counter() < end:
        data = torch.tanh(data @ data)
    job.synchronize()


def measure(job: Job, folder: Path, rounds: int, step_seconds: float) -> dict[str, list[Cost]]:
    """Saves with every method in turn; the first round warms up and is kept as the first element."""
    ours = Ours(job, folder / "lockstep")
    torch_save, dcp_save = folder / "torch-save", folder / "dcp"
    methods: dict[str, Callable[[], Cost]] = {
        "lockstep, bare": ours.save,
        "lockstep, overlapped": lambda: ours.save(step_seconds),
        "torch.save": TorchSave(job, torch_save, sync=False).save,
        "torch.save and fsync": TorchSave(job, torch_save, sync=True).save,
        "accelerator.save_state": SaveState(job, folder / "save-state").save,
        "DCP async_save": PlainDcp(job, dcp_save).save,
    }
    costs: dict[str, list[Cost]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, save in methods.items():
            for used in (torch_save, dcp_save):
                shutil.rmtree(used, ignore_errors=True)
                used.mkdir()
            os.sync()  # nobody pays for what another left to be written
            costs[name].append(save())
            sys.stdout.write(f"round {number}  {name:24} stall {costs[name][-1].stall:7.3f} s  ")
            sys.stdout.write(f"total {costs[name][-1].total:7.3f} s\n")
            sys.stdout.flush()
    if not ours.reads_back():
        raise SystemExit("the checkpoint does not read back")
    return costs


def summary(costs: dict[str, list[Cost]]) -> dict[str, Any]:
    """Returns medians without the first round, and the ratios that the bars are about."""
    medians = {
        name: {
            "stall": statistics.median(c.stall for c in found[1:]),
            "total": statistics.median(c.total for c in found[1:]),
            "first_stall": found[0].stall,
        }
        for name, found in costs.items()
    }
    reference, peer = medians["torch.save"]["total"], medians["DCP async_save"]["total"]
    ratios = {
        "stall, overlapped, of torch.save": medians["lockstep, overlapped"]["stall"] / reference,
        "stall, bare, of torch.save": medians["lockstep, bare"]["stall"] / reference,
        "stall, bare, of DCP's": medians["lockstep, bare"]["stall"] / medians["DCP async_save"]["stall"],
        "total of DCP's": medians["lockstep, bare"]["total"] / peer,
    }
    bars = {"stall at most a tenth of torch.save": BAR_STALL, "total at most 1.2 of DCP's": BAR_TOTAL}
    return {"seconds": medians, "ratios": ratios, "bars": bars}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code, which does not depend on the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_l_16", help="a torchvision model (default: vit_l_16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-seconds", type=float, default=0.5, help="that a step computes before its update")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; must not exist")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True)
    warnings.simplefilter("ignore")  # of the peers, about a world of one process
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # DCP's thread wants one
    job = Job(options.model, torch.device(options.device))
    try:
        costs = measure(job, options.folder, options.rounds, options.step_seconds)
    finally:
        shutil.rmtree(options.folder)
        dist.destroy_process_group()
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    report = {
        "command": f"python -m benchmarks.checkpoint {' '.join(sys.argv[1:] if arguments is None else arguments)}",
        "device": f"{device}, {os.cpu_count()} CPU cores",
        "load": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
        },
        "model": options.model,
        "bytes": job.num_bytes,
        "step_seconds": options.step_seconds,
        **summary(costs),
        "rounds": {name: [[c.stall, c.total] for c in found] for name, found in costs.items()},
    }
    sys.stdout.write(json.dumps({k: report[k] for k in ("seconds", "ratios", "bars")}, indent=2) + "\n")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
