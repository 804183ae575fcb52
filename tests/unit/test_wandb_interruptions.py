"""W&B over kills, rollbacks, resumes and dead networks: its history is one curve, the one of metrics.jsonl."""

from __future__ import annotations

import glob
import json
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import wandb
import wandb_log
from accelerate import PartialState
from conftest import WriteConfig, nightly
from launching import environment
from run_results import records, summary
from wandb_server import StoredRun, WandbServer

from trainer.cli import main
from trainer.config import load_config
from trainer.config_reporting import WandbConfig
from trainer.faults.plan import VARIABLE, Event, write_plan
from trainer.run_folder import RunFolder
from trainer.tracking import reminder, syncing, wandb_file, wandb_run
from trainer.tracking.wandb_run import WandbRun

if TYPE_CHECKING:
    from resuming import TrainServer


def wandb_config(**settings: Any) -> dict[str, Any]:
    return {"trackers": ["wandb"], "wandb": settings}


def home(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "home"
    folder.mkdir(exist_ok=True)
    return {"HOME": str(folder)}


def sync(variables: Mapping[str, str], *arguments: str) -> None:
    """Uploads with wandb's own reader."""
    command = [sys.executable, "-m", "wandb", "sync", *arguments]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=60)
    assert "ERROR" not in done.stderr, done.stderr


def trainer_command(variables: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m trainer`."""
    command = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=60)


def offline_runs(run_dir: Path) -> list[str]:
    return sorted(glob.glob(str(run_dir / "wandb" / "offline-run-*")))


def assert_one_curve(run: StoredRun, run_dir: Path) -> None:
    """Asserts that W&B has each step of metrics.jsonl once, in order, with the same values."""
    expected: dict[int, dict[str, Any]] = {}
    for record in records(run_dir):
        expected.setdefault(record["step"], {}).update(
            {key: value for key, value in record.items() if key != "time" and value is not None}
        )
    assert [row["step"] for row in run.history] == list(expected)
    assert [row["_step"] for row in run.history] == list(expected)
    for row in run.history:
        for key, value in expected[row["step"]].items():
            # The others are measured by a clock: they differ where a step was made twice.
            if key in ("epoch", "samples", "train/loss", "train/lr", "train/grad_norm") or key.startswith("eval/"):
                assert row[key] == value, (row["step"], key)
        assert row.keys() >= {key for key in expected[row["step"]] if not key.startswith("system/")}


def aliases(artifact: Mapping[str, Any]) -> set[str]:
    return {alias["alias"] for alias in artifact["aliases"]}


@pytest.fixture
def killed(tmp_path: Path) -> dict[str, str]:
    """Variables of a run with a checkpoint every 3 steps that is rolled back in step 8, and killed in step 9."""
    (tmp_path / "run").mkdir()
    events = [Event("nan", step=8), Event("kill", step=9, place="forward")]
    write_plan(tmp_path / "plan.json", tmp_path / "run", events, seconds_valid=600)
    return {VARIABLE: str(tmp_path / "plan.json")}


def test_online_is_one_curve_over_a_kill(
    server: TrainServer,
    write_config: WriteConfig,
    tmp_path: Path,
    killed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"project": "p", "name": "shown", "group": "g", "tags": ["t"], "notes": "n", "entity": "team"}
    init = {"wandb": {"job_type": "trial", "settings": {"x_file_stream_transmit_interval": 0.1}}}
    changes = {**wandb_config(**settings, checkpoints="all"), "init": init}
    config = write_config(tracking=changes, checkpoint__every=3, eval__every=2, faults__non_finite="rollback")
    with WandbServer() as online:
        variables = {**home(tmp_path), **online.variables}
        assert server.train("--config", config, variables={**variables, **killed}).code == -9
        done = server.train("--config", config, variables=variables)
        assert done.code == 0, done.err
        (run,) = online.runs.values()
        assert_one_curve(run, tmp_path / "run")
        assert run.num_starts == 2
        assert run.exit_code == 0
        told = run.attributes
        assert (told["displayName"], told["groupName"], told["tags"], told["notes"]) == ("shown", "g", ["t"], "n")
        assert (told["entity"], told["project"], told["jobType"]) == ("team", "p", "trial")
        assert run.config["optim"]["lr"] == 0.01
        evaluated = [r["eval/accuracy"] for r in records(tmp_path / "run") if "eval/accuracy" in r]
        losses = [r["train/loss"] for r in records(tmp_path / "run") if r.get("train/loss") is not None]
        assert (run.summary["eval/accuracy"], run.summary["train/loss"]) == (evaluated[-1], losses[-1])
        assert run.summary["best/eval/accuracy"] == max(evaluated)
        assert run.summary["best/train/loss"] == min(losses)
        models = [found for found in online.artifacts if found["artifactTypeName"] == "model"]
        steps = {step for found in models for step in aliases(found) if step.startswith("step-")}
        assert {"step-3", "step-6", "step-9", "step-10"} <= steps
        assert {"latest", "step-10"} <= aliases(models[-1])
        assert any("best" in aliases(found) for found in models)
        assert not (tmp_path / "run" / "wandb" / "checkpoints").exists(), done.out  # all is uploaded
        assert run.summary["status"] == "finished"
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        wandb.teardown()  # an earlier test may have had it read other variables
        export = ["export", str(tmp_path / "run"), "--output", str(tmp_path / "model.safetensors"), "--artifact"]
        assert main(export) == 0
        assert "export-" in str(online.artifacts[-1])
        monkeypatch.setenv("WANDB_MODE", "disabled")
        assert main(export) == 2


@nightly
def test_offline_is_one_curve_once_synced(
    server: TrainServer, write_config: WriteConfig, tmp_path: Path, killed: dict[str, str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"checkpoint__every": 3, "eval__every": 2, "faults__non_finite": "rollback"}
    offline = {"trackers": ["wandb", "tensorboard"], "wandb": {"mode": "offline"}}
    config = write_config(**changes, tracking=offline)
    variables = home(tmp_path)
    assert server.train("--config", config, variables={**variables, **killed}).code == -9
    assert server.train("--config", config, variables=variables).code == 0
    with WandbServer() as online:
        sync({**variables, **online.variables}, *offline_runs(tmp_path / "run"))
        (run,) = online.runs.values()
        assert_one_curve(run, tmp_path / "run")
        assert run.exit_code == 0
    assert summary(tmp_path / "run")["num_rollbacks"] == 1
    written = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    written.Reload()
    assert [event.step for event in written.Scalars("train/loss")] == list(range(1, 11))
    # Never synced, and the network is back: another attempt sends what the server lacks.
    longer = write_config(**changes, tracking=wandb_config(mode="online"), train__epochs=3)
    with WandbServer() as online:
        variables = {**variables, **online.variables}
        assert server.train("--config", longer, variables=variables).code == 0
        (run,) = online.runs.values()
        assert_one_curve(run, tmp_path / "run")
        assert max(row["step"] for row in run.history) == 15
        sync(variables, *offline_runs(tmp_path / "run"))  # nothing is left to do
        assert_one_curve(run, tmp_path / "run")


@nightly
def test_a_server_that_dies_in_the_middle(server: TrainServer, write_config: WriteConfig, tmp_path: Path) -> None:
    init = {"wandb": {"settings": {"x_file_stream_transmit_interval": 0.1}}}
    changes = {**wandb_config(mode="online", finish_timeout="2 seconds"), "init": init, "samples": 0}
    with WandbServer(dies=True) as online:
        variables = {**home(tmp_path), **online.variables}
        done = server.train("--config", write_config(tracking=changes, train__epochs=60), variables=variables)
        assert done.code == 0, done.err
        assert online.stopped
        (run,) = online.runs.values()
        assert run.history == []
    assert summary(tmp_path / "run")["status"] == "finished"
    (file,) = (tmp_path / "run" / "wandb").glob("run-*/*.wandb")
    assert [row["step"] for row in wandb_log.history(file)] == list(range(1, 301))
    assert "wandb: not all is uploaded after 2 s" in done.out
    (line,) = (line for line in done.out.splitlines() if "-m trainer sync" in line)
    arguments = line.partition("-m trainer ")[2].split()
    assert arguments == ["sync", str(tmp_path / "run")]
    assert not (tmp_path / "run" / "wandb" / "complete").exists()
    with WandbServer() as online:  # as the line says
        variables = {**home(tmp_path), **online.variables}
        late = trainer_command(variables, *arguments)
        assert late.returncode == 0, late.stderr
        assert late.stderr.startswith("sent 300 rows to the W&B run ")
        assert late.stderr.count("\n") == 1
        (run,) = online.runs.values()
        assert_one_curve(run, tmp_path / "run")
        assert (run.exit_code, run.summary["status"]) == (0, "finished")
        assert (tmp_path / "run" / "wandb" / "complete").exists()
        # A server that has a part of it.
        run.lines = {place: run.lines[place] for place in range(7)}
        run.summary = run.lines[6]
        assert trainer_command(variables, *arguments).stderr.startswith("sent 293 rows to the W&B run ")
        assert_one_curve(run, tmp_path / "run")


def test_sync_says_in_a_line_what_it_lacks(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()

    def told() -> str:
        assert main(["sync", str(run)]) == 2
        return capsys.readouterr().err

    assert told() == f"error: '{run}' is no run folder: it has no config.yaml\n"
    shutil.copy(write_config(), run / "config.yaml")
    assert told() == f"error: the run in '{run}' has no W&B run: tracking.trackers had no wandb\n"
    (run / "wandb" / "offline-run-20260101_000000-abc").mkdir(parents=True)
    (run / "wandb" / "offline-run-20260101_000000-abc" / "run-abc.wandb").touch()
    monkeypatch.setattr(syncing, "wandb_server", lambda: "http://127.0.0.1:9")
    monkeypatch.setattr(syncing, "has_wandb_key", lambda: False)
    assert told() == "error: no API key for 127.0.0.1: type `wandb login`, or set WANDB_API_KEY\n"
    monkeypatch.setattr(syncing, "has_wandb_key", lambda: True)
    assert told() == "error: 127.0.0.1 cannot be reached\n"


def test_servers_that_keep_one_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run, "_PROBE_SECONDS", 0.2)
    online = WandbConfig(mode="online")
    with WandbServer(silent=True) as silent:
        monkeypatch.setattr(wandb_run, "wandb_server", lambda: silent.url)
        assert wandb_run.wandb_mode(online) == "offline"
    with WandbServer() as fine:
        monkeypatch.setattr(wandb_run, "_PROBE_SECONDS", 10)
        monkeypatch.setattr(wandb_run, "wandb_server", lambda: "http://far.example:8080")
        monkeypatch.setenv("http_proxy", fine.url)  # it reaches what we cannot
        assert wandb_run.wandb_mode(online) == "online"
        assert fine.requests == ["GET http://far.example:8080"]
        monkeypatch.delenv("http_proxy")
    monkeypatch.setattr(wandb_run, "_PROBE_SECONDS", 0.2)
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments, **options: time.sleep(20))
    started = time.monotonic()
    assert wandb_run.wandb_mode(online) == "offline"
    assert time.monotonic() - started < 5


def test_a_record_that_is_not_whole_is_not_replayed(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(load_config(str(write_config()), []))
    folder.create()
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in (1, 2, 3)]
    folder.metrics_file.write_text("\n".join([*lines, '{"step": 4, "tra']))

    def full(file: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.run_folder.replacing", full)
    assert [record["step"] for record in folder.cut_metrics(2, 0)] == [1, 2]


def test_files_of_killed_attempts_are_mended(tmp_path: Path) -> None:
    whole = b":W&B\xe1\xbe\x00"
    ends = []
    for kind, data in [(1, b"a" * 50), (2, b"b" * 32_600), (4, b"c" * 100), (1, b"d" * 9)]:
        left = 32768 - len(whole) % 32768
        assert left >= 7
        check = zlib.crc32(data, zlib.crc32(bytes([kind])))
        whole += struct.pack("<IHB", check, len(data), kind) + data
        if kind != 2:
            ends.append(len(whole))
    (tmp_path / "offline-run-1-abc").mkdir()
    file = tmp_path / "offline-run-1-abc" / "run-abc.wandb"

    def mended(content: bytes) -> int:
        file.write_bytes(content)
        assert wandb_file.last_step(tmp_path, "abc", tmp_path / "other") == -1
        return file.stat().st_size

    for cut in (*ends, ends[0] + 3, ends[1] - 1, ends[1] + 5, ends[2] - 1):
        assert mended(whole[:cut]) == max(end for end in ends if end <= cut), cut
    assert mended(whole[: ends[2] - 1] + b"x") == ends[1]  # the last record is broken
    for content in (b"", whole[:7], whole[:30], whole[:20] + b"x" + whole[21:], whole[:100] + b"x" + whole[101:]):
        assert mended(content) == len(content)  # nothing to go by, or broken in the middle: left as it is
    whole_online = tmp_path / "run-1-abc" / "run-abc.wandb"
    whole_online.parent.mkdir()
    whole_online.write_bytes(whole[:-1])
    assert mended(whole) == len(whole)
    assert whole_online.stat().st_size == len(whole) - 1


def test_a_step_that_is_evaluated_by_the_next_attempt(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home(tmp_path)["HOME"])
    PartialState(cpu=True)
    config = load_config(str(write_config(tracking=wandb_config(mode="offline"))), [])
    first = WandbRun(config, tmp_path, None, [], {}, {})
    for step in (9, 10):
        first.log({"train/loss": float(step)}, step)
    first.finish(failed=True, open_step=10, seconds=20)
    wandb.teardown()  # as at the end of a process: offline files are whole then
    assert (tmp_path / "wandb" / "run-id").read_text().strip() == first.id
    records = [{"step": step, "time": 0.0, "train/loss": float(step)} for step in (9, 10)]
    second = WandbRun(config, tmp_path, None, records, {}, {})  # no checkpoint knows of the first one
    assert second.id == first.id
    second.log({"eval/loss": 1.0}, 10)
    second.end_step(10)
    assert second._row == {}  # it waits for nothing more
    second.finish(failed=False, open_step=None, seconds=20)
    wandb.teardown()
    assert reminder(config, tmp_path) is None
    monkeypatch.setenv("WANDB_MODE", "online")
    online = load_config(str(write_config(tracking=wandb_config())), [])
    assert f"-m trainer sync {tmp_path}" in str(reminder(online, tmp_path))
    (tmp_path / "wandb" / "complete").touch()
    assert reminder(online, tmp_path) is None
    rows = [wandb_log.history(file) for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    told = [[(row["step"], row["train/loss"], row.get("eval/loss")) for row in part] for part in rows]
    assert told == [[(9, 9.0, None)], [(10, 10.0, 1.0)]]
    codes = [wandb_log.exit_code(file) for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    assert codes == [1, 0]
