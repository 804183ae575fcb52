"""What may change between two starts of a run."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Train, WriteConfig

from trainer.checkpoint.compatibility import check_resumable, compare
from trainer.config import Config, load_config
from trainer.errors import UserError


def config(write_config: WriteConfig, **changes: Any) -> Config:
    return load_config(str(write_config(**changes)))


MAY_CHANGE: dict[str, dict[str, Any]] = {
    "workers": {"data__workers": 2},
    "feed": {"data__feed": "host"},
    "path of the data": {"data__train__args__root": "/elsewhere/photos"},
    "evaluation": {"data__eval__args__length": 7},
    "micro-batch": {"train__micro_batch_size": 6},
    "more steps": {"train__epochs": 9},
    "steps instead of epochs": {"train__epochs": None, "train__steps": 99},
    "log": {"log__every": 7},
    "checkpoints": {"checkpoint": {"every": "3 minutes", "keep": 5}},
    "trackers": {"tracking__trackers": ["tensorboard"]},
    "run folder": {"run__dir": "/elsewhere/run", "run__name": "moved"},
    "memory": {"memory__checkpointing": "full"},
    "compile": {"model__compile": "model"},
    "weights to start from": {"model__weights": "start.safetensors"},
    "optimizer's implementation": {"optim__implementation": "foreach"},
    "TF32": {"backends__matmul_precision": "high"},
}


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_what_may_change_is_said(name: str, write_config: WriteConfig) -> None:
    before = config(write_config).model_dump(mode="json")
    changes = check_resumable(before, 60, config(write_config, **MAY_CHANGE[name]), 60)
    assert changes.allowed
    assert not changes.refused


NOT_SILENTLY: dict[str, tuple[dict[str, Any], str]] = {
    "learning rate": ({"optim__lr": 0.02}, "optim.lr: 0.01 in the checkpoint, 0.02 now"),
    "schedule": ({"schedule__name": "cosine"}, "schedule.name: constant in the checkpoint, cosine now"),
    "dropout": ({"model__args__dropout": 0.5}, "model.args.dropout: 0.2 in the checkpoint, 0.5 now"),
    "augmentation": ({"data__augment__erase": 0.5}, "data.augment.erase: 0.0 in the checkpoint, 0.5 now"),
    "normalisation": (
        {"data__normalize": {"mean": [0.5], "std": [0.5]}},
        "data.normalize.mean: unset in the checkpoint, [0.5] now",
    ),
    "other data": ({"data__train__name": "vectors:Dicts"}, "data.train.name: vectors:Vectors in the checkpoint"),
    "precision": ({"precision": "bf16"}, "precision: no in the checkpoint, bf16 now"),
    "loss": ({"task__args": {"input_key": "x"}}, "task.args.input_key: unset in the checkpoint, x now"),
}


@pytest.mark.parametrize("name", NOT_SILENTLY)
def test_what_changes_the_training_needs_leave(name: str, write_config: WriteConfig) -> None:
    changes, message = NOT_SILENTLY[name]
    before = config(write_config).model_dump(mode="json")
    with pytest.raises(UserError) as refused:
        check_resumable(before, 60, config(write_config, **changes), 60)
    problem = refused.value.problems[0]
    assert str(problem).startswith(message)
    assert f"checkpoint.allow_changes=[{problem.path}]" in str(problem)
    keys = [p.path for p in refused.value.problems]
    allowed = check_resumable(before, 60, config(write_config, **changes, checkpoint={"allow_changes": keys}), 60)
    assert any(line.startswith(problem.path) for line in allowed.allowed)


@pytest.mark.parametrize(
    ("key", "value"),
    [("run__seed", 3), ("train__batch_size", 20), ("data__drop_last", True), ("optim__name", "sgd")],
)
def test_what_cannot_change_at_all(key: str, value: Any, write_config: WriteConfig) -> None:
    path = key.replace("__", ".")
    before = config(write_config).model_dump(mode="json")
    now = config(write_config, **{key: value}, checkpoint={"allow_changes": [path]})
    with pytest.raises(UserError, match=rf"{path}: .* this cannot change in a run"):
        check_resumable(before, 60, now, 60)


@pytest.mark.parametrize("values", [(None, 0.7), (0.7, None), (0.7, 0.8)])
def test_layers_begin_or_end_in_no_run(values: tuple[float | None, float | None], write_config: WriteConfig) -> None:
    before, now = (config(write_config, optim__layer_decay=v, checkpoint={"allow_changes": ["optim"]}) for v in values)
    changes = compare(before.model_dump(mode="json"), now)
    if None not in values:
        assert changes.refused == ()
        return
    (problem,) = changes.refused
    assert problem.path == "optim.layer_decay"
    assert problem.message.endswith("this cannot change in a run")


def test_the_same_data_with_other_samples(write_config: WriteConfig) -> None:
    before = config(write_config)
    with pytest.raises(UserError, match=r"data.train: 60 samples in the checkpoint, 61 now"):
        check_resumable(before.model_dump(mode="json"), 60, before, 61)


def test_settings_that_an_older_version_did_not_know(write_config: WriteConfig) -> None:
    before = config(write_config).model_dump(mode="json")
    del before["optim"]["clip_norm"]
    del before["backends"]
    assert compare(before, config(write_config, optim__clip_norm=1.0)).refused == ()


def test_a_setting_that_does_not_exist_cannot_be_allowed(train: Train, write_config: WriteConfig) -> None:
    code, _, err = train("--config", write_config(checkpoint={"allow_changes": ["optim.lrr"]}))
    assert code == 2
    assert "checkpoint.allow_changes.0: 'optim.lrr' is no setting; did you mean 'optim.lr'?" in err
