"""What `data.feed: auto` chooses, and the number of workers that `auto` settles on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from trainer.config_data import DataConfig
from trainer.data import modes, tuning
from trainer.data.datasets import TorchFile
from trainer.data.tuning import WorkerTuner

CUDA = torch.device("cuda")
PIXELS = 100 * 3 * 8 * 8


@pytest.fixture
def dataset(tmp_path: Path) -> TorchFile:
    torch.save((torch.zeros(100, 3, 8, 8, dtype=torch.uint8), torch.zeros(100)), tmp_path / "data.pt")
    return TorchFile(str(tmp_path / "data.pt"))


def choose(dataset: Any, memory: int, device: torch.device = CUDA, ranks: int = 1, **data: Any) -> modes.Route:
    config = DataConfig.model_validate({"train": {"name": "x:y"}, **data})
    transforms = data.pop("built", [v2.RandomCrop(8, padding=1)])
    return modes.choose_route(dataset, config, "train", transforms, device, ranks, memory)


def test_auto_keeps_a_small_data_set_on_a_gpu(dataset: TorchFile) -> None:
    assert choose(dataset, PIXELS * 5).mode == "resident"
    large = choose(dataset, PIXELS * 5 - 10)
    assert large.mode == "host"
    assert "GiB" in large.reason
    shared = choose(dataset, PIXELS * 3, ranks=2)
    assert (shared.mode, shared.is_sharded) == ("resident", True)
    whole = choose(dataset, PIXELS * 3, ranks=2, resident_placement="replicated")
    assert whole.mode == "host"
    asked = choose(dataset, PIXELS * 5, ranks=2, resident_placement="sharded")
    assert (asked.mode, asked.is_sharded) == ("resident", True)


def test_auto_on_the_cpu_loads_on_the_host(dataset: TorchFile) -> None:
    route = choose(dataset, PIXELS * 5, torch.device("cpu"))
    assert (route.mode, route.reason) == ("host", "there is no GPU to keep it on")


def tuned(load: float, train: float, most: int = 8, waited: float = 0.0, batches: int = 100) -> int | None:
    tuner, now = WorkerTuner(most), 0.0
    for _ in range(batches):
        tuner.observe(now, waited, load)
        now += waited + train
    return tuner.chosen()


def test_workers_are_settled_by_what_loading_and_training_take() -> None:
    assert tuned(load=0.4, train=0.2) == 3  # 2, and a third more
    assert tuned(load=0.01, train=0.2) == 1
    assert tuned(load=4.0, train=0.2) == 8
    assert tuned(load=0.4, train=0.2, waited=5.0) == 3  # the wait is what loading costs, not what training takes
    assert tuned(load=0.4, train=0.2, batches=10) is None
    assert tuned(load=0.001, train=0.001, batches=100) is None  # not three seconds yet


def test_the_log_says_when_no_number_of_workers_is_enough() -> None:
    for load, is_enough in ((0.4, True), (4.0, False)):
        tuner, now = WorkerTuner(8), 0.0
        for _ in range(50):
            tuner.observe(now, 0.0, load)
            now += 0.2
        assert tuner.chosen() is not None
        assert ("will wait for data" in tuner.reason) != is_enough


def test_cores_are_divided_by_the_processes_that_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setattr(tuning.Path, "read_text", lambda path: "max 100000\n")
    assert tuning.cores_of_a_rank(1) == 12
    assert tuning.cores_of_a_rank(3) == 4
    assert tuning.cores_of_a_rank(3, has_its_own=True) == 12
    monkeypatch.setattr(tuning.Path, "read_text", lambda path: "600000 100000\n")
    assert tuning.cores_of_a_rank(1) == 6
    assert tuning.cores_of_a_rank(3, has_its_own=True) == 2
    assert tuning.cores_of_a_rank(40) == 1


def test_evaluations_between_steps_do_not_count_as_steps() -> None:
    tuner, now = WorkerTuner(8), 0.0
    for i in range(400):
        tuner.observe(now, 0.0, 0.04)
        now += 10.0 if i == 100 else 0.01  # an evaluation
    assert tuner.chosen() == 6
