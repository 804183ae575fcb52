"""What the benchmarks of checkpoints share: a state to save, where to, and the ways to do it, ours and the peers'."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from trainer.checkpoint.storage import open_storage
from trainer.checkpoint.writing import Saver

MODEL = "vit_l_16"
TINY_MODEL = "shufflenet_v2_x0_5"


def add_model_and_folder(parser: argparse.ArgumentParser) -> None:
    """Adds `--model` and `--folder`."""
    parser.add_argument("--model", default=MODEL, help=f"a torchvision model; {MODEL} by default")
    parser.add_argument("--folder", type=Path, help="a new one on the disk to measure; default: in the current folder")


@contextmanager
def new_folder(folder: Path | None) -> Iterator[Path]:
    """Makes the folder of `--folder`, and removes it."""
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix=".checkpoints-", dir=Path.cwd()))
    else:
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def world_of_one() -> Iterator[None]:
    """Has a process group: plain DCP saves in a thread, which needs one even where there is one process."""
    warnings.simplefilter("ignore")  # of the peers, about a world of one process
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Cost:
    """One save."""

    stall: float  # seconds
    total: float  # seconds
    foreign_cores: float = 0.0  # that others kept busy meanwhile, on average


class Job:
    """What is saved: a model and an optimizer that has made one step, without the forward that it would need."""

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
        return sum(tensor.nbytes for tensor in self.state().tensors.values())

    def state(self) -> State:
        """Returns the state as the Trainer would."""
        return Parts(self.model, self.optimizer, None, None, {}, 0, 1).collect()

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def compute(self, seconds: float) -> None:
        """Stands for a step's forward and backward: keeps all of torch's threads, or the device, busy."""
        end = time.perf_counter() + seconds
        data = torch.randn(1024, 1024, device=self.device)
        while time.perf_counter() < end:
            data = torch.tanh(data @ data)
            self.synchronize()


class Ours:
    """`Saver`, as the Trainer uses it."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.step = 0
        self.folder = CheckpointFolder(open_storage(str(folder)), keep=1)
        self.saver = Saver(self.folder, Alone(), None, True, job.device)
        self.saver.prepare(job.state())

    def save(self, _: Path, step_seconds: float) -> Cost:
        """Saves, and is asked for the optimizer's step after a forward and backward of so long."""
        self.step += 1
        started = time.perf_counter()
        state = self.job.state()
        self.saver.save(state, Manifest(Progress(step=self.step), {}, 1, 1, state.values))
        stall = time.perf_counter() - started
        if step_seconds:
            self.job.compute(step_seconds)
        waits = time.perf_counter()
        self.saver.before_update()
        self.job.synchronize()  # on a GPU it is the device that waits
        stall += time.perf_counter() - waits
        self.saver.wait()
        total = time.perf_counter() - started
        if self.saver.failures:
            raise RuntimeError(f"a save failed: {self.saver.failures[-1]}")
        return Cost(stall, total)

    def check_reads_back(self) -> None:
        """Compares the last checkpoint with the job, bit for bit.

        Raises:
            RuntimeError: it is another.
        """
        checkpoint = self.folder.newest()
        tensors = self.job.state().tensors
        wrong = [name for name, tensor in tensors.items() if not checkpoint.read(name).equal(tensor.cpu())]
        if checkpoint.step != self.step or wrong:
            raise RuntimeError(f"step {checkpoint.step} does not read back as step {self.step}: {wrong[:3]}")


class Alone:
    """The ranks of a checkpoint, where there is only this process."""

    rank = 0
    num_ranks = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    gather_on_main = gather

    def from_main(self, value: Callable[[], Any]) -> Any:
        return value()

    agree = from_main


def torch_save(job: Job, folder: Path, sync: bool) -> Cost:
    """`torch.save` of both state dicts into one file."""
    file = folder / "checkpoint.pt"
    started = time.perf_counter()
    torch.save({"model": job.model.state_dict(), "optimizer": job.optimizer.state_dict()}, file)
    if sync:
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    return Cost(seconds, seconds)


def save_state(accelerator: Accelerator, folder: Path) -> Cost:
    """`accelerator.save_state` of what the accelerator has prepared."""
    started = time.perf_counter()
    accelerator.save_state(str(folder))
    seconds = time.perf_counter() - started
    return Cost(seconds, seconds)


def plain_dcp(job: Job, folder: Path) -> Cost:
    """`torch.distributed.checkpoint.async_save` with its own writer, stager and defaults."""
    started = time.perf_counter()
    model, optimizer = get_state_dict(job.model, job.optimizer)
    future = dcp.async_save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "checkpoint")
    stall = time.perf_counter() - started
    assert isinstance(future, Future)
    future.result()
    return Cost(stall, time.perf_counter() - started)
