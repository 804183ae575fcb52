"""A loss that is divided by what a task counts, and metrics of all kinds: the same however a batch is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteConfig, few
from resuming import TrainServer
from run_results import losses, summary, weights

F1 = {"name": "torchmetrics.classification:MulticlassF1Score", "args": {"num_classes": 3}}
FSDP = {"parallel": {"strategy": "fsdp"}, "memory": {"blocks": ["blocks.0", "blocks.1"]}}
# ranks, micro-batch, other settings; of 64 samples, and of the 33 that are left, of which a rank may have a batch less
SPLITS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "ddp": (2, 16, {}),
    "fsdp": (2, 16, FSDP),
    "micro-batches": (1, 8, {}),
    "one-each": (2, 32, {}),
    "skip": (2, 16, {"faults": {"non_finite": "skip"}, "optim__clip_norm": 100.0}),
    "compressed": (2, 16, {"parallel": {"gradient_compression": "fp16"}}),
    "fp16": (2, 16, {"precision": "fp16"}),
}
IN_CI = ("ddp", "fsdp")
ROUGH = ("compressed", "fp16")


def trained(
    server: TrainServer, write_config: WriteConfig, folder: Path, ranks: int, micro_batch: int | None, **changes: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    file = write_config(
        f"{folder.name}.yaml",
        run__dir=str(folder / "run"),
        data__train__args__length=64 + 33,
        model={"name": "fitted_model:Stack", "args": {"depth": 2}},
        **{"optim": {"name": "sgd", "lr": 0.3}, "task": {"name": "counted:Counted"}, **changes},
        train={"epochs": 1, "batch_size": 64, "micro_batch_size": micro_batch},
    )
    done = server.train("--config", file, ranks=ranks, folder=folder)
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("counted")


@pytest.mark.parametrize("name", few(SPLITS, *IN_CI))
def test_the_step_does_not_depend_on_the_split(
    name: str, server: TrainServer, write_config: WriteConfig, folder: Path
) -> None:
    whole = folder / "whole" / "run"
    if not whole.exists():
        trained(server, write_config, folder / "whole", 1, None)
    ranks, micro_batch, changes = SPLITS[name]
    run = trained(server, write_config, folder / name, ranks, micro_batch, **changes)
    tolerance = 2e-2 if name in ROUGH else 1e-5
    assert losses(run) == pytest.approx(losses(whole), rel=tolerance)
    assert summary(run)["skipped_steps"] == 0  # the guess keeps fp16's gradients in range
    expected = weights(whole, 2)
    for key, found in weights(run, 2).items():
        torch.testing.assert_close(found, expected[key], rtol=tolerance, atol=tolerance / 10)


def test_metrics_are_those_of_one_rank(server: TrainServer, write_config: WriteConfig, folder: Path) -> None:
    """Weights that stay as they are, 23 samples to evaluate, in batches of 4 on two ranks."""
    task = {"name": "counted:Counted", "metrics": {"f1": F1}}
    changes = {"optim": {"name": "sgd", "lr": 1e-30}, "task": task, "eval": {"batch_size": 4}}
    found = {
        ranks: summary(trained(server, write_config, folder / f"metrics-{ranks}", ranks, None, **changes))["metrics"]
        for ranks in (1, 2)
    }
    names = ["num_records", "in_order", "f1", *(f"cell_{row}{column}" for row in range(3) for column in range(3))]
    assert [found[1][f"eval/{name}"] for name in names] == [found[2][f"eval/{name}"] for name in names]
    assert found[1]["eval/num_records"] == sum(found[1][f"eval/{name}"] for name in names[3:]) == 23
    assert found[1]["eval/loss"] == pytest.approx(found[2]["eval/loss"], rel=1e-12)
    cells = {(row, column): found[2][f"eval/cell_{row}{column}"] for row in range(3) for column in range(3)}
    parts = [
        2 * cells[c, c] / (sum(cells[c, i] for i in range(3)) + sum(cells[i, c] for i in range(3))) for c in range(3)
    ]
    assert found[2]["eval/f1"] == pytest.approx(sum(parts) / 3)
