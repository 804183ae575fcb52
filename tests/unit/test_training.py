"""Whole runs on one process: exact gradients, exact resume, what is kept, what is left behind."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Train, WriteConfig
from run_results import checkpoint, close, identical, losses, optimizer_state, records, summary, weights

from trainer.config import load_config
from trainer.loop import Trainer
from trainer.tasks.classification import Classification


def test_a_run_and_what_it_leaves_behind(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    code, out, err = train("--config", write_config())
    assert (code, err) == (0, "")
    run = tmp_path / "run"
    found = summary(run)
    assert (found["status"], found["step"], found["samples"], found["epoch"]) == ("finished", 10, 120, 2.0)
    assert set(found["metrics"]) == {"eval/loss", "eval/accuracy"}
    assert found["samples_per_second"] > 0
    assert 0 < found["goodput"] <= 1
    assert found["peak_memory_bytes"] > 2**20
    assert set(found["seconds"]) >= {"total", "train", "startup", "evaluation", "checkpoint", "data_wait"}
    assert [r["step"] for r in records(run) if "train/loss" in r] == list(range(1, 11))
    assert [r["step"] for r in records(run) if "eval/loss" in r] == [5, 10]
    assert all({"step", "epoch", "samples", "time"} <= set(r) for r in records(run))
    assert load_config(str(run / "config.yaml")).train.batch_size == 12
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["num_processes"] == 1
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best", "step-00000005", "step-00000010"]
    assert "step 10/10" in out


def test_starting_a_finished_run_again_changes_nothing(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    train("--config", write_config())
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    code, out, _ = train("--config", write_config())
    assert code == 0
    assert "already finished" in out
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == files


def test_a_longer_run_continues(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    train("--config", write_config())
    code, out, _ = train("--config", write_config(train__epochs=3))
    assert code == 0
    assert "continuing from step 10" in out
    assert summary(tmp_path / "run")["step"] == 15
    assert list(losses(tmp_path / "run")) == list(range(1, 16))


@pytest.mark.parametrize("reads", [13, 61, 85])  # while steps 2, 6 and 8 are loaded
def test_interrupted_and_started_again_equals_uninterrupted(
    reads: int, train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Dropout, random samples and AdamW included: bit for bit the same, in weights, state and every loss."""
    whole = tmp_path / "whole"
    assert train("--config", write_config("whole.yaml", run__dir=str(whole))).code == 0

    same_samples = {"allow_changes": ["data.train"]}
    interrupting = {"name": "vectors:Interrupting", "args": {"length": 60, "after": reads}}
    code, out, err = train("--config", write_config(data__train=interrupting))
    assert (code, err) == (75, "")
    stopped = summary(tmp_path / "run")
    assert stopped["status"] == "stopped"
    assert stopped["step"] == -(-reads // 12)
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped['step']:08d}").is_dir()

    code, out, _ = train("--config", write_config(checkpoint=same_samples))
    assert code == 0
    assert f"continuing from step {stopped['step']}" in out
    assert losses(tmp_path / "run") == losses(whole)
    assert identical(weights(tmp_path / "run", 10), weights(whole, 10))
    assert identical(optimizer_state(tmp_path / "run", 10), optimizer_state(whole, 10))
    for key in ("metrics", "best"):
        assert summary(tmp_path / "run")[key] == summary(whole)[key]


def test_accumulation_is_the_same_optimisation(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    plain = {"model__args__dropout": 0.0, "train__epochs": 3, "data__train__args__length": 55}
    for micro in (12, 6, 4, 1):
        run = tmp_path / f"run-{micro}"
        file = write_config(f"{micro}.yaml", run__dir=str(run), train__micro_batch_size=micro, **plain)
        assert train("--config", file).code == 0
        assert close(weights(run, 15), weights(tmp_path / "run-12", 15))
        for step, loss in losses(tmp_path / "run-12").items():
            assert losses(run)[step] == pytest.approx(loss, rel=1e-4)


def test_gradient_of_a_smaller_last_batch_is_its_mean(write_config: WriteConfig, tmp_path: Path) -> None:
    changes = {"data__train__args__length": 19, "model__args__dropout": 0.0, "train__micro_batch_size": 4}
    config = load_config(str(write_config(**changes, train__epochs=1, optim={"name": "sgd", "lr": 1.0})))
    trainer = Trainer(config)
    trainer.start()
    trainer.train_step()
    before = {k: v.clone() for k, v in trainer.bare_model.state_dict().items()}
    batches = list(trainer.feed.step_batches(1))
    assert [b.num_samples for b in batches] == [4, 3]
    inputs, targets = (torch.cat([b.data[i] for b in batches]) for i in (0, 1))
    torch.nn.functional.cross_entropy(trainer.bare_model(inputs), targets).backward()
    expected = {k: p.detach() - p.grad for k, p in trainer.bare_model.named_parameters() if p.grad is not None}
    trainer.optimizer.zero_grad()
    trainer.feed.start(trainer.sampler, 1, 2)
    trainer.train_step()
    assert close(dict(trainer.bare_model.state_dict()), expected)
    assert not close(before, expected)
    trainer.close()


def test_clipping(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    sgd = {"name": "sgd", "lr": 1.0, "clip_norm": 0.01}
    train("--config", write_config(optim=sgd, train={"steps": 2, "batch_size": 12}, checkpoint={"every": 1}))
    change = [weights(tmp_path / "run", 2)[k] - weights(tmp_path / "run", 1)[k] for k in weights(tmp_path / "run", 1)]
    assert torch.stack([c.square().sum() for c in change]).sum().sqrt() == pytest.approx(0.01, rel=1e-3)
    assert all(r["train/grad_norm"] > 0.01 for r in records(tmp_path / "run") if "train/loss" in r)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_clipping_by_value(precision: str, train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    """Of gradients without the loss scale, which is 65536 at first."""
    sgd = {"name": "sgd", "lr": 1.0}
    steps = {"train": {"steps": 2, "batch_size": 12}, "checkpoint": {"every": 1}, "precision": precision}
    changes: list[dict[str, torch.Tensor]] = []
    for limit in (None, 0.01):
        run = tmp_path / f"run-{limit}"
        done = train("--config", write_config(run__dir=str(run), optim={**sgd, "clip_value": limit}, **steps))
        assert done.code == 0, done.err
        changes.append({name: after - weights(run, 1)[name] for name, after in weights(run, 2).items()})
    unclipped, change = changes
    assert max(float(c.abs().max()) for c in unclipped.values()) > 0.02
    assert max(float(c.abs().max()) for c in change.values()) == pytest.approx(0.01, rel=1e-4)
    num_at_limit = sum(int((c.abs() > 0.00999).sum()) for c in change.values())
    assert 0 < num_at_limit < sum(c.numel() for c in change.values())


def test_bf16_computes_in_bf16_and_keeps_float32_weights(
    train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    assert train("--config", write_config(run__dir=str(tmp_path / "full"))).code == 0
    assert train("--config", write_config(precision="bf16")).code == 0
    full, half = losses(tmp_path / "full"), losses(tmp_path / "run")
    assert full != half
    assert half[1] == pytest.approx(full[1], rel=0.02)
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "run", 10).values())


def test_learning_rate_reaches_the_optimizer(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    train("--config", write_config(schedule={"name": "linear", "warmup": 2, "warmup_start": 0.5}))
    rates = [r["train/lr"] for r in records(tmp_path / "run") if "train/lr" in r]
    assert rates == pytest.approx([0.005, 0.0075, *(0.01 * (1 - s / 8) for s in range(8))])
    group = checkpoint(tmp_path / "run", 10).manifest.values["optimizer"]["groups"][0]
    assert group["lr"] == pytest.approx(rates[-1])


def test_settings_of_the_optimizer_may_change_on_resume(
    train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    train("--config", write_config())
    allowed = {"allow_changes": ["optim.weight_decay"]}
    train("--config", write_config(train__epochs=3, optim__weight_decay=0.5, checkpoint=allowed))
    group = checkpoint(tmp_path / "run", 15).manifest.values["optimizer"]["groups"][0]
    assert group["weight_decay"] == 0.5


def test_the_best_and_the_newest_checkpoints_are_kept(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    best = {"best": {"metric": "loss", "mode": "max"}, "keep": 1}  # the first evaluation is the worst, so the "best"
    train("--config", write_config(train__epochs=4, checkpoint=best))
    folder = tmp_path / "run" / "checkpoints"
    evaluations = {r["step"]: r["eval/loss"] for r in records(tmp_path / "run") if "eval/loss" in r}
    worst = max(evaluations, key=evaluations.__getitem__)
    assert summary(tmp_path / "run")["best"] == {"step": worst, "metric": "loss", "value": evaluations[worst]}
    assert (folder / "best").resolve().name == f"step-{worst:08d}"
    assert {p.name for p in folder.glob("step-*")} == {f"step-{worst:08d}", "step-00000020"}
    assert not list(folder.glob(".*"))


def test_without_evaluation_data(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    assert train("--config", write_config(data__eval=None)).code == 0
    assert summary(tmp_path / "run")["metrics"] == {}
    assert summary(tmp_path / "run")["best"] is None
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()


def test_intervals(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    train("--config", write_config(eval={"every": 4}, log={"every": 3}, checkpoint={"every": "1 epoch", "keep": 9}))
    run = tmp_path / "run"
    assert [r["step"] for r in records(run) if "eval/loss" in r] == [4, 8, 10]
    assert [r["step"] for r in records(run) if "train/loss" in r] == [3, 6, 9, 10]
    best = summary(run)["best"]["step"]
    steps = {int(p.name[5:]) for p in (run / "checkpoints").glob("step-*")}
    assert {5, 10, best} <= steps <= {4, 5, 8, 10}


def test_drop_last(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    train("--config", write_config(data__drop_last=True, data__train__args__length=59))
    assert summary(tmp_path / "run")["step"] == 8
    assert summary(tmp_path / "run")["samples"] == 96


def test_dicts_reach_the_model(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    dicts = {"name": "vectors:Dicts", "args": {"length": 60}}
    task = {"args": {"input_key": "vector", "target_key": "kind"}}
    assert train("--config", write_config(data__train=dicts, data__eval=dicts, task=task)).code == 0
    train("--config", write_config("pairs.yaml", run__dir=str(tmp_path / "pairs")))
    assert losses(tmp_path / "run") == losses(tmp_path / "pairs")


def test_a_task_of_the_users_own(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    task = {"name": "regression:Regression", "args": {"scale": 2.0}}
    model = {"name": "torch.nn:Linear", "args": {"in_features": 8, "out_features": 1}}
    config = yaml.safe_load(write_config(task=task).read_text()) | {"model": model}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    code, _, err = train("--config", tmp_path / "own.yaml")
    assert (code, err) == (0, "")
    assert set(summary(tmp_path / "run")["metrics"]) == {"eval/rmse"}
    assert summary(tmp_path / "run")["best"]["metric"] == "rmse"


def test_synthetic_data(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    data = {"train": {"name": "synthetic", "args": {"num_samples": 64, "shape": [8], "num_classes": 3}}}
    code, _, err = train("--config", write_config(data=data))
    assert (code, err) == (0, "")
    assert summary(tmp_path / "run")["samples"] == 128


def test_train_and_eval_modes(
    train: Train, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes: dict[str, Any] = {"eval": {"every": 4, "batch_size": 23}}
    assert train("--config", write_config(**changes, model={"name": "vectors_model:Frozen"})).code == 0
    train_steps, evaluation = ["01"] * 4, ["00"]
    expected = train_steps + evaluation + train_steps + evaluation + train_steps[:2] + evaluation
    counting = ["01"]  # of FLOPs, on a copy
    assert (tmp_path / "modes").read_text().split() == counting + expected


def test_best_of_another_metric_starts_anew(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    train("--config", write_config())
    best = {"metric": "loss", "mode": "max"}
    train("--config", write_config(train__epochs=4, checkpoint={"best": best}))
    evaluations = {r["step"]: r["eval/loss"] for r in records(tmp_path / "run") if "eval/loss" in r}
    worst = max((15, 20), key=evaluations.__getitem__)
    assert summary(tmp_path / "run")["best"] == {"step": worst, "metric": "loss", "value": evaluations[worst]}


class Unlisted(Classification):
    """Its metrics are known at the first evaluation only."""


def test_an_unknown_best_metric_loses_no_step(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    best = {"best": {"metric": "acc", "mode": "max"}}
    code, _, err = train("--config", write_config(checkpoint=best, task={"name": "test_training:Unlisted"}))
    assert code == 2
    assert "it has: loss, accuracy" in err
    assert (tmp_path / "run" / "checkpoints" / "step-00000005").is_dir()


def test_what_changed_is_said(train: Train, write_config: WriteConfig) -> None:
    train("--config", write_config())
    allowed = {"allow_changes": ["optim"]}
    _, out, _ = train("--config", write_config(train__epochs=3, optim__lr=0.02, checkpoint=allowed))
    assert "changed    optim.lr: 0.01 -> 0.02" in out
    assert "changed    train.epochs: 2 -> 3" in out
    assert "changed    checkpoint.allow_changes: [] -> ['optim']" in out
    assert out.count("\nchanged    ") == 3


def test_a_users_pil_images_become_floats(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    data = {"train": {"name": "pictures:Pictures"}, "workers": 0}
    assert train("--config", write_config(data=data, model={"name": "small_cnn", "args": {"num_classes": 2}})).code == 0


def test_saving_a_step_again_changes_its_progress_alone(
    train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    """The evaluation comes after the save, and what it found is added."""
    train("--config", write_config())
    run = tmp_path / "run"
    folder = run / "checkpoints" / "step-00000010"
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert written["manifest.json"] > written["rank-00000.safetensors"]
    found = checkpoint(run, 10)
    found.verify()
    assert found.manifest.progress.evaluated_step == 10
    assert found.manifest.progress.eval_metrics == {
        "loss": records(run)[-1]["eval/loss"],
        "accuracy": records(run)[-1]["eval/accuracy"],
    }


def test_metrics_are_json_even_where_they_are_nan(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    train("--config", write_config(optim={"name": "sgd", "lr": 1e30}, faults__non_finite="skip"))
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert losses(tmp_path / "run")[10] is None


def test_tensorboard(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train("--config", write_config(tracking={"trackers": ["tensorboard"]})).code == 0
    (folder,) = {p.parent for p in (tmp_path / "run" / "tensorboard").glob("events*")}
    events = EventAccumulator(str(folder)).Reload()
    curve = {e.step: e.value for e in events.Scalars("train/loss")}
    assert curve == pytest.approx(losses(tmp_path / "run"), rel=1e-6)


def test_wandb_disabled_writes_nothing(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    tracking = {"trackers": ["wandb"], "wandb": {"mode": "disabled"}}
    assert train("--config", write_config(tracking=tracking)).code == 0
    assert not (tmp_path / "run" / "wandb").exists()


def test_a_failed_run_says_so(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    train("--config", write_config())
    bad = {"data__train__name": "vectors:BadLabel", "checkpoint": {"allow_changes": ["data.train"]}}
    code, _, _ = train("--config", write_config(train__epochs=3, **bad))
    assert code == 2
    assert summary(tmp_path / "run")["status"] == "failed"
    assert "label 3" in summary(tmp_path / "run")["error"]


def test_non_finite_loss_is_said(train: Train, write_config: WriteConfig) -> None:
    _, out, _ = train("--config", write_config(optim={"name": "sgd", "lr": 1e30}, faults__non_finite="skip"))
    assert "the loss is nan" in out


def test_half_a_line_in_metrics_does_not_stop_a_resume(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    train("--config", write_config())
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "train/loss": 1}\n{"step": 1')  # what a killed run wrote after its last checkpoint
    assert train("--config", write_config(train__epochs=3)).code == 0
    assert list(losses(tmp_path / "run")) == list(range(1, 16))


def test_logging_is_ours_alone() -> None:
    assert not logging.getLogger("lockstep").propagate or not logging.getLogger("lockstep").handlers
