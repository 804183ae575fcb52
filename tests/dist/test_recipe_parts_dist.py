"""Parts of recipes on two ranks: stopped in the middle of an epoch and resumed bit for bit, and as on one rank.

A row of `PARTS` is a part's settings, on top of `BASE`, as `conftest.tiny_config` takes them. `TOGETHER` says which of
them ordinary CI trains in one run; every part belongs to one of these. Nightly trains each part alone as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import few, nightly, tiny_config
from resuming import TrainServer, assert_same_end
from run_results import losses, summary

from trainer.faults.plan import VARIABLE, Event, write_plan
from trainer.small_models import SmallCNN

NUM_SAMPLES, NUM_EVALUATED = 26, 9
STOPPED_AT = 6  # of 8 steps: in the middle of the second epoch

BASE: dict[str, Any] = {
    "data__train": {"name": "torch_file", "args": {"path": "train.pt"}},
    "data__eval": {"name": "torch_file", "args": {"path": "eval.pt"}},
    "data__normalize": {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.25, 0.25]},
    "model": {"name": "small_cnn", "args": {"width": 8, "in_channels": 3, "num_classes": 3}},
    "train": {"epochs": 2, "batch_size": 8, "micro_batch_size": 2},  # the last batch of an epoch has 2 samples
    "checkpoint__keep": 1,
}


def transforms(*names: str) -> dict[str, Any]:
    return {"data__transforms__train": [{"name": name} for name in names]}


TEACHER: dict[str, Any] = {
    "name": "small_cnn",
    "args": {"width": 16, "in_channels": 3, "num_classes": 3},
    "weights": "teacher.pt",
}

PARTS: dict[str, dict[str, Any]] = {
    "rand_augment": transforms("RandAugment"),
    "trivial_augment": transforms("TrivialAugmentWide"),
    "auto_augment": transforms("AutoAugment"),
    "mixup": {"data__augment__mixup": 0.3},
    "cutmix": {"data__augment__cutmix": 1.0},
    "random_erasing": {"data__augment__erase": 0.5, "data__augment__erase_with": "noise"},
    "label_smoothing": {"task__loss": {"name": "cross_entropy", "args": {"label_smoothing": 0.1}}},
    "ema": {"optim__ema": {"decay": 0.9, "warmup": True}},
    "clip_norm": {"optim__clip_norm": 0.5},
    "repeats": {"data__augment_repeats": 3, "data__augment__mixup": 0.3},
    "soft_targets": {"task__loss": {"name": "torch.nn:BCEWithLogitsLoss"}, "task__args": {"label_smoothing": 0.1}},
    "teacher": {"task__teacher": {**TEACHER, "temperature": 2.0}},
    "hard_teacher": {"task__teacher": {**TEACHER, "hard": True}},
    "fsdp": {"parallel__strategy": "fsdp"},
    "counts": {"task__name": "counted:Counted"},
    "metrics": {
        "task__metrics": {"f1": {"name": "torchmetrics.classification:MulticlassF1Score", "args": {"num_classes": 3}}}
    },
    "no_weight_decay": {"optim__weight_decay": 0.1, "optim__no_weight_decay": ["norm", "bias"]},
    "layer_decay": {"optim__layer_decay": 0.7},
    "freeze": {"model": {**BASE["model"], "freeze": ["features.0"]}},
    "clip_value": {"optim__clip_value": 0.01},
    "muon": {"optim__name": "Muon", "optim__rest": {"name": "adamw", "lr": 0.003, "match": ["not_matrix"]}},
    "lamb": {"optim__name": "timm.optim:Lamb"},
}
TOGETHER: dict[str, tuple[str, ...]] = {
    "augmented": (
        "rand_augment",
        "mixup",
        "cutmix",
        "random_erasing",
        "label_smoothing",
        "ema",
        "clip_norm",
        "repeats",
        "teacher",
    ),
    "trivial": ("trivial_augment", "cutmix", "soft_targets"),
    "automatic": ("auto_augment", "hard_teacher", "fsdp"),
    "counted": ("counts", "metrics", "clip_norm"),
    "tuned": ("muon", "no_weight_decay", "layer_decay", "freeze", "clip_value"),
    "foreign": ("lamb", "no_weight_decay", "layer_decay", "ema"),
}
IN_CI = ("tuned",)  # the others, which differ in little from these, run nightly


def merged(parts: tuple[str, ...]) -> dict[str, Any]:
    """Returns the settings of several parts, none of which sets what another has set to something else."""
    settings = dict(BASE)
    for part in parts:
        different = [
            key for key, value in PARTS[part].items() if settings.get(key, value) not in (value, BASE.get(key))
        ]
        assert not different, f"{different} of {part} are set by another part of {parts}"
        settings |= PARTS[part]
    return settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the data are, and runs leave theirs."""
    folder = tmp_path_factory.mktemp("parts")
    for name, num in (("train", NUM_SAMPLES), ("eval", NUM_EVALUATED)):
        images = torch.randint(
            0, 256, (num, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(num)
        )
        torch.save((images, torch.arange(num) % 3), folder / f"{name}.pt")
    torch.manual_seed(1)
    torch.save(SmallCNN(**TEACHER["args"]).state_dict(), folder / "teacher.pt")
    return folder


def assert_survives(server: TrainServer, folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Trains on two ranks in one go, with a stop in the middle, and on one rank, and compares."""

    def train(which: str, ranks: int, **variables: str) -> int:
        file = folder / f"{name}-{which}.yaml"
        file.write_text(yaml.safe_dump(tiny_config(folder / name / which, **settings)))
        done = server.train("--config", file, ranks=ranks, folder=folder, variables=variables)
        assert done.code in (0, 75), done.out + done.err
        assert "Traceback" not in done.err
        return done.code

    whole, stopped, alone = (folder / name / which for which in ("whole", "stopped", "alone"))
    assert train("whole", 2) == 0
    plan = folder / f"{name}-plan.json"
    write_plan(plan, stopped, [Event("stop-at", step=STOPPED_AT)])
    assert train("stopped", 2, **{VARIABLE: str(plan)}) == 75
    assert summary(stopped)["step"] == STOPPED_AT
    assert train("stopped", 2) == 0
    assert_same_end(stopped, whole)

    assert train("alone", 1) == 0
    assert losses(alone) == pytest.approx(losses(whole), rel=1e-3)
    one, two = summary(alone), summary(whole)
    assert (one["step"], one["samples"]) == (two["step"], two["samples"]) == (8, 2 * NUM_SAMPLES)
    assert one["metrics"]["eval/loss"] == pytest.approx(two["metrics"]["eval/loss"], rel=1e-3)


@pytest.mark.parametrize("name", few(TOGETHER, *IN_CI))
def test_together(name: str, server: TrainServer, folder: Path) -> None:
    assert_survives(server, folder, f"together-{name}", merged(TOGETHER[name]))


@nightly
@pytest.mark.parametrize("name", PARTS)
def test_alone(name: str, server: TrainServer, folder: Path) -> None:
    assert_survives(server, folder, name, merged((name,)))


def test_every_part_belongs_to_a_run_of_several() -> None:
    assert {part for parts in TOGETHER.values() for part in parts} == set(PARTS)
