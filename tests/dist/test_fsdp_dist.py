"""FSDP2 and HSDP train as DDP does, in every setting that they go with; BatchNorm over all processes as on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import NIGHTLY, WriteConfig, few, tiny_config
from launching import local, on_processes
from run_results import losses, summary

from trainer.cli import main

ODD = {"name": "sharded_models:Odd"}
ODD_NORMED = {"name": "sharded_models:Odd", "args": {"normed": True}}
STACK = {"name": "fitted_model:Stack", "args": {"depth": 2}}
FSDP = {"strategy": "fsdp"}
HSDP = {"strategy": "hsdp", "shard_size": 2}
SYNCED = {"sync_batchnorm": True}
ACCUMULATED = {"epochs": 1, "batch_size": 16, "micro_batch_size": 2}
# 101 samples: of the last 5, one of two ranks has two micro-batches and the other one.
COMMON: dict[str, Any] = {
    "data__train__args__length": 101,
    "eval": {"batch_size": 4},
    "optim": {"name": "adamw", "lr": 0.01, "clip_norm": 1.0},
    "model": ODD,
    "train": ACCUMULATED,
}
# SGD: below BatchNorm some gradients are rounding alone, which Adam would blow up.
NORMED: dict[str, Any] = {
    "model": ODD_NORMED,
    "train": {"steps": 6, "batch_size": 16},
    "optim": {"name": "sgd", "lr": 0.1, "clip_norm": 1.0},
}
SKIPPING = {"data__eval__name": "vectors:MissingFile", "eval": {"batch_size": 1}}
OVERFLOWING = {"precision": "fp16", "data__train__name": "vectors:Huge", "model": STACK}

# Each of these with DDP and with FSDP on two processes.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normed": NORMED,
    "unclipped": {"optim": {"name": "sgd", "lr": 0.1}, "model": STACK},
    "bf16": {"precision": "bf16"},
    "normed bf16": {**NORMED, "precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "overflowing": OVERFLOWING,
    "one block": {"model": {"name": "mlp", "args": {"in_features": 8, "hidden": [16]}}},
    "one evaluated": {"data__eval__args__length": 1},
    "one unreadable": {**SKIPPING, "data__on_error": "skip", "data__max_skipped": 1.0},
    "images": {
        "data__train": {"name": "synthetic", "args": {"num_samples": 24, "shape": [3, 16, 16], "num_classes": 3}},
        "data__eval": {"name": "synthetic", "args": {"num_samples": 5, "shape": [3, 16, 16], "num_classes": 3}},
        "model": {"name": "small_cnn", "args": {"in_channels": 3, "width": 8}},
        "optim": {"name": "sgd", "lr": 0.1, "clip_norm": 1.0},
    },
}
IN_CI = [name for name in SETTINGS if NIGHTLY or name not in ("one evaluated", "images")]
# And these with FSDP only.
MORE: dict[str, dict[str, Any]] = {
    "kept": {"parallel": {**FSDP, "reshard_after_forward": False}},
    "offloaded": {"parallel": {**FSDP, "cpu_offload": True}},
    "checkpointed": {"parallel": FSDP, "memory": {"checkpointing": "full"}},
    "normed bf16 checkpointed": {**NORMED, "parallel": FSDP, "precision": "bf16", "memory": {"checkpointing": "full"}},
    "compiled": {"parallel": FSDP, "model": {**STACK, "compile": "blocks"}, "optim": {"name": "sgd", "lr": 0.1}},
    "fused overflowing": {
        **OVERFLOWING,
        "parallel": FSDP,
        "optim": {"name": "adamw", "lr": 0.01, "clip_norm": 1.0, "implementation": "fused"},
    },
    "fitted": {
        "parallel": FSDP,
        "model": STACK,
        "train": {"steps": 2, "batch_size": 512, "micro_batch_size": "auto"},
        "memory": {"checkpointing": "auto", "target": "400KiB"},
    },
    "synced ddp": {**NORMED, "parallel": SYNCED},
    "synced fsdp": {**NORMED, "parallel": {**FSDP, **SYNCED}},
    "synced uneven": {"model": ODD_NORMED, "parallel": SYNCED},
    "synced without": {"parallel": SYNCED},
    "another size": {"parallel": {"strategy": "hsdp", "shard_size": 3}},
}
ON_ONE: dict[str, dict[str, Any]] = {
    "synced ddp": {**NORMED, "parallel": SYNCED},
    "normed": {**NORMED, "parallel": FSDP},
}
ON_FOUR: dict[str, dict[str, Any]] = {
    "hsdp": {"parallel": HSDP},
    "hsdp fp16": {"parallel": HSDP, "precision": "fp16"},
    "synced": {**NORMED, "parallel": {**HSDP, **SYNCED}},
}


class Results:
    """What `fsdp_worker.py` left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def train(self, world: int, cases: dict[str, dict[str, Any]]) -> None:
        files = []
        for name, changes in cases.items():
            config = tiny_config(self.folder / f"{name}-{world}", **{**COMMON, **changes})
            files.append(self.folder / f"{name}.yaml".replace(" ", "_"))
            files[-1].write_text(yaml.safe_dump(config))
        done = on_processes(world, "fsdp_worker.py", self.folder, *map(str, files))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Warning" not in done.stderr, done.stderr

    def of(self, name: str, world: int = 2, rank: int = 0) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}-{world}-{rank}.json".replace(" ", "_")).read_text())

    def weights(self, name: str, world: int = 2) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / f"{name}-{world}.pt".replace(" ", "_"), weights_only=True)

    def assert_alike(self, one: dict[str, Any], other: dict[str, Any], rel: float = 1e-5) -> None:
        assert other["losses"] == pytest.approx(one["losses"], rel=rel)
        assert other["norms"] == pytest.approx(one["norms"], rel=10 * rel, nan_ok=True)
        assert other["metrics"] == pytest.approx(one["metrics"], rel=rel)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    results = Results(tmp_path_factory.mktemp("fsdp"))
    cases: dict[str, dict[str, Any]] = {
        f"{name} {strategy}": {**changes, "parallel": {"strategy": strategy}}
        for name, changes in SETTINGS.items()
        if name in IN_CI
        for strategy in ("ddp", "fsdp")
    }
    results.train(2, cases | MORE)
    results.train(1, ON_ONE)
    results.train(4, ON_FOUR)
    return results


@pytest.mark.parametrize("name", few(SETTINGS, *IN_CI))
def test_fsdp_is_like_ddp(name: str, results: Results) -> None:
    ddp, fsdp = results.of(f"{name} ddp"), results.of(f"{name} fsdp")
    results.assert_alike(ddp, fsdp, 2e-2 if "16" in name else 1e-5)
    assert fsdp["before"]["names"] == ddp["before"]["names"]
    for key in ("skipped_steps", "skipped_samples", "scale"):
        for rank in (0, 1):
            assert results.of(f"{name} fsdp", rank=rank)[key] == results.of(f"{name} ddp", rank=rank)[key]
    assert results.of(f"{name} fsdp", rank=1)["metrics"] == fsdp["metrics"]
    if "16" not in name and "normed" not in name:  # below BatchNorm some gradients are rounding alone
        one, other = results.weights(f"{name} ddp"), results.weights(f"{name} fsdp")
        assert all(torch.allclose(one[key], other[key], rtol=1e-4, atol=1e-6) for key in one)


def test_settings_change_nothing(results: Results) -> None:
    for name, as_with in (
        ("kept", "plain fsdp"),
        ("offloaded", "plain fsdp"),
        ("checkpointed", "plain fsdp"),
        ("normed bf16 checkpointed", "normed bf16 fsdp"),
        ("fused overflowing", "overflowing fsdp"),
    ):
        results.assert_alike(results.of(as_with), results.of(name), 1e-6)
    assert results.of("overflowing fsdp")["skipped_steps"] > 0
    compiled, plain = results.of("compiled"), results.of("unclipped fsdp")
    assert compiled["compiled"] > 0 == plain["compiled"]
    assert compiled["losses"] != compiled["norms"]
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-5)


def test_settings_reach_the_shares(results: Results) -> None:
    found = {name: results.of(name) for name in ("plain fsdp", "kept", "offloaded")}
    blocks = ["blocks.0", "blocks.1"]
    assert [found[name]["gathered_after_forward"] for name in found] == [[], blocks, []]
    assert [found[name]["before"]["offloaded"] for name in found] == [[], [], ["", *blocks]]


def test_blocks_are_shared_by_themselves(results: Results) -> None:
    found = results.of("plain fsdp")
    assert found["blocks"] == [f"blocks.{i}" for i in range(4)]
    layout = found["before"]
    # The last two blocks share a weight, which is gathered with the rest.
    assert layout["fsdp_modules"] == ["", "blocks.0", "blocks.1"]
    assert layout["same_module"]
    assert layout["all_shared"]
    assert layout["optimizer_has_them"]
    assert layout["frozen"] == [f"blocks.{i}.scale" for i in range(4)]
    assert found["after"] == layout  # also after an evaluation
    # A single row cannot be halved: the first process has it.
    assert layout["share"] + results.of("plain fsdp", rank=1)["before"]["share"] == pytest.approx(1)
    assert results.of("unclipped fsdp")["before"]["share"] == pytest.approx(0.5, abs=1e-3)
    assert results.of("unclipped fsdp")["before"]["fsdp_modules"] == ["", "blocks.0", "blocks.1"]
    assert results.of("one block fsdp")["before"]["fsdp_modules"] == [""]
    assert results.of("plain ddp")["before"]["fsdp_modules"] == []
    # BatchNorm keeps float32, so it is gathered apart from what does not.
    normed = results.of("normed bf16 fsdp")["before"]
    assert set(normed["fsdp_modules"]) >= {"norm", "blocks.0", "blocks.0.norm", "blocks.3.norm"}
    assert results.of("normed fsdp")["before"]["fsdp_modules"] == ["", "blocks.0", "blocks.1"]
    assert normed["dtypes"] == results.of("fp16 fsdp")["before"]["dtypes"] == ["torch.float32"]


def test_rank_0_has_the_buffers_that_count(results: Results) -> None:
    one, other = results.weights("normed ddp"), results.weights("normed fsdp")
    buffers = [name for name in one if "running" in name or "tracked" in name]
    assert len(buffers) == 3 * 5
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in buffers)


def test_the_plan_is_that_of_a_share(results: Results) -> None:
    """With a copy of the model per process no more than 16 samples fit."""
    sizes = {results.of("fitted", rank=rank)["micro_batch_size"] for rank in (0, 1)}
    assert sizes == {64}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_batchnorm_of_two_processes_is_that_of_one(strategy: str, results: Results) -> None:
    whole, split = results.of("synced ddp", world=1), results.of(f"synced {strategy}")
    results.assert_alike(whole, split)  # with the norm of the gradients
    assert split["before"]["names"] == whole["before"]["names"]
    assert "CpuSyncBatchNorm" in split["classes"]
    assert "CpuSyncBatchNorm" not in whole["classes"]
    one, two = results.weights("synced ddp", world=1), results.weights(f"synced {strategy}")
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-5) for name in one if "shift" not in name)
    # What it would be without: each process has statistics of its own.
    apart = results.of("normed ddp")
    assert apart["losses"][0] != pytest.approx(whole["losses"][0], rel=1e-3)


def test_what_cannot_be_shared_is_one_line_on_every_process(results: Results) -> None:
    for rank in (0, 1):
        assert results.of("synced uneven", rank=rank)["error"].startswith("data.drop_last: the last batch of an epoch")
        assert results.of("synced without", rank=rank)["error"].endswith("the model has no BatchNorm")
        message = "parallel.shard_size: 2 processes do not split into groups of 3; these sizes fit: 2"
        assert results.of("another size", rank=rank)["error"] == message


def test_a_process_alone_trains_the_whole_model(results: Results) -> None:
    alone = results.of("normed", world=1)
    assert alone["before"]["fsdp_modules"] == []
    results.assert_alike(results.of("synced ddp", world=1), alone)


def test_pairs_share_a_copy(results: Results) -> None:
    plain, hsdp = results.of("plain ddp"), results.of("hsdp", world=4)
    results.assert_alike(plain, hsdp)
    shares = [results.of("hsdp", world=4, rank=rank)["before"]["share"] for rank in range(4)]
    assert shares[0] == shares[2] > 0.5 > shares[1] == shares[3]
    assert shares[0] + shares[1] == pytest.approx(1)
    results.assert_alike(plain, results.of("hsdp fp16", world=4), 1e-2)
    results.assert_alike(results.of("synced ddp", world=1), results.of("synced", world=4))


def test_through_the_launcher(write_config: WriteConfig, results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole run, saved and ended as any, that one process can evaluate."""
    file = write_config(**COMMON)
    done = local(file, 2, "parallel.strategy=fsdp", "train.epochs=1")
    assert done.returncode == 0, done.stderr
    assert "parallel   fsdp: 2 processes share one copy" in done.stdout
    assert "Warning" not in done.stdout + done.stderr
    folder = file.parent / "run"
    assert summary(folder)["status"] == "finished"
    assert list(losses(folder).values()) == pytest.approx(results.of("plain ddp")["losses"], rel=1e-5)
    expected = results.of("plain ddp")["metrics"]
    assert summary(folder)["metrics"]["eval/loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert main(["evaluate", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(expected["loss"], rel=1e-5)
