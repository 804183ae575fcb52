"""Every recipe in configs/ runs as shipped, but smaller: a few steps, an evaluation and a checkpoint.

The data are made up, with real files where the recipe looks for them. What a test may change are sizes, and it is
checked that it changes nothing else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import REPOSITORY, Outcome, Train, nightly
from language_model import prepare
from picture_trees import make_cifar10, make_class_folders, make_coco, make_voc
from resuming import TrainServer
from run_results import checkpoint, records, summary
from torch import nn
from torchvision import models
from torchvision.datasets import cifar

from trainer.config import load_config
from trainer.model import build_model
from trainer.telemetry.efficiency import FlopCounter

CONFIGS = REPOSITORY / "configs"
STEPS = 2
PIXELS = 32
NUM_CLASSES = 4
TRANSFORMER = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64, "num_classes": NUM_CLASSES}
FEW_PROPOSALS = {
    **{f"model.args.{side}_size": 64 for side in ("min", "max")},
    "model.args.box_batch_size_per_image": 8,
    **{f"model.args.rpn_{when}_nms_top_n_{mode}": 16 for when in ("pre", "post") for mode in ("train", "test")},
}


class Recipe(NamedTuple):
    """How a recipe is made small."""

    sizes: Mapping[str, Any]
    ranks: int = 1


def vision_transformer(patch_size: int) -> dict[str, Any]:
    """Returns sizes of a transformer of the same class, with few layers."""
    args = {"image_size": 2 * patch_size, "patch_size": patch_size, **TRANSFORMER}
    return {"model": {"name": "torchvision.models:VisionTransformer", "args": args}, "pixels": 2 * patch_size}


RECIPES = {
    "cifar10_fast": Recipe({"train.batch_size": 8}),
    "cifar10_resnet18": Recipe({"train.batch_size": 2, "pixels": 16}),
    "coco_faster_rcnn": Recipe({"train.batch_size": 2, **FEW_PROPOSALS}),
    "digits": Recipe({"train.batch_size": 96}),
    "finetune_resnet50": Recipe({"train.batch_size": 4, "pixels": PIXELS}),
    "fsdp_vit_h_14": Recipe({"train.batch_size": 4, **vision_transformer(14)}, ranks=2),
    "imagenet_convnext_tiny": Recipe({"train.batch_size": 4, "pixels": PIXELS}),
    "imagenet_resnet50": Recipe({"train.batch_size": 4, "pixels": PIXELS}),
    "imagenet_resnet50_16epochs": Recipe({"train.batch_size": 4, "pixels": PIXELS}),
    "imagenet_resnet50_v2": Recipe({"train.batch_size": 4, "pixels": PIXELS}),
    "imagenet_vit_b_16": Recipe({"train.batch_size": 4, **vision_transformer(16)}),
    "synthetic": Recipe({"train.batch_size": 4, "data.train.args.shape": [3, PIXELS, PIXELS]}),
    "tinystories": Recipe(
        {
            "train.batch_size": 4,
            "data.train.args.sequence_length": 16,
            "data.eval.args.sequence_length": 16,
            "model.args": {"vocab_size": 256, "width": 16, "depth": 2, "num_heads": 2, "max_length": 16},
        }
    ),
    "voc_deeplabv3": Recipe({"train.batch_size": 2, "pixels": PIXELS}),
}
# The base of five others; ResNet-50 compiled, as cifar10_fast's net is; two that differ from another in figures only.
ALIKE = (
    "imagenet_resnet50",
    "imagenet_resnet50_16epochs",
    "imagenet_vit_b_16",
    "cifar10_fast",
    "synthetic",
    "imagenet_resnet50_v2",
    "imagenet_convnext_tiny",
    "cifar10_resnet18",
    "voc_deeplabv3",  # tests/dist/test_segmentation_dist.py has such a run
)
# What a test may change besides `model` of the transformers, whose number of layers is part of their name.
SIZE = re.compile(
    r"train\.(steps|epochs|batch_size)|schedule\.warmup|optim\.ema\.every|log\.every|tracking\.trackers(\.0)?"
    r"|data\.workers|data\.transforms\.(train|eval)\.\d+\.args\.(size|min_size|max_size)"
    r"|data\.(train|eval)\.args\.(shape\.\d|sequence_length)|task\.metrics\.top5\.args\.(num_classes|top_k)"
    r"|model\.args\.(min_size|max_size|box_batch_size_per_image|rpn_(pre|post)_nms_top_n_(train|test))"
    r"|model\.args\.(vocab_size|width|depth|num_heads|max_length)"
)


def overrides(name: str) -> list[str]:
    """Returns the settings that make a recipe small."""
    shipped = load_config(str(CONFIGS / f"{name}.yaml"))
    sizes = dict(RECIPES[name].sizes)
    pixels = sizes.pop("pixels", None)
    sizes |= {"train.steps": STEPS, "train.epochs": None, "log.every": 1, "data.workers": 0, "tracking.trackers": []}
    if str(shipped.schedule.warmup) != "0":
        sizes["schedule.warmup"] = "1 epoch" if shipped.schedule.interval == "epoch" else 1
    if shipped.optim.ema is not None:
        sizes["optim.ema.every"] = 1
    if "top5" in shipped.task.metrics:
        sizes |= {"task.metrics.top5.args.num_classes": NUM_CLASSES, "task.metrics.top5.args.top_k": 2}
    if pixels is not None:
        smaller = {"size": pixels, "min_size": pixels // 2, "max_size": 2 * pixels}
        for split in ("train", "eval"):
            listed = [t.model_dump() for t in getattr(shipped.data.transforms, split)]
            for transform in listed:
                transform["args"] |= {key: n for key, n in smaller.items() if key in transform["args"]}
            sizes[f"data.transforms.{split}"] = listed
    return [f"{key}={json.dumps(value)}" for key, value in sizes.items()]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Returns the plain values of a config by dotted path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if not items:
        return {path: value}
    return {p: v for key, inner in items for p, v in flat(inner, f"{path}.{key}" if path else str(key)).items()}


def run(name: str, train: Train, server: TrainServer, folder: Path) -> Outcome:
    """Trains a recipe in a folder where its data are."""
    arguments = ["--config", str(CONFIGS / f"{name}.yaml"), *overrides(name)]
    ranks = RECIPES[name].ranks
    return train(*arguments) if ranks == 1 else server.train(*arguments, ranks=ranks, folder=folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the data that recipes look for, and torchvision's weights."""
    folder = tmp_path_factory.mktemp("recipes")
    make_class_folders(folder / "data" / "imagenet", {"train": 1, "val": 1})
    make_class_folders(folder / "data" / "photos", {"train": 2, "eval": 1}, ("cat", "dog", "owl"))
    make_cifar10(folder / "data" / "cifar10", per_batch=4)
    prepare.write([f"This is story {i}. It is a short one." for i in range(20)], folder / "data" / "tinystories")
    make_coco(folder / "data" / "coco", {"train2017": 4, "val2017": 2})
    make_voc(folder / "data" / "voc", {"train": 4, "val": 2})
    place = folder / "torch" / "hub" / "checkpoints"
    place.mkdir(parents=True)
    weights = models.resnet50().state_dict()
    for version in models.ResNet50_Weights:
        torch.save(weights, place / Path(version.url).name)
    return folder


@pytest.fixture
def place(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a fresh current folder with the data in it, and nothing that takes long and is not the recipe's."""
    (tmp_path / "data").symlink_to(data / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(data / "torch"))
    # Their checksums cannot be those of the real files.
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())
    compiled = nn.Module.compile
    # Traced as shipped; code for the CPU would take minutes to compile.
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: compiled(self, backend="eager"))
    monkeypatch.setattr(FlopCounter, "is_due", False)  # which takes longer than both steps, and has its own tests
    return tmp_path


def test_every_recipe_is_here() -> None:
    assert set(RECIPES) == {file.stem for file in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("name", RECIPES)
def test_only_sizes_differ_from_what_is_shipped(name: str) -> None:
    file = str(CONFIGS / f"{name}.yaml")
    shipped = flat(load_config(file).model_dump(mode="json"))
    tried = flat(load_config(file, overrides(name)).model_dump(mode="json"))
    changed = {key for key in shipped.keys() | tried.keys() if shipped.get(key) != tried.get(key)}
    others = {key for key in changed if not SIZE.fullmatch(key)}
    if "model" in RECIPES[name].sizes:
        assert shipped["model.name"].startswith("vit_")
        others = {key for key in others if not re.fullmatch(r"model\.name|model\.args(\.\w+)?", key)}
    assert others == set()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which dynamo reads
@pytest.mark.parametrize("name", [pytest.param(name, marks=[nightly] * (name in ALIKE)) for name in RECIPES])
def test_recipe_runs(name: str, train: Train, server: TrainServer, place: Path) -> None:
    done = run(name, train, server, place)
    assert done.code == 0, done.err
    config = load_config(str(CONFIGS / f"{name}.yaml"))
    found = summary(place / config.run_dir)
    assert (found["status"], found["step"], found["num_processes"]) == ("finished", STEPS, RECIPES[name].ranks)
    losses = [record["train/loss"] for record in records(place / config.run_dir) if "train/loss" in record]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    evaluated = {key: value for key, value in found["metrics"].items() if key.startswith("eval/")}
    assert bool(evaluated) == (config.data.eval is not None)
    # After two steps BatchNorm's statistics are so far off that the loss may overflow; and no object may be small.
    assert not evaluated or any(value is not None and math.isfinite(value) for value in evaluated.values())
    assert checkpoint(place / config.run_dir, STEPS).manifest.progress.step == STEPS


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("cifar10_fast", 2.0),
        ("cifar10_resnet18", 11.2),
        ("fsdp_vit_h_14", 632.0),
        ("imagenet_convnext_tiny", 28.6),
        ("imagenet_vit_b_16", 86.6),
    ],
)
def test_models_are_those_that_are_named(name: str, millions: float) -> None:
    config = load_config(str(CONFIGS / f"{name}.yaml"))
    with torch.device("meta"):
        model = build_model(config.model, 10 if name.startswith("cifar10") else 1000)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
