"""What ranks do together, however they were started."""

from __future__ import annotations

import http.server
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import wandb_log
import yaml
from conftest import WriteConfig, nightly
from resuming import TrainServer
from run_results import losses, summary

from trainer.cli import main


@pytest.mark.parametrize("find", [False, True])
def test_parameters_without_a_gradient(find: bool, server: TrainServer, write_config: WriteConfig) -> None:
    """With the search they train; without it DDP refuses the second step."""
    file = write_config(parallel={"find_unused_parameters": find})
    config = yaml.safe_load(file.read_text())
    config["model"] = {"name": "vectors_model:Unused"}
    file.write_text(yaml.safe_dump(config))
    done = server.train("--config", file, ranks=2)
    assert done.code == (0 if find else 2), done.err
    if not find:
        assert re.search("error: .*: parallel.find_unused_parameters: .* unused .* set it to true", done.err)


def test_rank_0_downloads_first(server: TrainServer, write_config: WriteConfig, tmp_path: Path) -> None:
    data = {"name": "slow:Downloads", "args": {"length": 60, "folder": str(tmp_path)}}
    assert server.train("--config", write_config(data__train=data), ranks=3).code == 0
    assert (tmp_path / "fetched-by").read_text() == "0"


def test_evaluation_is_that_of_the_saved_model(
    server: TrainServer, write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """BatchNorm's statistics differ between ranks after a step; the checkpoint holds those of rank 0."""
    file = write_config()
    config = yaml.safe_load(file.read_text())
    config["model"] = {"name": "vectors_model:Normed", "args": {"dropout": 0.2}}
    file.write_text(yaml.safe_dump(config))
    assert server.train("--config", file, ranks=2).code == 0
    during = summary(tmp_path / "run")["metrics"]
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    after = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert after["loss"] == pytest.approx(during["eval/loss"], rel=1e-6)
    assert after["accuracy"] == during["eval/accuracy"]


def test_last_batch_smaller_than_the_world(server: TrainServer, write_config: WriteConfig, tmp_path: Path) -> None:
    """One sample for three ranks: two of them run a stand-in without weight, accumulation included."""
    plain = {
        "data__train__args__length": 37,
        "data__eval__args__length": 2,
        "model__args__dropout": 0.0,
        "train": {"epochs": 3, "batch_size": 12, "micro_batch_size": 2},
    }
    alone = write_config("one.yaml", run__dir=str(tmp_path / "one"), **plain)
    assert server.train("--config", alone).code == 0
    done = server.train("--config", write_config(**plain), ranks=3)
    assert done.code == 0, done.err
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert summary(tmp_path / "run")["metrics"] == pytest.approx(summary(tmp_path / "one")["metrics"], rel=1e-4)


def test_wandb_is_one_run_however_many_ranks_and_restarts(
    server: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    settings = {"project": "a-project", "tags": ["t1", "t2"], "group": "g", "notes": "n"}
    tracking = {"trackers": ["wandb"], "wandb": settings}
    home = {"HOME": str(tmp_path / "empty")}
    Path(home["HOME"]).mkdir()
    first = server.train("--config", write_config(tracking=tracking), ranks=2, variables=home)
    assert first.code == 0, first.err
    assert first.out.count("wandb: offline, as no API key was found") == 1
    second = server.train("--config", write_config(tracking=tracking, train__epochs=3), ranks=2, variables=home)
    assert second.code == 0, second.err

    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2  # one per start
    runs = [wandb_log.run(file) for file in files]
    assert runs[0].run_id == runs[1].run_id
    assert {(r.project, r.display_name, r.run_group, r.notes, tuple(r.tags)) for r in runs} == {
        ("a-project", "tiny", "g", "n", ("t1", "t2"))
    }
    assert wandb_log.config(files[0])["train"]["batch_size"] == 12
    rows = [row for file in files for row in wandb_log.history(file)]
    curve = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert curve == losses(tmp_path / "run")
    assert list(curve) == list(range(1, 16))
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [5, 10, 15]
    assert [row["_step"] for row in rows] == list(range(1, 16))  # one row per step
    # All samples of both ranks are in the matrix; the examples are rank 0's.
    folder = tmp_path / "run" / "eval" / "step-00000015"
    counts = json.loads((folder / "confusion.json").read_text())["counts"]
    assert [sum(row) for row in counts] == [8, 8, 7]  # of 23 samples
    correct = sum(counts[label][label] for label in range(3))
    assert correct / 23 == summary(tmp_path / "run")["metrics"]["eval/accuracy"]
    samples = json.loads((folder / "samples.json").read_text())
    assert [sample["image"] for sample in samples] == [None] * 12
    assert {sample["target"] for sample in samples} == {"a", "b", "c"}


def test_wandb_online_without_a_network_goes_offline(
    server: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    tracking = {"trackers": ["wandb"], "wandb": {"mode": "online"}}
    variables = {"HOME": str(tmp_path / "home"), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "k" * 40}
    done = server.train("--config", write_config(tracking=tracking), variables=variables)
    assert done.code == 0, done.err
    assert "wandb: offline, as 127.0.0.1 cannot be reached" in done.out
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1


@nightly
def test_wandb_online_without_a_key_goes_offline(
    server: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    """A server answers, but there is nothing to log in with."""
    (tmp_path / "home").mkdir()
    empty = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=empty.serve_forever, daemon=True).start()
    tracking = {"trackers": ["wandb"], "wandb": {"mode": "online"}}
    variables = {"HOME": str(tmp_path / "home"), "WANDB_BASE_URL": f"http://127.0.0.1:{empty.server_port}"}
    done = server.train("--config", write_config(tracking=tracking), variables=variables)
    empty.shutdown()
    empty.server_close()
    assert done.code == 0, done.err
    assert "wandb: offline, as it cannot start online" in done.out
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1


def test_wandb_mode_of_the_environment_is_checked(
    server: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    done = server.train("--config", write_config(tracking={"trackers": ["wandb"]}), variables={"WANDB_MODE": "foo"})
    assert done.code == 2
    assert done.err == "error: WANDB_MODE=foo in the environment; it must be online, offline or disabled\n"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "every rank": (
        {"model__name": "resnet81"},
        r"error: .*tiny.yaml:\d+: model.name: unknown model 'resnet81'; did you mean 'resnet18'",
    ),
    "split": ({"train__batch_size": 13}, r"error: .*: train.batch_size: 13 samples do not split .* 12 and 14"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_all_is_said_once(name: str, server: TrainServer, write_config: WriteConfig) -> None:
    changes, expected = BAD[name]
    done = server.train("--config", write_config(**changes), ranks=2)
    assert done.code == 2, done.err
    (problem,) = done.err.splitlines()
    assert re.match(expected, problem)
