"""docs/coming-from.md: each row's YAML loads, means what it says, and names what is there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import REPOSITORY

from trainer import yaml_source
from trainer.components import Kind, resolve
from trainer.config import load_config
from trainer.data.transforms import build_transforms
from trainer.schedule import build_learning_rate
from trainer.tasks import build_task

PAGE = (REPOSITORY / "docs" / "coming-from.md").read_text()
BASE = """
run: {name: tried}
data:
  train: {name: image_folder, args: {root: train}}
  eval: {name: image_folder, args: {root: eval}}
model: {name: resnet50}
optim: {name: sgd, lr: 0.1}
train: {epochs: 90, batch_size: 1024}
"""
STEPS_PER_EPOCH = 1251
IN_WORDS = ("not here", "always")


class Row(NamedTuple):
    theirs: str
    ours: str


def rows() -> Iterator[Row]:
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            theirs, ours, _ = line[2:-1].split(" | ")
            yield Row(theirs.strip(), ours.strip())


ROWS = list(rows())


@pytest.mark.parametrize("row", [row for row in ROWS if row.ours not in IN_WORDS], ids=lambda row: row.theirs[:60])
def test_rows_mean_what_they_say(row: Row, tmp_path: Path) -> None:
    assert re.fullmatch(r"`[^`]+`", row.ours), row.ours
    text = row.ours.strip("`")
    if text.startswith("{"):  # several sections
        text = text[1:-1]
    (tmp_path / "base.yaml").write_text(BASE)
    file = tmp_path / "run.yaml"
    file.write_text(f"{{base: base.yaml, {text}}}")
    config = load_config(str(file))
    assert_holds(config.model_dump(mode="json"), yaml_source.read(str(file), []).values)
    for numbers in re.findall(r"`([^`]+)`", row.theirs)[:1]:
        for number in re.findall(r"(?<![\w.\-])\d[\d.e\-]*(?![\w.])", numbers):
            assert number in re.findall(r"[\w.\-]+", text), number
    data, schedule, optim, task = config.data, config.schedule, config.optim, config.task
    kinds: list[tuple[Kind, str]] = [
        ("data set", data.train.name),
        ("model", config.model.name),
        ("optimizer", optim.name),
        ("schedule", schedule.name),
        ("task", task.name),
        *(("transform", part.name) for part in (*data.transforms.train, *data.transforms.eval)),
    ]
    if task.loss is not None:
        kinds.append(("loss", task.loss.name))
    for kind, name in kinds:
        if name.startswith("timm"):
            pytest.importorskip("timm")
        resolve(kind, name, "here")
    total_steps = config.train.steps or (config.train.epochs or 0) * STEPS_PER_EPOCH
    build_learning_rate(optim, schedule, total_steps, STEPS_PER_EPOCH)
    build_task(task, num_classes=1000)
    for split in ("train", "eval"):
        build_transforms(getattr(data.transforms, split), f"data.transforms.{split}")


def assert_holds(resolved: Any, given: Any, path: str = "") -> None:
    """Asserts that all that was written is what the config holds."""
    if isinstance(given, Mapping):
        for key, value in given.items():
            assert_holds(resolved[key], value, f"{path}.{key}")
    elif isinstance(given, list):
        assert len(resolved) == len(given), path
        for i, value in enumerate(given):
            assert_holds(resolved[i], value, f"{path}.{i}")
    else:
        assert resolved == given or str(resolved) == str(given), path


def test_there_are_all_rows() -> None:
    assert len(ROWS) > 150
    assert {row.ours for row in ROWS if not row.ours.startswith("`")} == set(IN_WORDS)
