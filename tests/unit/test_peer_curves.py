"""The same training as by the peers' own code: losses and rates of 50 steps, weights and averages at their end.

Each run of ours is recorded: its first weights, and its batches as the model got them, mixed and normalised. The peer's
step is then made by hand from the peer's own parts, in the order of torchvision's references/classification/train.py
or timm's train.py, with a model that the peer built. The mixing itself is compared in `test_mixing_is_*`: ours draws a
share per pair of neighbours, theirs one per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import nightly, tiny_config
from run_results import identical, records, tensors, weights
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torchvision.models import DenseNet
from torchvision.ops._utils import split_normalization_params
from torchvision.transforms import v2

from trainer.config import load_config
from trainer.config_data import AugmentConfig
from trainer.data.augment import AugmentationPlan, DeviceAugmentation, mix_targets
from trainer.data.draws import sample_keys
from trainer.data.feed import MicroBatch
from trainer.data.sampler import SampleKey
from trainer.loop import Trainer

pytestmark = pytest.mark.unit

NUM_CLASSES, NUM_SAMPLES, BATCH, EPOCHS, STEPS = 5, 80, 16, 10, 50
PER_EPOCH = NUM_SAMPLES // BATCH

# Gradients are computed in the same operations, so that weights stay equal bit for bit. The loss that is shown is the
# sum of a batch divided by its size here and torch's mean there: two roundings of 2^-24 each, and those of the sum.
LOSS = 5e-7


@dataclass
class Run:
    """A run of ours: the state dict it began with, and (inputs, targets) of each step as the model got them."""

    folder: Path
    initial: dict[str, torch.Tensor]
    batches: list[tuple[torch.Tensor, torch.Tensor]]

    def reported(self, key: str) -> list[float]:
        return [record[f"train/{key}"] for record in records(self.folder) if f"train/{key}" in record]


def our_run(folder: Path, **changes: Any) -> Run:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (NUM_SAMPLES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    torch.save((images, torch.arange(NUM_SAMPLES) % NUM_CLASSES), folder / "train.pt")
    settings = {
        "data__train": {"name": "torch_file", "args": {"path": str(folder / "train.pt")}},
        "data__eval": None,
        "data__transforms__train": [{"name": "RandomHorizontalFlip"}],
        "data__normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "train": {"epochs": EPOCHS, "batch_size": BATCH},
        **changes,
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tiny_config(folder / "run", **settings)))
    trainer = Trainer(load_config(str(file)))
    run = Run(folder / "run", {k: v.clone() for k, v in trainer.bare_model.state_dict().items()}, [])
    step_batches = trainer.feed.step_batches

    def recorded(step: int) -> Iterator[MicroBatch]:
        for batch in step_batches(step):
            inputs, targets = batch.data
            run.batches.append((inputs.clone(memory_format=torch.preserve_format), targets.clone()))
            yield batch

    trainer.feed.step_batches = recorded  # type: ignore[method-assign]
    assert trainer.fit() == "finished"
    assert len(run.batches) == STEPS
    return run


def peers(model: nn.Module, run: Run) -> nn.Module:
    """Returns the peer's model with the weights that ours began with, in the memory format of ours."""
    model.load_state_dict(run.initial)
    return model.to(memory_format=torch.channels_last).train()


def by_epoch(run: Run) -> Iterator[tuple[int, list[tuple[torch.Tensor, torch.Tensor]]]]:
    for epoch in range(EPOCHS):
        yield epoch, run.batches[epoch * PER_EPOCH : (epoch + 1) * PER_EPOCH]


def assert_same(
    run: Run,
    losses: list[float],
    rates: list[float],
    model: nn.Module,
    averages: dict[str, torch.Tensor] | None = None,
) -> None:
    assert run.reported("loss") == pytest.approx(losses, rel=LOSS, abs=0)
    assert losses[-1] != pytest.approx(losses[0], rel=0.01)  # it did train
    assert run.reported("lr") == pytest.approx(rates, rel=1e-11, abs=0)
    assert identical(weights(run.folder, STEPS), dict(model.state_dict()))
    assert averages is None or identical(tensors(run.folder, STEPS, "ema."), averages)


# ---- torchvision ------------------------------------------------------------------------------------------------

SGD = {"name": "sgd", "lr": 0.05, "weight_decay": 1e-3, "args": {"momentum": 0.9, "nesterov": True}}
SMOOTHED = {"task__loss": {"name": "cross_entropy", "args": {"label_smoothing": 0.1}}}
DENSENET = {"growth_rate": 8, "block_config": [2, 2], "num_init_features": 16, "num_classes": NUM_CLASSES}
MODEL = {"name": "torchvision.models:DenseNet", "args": DENSENET}
MIXED = {"data__augment": {"mixup": 0.2, "cutmix": 1.0}}
STEP_LR = {"schedule": {"name": "step", "args": {"every": "3 epochs", "gamma": 0.5}, "interval": "epoch"}}
COSINE = {"schedule": {"name": "cosine", "warmup": "2 epochs", "interval": "epoch"}}


def torchvisions(
    run: Run,
    schedule: Callable[[torch.optim.Optimizer], Any],
    smoothing: float = 0.0,
    clip_norm: float | None = None,
    ema_decay: float | None = None,
    norm_weight_decay: float | None = None,
) -> tuple[list[float], list[float], nn.Module, AveragedModel | None]:
    """Trains as torchvision's classification reference does."""
    model = peers(DenseNet(**DENSENET), run)
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
    parameters: Any = model.parameters()
    if norm_weight_decay is not None:
        decays = (norm_weight_decay, SGD["weight_decay"])
        groups = split_normalization_params(model)
        parameters = [{"params": p, "weight_decay": w} for p, w in zip(groups, decays, strict=True)]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)
    scheduler = schedule(optimizer)
    averages = None
    if ema_decay is not None:
        averages = AveragedModel(
            model, avg_fn=lambda average, new, _: ema_decay * average + (1 - ema_decay) * new, use_buffers=True
        )
    losses, rates = [], []
    for _, batches in by_epoch(run):
        for images, targets in batches:
            loss = criterion(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if averages is not None:
                averages.update_parameters(model)
            losses.append(loss.item())
        scheduler.step()
    return losses, rates, model, averages


@nightly
def test_torchvisions_plain_recipe(tmp_path: Path) -> None:
    """ResNet-50's first recipe in small: SGD, labels, StepLR per epoch."""
    run = our_run(tmp_path, model=MODEL, optim=SGD, **STEP_LR)
    losses, rates, model, _ = torchvisions(run, lambda o: lr_scheduler.StepLR(o, 3, 0.5))
    assert_same(run, losses, rates, model)


def cosine_after_warm_up(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, 0.01, total_iters=2),
            lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS - 2),
        ],
        milestones=[2],
    )


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_torchvisions_new_recipe(tmp_path: Path) -> None:
    """The one of its newer weights in small: label smoothing, mixup and cutmix, clipping, EMA, cosine after warm-up."""
    averaged = {"clip_norm": 1.0, "ema": {"decay": 0.9, "warmup": False}}
    optim = {**SGD, "no_weight_decay": ["norm"], **averaged}
    run = our_run(tmp_path, model=MODEL, optim=optim, **COSINE, **SMOOTHED, **MIXED)
    losses, rates, model, averages = torchvisions(run, cosine_after_warm_up, 0.1, 1.0, 0.9, norm_weight_decay=0.0)
    assert_same(run, losses, rates, model)
    assert averages is not None
    found, expected = tensors(run.folder, STEPS, "ema."), dict(averages.module.named_parameters())
    assert found.keys() == expected.keys()
    for name, average in found.items():  # decay * a + (1 - decay) * w there, torch.lerp here: some roundings per step
        assert torch.allclose(average, expected[name], rtol=1e-5, atol=1e-6), name


# ---- timm -------------------------------------------------------------------------------------------------------

needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="needs pip install 'lockstep-trainer[timm]'")

VIT = {"name": "timm:test_vit", "args": {"img_size": 32, "num_classes": NUM_CLASSES}}
RESNET = {"name": "timm:test_resnet", "args": {"num_classes": NUM_CLASSES}}


def timms(
    run: Run,
    name: str,
    args: dict[str, Any],
    optimizer: dict[str, Any],
    schedule: dict[str, Any],
    smoothing: float,
    is_mixed: bool,
    clip_grad: float | None = None,
) -> tuple[list[float], list[float], nn.Module, dict[str, torch.Tensor]]:
    """Trains as timm's train.py does, in float32 and without a prefetcher."""
    from timm import create_model
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3, dispatch_clip_grad

    model = peers(create_model(name, num_classes=NUM_CLASSES, **args), run)
    groups = create_optimizer_v2(model, **optimizer)
    averages = ModelEmaV3(model, decay=0.95, use_warmup=True)
    criterion = SoftTargetCrossEntropy() if is_mixed else LabelSmoothingCrossEntropy(smoothing=smoothing)
    scheduler, num_epochs = create_scheduler_v2(groups, updates_per_epoch=PER_EPOCH, **schedule)
    assert num_epochs == EPOCHS
    # train.py clips model.parameters(). The norm is a sum over them, and another order changes its last bits.
    in_groups = [p for group in groups.param_groups for p in group["params"]]
    losses, rates, num_updates = [], [], 0
    groups.zero_grad()
    for epoch, batches in by_epoch(run):
        for images, targets in batches:
            if is_mixed:  # its Mixup smooths what it mixes
                targets = targets * (1 - smoothing) + smoothing / NUM_CLASSES
            loss = criterion(model(images), targets)
            loss.backward()
            if clip_grad is not None:
                dispatch_clip_grad(in_groups, value=clip_grad)
            rates.append(groups.param_groups[0]["lr"] / groups.param_groups[0].get("lr_scale", 1.0))
            groups.step()
            num_updates += 1
            groups.zero_grad()
            averages.update(model, step=num_updates)
            losses.append(loss.item())
            scheduler.step_update(num_updates)
        scheduler.step(epoch + 1)
    return losses, rates, model, dict(averages.module.named_parameters())


@nightly
@needs_timm
def test_timms_recipe_for_transformers(tmp_path: Path) -> None:
    """DeiT's in small: AdamW, layer decay, mixup, cutmix, smoothing, clipping, EMA with warm-up, cosine on updates."""
    optim = {
        "name": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.05,
        "no_weight_decay": ["vector", "pos_embed", "cls_token"],
        "layer_decay": 0.75,
        "clip_norm": 1.0,
        "ema": {"decay": 0.95, "warmup": "timm"},
    }
    schedule = {
        "name": "cosine",
        "args": {"min_ratio": 1e-5 / 2e-3},
        "warmup": "2 epochs",
        "warmup_start": 1e-6 / 2e-3,
        "warmup_prefix": False,
    }
    run = our_run(tmp_path, model=VIT, optim=optim, schedule=schedule, **SMOOTHED, **MIXED)
    found = timms(
        run,
        "test_vit",
        {"img_size": 32},
        {"opt": "adamw", "lr": 2e-3, "weight_decay": 0.05, "layer_decay": 0.75},
        {
            "sched": "cosine",
            "num_epochs": EPOCHS,
            "warmup_epochs": 2,
            "warmup_lr": 1e-6,
            "min_lr": 1e-5,
            "step_on_epochs": False,
        },
        smoothing=0.1,
        is_mixed=True,
        clip_grad=1.0,
    )
    assert_same(run, *found)


@needs_timm
@nightly
def test_timms_recipe_for_convolutions(tmp_path: Path) -> None:
    """SGD with Nesterov's momentum, smoothed labels, steps per epoch after a warm-up of its own epochs."""
    optim = {**SGD, "no_weight_decay": ["vector"], "ema": {"decay": 0.95, "warmup": "timm"}}
    schedule = {
        "name": "step",
        "args": {"every": "3 epochs", "gamma": 0.5},
        "interval": "epoch",
        "warmup": "2 epochs",
        "warmup_start": 1e-4 / 0.05,
    }
    run = our_run(tmp_path, model=RESNET, optim=optim, schedule=schedule, **SMOOTHED)
    found = timms(
        run,
        "test_resnet",
        {},
        {"opt": "sgd", "lr": 0.05, "weight_decay": 1e-3, "momentum": 0.9},
        {
            "sched": "step",
            "num_epochs": EPOCHS - 2,
            "decay_epochs": 3,
            "decay_rate": 0.5,
            "warmup_epochs": 2,
            "warmup_lr": 1e-4,
            "warmup_prefix": True,
        },
        smoothing=0.1,
        is_mixed=False,
    )
    assert_same(run, *found)


# ---- mixing -----------------------------------------------------------------------------------------------------


def planned(mixup: float, cutmix: float) -> tuple[torch.Tensor, torch.Tensor, AugmentationPlan, DeviceAugmentation]:
    """Returns float images in [0, 1], labels, and what is drawn for 8 of them."""
    module = DeviceAugmentation(None, AugmentConfig(mixup=mixup, cutmix=cutmix))
    images = torch.rand(8, 3, 12, 16, generator=torch.Generator().manual_seed(2))
    keys = sample_keys(0, [SampleKey(0, i) for i in range(8)])
    return images, torch.arange(8) % NUM_CLASSES, module.plan(keys, tuple(images.shape)), module


def test_mixing_is_torchvisions() -> None:
    """For the same share or box, on each pair: torchvision rolls a batch by one, which swaps two."""
    for transform, alphas in ((v2.MixUp, (0.8, 0.0)), (v2.CutMix, (0.0, 1.0))):
        images, labels, plan, module = planned(*alphas)
        assert plan.mix_boxes is not None
        assert plan.target_share is not None
        ours = module(images, plan)
        our_targets = mix_targets(labels, plan, NUM_CLASSES)
        assert not torch.equal(ours, images)
        theirs = transform(num_classes=NUM_CLASSES)
        for i in range(0, 8, 2):
            top, left, bottom, right = plan.mix_boxes[i].tolist()
            share = float(plan.target_share[i])
            pair = labels[i : i + 2]
            params = {
                "labels": pair,  # known by identity
                "batch_size": 2,
                "lam": share,
                "box": (left, top, right, bottom),
                "lam_adjusted": share,
            }
            assert torch.equal(ours[i : i + 2], theirs.transform(images[i : i + 2], params))
            assert torch.equal(our_targets[i : i + 2], theirs.transform(pair, params))


@needs_timm
@pytest.mark.parametrize("use_cutmix", [False, True], ids=["mixup", "cutmix"])
def test_mixing_is_timms(use_cutmix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm flips a batch, which swaps two, and smooths before it mixes, which is the same as after."""
    from timm.data import mixup as timms_mixup

    images, labels, plan, module = planned(*((0.0, 1.0) if use_cutmix else (0.8, 0.0)))
    assert plan.mix_boxes is not None
    assert plan.target_share is not None
    ours = module(images, plan)
    smoothed = mix_targets(labels, plan, NUM_CLASSES) * 0.9 + 0.1 / NUM_CLASSES
    theirs = timms_mixup.Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=NUM_CLASSES)
    for i in range(0, 8, 2):
        top, left, bottom, right = plan.mix_boxes[i].tolist()
        share = float(plan.target_share[i])
        monkeypatch.setattr(theirs, "_params_per_batch", lambda share=share: (share, use_cutmix))
        box = (top, bottom, left, right)
        monkeypatch.setattr(timms_mixup, "cutmix_bbox_and_lam", lambda *_, box=box, share=share, **__: (box, share))
        mixed, targets = theirs(images[i : i + 2].clone(), labels[i : i + 2])
        assert torch.equal(ours[i : i + 2], mixed)
        assert torch.allclose(smoothed[i : i + 2], targets, rtol=1e-6, atol=1e-7)
