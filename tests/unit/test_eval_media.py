"""What an evaluation shows: samples and a confusion matrix, in the run folder and in trackers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb_log
from conftest import Train, WriteConfig
from run_results import records, summary
from torch import nn
from torch.nn import functional

from trainer.cli import main
from trainer.config_data import NormalizeConfig
from trainer.data.augment import DeviceAugmentation
from trainer.data.datasets import Digits
from trainer.eval_media import Collector, EvalMedia
from trainer.tasks.classification import Classification
from trainer.tracking import wandb_run


def digits(write_config: WriteConfig, run_dir: Path, **tracking: Any) -> Path:
    return write_config(
        f"{run_dir.name}.yaml",
        run={"name": "tiny", "dir": str(run_dir), "seed": 3},
        data={split: {"name": "digits", "args": {"split": split}} for split in ("train", "eval")} | {"workers": 0},
        model={"name": "small_cnn", "args": {"width": 8}},
        train={"steps": 30, "batch_size": 96},
        eval={"every": 10},
        log={"every": 10},
        checkpoint={"every": 30},
        tracking=tracking,
    )


def test_what_evaluations_show_and_artifacts(
    train: Train, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("HOME", str(tmp_path))
    run, plain = tmp_path / "run", tmp_path / "plain"
    settings = {"mode": "offline", "checkpoints": "last"}
    config = digits(write_config, run, trackers=["wandb", "tensorboard"], wandb=settings, samples=5)
    assert train("--config", config).code == 0
    assert train("--config", digits(write_config, plain, trackers=[], samples=0)).code == 0
    evaluations = [r for r in records(run) if "eval/accuracy" in r]
    for record, expected in zip(evaluations, (r for r in records(plain) if "eval/accuracy" in r), strict=True):
        assert record["eval/accuracy"] == expected["eval/accuracy"]
        assert record["eval/loss"] == expected["eval/loss"]
    assert not (plain / "eval").exists()

    # The run folder: the newest and the best evaluation.
    best = summary(run)["best"]["step"]
    assert {path.name for path in (run / "eval").iterdir()} == {f"step-{step:08d}" for step in {30, best}}
    shown = run / "eval" / "step-00000030"
    confusion = json.loads((shown / "confusion.json").read_text())
    counts = np.array(confusion["counts"])
    data_set = Digits("eval")
    labels = [int(data_set[i][1]) for i in range(len(data_set))]
    assert confusion["classes"] == [str(label) for label in range(10)]
    assert counts.sum(1).tolist() == np.bincount(labels, minlength=10).tolist()
    assert counts.trace() / counts.sum() == evaluations[-1]["eval/accuracy"]
    samples = json.loads((shown / "samples.json").read_text())
    assert [sample["target"] for sample in samples] == [str(label) for label in labels[:5]]
    for i, sample in enumerate(samples):
        assert 0 < sample["confidence"] <= 1
        picture = np.asarray(Image.open(shown / sample["image"]))
        assert picture.shape == (8, 8, 3)
        original = np.asarray(data_set[i][0]).reshape(8, 8).astype(float)
        assert np.abs(picture[:, :, 0] / 255 - original / original.max()).max() < 0.1

    # W&B.
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    rows = [row for row in wandb_log.history(file) if "eval/accuracy" in row]
    assert [row["step"] for row in rows] == [10, 20, 30]
    files = file.parent / "files"
    for row in rows:
        assert "train/loss" in row  # one row per step
        assert len(row["eval/images.captions"]) == 5
        assert all((files / name).exists() for name in row["eval/images.filenames"])
    table = json.loads((files / rows[-1]["eval/samples.path"]).read_text())
    assert table["columns"] == ["image", "target", "prediction", "confidence"]
    assert [line[1:3] for line in table["data"]] == [[sample["target"], sample["prediction"]] for sample in samples]
    cells = json.loads((files / rows[-1]["eval/confusion_table.path"]).read_text())["data"]
    assert [cell[2] for cell in cells] == counts.flatten().tolist()
    uploaded = [found for found in wandb_log.artifacts(file) if found.type == "model"]
    (checkpoint,) = uploaded
    assert set(checkpoint.aliases) >= {"latest", "step-30"}
    linked = run / "wandb" / "checkpoints" / "step-00000030-1"
    assert {f.name for f in linked.iterdir()} == {f.name for f in (run / "checkpoints" / "step-00000030").iterdir()}

    # TensorBoard.
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    assert {f"eval/samples/{i}" for i in range(5)} | {"eval/confusion"} == set(found.Tags()["images"])
    assert [event.step for event in found.Images("eval/samples/0")] == [10, 20, 30]

    # An export joins the run.
    output = tmp_path / "model.safetensors"
    assert main(["export", str(run), "--output", str(output), "--artifact"]) == 0
    assert main(["export", str(plain), "--output", str(output), "--artifact"]) == 2
    newest = sorted(run.glob("wandb/offline-run-*/*.wandb"))[-1]
    assert newest.parent != file.parent
    assert wandb_log.run(newest).run_id == wandb_log.run(file).run_id
    (exported,) = wandb_log.artifacts(newest)
    assert (exported.type, set(exported.aliases)) == ("model", {"latest", "step-30", "safetensors"})
    assert [entry.path for entry in exported.manifest.contents] == ["model.safetensors"]


@pytest.mark.parametrize("is_soft", [False, True])
def test_the_confusion_matrix_counts_what_has_a_label(is_soft: bool) -> None:
    task = Classification(num_classes=3)
    outputs = torch.tensor([[2.0, 1, 0], [0, 2, 1], [0, 2, 1], [0, 0, 5]])
    labels = torch.tensor([0, 1, 2, 2]) if is_soft else torch.tensor([0, 1, 2, -100])
    targets = functional.one_hot(labels, 3).float() if is_soft else labels
    tables: dict[str, torch.Tensor] = {}
    for _ in range(2):
        task.eval_tables(tables, outputs, (torch.zeros(4), targets))
    assert tables["confusion"].tolist() == [[2, 0, 0], [0, 2, 0], [0, 2, 2 if is_soft else 0]]
    wide: dict[str, torch.Tensor] = {}
    task.eval_tables(wide, torch.zeros(4, 1001), (torch.zeros(4), labels))
    assert wide == {}


def no_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.flatten(1).mean(1)


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        (nn.MSELoss(reduction="none"), torch.randn(4, 1), torch.randn(4, 1)),
        (lambda outputs, targets: (outputs[:, 0] - targets) ** 2, torch.randn(4, 1), torch.randn(4)),
        (nn.CrossEntropyLoss(reduction="none"), torch.randn(4, 5, 6), torch.randint(0, 5, (4, 6))),
        (no_loss, torch.randn(4, 3), torch.tensor([0, 3, -100, -1])),  # labels outside of the classes
    ],
)
def test_what_is_no_classification_is_evaluated_as_before(
    loss: Any, outputs: torch.Tensor, targets: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    task = Classification(loss=loss)
    task._outputs_checked = True
    collector = Collector(task, 2)
    collector.add(outputs, (torch.zeros(4, 3), targets))
    media = collector.media(collector.tables, None, None)
    assert caplog.text == ""
    if loss is no_loss:
        assert media is not None
        assert media.tables["confusion"].sum() == 1
        assert [example.target for example in media.examples][1:] == ["3"]
    else:
        assert media is None


class Unwilling(Classification):
    """A user's task, which cannot show what it says it can."""

    def __init__(self, where: str) -> None:
        super().__init__(num_classes=2)
        self.where = where

    def eval_tables(self, tables: dict[str, torch.Tensor], outputs: torch.Tensor, data: Any) -> None:
        if self.where == "eval_tables":
            raise KeyError("no")
        super().eval_tables(tables, outputs, data)
        if self.where == "table":
            tables["confusion"] = tables["confusion"].float()

    def describe_examples(self, examples: Any, classes: Any) -> Any:
        return [(0, None)]


@pytest.mark.parametrize("where", ["eval_tables", "table", "describe_examples"])
def test_a_task_that_cannot_show_ends_no_run(where: str, caplog: pytest.LogCaptureFixture) -> None:
    task = Unwilling(where)
    batch = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
    for _ in range(2):
        collector = Collector(task, 2)
        for _ in range(2):
            collector.add(torch.eye(2), batch)
        assert collector.media(collector.tables, None, None) is None
    assert caplog.text.count("evaluations show no samples and no tables from here on") == 1


def test_a_large_confusion_matrix_is_told_in_its_largest_cells() -> None:
    counts = np.arange(1000 * 1000).reshape(1000, 1000) % 1009
    counts[:, :500] = 0
    media = EvalMedia([], {"confusion": counts}, [str(i) for i in range(1000)])
    started = time.process_time()
    told = wandb_run._wandb_media(media)["eval/confusion"].table.data
    assert time.process_time() - started < 2
    assert len(told) == 10_000
    assert all(counts[int(i), int(j)] == count for i, j, count in told)
    assert min(count for _, _, count in told) >= np.sort(counts, axis=None)[-10_000]


def test_pictures_are_as_they_were_before_they_were_normalised() -> None:
    original = torch.randint(0, 256, (3, 3, 20, 500), dtype=torch.uint8)
    normalize = NormalizeConfig(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])
    normalized = DeviceAugmentation(normalize, dtype=torch.float32)(original)
    task = Classification(num_classes=2)
    collector = Collector(task, 5)
    for batch in (normalized[:2], normalized[2:]):
        collector.add(torch.tensor([[0.0, 9.0]] * len(batch)), (batch, torch.tensor([0] * len(batch))))
    media = collector.media({}, ["cat", "dog"], normalize)
    assert media is not None
    assert [(e.number, e.target, e.prediction) for e in media.examples] == [(i, "cat", "dog") for i in range(3)]
    assert media.examples[0].caption == "dog (100%), is cat"
    for example, expected in zip(media.examples, original, strict=True):
        assert example.image is not None
        assert example.image.shape == (10, 256, 3)
        small = functional.interpolate(expected[None].float(), (10, 256), mode="area")[0].permute(1, 2, 0)
        assert np.abs(example.image - small.numpy()).max() <= 1
