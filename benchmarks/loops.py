"""The same training, written as each library's documentation has it: the peers that `Trainer` is measured against.

Owns the loops and the data in memory that they share. Each loop trains without end and calls `after_step` with the
number of samples after every optimizer step; who counts, and when a loop has to wait, is the caller's business. The
callers are `benchmarks.step_overhead`, `benchmarks.end_to_end` and `benchmarks.ranks`. Libraries are imported where
they are used.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import yaml
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler, TensorDataset

from trainer.config_model import ModelConfig
from trainer.model import build_model, uses_channels_last
from trainer.precision import HUGE_PAGES_VARIABLE

LEARNING_RATE, MOMENTUM = 1e-3, 0.9
ENDLESS = 10**7  # steps

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and labels
AfterStep = Callable[[int], None]


@dataclass(frozen=True)
class Work:
    """What all loops train alike, in one process."""

    model: str  # a name in our configs
    shape: tuple[int, ...]  # of an input
    batch_size: int  # of this process
    num_samples: int  # of an epoch
    args: Mapping[str, Any] = field(default_factory=dict)  # of the model
    num_classes: int = 10
    precision: Literal["no", "bf16"] = "no"
    compile: bool = False
    data: Literal["memory", "device"] = "memory"  # a data set in the host's memory; or one batch, on the device already
    device_type: str = "cpu"
    report_every: int = 50  # steps; the default of ours, Lightning's and timm's

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", local_rank) if self.device_type == "cuda" else torch.device(self.device_type)

    def model_section(self) -> dict[str, Any]:
        """Returns the `model` section of our config."""
        args = {"num_classes": self.num_classes, **self.args}
        return {"name": self.model, "args": args, "compile": "model" if self.compile else "none"}

    def build_model(self) -> nn.Module:
        """Returns the model on the device, in the memory format that our trainer would choose; not compiled."""
        config = ModelConfig.model_validate(self.model_section())
        model = build_model(config, self.num_classes).to(self.device).train()
        if uses_channels_last(config, model):
            model = model.to(memory_format=torch.channels_last)
        return model

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns what a hand-written loop runs its forward in."""
        return torch.autocast(self.device_type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def fake_samples(self, num_samples: int) -> Batch:
        """Returns random inputs and labels in the host's memory."""
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(num_samples, *self.shape, generator=generator)
        return inputs, torch.randint(self.num_classes, (num_samples,), generator=generator)


class InMemory(TensorDataset):
    """Random samples in the host's memory, the same for all loops.

    Args:
        num_samples: of an epoch.
        shape: of an input.
        num_classes: number of labels.
    """

    def __init__(self, num_samples: int, shape: list[int], num_classes: int) -> None:
        work = Work("", tuple(shape), batch_size=1, num_samples=num_samples, num_classes=num_classes)
        super().__init__(*work.fake_samples(num_samples))
        self.classes = [str(label) for label in range(num_classes)]


class OnDevice:
    """One batch that is on the device already, over and over for an epoch."""

    def __init__(self, work: Work) -> None:
        inputs, labels = work.fake_samples(work.batch_size)
        memory_format = torch.channels_last if inputs.ndim == 4 else torch.contiguous_format
        self._batch = inputs.to(work.device, memory_format=memory_format), labels.to(work.device)
        self._length = work.num_samples // work.batch_size

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return itertools.repeat(self._batch, self._length)


def open_loader(work: Work, sampler: Sampler[int] | None = None) -> Any:
    """Returns an epoch's batches, as torch's documentation has it: loaded in this process, pinned for a GPU.

    Args:
        work: what is trained.
        sampler: of this process's share; None for all samples in random order.
    """
    if work.data == "device":
        return OnDevice(work)
    return DataLoader(
        InMemory(work.num_samples, list(work.shape), work.num_classes),
        batch_size=work.batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        drop_last=True,
        pin_memory=work.device_type == "cuda",
    )


# ---- the loops -----------------------------------------------------------------------------------------------


def raw(work: Work, loader: Any, after_step: AfterStep, wrap: Callable[[nn.Module], nn.Module] | None = None) -> None:
    """The loop of PyTorch's tutorials.

    Args:
        work: what is trained.
        loader: gives the batches of an epoch.
        after_step: called after every step.
        wrap: what makes the model train together with those of other processes, such as DDP.
    """
    model = work.build_model()
    if work.compile:
        model.compile()
    if wrap is not None:
        model = wrap(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, fused=work.device_type == "cuda"
    )
    for epoch in itertools.count():
        if hasattr(getattr(loader, "sampler", None), "set_epoch"):
            loader.sampler.set_epoch(epoch)
        for inputs, labels in loader:
            inputs = inputs.to(work.device, non_blocking=True)
            labels = labels.to(work.device, non_blocking=True)
            optimizer.zero_grad()
            with work.autocast():
                loss = functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            after_step(len(labels))


def on_huge_pages(work: Work, after_step: AfterStep) -> None:
    """The same loop with memory as our trainer has it; in a process that has no tensor yet."""
    os.environ[HUGE_PAGES_VARIABLE] = "1"
    raw(work, open_loader(work), after_step)


def accelerate(work: Work, loader: Any, after_step: AfterStep) -> None:
    """Accelerate's quick tour: `prepare`, and `accelerator.backward` in the loop of PyTorch's tutorials."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        mixed_precision=work.precision,
        cpu=work.device_type == "cpu",
        dynamo_backend="inductor" if work.compile else None,
    )
    model = work.build_model()
    optimizer: Any = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, fused=work.device_type == "cuda"
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    if isinstance(loader, DataLoader):
        loader = accelerator.prepare(loader)
    while True:
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
            after_step(len(labels))


def lightning(work: Work, loader: Any, after_step: AfterStep, folder: Path) -> None:
    """Lightning's introduction: a module and its Trainer, which logs the loss; no checkpoint and no progress bar."""
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = work.build_model()

        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            inputs, labels = batch
            loss = functional.cross_entropy(self.model(inputs), labels)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(
                self.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, fused=work.device_type == "cuda"
            )

    class Counting(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            after_step(len(batch[1]))

    trainer = pl.Trainer(
        accelerator="gpu" if work.device_type == "cuda" else work.device_type,
        devices=1,
        precision="bf16-mixed" if work.precision == "bf16" else "32-true",
        max_epochs=-1,
        callbacks=[Counting()],
        log_every_n_steps=work.report_every,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module: Any = Module()
    if work.compile:
        module = torch.compile(module)
    trainer.fit(module, loader)


def timm(work: Work, loader: Any, after_step: AfterStep) -> None:
    """What a step of `train_one_epoch` in timm's train.py does by default, of the package's parts.

    That file is not in timm's package. Its options are off by default: mixup, clipping, averages of the weights.
    """
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.task import ClassificationTask
    from timm.utils import AverageMeter

    model = work.build_model()
    task: Any = ClassificationTask(model=model, criterion=nn.CrossEntropyLoss().to(work.device), device=work.device)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="momentum", lr=LEARNING_RATE, momentum=MOMENTUM)
    if work.compile:
        task.compile(backend="inductor", mode=None)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=ENDLESS, warmup_epochs=0, updates_per_epoch=len(loader)
    )
    logger = logging.getLogger("train")
    num_updates = 0
    for epoch in itertools.count():
        meters = SimpleNamespace(update=AverageMeter(), data=AverageMeter(), losses=AverageMeter())
        task.get_trainable_module().train()
        began_loading = began_update = time.time()
        optimizer.zero_grad()
        for index, (inputs, labels) in enumerate(loader):
            inputs, labels = inputs.to(device=work.device), labels.to(device=work.device)
            meters.data.update(time.time() - began_loading)
            with work.autocast():
                loss = task(inputs, labels)["loss"]
            loss.backward()
            optimizer.step()
            meters.losses.update(loss.item(), len(labels))
            optimizer.zero_grad()
            num_updates += 1
            task.update_ema(step=num_updates)
            now = time.time()
            meters.update.update(now - began_update)
            began_update = now
            if index % work.report_every == 0:
                rates = [group["lr"] for group in optimizer.param_groups]
                logger.info(
                    f"Train: {epoch} [{index}/{len(loader)}] Loss: {meters.losses.val:#.3g} ({meters.losses.avg:#.3g}) "
                    f"Time: {meters.update.val:.3f}s ({meters.update.avg:.3f}s) LR: {sum(rates) / len(rates):.3e} "
                    f"Data: {meters.data.val:.3f} ({meters.data.avg:.3f})"
                )
            if scheduler is not None:
                scheduler.step_update(num_updates=num_updates, metric=meters.losses.avg)
            after_step(len(labels))
            began_loading = time.time()


# ---- ours ----------------------------------------------------------------------------------------------------


def our_config(work: Work, run_dir: Path, **sections: Any) -> dict[str, Any]:
    """Returns a config of the same training: what it does not say is as by default, but for trackers.

    Args:
        work: what is trained; its batch is this process's, and that of a run with one process.
        run_dir: the run folder.
        **sections: instead of those here.
    """
    if work.data == "device":
        args = {"shape": list(work.shape), "pool": work.batch_size, "num_classes": work.num_classes}
        train = {"name": "synthetic", "args": {"num_samples": work.num_samples, **args}}
    else:
        args = {"shape": list(work.shape), "num_classes": work.num_classes}
        train = {"name": f"{__name__}:InMemory", "args": {"num_samples": work.num_samples, **args}}
    return {
        "run": {"name": run_dir.name, "dir": str(run_dir)},
        "data": {"train": train, "workers": 0, "drop_last": True},
        "model": work.model_section(),
        "optim": {"name": "sgd", "lr": LEARNING_RATE, "args": {"momentum": MOMENTUM}},
        "precision": work.precision,
        "backends": {"cudnn_benchmark": work.device_type == "cuda"},  # as the callers set it for the others
        "train": {"steps": ENDLESS, "batch_size": work.batch_size},
        "log": {"every": work.report_every},
        "checkpoint": {"every": ENDLESS},
        "tracking": {"trackers": []},
        **sections,
    }


def write_config(config: Mapping[str, Any], file: Path) -> Path:
    """Writes a config as YAML; returns its file."""
    file.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    return file


def ours(work: Work, after_step: AfterStep, folder: Path, **sections: Any) -> None:
    """Our `Trainer`, whole, as `train.py` runs it: its feed, its watch, its reports."""
    from trainer.cli import set_up_logging
    from trainer.config import load_config
    from trainer.loop import Trainer

    class Counting(Trainer):
        def after_step(self) -> None:
            super().after_step()
            after_step(work.batch_size)

    set_up_logging(to_stderr=False)
    config = load_config(str(write_config(our_config(work, folder / "run", **sections), folder / "config.yaml")))
    Counting(config).fit()
