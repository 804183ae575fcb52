"""However a batch is split over micro-batches and processes, its gradient is the mean over its samples."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import WriteConfig
from resuming import TrainServer

Steps = list[list[torch.Tensor]]
SPLITS = {"1x64": (1, None), "4x16": (1, 16), "2x2x16": (2, 16)}


def gradients(
    server: TrainServer, write_config: WriteConfig, folder: Path, processes: int, micro_batch_size: int | None
) -> Steps:
    """Returns the gradients of an epoch's two steps: of 64 samples, and of the 37 that are left."""
    folder.mkdir()
    file = write_config(
        f"{folder.name}/run.yaml",
        run__dir=str(folder / "run"),
        data__train__args__length=64 + 37,
        model={"name": "fitted_model:Stack", "args": {"depth": 2}},
        optim={"name": "exchange:Recorded", "lr": 1.0},
        train={"epochs": 1, "batch_size": 64, "micro_batch_size": micro_batch_size},
    )
    done = server.train("--config", file, ranks=processes, folder=folder)
    assert done.code == 0, done.err
    ranks = [
        [torch.load(folder / f"gradients-{rank}-{step}.pt", weights_only=True) for step in range(2)]
        for rank in range(processes)
    ]
    for other in ranks[1:]:
        for ours, theirs in zip(ranks[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return ranks[0]


def test_gradients_do_not_depend_on_the_split(server: TrainServer, write_config: WriteConfig, tmp_path: Path) -> None:
    found = {name: gradients(server, write_config, tmp_path / name, *split) for name, split in SPLITS.items()}
    for name in ("4x16", "2x2x16"):
        for step, tolerance in enumerate((1e-5, 1e-4)):  # the second step's weights differ in their last bits already
            for ours, whole in zip(found[name][step], found["1x64"][step], strict=True):
                error = float((ours - whole).norm() / whole.norm())
                assert error < tolerance, (name, step)


def test_steps_of_other_batches_would_show(server: TrainServer, write_config: WriteConfig, tmp_path: Path) -> None:
    """What the test above would see if a sample were lost."""
    first, second = gradients(server, write_config, tmp_path / "whole", 1, None)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(second, first, strict=True)]
    assert min(errors) > 1e-3
