"""`python -m trainer`: evaluating and exporting what a run left behind."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Train, WriteConfig, few, forget_accelerate, nightly, tiny_config
from odd_outputs import Normed
from run_results import identical, summary, tensors, weights
from safetensors import safe_open
from safetensors.torch import load_file

from trainer import results
from trainer.cli import main
from trainer.errors import UserError
from trainer.small_models import MLP

FORMATS = ("safetensors", "state_dict", "onnx", "torch_export")
EMA = {"name": "adamw", "lr": 0.01, "ema": {"decay": 0.9}}
FSDP = {"strategy": "fsdp", "reshard_after_forward": False, "cpu_offload": True, "sync_batchnorm": True}
HSDP = {"strategy": "hsdp", "shard_size": 2}
COMPRESSED = {"gradient_compression": "bf16", "static_graph": True}


@pytest.fixture
def run_dir(train: Train, write_config: WriteConfig, tmp_path: Path) -> Path:
    best = {"best": {"metric": "loss", "mode": "max"}}  # the earlier of the two checkpoints
    assert train("--config", write_config(checkpoint=best)).code == 0
    forget_accelerate()
    return tmp_path / "run"


@pytest.fixture
def averaged_run(train: Train, write_config: WriteConfig, tmp_path: Path) -> Path:
    assert train("--config", write_config(optim=EMA)).code == 0
    forget_accelerate()
    return tmp_path / "run"


def exported(run: Path, file_format: str, *arguments: str) -> Path:
    output = run.parent / "out" / "model"
    forget_accelerate()
    assert main(["export", str(run), "--format", file_format, "--output", str(output), *arguments]) == 0
    assert [p.name for p in output.parent.iterdir()] == ["model"]
    return output


def mlp(state: dict[str, torch.Tensor]) -> MLP:
    model = MLP(3, 8, (16,)).eval()
    model.load_state_dict(state)
    return model


def outputs(file: Path, file_format: str, batch: torch.Tensor) -> torch.Tensor:
    """What an exported file makes of a batch, read by nothing of ours."""
    if file_format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0])
    if file_format == "torch_export":
        with open(file, "rb") as stream:
            return torch.export.load(stream).module()(batch)
    return mlp(load_file(file) if file_format == "safetensors" else torch.load(file, weights_only=True))(batch)


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("file_format", ["safetensors", "state_dict"])
def test_exported_weights_are_the_trained_ones(file_format: str, best: bool, run_dir: Path) -> None:
    file = exported(run_dir, file_format, *["--best"] * best)
    found = load_file(file) if file_format == "safetensors" else torch.load(file, weights_only=True)
    assert identical(found, weights(run_dir, 5 if best else 10))


@pytest.mark.parametrize("file_format", few(FORMATS, "onnx", "safetensors"))
def test_every_format_gives_the_models_outputs(
    file_format: str, averaged_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    averages, last = tensors(averaged_run, 10, "ema."), weights(averaged_run, 10)
    assert averages.keys() == last.keys()
    assert not identical(averages, last)
    batch = torch.randn(7, 8)
    for arguments, state in (((), averages), (("--weights", "raw"), last), (("--weights", "ema"), averages)):
        capfd.readouterr()
        file = exported(averaged_run, file_format, *arguments)
        said = capfd.readouterr()
        kind = "averages (EMA)" if state is averages else "weights"
        assert f"4 tensors, the {kind} of step 10, as {file_format}" in said.err.splitlines()[-1]
        assert said.out == ""
        assert all("exported" not in line and "Warning" not in line for line in said.err.splitlines())
        for size in (7, 1):
            expected = mlp(state)(batch[:size])
            assert torch.allclose(outputs(file, file_format, batch[:size]), expected, rtol=1e-4, atol=1e-5)


@nightly
@pytest.mark.parametrize("file_format", ["onnx", "torch_export"])
def test_images_and_batch_statistics(file_format: str, train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    """Convolutions and BatchNorm, trained in bfloat16 and channels_last, on images that the device scales."""
    data = {"name": "synthetic", "args": {"num_samples": 12, "shape": [3, 32, 32], "num_classes": 3}}
    config = tiny_config(tmp_path / "run")
    config["data"] = {"train": data, "eval": data, "workers": 0}
    config["model"] = {"name": "odd_outputs:Normed"}
    config["precision"] = "bf16"
    config["train"] = {"steps": 1, "batch_size": 6}
    file = write_config()
    file.write_text(yaml.safe_dump(config))
    assert train("--config", file).code == 0
    output = exported(tmp_path / "run", file_format)
    model = Normed().eval()
    model.load_state_dict(weights(tmp_path / "run", 1))
    batch = torch.rand(5, 3, 32, 32)
    assert torch.allclose(outputs(output, file_format, batch), model(batch), rtol=1e-3, atol=1e-4)


def test_a_graph_has_no_part_of_the_augmentation(write_config: WriteConfig, tmp_path: Path) -> None:
    augment: dict[str, Any] = {"mixup": 0.2, "cutmix": 1.0, "mix_probability": 0.8, "cutmix_share": 0.3}
    augment |= {"erase": 0.5, "erase_with": "noise"}
    file = write_config(data={"train": {"name": "digits"}, "augment_repeats": 2, "augment": augment})
    file.rename(tmp_path / "config.yaml")
    data = results._read_config(tmp_path, *results._ALONE, *results._PLAIN).data
    assert data.augment_repeats == 1
    assert not data.augment.mixes
    assert data.augment.erase == 0


@pytest.mark.parametrize("file_format", few(FORMATS, "safetensors"))
def test_an_existing_file_is_replaced_whole_or_not_at_all(
    file_format: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output = run_dir.parent / "out" / "model"
    output.parent.mkdir()
    output.write_text("before")

    def fails(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        assert main(["export", str(run_dir), "--format", file_format, "--output", str(output)]) == 2
    assert f"cannot write '{output}': [Errno 28] No space left" in capfd.readouterr().err
    assert [p.name for p in output.parent.iterdir()] == ["model"]
    assert output.read_text() == "before"
    exported(run_dir, file_format)
    assert output.read_bytes()[:6] != b"before"


def test_a_graph_with_other_outputs_is_not_written(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from trainer import graphs

    write = graphs._write_program
    monkeypatch.setattr(graphs, "_write_program", lambda *args: lambda batch: write(*args)(batch) + 0.5)
    output = run_dir.parent / "model.pt2"
    assert main(["export", str(run_dir), "--format", "torch_export", "--output", str(output)]) == 2
    assert "differ from the model's by up to 0.5 (rtol 0.001, atol 0.0001)" in capfd.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("odd_outputs:Named", "is called with one and returns a dict"),
        ("odd_outputs:Branching", "'odd_outputs:Branching' cannot be exported as torch_export"),
    ],
)
@nightly
def test_models_that_are_no_graph(
    model: str, message: str, train: Train, write_config: WriteConfig, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", task={"name": "odd_outputs:OfNamed"}, train__epochs=1)
    config["model"] = {"name": model}
    file = write_config()
    file.write_text(yaml.safe_dump(config))
    assert train("--config", file).code == 0
    forget_accelerate()
    output = str(tmp_path / "model.pt2")
    assert main(["export", str(tmp_path / "run"), "--format", "torch_export", "--output", output]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert exported(tmp_path / "run", "safetensors").stat().st_size > 0


def test_a_task_that_calls_the_model_otherwise(
    train: Train, write_config: WriteConfig, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write_config(task={"name": "odd_outputs:Twice"}, train__epochs=1)
    assert train("--config", file).code == 0
    forget_accelerate()
    output = str(tmp_path / "model.pt2")
    assert main(["export", str(tmp_path / "run"), "--format", "torch_export", "--output", output]) == 2
    assert "'mlp' is called with 2 batches by its task" in capfd.readouterr().err


def test_onnx_needs_packages(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(run_dir), "--format", "onnx", "--output", str(run_dir / "m.onnx")]) == 2
    assert "needs more packages (onnxscript): pip install 'lockstep-trainer[export]'" in capfd.readouterr().err


def test_a_safetensors_file_says_what_it_is(averaged_run: Path) -> None:
    with safe_open(exported(averaged_run, "safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "10", "weights": "ema"}


def test_a_safetensors_file_is_written_one_tensor_at_a_time(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    from trainer.checkpoint.reading import Checkpoint

    read, alive, most = Checkpoint.read, weakref.WeakSet[torch.Tensor](), 0

    def counting(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(checkpoint, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counting)
    exported(run_dir, "safetensors")
    assert most == 1


def test_a_damaged_newest_checkpoint_is_skipped(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = run_dir / "checkpoints" / "step-00000010" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    capfd.readouterr()
    found = load_file(exported(run_dir, "safetensors"))
    assert identical(found, weights(run_dir, 5))
    assert "step-00000010': rank-00000.safetensors does not match its checksum" in capfd.readouterr().err
    (run_dir / "checkpoints" / "step-00000005" / "rank-00000.safetensors").unlink()
    for arguments, message in (([], "holds no good checkpoint"), (["--best"], "rank-00000.safetensors is missing")):
        assert main(["evaluate", str(run_dir), *arguments]) == 2
        assert message in capfd.readouterr().err


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
    assert identical(weights(tmp_path / "b", 10), weights(run_dir, 10))


@pytest.mark.parametrize("kind", ["raw", "ema"])
def test_tied_weights_are_exported_under_every_name(
    kind: str, train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", optim=EMA)
    config["model"] = {"name": "tied:Tied"}
    file = write_config()
    file.write_text(yaml.safe_dump(config))
    assert train("--config", file).code == 0
    found = load_file(exported(tmp_path / "run", "safetensors", "--weights", kind))
    assert torch.equal(found["a.weight"], found["b.weight"])
    source = tensors(tmp_path / "run", 10, "model." if kind == "raw" else "ema.")
    assert identical(found, source)


def test_evaluate_repeats_the_runs_own_evaluation(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    expected = summary(run_dir)["metrics"]
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


def test_evaluate_with_averages_and_without(averaged_run: Path) -> None:
    metrics = summary(averaged_run)["metrics"]
    found = results.evaluate(averaged_run, best=False)
    assert (found["loss"], found["accuracy"]) == (metrics["eval/loss"], metrics["eval/accuracy"])
    forget_accelerate()
    assert results.evaluate(averaged_run, best=False, kind="ema") == found
    forget_accelerate()
    assert results.evaluate(averaged_run, best=False, kind="raw")["loss"] != found["loss"]


@pytest.mark.parametrize("parallel", few([HSDP, FSDP, COMPRESSED], HSDP))
def test_a_run_of_many_processes_is_evaluated_on_one(
    parallel: dict[str, Any], run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = summary(run_dir)["metrics"]
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["parallel"] |= parallel
    if "strategy" in parallel:
        config["memory"]["blocks"] = ["layers.*"]
    config["model"]["weights"] = "gone.safetensors"
    config["tracking"]["trackers"] = ["wandb"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    assert results.evaluate(run_dir, best=False)["loss"] == expected["eval/loss"]
    forget_accelerate()
    results.export(run_dir, "torch_export", run_dir / "m.pt2", best=False)


def test_checkpoints_elsewhere(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    elsewhere = {"dir": str(tmp_path / "elsewhere")}
    assert train("--config", write_config(checkpoint=elsewhere)).code == 0
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    forget_accelerate()
    assert results.evaluate(moved, best=False)["step"] == 10
    with pytest.raises(UserError, match="it is a folder"):
        results.export(moved, "safetensors", tmp_path, best=False)


def test_what_a_module_has_besides_tensors(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    config["model"] = {"name": "odd_parts:Counting"}
    file = write_config()
    file.write_text(yaml.safe_dump(config))
    assert train("--config", file).code == 0
    output = exported(tmp_path / "run", "state_dict")
    assert torch.load(output, weights_only=True)["_extra_state"] == {"num_calls": 10}
    again = ("run.dir=" + str(tmp_path / "again"), f"model.weights={output.rename(output.with_suffix('.pt'))}")
    assert train("--config", file, *again, "train.epochs=1").code == 0


def test_what_is_not_there(run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "w")]
    capfd.readouterr()
    assert main(["export", str(tmp_path / "none"), *output]) == 2
    assert "is not a run folder" in capfd.readouterr().err
    assert main(["export", str(run_dir), "--output", "/dev/null/w"]) == 2
    assert "cannot write" in capfd.readouterr().err
    assert main(["export", str(run_dir), *output, "--weights", "ema"]) == 2
    assert "has no averages: the run has no optim.ema" in capfd.readouterr().err
    shutil.rmtree(run_dir / "checkpoints" / "step-00000005")
    assert main(["export", str(run_dir), *output, "--best"]) == 2
    assert "holds no best checkpoint" in capfd.readouterr().err
    shutil.rmtree(run_dir / "checkpoints")
    assert main(["export", str(run_dir), *output]) == 2
    assert "holds no checkpoint" in capfd.readouterr().err
