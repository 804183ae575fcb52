"""Detection learns a small COCO set, and its average precision does not depend on the number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import WriteConfig
from picture_trees import make_coco
from resuming import TrainServer
from run_results import summary


def coco(folder: Path, split: str) -> dict[str, Any]:
    annotations = folder / "annotations" / f"instances_{split}.json"
    return {"name": "CocoDetection", "args": {"root": str(folder / split), "annFile": str(annotations)}}


def test_it_learns_and_ranks_agree(server: TrainServer, write_config: WriteConfig, tmp_path: Path) -> None:
    make_coco(tmp_path, {"train": 60, "val": 20})

    def metrics(name: str, ranks: int, **changes: Any) -> dict[str, float]:
        settings = {
            "data": {
                "train": coco(tmp_path, "train"),
                "eval": coco(tmp_path, "val"),
                "transforms": {"train": [{"name": "RandomHorizontalFlip"}]},
                "workers": 0,
            },
            "model": {"name": "small_detector:faster_rcnn"},
            "task": {"name": "detection"},
            "optim": {"name": "adamw", "lr": 0.002},
            "train": {"epochs": 10, "batch_size": 6},
            "eval": {"every": "10 epochs"},
            "log": {"every": 1000},
        }
        file = write_config(f"{name}.yaml", run__dir=str(tmp_path / name), **{**settings, **changes})
        done = server.train("--config", file, ranks=ranks)
        assert done.code == 0, done.err
        return {k: v for k, v in summary(tmp_path / name)["metrics"].items() if k.startswith("eval/")}

    learnt = metrics("learnt", 1)
    assert learnt["eval/ap50"] >= 0.8
    assert learnt["eval/ap"] == learnt["eval/ap_small"]
    assert learnt["eval/ap_large"] is None  # there is nothing large
    still: dict[str, Any] = {
        "model": {"name": "small_detector:faster_rcnn", "args": {"momentum": 0.0}, "weights": str(tmp_path / "learnt")},
        "optim": {"name": "sgd", "lr": 1e-30},  # which changes no weight
        "train": {"steps": 1, "batch_size": 6},
    }
    assert metrics("two", 2, **still) == learnt
