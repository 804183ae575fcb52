"""Segmentation on several ranks: the mean over the pixels that count is torchvision's, however the batch is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteConfig, nightly
from picture_trees import make_voc
from resuming import TrainServer, assert_same_end
from run_results import losses, summary, weights
from segments import Segments, SmallSegmenter
from torch.nn import functional

from trainer.config_data import DataConfig
from trainer.data.feed import DeviceFeed
from trainer.data.sampler import BatchPlan, StepSampler
from trainer.faults.plan import VARIABLE, Event, write_plan
from trainer.tasks.segmentation import Segmentation

NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 3, 12, 0.5
WEIGHT = [0.5, 1.0, 2.0]
DATA: dict[str, Any] = {
    "train": {"name": "segments:Segments", "args": {"length": 30}},
    "normalize": {"mean": [0.5] * 3, "std": [0.25] * 3},
    "workers": 0,
}


def reference() -> tuple[dict[str, torch.Tensor], list[float]]:
    """Returns the weights after some steps of a loop as in torchvision's references, and the loss of each step."""
    torch.manual_seed(0)
    model = SmallSegmenter(3, aux=True)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    config, task = DataConfig.model_validate(DATA), Segmentation(num_classes=3)
    feed = DeviceFeed(Segments(30), config, "train", torch.device("cpu"), 0, task)
    feed.start(StepSampler(BatchPlan.split(30, BATCH_SIZE, None, 1, False), 0, 0), 0, NUM_STEPS)
    found = []
    for step in range(NUM_STEPS):
        (batch,) = feed.step_batches(step)
        images, masks = batch.data[0], batch.data[1].long()
        outputs = model(images)
        parts = {
            name: functional.cross_entropy(x, masks, torch.tensor(WEIGHT), ignore_index=255)
            for name, x in outputs.items()
        }
        loss = parts["out"] + 0.5 * parts["aux"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    feed.close()
    return {name: value.detach() for name, value in model.state_dict().items()}, found


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [pytest.param(1, 4, marks=nightly), (2, 2)])
def test_weights_are_those_of_torchvisions_loop(
    ranks: int, micro_batch_size: int, server: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    file = write_config(
        data=DATA,
        model={"name": "segments:SmallSegmenter", "args": {"aux": True}},
        task={"name": "segmentation", "loss": {"name": "cross_entropy", "args": {"weight": WEIGHT}}},
        optim={"name": "sgd", "lr": LEARNING_RATE},
        train={"steps": NUM_STEPS, "batch_size": BATCH_SIZE, "micro_batch_size": micro_batch_size},
    )
    done = server.train("--config", file, ranks=ranks, folder=tmp_path)
    assert done.code == 0, done.err
    expected, expected_losses = reference()
    found = weights(tmp_path / "run", NUM_STEPS)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=2e-6), name
    assert list(losses(tmp_path / "run").values()) == pytest.approx(expected_losses, rel=1e-5)


def test_it_resumes_bit_for_bit_and_counts_pixels_once(
    server: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    make_voc(tmp_path / "voc", {"train": 14, "val": 5})
    args = {"root": str(tmp_path / "voc"), "download": False}
    crop = {"name": "RandomCrop", "args": {"size": 32, "pad_if_needed": True, "fill": {"Image": 0, "Mask": 255}}}

    def run(name: str, ranks: int, **variables: str) -> int:
        config = write_config(
            f"{name}.yaml",
            run__dir=str(tmp_path / name),
            data={
                "train": {"name": "VOCSegmentation", "args": args},
                "eval": {"name": "VOCSegmentation", "args": {**args, "image_set": "val"}},
                "transforms": {"train": [crop, {"name": "RandomHorizontalFlip"}]},
                "normalize": {"mean": [0.45] * 3, "std": [0.25] * 3},
                "workers": 1,
            },
            model={"name": "segments:SmallSegmenter", "args": {"num_classes": 21, "aux": True}},
            task={"name": "segmentation"},
            train={"epochs": 2, "batch_size": 4, "micro_batch_size": 1},
            eval={"every": "1 epoch", "batch_size": 2},
        )
        done = server.train("--config", config, ranks=ranks, folder=tmp_path, variables=variables)
        assert done.code in (0, 75), done.err
        return done.code

    assert run("whole", 2) == 0
    plan = tmp_path / "plan.json"
    write_plan(plan, tmp_path / "stopped", [Event("stop-at", step=6)])
    assert run("stopped", 2, **{VARIABLE: str(plan)}) == 75
    assert run("stopped", 2) == 0
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
    assert run("alone", 1) == 0
    alone, two = summary(tmp_path / "alone")["metrics"], summary(tmp_path / "whole")["metrics"]
    assert alone.keys() == two.keys()
    assert alone["eval/mean_iou"] == pytest.approx(two["eval/mean_iou"], abs=2e-3)  # pixels at the edge of a decision
    assert alone["eval/loss"] == pytest.approx(two["eval/loss"], rel=1e-3)
