"""`python -m launch plan`: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY, Outcome, WriteConfig, nightly
from launching import run

from launch.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

DIGITS = str(REPOSITORY / "configs" / "digits.yaml")
VIT = {"patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 128, "mlp_dim": 512, "image_size": 64}
Plan = Callable[..., Outcome]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    def plan(*arguments: str | Path) -> Outcome:
        try:
            code = main(["plan", *map(str, arguments)])
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return plan


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A vision transformer with 65 tokens on synthetic images, 96 in a batch."""
    config: dict[str, Any] = {
        "run": {"name": "vit"},
        "data": {"train": {"name": "synthetic", "args": {"num_samples": 960, "shape": [3, 64, 64], "num_classes": 10}}},
        "model": {"name": "torchvision.models:VisionTransformer", "args": {**VIT, "num_classes": 10}},
        "optim": {"name": "adamw", "lr": 1e-3},
        "train": {"epochs": 1, "batch_size": 96},
    }
    file = tmp_path / "vit.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def rows(out: str) -> list[list[str]]:
    """The lines of the table of settings, split at spaces."""
    lines = out.split("  checkpointing ")[1].splitlines()[1:]
    return [line.split() for line in lines[: lines.index("")]]


def fastest(out: str) -> list[str]:
    """The overrides that the plan proposes."""
    line = next(line for line in out.splitlines() if line.startswith("fastest that fits: "))
    return line.removeprefix("fastest that fits: ").split()


def peak_line(out: str) -> str:
    return next(line for line in out.splitlines() if line.startswith("  peak"))


# ---- what it prints ---------------------------------------------------------------------------------------------


def test_the_digits_on_a_large_card(plan: Plan) -> None:
    code, out, err = plan("--config", DIGITS, "--device", "24GiB")
    assert code == 0, err
    assert "device     24.00 GiB with the speed of a10-24g: 21.60 GiB to use (90% of its memory)" in out
    assert "model      small_cnn, " in out
    assert "batch      96 = 1 processes x 96" in out
    assert "with train.micro_batch_size=96 memory.checkpointing=none, predicted:" in out
    assert "   fits: 21.60 GiB to use" in peak_line(out)
    assert fastest(out) == ["train.micro_batch_size=96", "memory.checkpointing=none"]
    assert rows(out)[0][:4] == ["none", "ddp", "96", "1x"]


def test_averages_have_a_line(plan: Plan) -> None:
    code, out, err = plan("--config", DIGITS, "--device", "24GiB", "optim.ema={decay: 0.99}")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    size = {line[0]: line[1:] for line in lines if line and line[0] in ("averages", "parameters")}
    assert size["averages"] == size["parameters"]


@nightly
def test_two_processes_may_share_the_model(plan: Plan, vit: Path) -> None:
    code, out, err = plan("--config", vit, "--device", "h100-80g", "--processes", "2")
    assert code == 0, err
    assert "batch      96 = 2 processes x 48" in out
    assert "4 repeated blocks" in out
    found = [row[:3] for row in rows(out)]
    assert [row[:2] for row in found] == [["none", "ddp"], ["selective", "ddp"], ["full", "ddp"], ["none", "fsdp"]]
    assert {row[2] for row in found} == {"48"}
    alone = plan("--config", vit, "--device", "h100-80g", "--processes", "1").out
    assert "fsdp" not in alone


@nightly
def test_what_fits_depends_on_the_device(plan: Plan, vit: Path) -> None:
    code, out, _ = plan("--config", vit, "--device", "64MiB")
    assert code == 1
    assert "does not fit: 57.60 MiB to use" in peak_line(out)
    sizes = {row[0]: int(row[2]) for row in rows(out)}
    assert sizes["none"] < sizes["full"] <= 96


def test_what_it_proposes_fits(plan: Plan, vit: Path) -> None:
    arguments = ("--config", vit, "--device", "64MiB")
    first = plan(*arguments)
    assert first.code == 1
    settings = fastest(first.out)
    second = plan(*arguments, *settings)
    assert second.code == 0
    assert f"per process with {' '.join(settings)}, predicted:" in second.out
    assert "   fits: " in peak_line(second.out)


@nightly
def test_what_is_left_open_is_chosen_as_a_run_would(plan: Plan, vit: Path) -> None:
    left_open = ("train.micro_batch_size=auto", "memory.checkpointing=auto")
    code, out, err = plan("--config", vit, "--device", "64MiB", *left_open)
    assert code == 0, err
    assert f"per process with {' '.join(fastest(out))}, predicted:" in out


@nightly
def test_nothing_fits_a_tiny_device(plan: Plan, vit: Path) -> None:
    code, out, _ = plan("--config", vit, "--device", "5MiB", "train.micro_batch_size=auto")
    assert code == 1
    assert "memory.target: 4.50 MiB (90% of the device) are too little" in out
    assert "nothing fits with DDP" in out
    assert {tuple(row[2:]) for row in rows(out)} == {("does", "not", "fit")}


@nightly
def test_dropout_does_not_hinder_recomputing(plan: Plan, vit: Path) -> None:
    """Blocks run again in backward, and must then take the same kernels as before."""
    code, out, err = plan("--config", vit, "--device", "24GiB", "model.args.dropout=0.1", "memory.checkpointing=full")
    assert code == 0, err
    assert "memory.checkpointing=full, predicted:" in out


@nightly
@pytest.mark.parametrize("suffix", ["html", "png"])
def test_a_drawing(suffix: str, plan: Plan, vit: Path, tmp_path: Path) -> None:
    pytest.importorskip("trainer.memory.plot")
    file = tmp_path / f"step.{suffix}"
    code, out, err = plan("--config", vit, "--device", "24GiB", "--plot", file)
    assert code == 0, err
    assert f"plotted to {file}" in out
    start = file.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == "png" else b"<html" in start.lower()


# ---- data that is elsewhere ---------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    config = {
        "run": {"name": "elsewhere"},
        "data": {
            "train": {"name": "image_folder", "args": {"root": "/nonexistent/train"}},
            "eval": {"name": "image_folder", "args": {"root": "/nonexistent/val"}},
            "transforms": {"train": [{"name": "RandomResizedCrop", "args": {"size": 32}}]},
        },
        "model": {"name": "resnet18"},
        "optim": {"name": "sgd", "lr": 0.1},
        "train": {"epochs": 1, "batch_size": 32},
    }
    file = tmp_path / "elsewhere.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


@nightly
def test_data_that_is_not_here_needs_its_shape(plan: Plan, elsewhere: Path) -> None:
    code, out, err = plan("--config", elsewhere, "--device", "24GiB", "--input", "3x32x32", "--num-classes", "10")
    assert code == 0, err
    assert "model      resnet18, 11,181,642 parameters" in out
    larger = plan("--config", elsewhere, "--device", "24GiB", "--input", "3x64x64", "--num-classes", "10").out
    assert peak_line(larger) != peak_line(out)


def test_data_that_is_not_here_says_how(plan: Plan, elsewhere: Path) -> None:
    code, _, err = plan("--config", elsewhere, "--device", "24GiB")
    assert code == 2
    assert "no such folder: '/nonexistent/train'" in err
    assert "--input" in err


def test_the_number_of_classes_must_be_known(plan: Plan, elsewhere: Path) -> None:
    code, _, err = plan("--config", elsewhere, "--device", "24GiB", "--input", "3x32x32")
    assert code == 2
    assert "--num-classes" in err
    arguments = ("--config", elsewhere, "--device", "24GiB", "--input", "3x32x32", "model.args.num_classes=7")
    assert plan(*arguments).code == 0


# ---- what it refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["3x", "0x32", "3,32,32", "large", "3x-1"])
def test_a_shape_that_is_none(shape: str, plan: Plan) -> None:
    code, _, err = plan("--config", DIGITS, "--device", "24GiB", f"--input={shape}")
    assert code == 2
    assert f"--input must be like 3x224x224 (got {shape})" in err


def test_an_unknown_device(plan: Plan) -> None:
    code, _, err = plan("--config", DIGITS, "--device", "h100-80gb")
    assert code == 2
    assert "unknown device 'h100-80gb'" in err
    assert "'h100-80g'" in err.replace("'h100-80gb'", "")


def test_no_device(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = plan("--config", DIGITS)
    assert code == 2
    assert "there is no GPU here: say --device" in err


def test_no_processes(plan: Plan) -> None:
    code, _, err = plan("--config", DIGITS, "--device", "24GiB", "--processes", "0")
    assert code == 2
    assert "--processes must be at least 1" in err


def test_a_batch_that_does_not_split(plan: Plan) -> None:
    code, _, err = plan("--config", DIGITS, "--device", "24GiB", "--processes", "7")
    assert code == 2
    assert "train.batch_size: 96 samples do not split over 7 processes" in err


def test_a_mistyped_config_is_located(plan: Plan, write_config: WriteConfig) -> None:
    file = write_config(memory={"chekpointing": "full"})
    code, _, err = plan("--config", file, "--device", "24GiB")
    assert code == 2
    assert re.search(r"tiny\.yaml:\d+: memory\.chekpointing: unknown key", err)
    model = write_config(model={"name": "resnet81"})
    code, _, err = plan("--config", model, "--device", "24GiB")
    assert code == 2
    assert re.search(r"tiny\.yaml:\d+: model\.name: unknown model 'resnet81'", err)


# ---- without memory -----------------------------------------------------------------------------------------------

_LARGE = """
import resource, sys
from launch.cli import main
import launch.plan  # what importing takes is not the plan's
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = main(["plan", "--config", sys.argv[1], "--device", "h100-80g", "--processes", "8"])
print("GREW", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, code)
"""


@nightly
def test_a_large_model_takes_no_memory_here(tmp_path: Path) -> None:
    """ViT-L/16 has 1.2 GB of weights; a step of it on one of 8 processes takes many times that."""
    config = {
        "run": {"name": "large"},
        "data": {"train": {"name": "synthetic", "args": {"num_samples": 64, "num_classes": 1000, "pool": 2}}},
        "model": {"name": "vit_l_16"},
        "optim": {"name": "adamw", "lr": 1e-3},
        "precision": "bf16",
        "train": {"steps": 1, "batch_size": 64},
    }
    file = tmp_path / "large.yaml"
    file.write_text(yaml.safe_dump(config))
    done = run([sys.executable, "-c", _LARGE, str(file)], tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "304,326,632 parameters, 24 repeated blocks" in done.stdout
    grew, code = map(int, done.stdout.split("GREW ")[1].split())
    assert code == 0
    assert grew < 1536
