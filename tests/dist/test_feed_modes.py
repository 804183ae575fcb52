"""The bytes that the model gets, on 1, 2 and 3 processes, from every way to the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import nightly
from resuming import TrainServer

RUNS = (("host", 3), ("replicated", 2), ("sharded", 2), ("sharded", 3))  # besides host on one process
WAYS: dict[str, dict[str, Any]] = {
    "host": {"feed": "host", "workers": 2},
    "replicated": {"feed": "resident", "resident_placement": "replicated"},
    "sharded": {"feed": "resident", "resident_placement": "sharded"},
}


def train(server: TrainServer, folder: Path, way: str, world: int, **settings: Any) -> list[list[str]]:
    """Returns the hashes of all samples of every step."""
    hashes = folder / f"{way}-{world}"
    hashes.mkdir()
    crop = {"name": "RandomCrop", "args": {"size": 16, "padding": 2}}
    config = {
        "run": {"name": f"{way}-{world}"},
        "data": {
            "train": {"name": "torch_file", "args": {"path": str(folder / "data.pt")}},
            "eval": {"name": "torch_file", "args": {"path": str(folder / "data.pt")}},
            "transforms": {"train": [crop, {"name": "RandomHorizontalFlip"}]},
            "normalize": {"mean": [0.5], "std": [0.25]},
            "augment": {"mixup": 0.3, "cutmix": 1.0, "erase": 0.25, "erase_with": "noise"},
            **WAYS[way],
            **{key: value for key, value in settings.items() if key.startswith("augment")},
        },
        "model": {"name": "small_cnn", "args": {"width": 8, "in_channels": 1, "num_classes": 3}},
        "task": {"name": "hashing:Hashing", "args": {"folder": str(hashes), "num_classes": 3}},
        "optim": {"lr": 0.001},
        "train": settings.get("train", {"epochs": 2, "batch_size": 12}),
        "tracking": {"trackers": []},
    }
    file = folder / f"{way}-{world}.yaml"
    file.write_text(yaml.safe_dump(config))
    done = server.train("--config", file, ranks=world, folder=folder)
    assert done.code == 0, done.out + done.err
    by_rank = [map(json.loads, (hashes / f"{rank}.jsonl").read_text().splitlines()) for rank in range(world)]
    return [sorted(h for share in step for h in share) for step in zip(*by_rank, strict=True)]


def test_every_way_and_every_world_gives_the_same_bytes(server: TrainServer, tmp_path: Path) -> None:
    images = torch.randint(0, 256, (30, 1, 16, 16), dtype=torch.uint8)
    torch.save((images, torch.arange(30) % 3), tmp_path / "data.pt")
    reference = train(server, tmp_path, "host", 1)
    assert [len(step) for step in reference] == [12, 12, 6] * 2
    assert len({h for step in reference for h in step}) == 60
    for way, world in RUNS:
        assert train(server, tmp_path, way, world) == reference, (way, world)


@nightly
def test_repeats_are_the_same_from_every_way(server: TrainServer, tmp_path: Path) -> None:
    images = torch.randint(0, 256, (30, 1, 16, 16), dtype=torch.uint8)
    torch.save((images, torch.arange(30) % 3), tmp_path / "data.pt")
    reference = train(server, tmp_path, "host", 1, augment_repeats=3)
    assert len({h for step in reference for h in step}) == 60
    for way, world in RUNS:
        assert train(server, tmp_path, way, world, augment_repeats=3) == reference, (way, world)


@pytest.mark.parametrize("way", ["sharded"])
def test_mixing_needs_whole_pairs_on_every_process(way: str, server: TrainServer, tmp_path: Path) -> None:
    torch.save(
        (torch.zeros(30, 1, 16, 16, dtype=torch.uint8), torch.zeros(30, dtype=torch.int64)), tmp_path / "data.pt"
    )
    message = "12 samples do not split into pairs to mix over 4 processes; nearest sizes: 8 and 16"
    with pytest.raises(AssertionError, match=message):
        train(server, tmp_path, way, 4)


def test_a_process_that_nobody_asks_for_a_sample_takes_part_in_the_exchange(
    server: TrainServer, tmp_path: Path
) -> None:
    images = torch.randint(0, 256, (30, 1, 16, 16), dtype=torch.uint8)
    torch.save((images, torch.arange(30) % 3), tmp_path / "data.pt")
    settings = {"augment": {}, "train": {"steps": 20, "batch_size": 3}}
    assert train(server, tmp_path, "sharded", 3, **settings) == train(server, tmp_path, "host", 1, **settings)
