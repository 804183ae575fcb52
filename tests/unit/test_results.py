"""`python -m trainer`: evaluating and exporting what a run left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Train, WriteConfig, forget_accelerate, tiny_config
from safetensors.torch import load_file

from trainer.cli import main


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"step-{step:08d}" / "model.pt", weights_only=True)


@pytest.fixture
def run_dir(train: Train, write_config: WriteConfig, tmp_path: Path) -> Path:
    best = {"best": {"metric": "loss", "mode": "max"}}  # the earlier of the two checkpoints
    assert train("--config", write_config(checkpoint=best)).code == 0
    forget_accelerate()
    return tmp_path / "run"


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("file_format", ["safetensors", "state_dict"])
def test_exported_weights_are_the_trained_ones(file_format: str, best: bool, run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "weights"
    arguments = ["export", str(run_dir), "--format", file_format, "--output", str(output)]
    assert main(arguments + ["--best"] * best) == 0
    exported = load_file(output) if file_format == "safetensors" else torch.load(output, weights_only=True)
    expected = saved(run_dir, 5 if best else 10)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[k], expected[k]) for k in expected)
    assert [p.name for p in output.parent.iterdir()] == ["weights"]


def test_exported_weights_start_another_run(
    run_dir: Path, tmp_path: Path, train: Train, write_config: WriteConfig
) -> None:
    output = tmp_path / "w.safetensors"
    main(["export", str(run_dir), "--output", str(output)])
    file = write_config(
        "b.yaml", run__dir=str(tmp_path / "b"), model__weights=str(output), optim={"name": "sgd", "lr": 1e-30}
    )
    code, out, _ = train("--config", file)
    assert code == 0
    assert "4 tensors loaded" in out
    expected = saved(run_dir, 10)
    assert all(torch.equal(v, expected[k]) for k, v in saved(tmp_path / "b", 10).items())


def test_tied_weights_are_exported_under_every_name(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    config["model"] = {"name": "tied:Tied"}
    file = write_config()
    file.write_text(yaml.safe_dump(config))
    assert train("--config", file).code == 0
    main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "w.safetensors")])
    exported = load_file(tmp_path / "w.safetensors")
    assert torch.equal(exported["a.weight"], exported["b.weight"])


def test_evaluate_repeats_the_runs_own_evaluation(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    expected = json.loads((run_dir / "summary.json").read_text())["metrics"]
    moved = run_dir.rename(run_dir.with_name("moved"))
    before = sorted(p.name for p in moved.rglob("*"))
    assert main(["evaluate", str(moved)]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found == {"step": 10, "loss": expected["eval/loss"], "accuracy": expected["eval/accuracy"]}
    assert sorted(p.name for p in moved.rglob("*")) == before
    forget_accelerate()
    assert main(["evaluate", str(moved), "--best"]) == 0
    assert json.loads(capfd.readouterr().out)["step"] == 5


def test_evaluate_needs_no_split_of_the_batch(
    train: Train, write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train("--config", write_config(train__micro_batch_size=4))
    text = (tmp_path / "run" / "config.yaml").read_text()  # as a run on three processes would have left it
    (tmp_path / "run" / "config.yaml").write_text(text.replace("micro_batch_size: 4", "micro_batch_size: 5"))
    moved = (tmp_path / "run").rename(tmp_path / "2024")
    forget_accelerate()
    capfd.readouterr()
    assert main(["evaluate", str(moved)]) == 0
    assert json.loads(capfd.readouterr().out)["step"] == 10


def test_what_is_not_there(run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "w")]
    capfd.readouterr()
    assert main(["export", str(tmp_path / "none"), *output]) == 2
    assert "is not a run folder" in capfd.readouterr().err
    assert main(["export", str(run_dir), "--output", "/dev/null/w"]) == 2
    assert "cannot write" in capfd.readouterr().err
    (run_dir / "checkpoints" / "best").unlink()
    assert main(["export", str(run_dir), *output, "--best"]) == 2
    assert "has no best checkpoint" in capfd.readouterr().err
    shutil.rmtree(run_dir / "checkpoints")
    assert main(["export", str(run_dir), *output]) == 2
    assert "holds no checkpoint" in capfd.readouterr().err
