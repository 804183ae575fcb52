"""Launchers, stops and resumes with several processes, through the real launcher."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import wandb_log
import yaml
from conftest import REPOSITORY, WriteConfig
from launching import Job, alive, environment, local, run
from run_results import weights

from trainer.cli import main

TRAIN = str(REPOSITORY / "train.py")
BIN = Path(sys.executable).parent
LAUNCH = [sys.executable, "-m", "launch", "local"]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def losses(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        ([str(BIN / "accelerate"), "launch"], 1),
        ([str(BIN / "torchrun"), "--nproc-per-node", "2"], 2),
        ([str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"], 2),
    ],
    ids=["accelerate", "torchrun", "accelerate on two"],
)
def test_other_launchers(launcher: list[str], processes: int, write_config: WriteConfig, tmp_path: Path) -> None:
    done = run([*launcher, TRAIN, "--config", str(write_config())], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(tmp_path / "run")["status"] == "finished"
    assert summary(tmp_path / "run")["num_processes"] == processes


@pytest.mark.parametrize("flags", [["--cpu", "--num_processes", "2"], ["--cpu", "--num_processes=2"]])
def test_a_launcher_that_starts_too_few_is_refused(flags: list[str], write_config: WriteConfig, tmp_path: Path) -> None:
    config = str(write_config())
    done = run([str(BIN / "accelerate"), "launch", *flags, TRAIN, "--config", config, "run.seed=1"], tmp_path)
    assert "returned non-zero exit status 2" in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "2 processes were asked for and 1 started" in line
    command = line.split("this works: ")[1].split()
    assert command == ["python", "-m", "launch", "local", "--config", config, "run.seed=1", "--processes", "2"]
    assert not (tmp_path / "run").exists()
    done = run([sys.executable, *command[1:]], tmp_path)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "run")["num_processes"] == 2


def test_too_few_processes_of_an_accelerate_config_file(write_config: WriteConfig, tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n"
        "num_machines: 1\nmachine_rank: 0\nmixed_precision: 'no'\n"
    )
    launcher = [str(BIN / "accelerate"), "launch", "--config_file", str(file)]
    done = run([*launcher, TRAIN, "--config", str(write_config())], tmp_path)
    assert "error: 2 processes were asked for and 1 started" in done.stderr


def test_accelerate_config_with_foreign_plugin_is_refused(write_config: WriteConfig, tmp_path: Path) -> None:
    command = [sys.executable, TRAIN, "--config", str(write_config())]
    done = run(command, tmp_path, ACCELERATE_USE_DEEPSPEED="true")
    assert done.returncode == 2
    assert "DeepSpeed" in done.stderr


def test_precision_that_contradicts_the_config_is_refused(write_config: WriteConfig, tmp_path: Path) -> None:
    launcher = [str(BIN / "accelerate"), "launch", "--mixed_precision", "bf16"]
    done = run([*launcher, TRAIN, "--config", str(write_config())], tmp_path)
    assert re.search(r"error: .*: precision: accelerate was launched with mixed precision bf16", done.stderr)
    assert run([*launcher, TRAIN, "--config", str(write_config(precision="bf16"))], tmp_path).returncode == 0


@pytest.mark.parametrize("find", [False, True])
def test_parameters_without_a_gradient(find: bool, write_config: WriteConfig) -> None:
    """With the search they train; without it DDP refuses the second step."""
    file = write_config(parallel={"find_unused_parameters": find})
    config = yaml.safe_load(file.read_text())
    config["model"] = {"name": "vectors_model:Unused"}
    file.write_text(yaml.safe_dump(config))
    done = local(file, 2)
    assert done.returncode == (0 if find else 2), done.stderr
    if not find:
        assert re.search("error: .*: parallel.find_unused_parameters: .* unused .* set it to true", done.stderr)


def test_rank_0_downloads_first(write_config: WriteConfig, tmp_path: Path) -> None:
    data = {"name": "slow:Downloads", "args": {"length": 60, "folder": str(tmp_path)}}
    assert local(write_config(data__train=data), 3).returncode == 0
    assert (tmp_path / "fetched-by").read_text() == "0"


def test_progress_bar_on_a_terminal(write_config: WriteConfig, tmp_path: Path) -> None:
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(its_end, (24, 150))
    command = [sys.executable, TRAIN, "--config", str(write_config())]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=its_end, stderr=its_end)
    os.close(its_end)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end was closed
        while chunk := os.read(terminal, 4096):
            shown += chunk
    os.close(terminal)
    assert process.wait(60) == 0
    assert re.search(rb"100%.*10/10 .*loss [\d.]+", shown), shown
    assert re.search(rb"step 10/10 .*eval/accuracy", shown)  # evaluations stay on the screen
    assert not re.search(rb"step \d+/10 .* lr ", shown)  # reports do not


def long_config(write_config: WriteConfig, **changes: Any) -> Path:
    """A run of many slow enough steps, checkpointed only when it stops."""
    every = {"every": "9999 epochs"}
    return write_config(
        **{
            "data__train__args__length": 4800,
            "train": {"epochs": 50, "batch_size": 12},
            "eval": every,
            "checkpoint": every,
            "log": {"every": 20},
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("processes", "number", "to_group", "workers"),
    [
        (1, signal.SIGINT, True, 2),
        (2, signal.SIGINT, True, 2),  # Ctrl-C in a terminal
    ],
)
def test_stopping_leaves_a_checkpoint_and_no_process(
    processes: int, number: signal.Signals, to_group: bool, workers: int, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = long_config(write_config, data__workers=workers)
    job = Job([*LAUNCH, "--config", str(config), "--processes", str(processes)], tmp_path)
    job.wait_for(lambda output: "step 40/" in output)
    family = job.family()
    assert len(family) >= (processes if processes > 1 else 0) + processes * workers
    job.signal(number, group=to_group)
    assert job.end() == 75, job.output()
    assert alive(family) == []
    assert "Traceback" not in job.output()
    found = summary(tmp_path / "run")
    assert found["status"] == "stopped"
    assert (tmp_path / "run" / "checkpoints" / f"step-{found['step']:08d}").is_dir()


def test_two_ctrl_c_end_at_once_and_leave_no_process(write_config: WriteConfig, tmp_path: Path) -> None:
    config = long_config(write_config, data__train={"name": "slow:Sleepy", "args": {"length": 4800, "after": 200}})
    job = Job([*LAUNCH, "--config", str(config), "--processes", "2"], tmp_path)
    job.wait_for(lambda output: (tmp_path / "asleep").exists())
    family = job.family()
    job.signal(signal.SIGINT)
    time.sleep(1)
    assert job.process.poll() is None  # it waits for a step that does not end
    job.signal(signal.SIGINT)
    assert job.end() == 1
    assert alive(family) == []


def test_a_second_ctrl_c_ends_one_process_at_once(write_config: WriteConfig, tmp_path: Path) -> None:
    config = long_config(write_config, data__train={"name": "slow:Sleepy", "args": {"length": 4800, "after": 200}})
    job = Job([*LAUNCH, "--config", str(config), "--processes", "1"], tmp_path)
    job.wait_for(lambda output: (tmp_path / "asleep").exists())
    job.signal(signal.SIGINT)
    job.signal(signal.SIGINT)  # the same request, delivered twice
    time.sleep(1.5)
    assert job.process.poll() is None
    job.signal(signal.SIGINT)
    assert job.end() == 1


def test_workers_of_a_failed_job_do_not_outlive_it(write_config: WriteConfig, tmp_path: Path) -> None:
    data = {"name": "slow:BuggyWhileOthersSleep", "args": {"length": 40}}
    config = write_config(data__eval=data, data__workers=2, eval={"batch_size": 1})
    job = Job([*LAUNCH, "--config", str(config), "--processes", "2"], tmp_path)
    family: dict[int, psutil.Process] = {}
    while job.process.poll() is None:
        family.update({p.pid: p for p in job.family()})
        time.sleep(0.05)
    assert job.end() == 1
    assert "a bug of the user's" in job.output()
    assert len(family) >= 2 + 2 * 2
    assert alive(list(family.values()), within=3) == []


def test_interrupted_on_two_ranks_equals_uninterrupted(write_config: WriteConfig, tmp_path: Path) -> None:
    """SIGTERM in mid-epoch, then the same command again: bit for bit the same, with workers, dropout, BatchNorm."""
    changes = {
        "data__train__args__length": 600,
        "data__workers": 1,
        "train": {"epochs": 3, "batch_size": 12},
        "log": {"every": 1},
        "schedule": {"name": "cosine"},
        "model": {"name": "vectors_model:Normed", "args": {"dropout": 0.2}},
    }
    whole = write_config("whole.yaml", run__dir=str(tmp_path / "whole"), **changes)
    assert local(whole, 2).returncode == 0
    config = write_config(**changes)
    job = Job([*LAUNCH, "--config", str(config), "--processes", "2"], tmp_path)
    job.wait_for(lambda output: "step 33/" in output)
    job.signal(signal.SIGTERM)
    assert job.end() == 75, job.output()
    stopped = summary(tmp_path / "run")["step"]
    assert 33 <= stopped < 150
    assert stopped % 50  # within an epoch
    done = local(config, 2)
    assert done.returncode == 0, done.stderr
    assert f"continuing from step {stopped}" in done.stdout
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "run", 150), weights(tmp_path / "whole", 150)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_evaluation_is_that_of_the_saved_model(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """BatchNorm's statistics differ between ranks after a step; the checkpoint holds those of rank 0."""
    file = write_config()
    config = yaml.safe_load(file.read_text())
    config["model"] = {"name": "vectors_model:Normed", "args": {"dropout": 0.2}}
    file.write_text(yaml.safe_dump(config))
    assert local(file, 2).returncode == 0
    during = summary(tmp_path / "run")["metrics"]
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    after = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert after["loss"] == pytest.approx(during["eval/loss"], rel=1e-6)
    assert after["accuracy"] == during["eval/accuracy"]


def test_another_number_of_processes_may_continue(write_config: WriteConfig, tmp_path: Path) -> None:
    changes = {"model__args__dropout": 0.0, "train": {"epochs": 2, "batch_size": 12}}
    assert local(write_config("whole.yaml", run__dir=str(tmp_path / "whole"), **changes), 1).returncode == 0
    config = write_config(**{**changes, "train": {"epochs": 1, "batch_size": 12}})
    assert local(config, 2).returncode == 0
    done = local(write_config(**changes), 3)
    assert done.returncode == 0, done.stderr
    assert "written by 2 processes, read by 3" in done.stdout
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_last_batch_smaller_than_the_world(write_config: WriteConfig, tmp_path: Path) -> None:
    """One sample for three ranks: two of them run a stand-in without weight, accumulation included."""
    plain = {
        "data__train__args__length": 37,
        "data__eval__args__length": 2,
        "model__args__dropout": 0.0,
        "train": {"epochs": 3, "batch_size": 12, "micro_batch_size": 2},
    }
    assert local(write_config("one.yaml", run__dir=str(tmp_path / "one"), **plain), 1).returncode == 0
    done = local(write_config(**plain), 3)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert summary(tmp_path / "run")["metrics"] == pytest.approx(summary(tmp_path / "one")["metrics"], rel=1e-4)


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "config": ({"optim__lr": -1}, [r"error: .*tiny.yaml:\d+: optim.lr: must be greater than 0"]),
    "every rank": (
        {"model__name": "resnet81"},
        [r"error: .*tiny.yaml:\d+: model.name: unknown model 'resnet81'; did you mean 'resnet18'"],
    ),
    "split": ({"train__batch_size": 13}, [r"error: .*: train.batch_size: 13 samples do not split .* 12 and 14"]),
    "one rank": ({"data__train__name": "slow:MissingOnRank1"}, [r"error: .*: data.train: rank 1: .*no such mount"]),
    "a sample": ({"data__train__name": "vectors:MissingFile"}, [r"error: .*: data.train: .*'seven.npy'"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_on_two_processes(name: str, write_config: WriteConfig, tmp_path: Path) -> None:
    changes, expected = BAD[name]
    done = local(write_config(**changes), 2)
    assert done.returncode == 2, done.stderr
    problems = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(problems) == len(expected), done.stderr
    for problem, pattern in zip(problems, expected, strict=True):
        assert re.match(pattern, problem)
    assert "Traceback" not in done.stderr
    if name != "a sample":  # in mid-run the other rank says that it lost its peer
        assert done.stderr.splitlines() == problems


def test_a_bug_on_two_processes_exits_1(write_config: WriteConfig) -> None:
    done = local(write_config(data__train={"name": "vectors:Buggy", "args": {"length": 60}}), 2)
    assert done.returncode == 1
    assert "a bug of the user's" in done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_the_example(processes: int, tmp_path: Path) -> None:
    """A user's own package, outside the repository."""
    source = REPOSITORY / "examples" / "bring_your_own"
    folder = tmp_path / "elsewhere"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    done = local(folder / "shapes.yaml", processes)
    assert done.returncode == 0, done.stderr
    assert summary(folder / "runs" / "shapes")["metrics"]["eval/accuracy"] >= 0.97


def test_wandb_is_one_run_however_many_ranks_and_restarts(write_config: WriteConfig, tmp_path: Path) -> None:
    settings = {"project": "a-project", "tags": ["t1", "t2"], "group": "g", "notes": "n"}
    tracking = {"trackers": ["wandb"], "wandb": settings}
    (tmp_path / "empty").mkdir()
    first = local(write_config(tracking=tracking), 2, HOME=str(tmp_path / "empty"))
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("wandb: offline, as no API key was found") == 1
    second = local(write_config(tracking=tracking, train__epochs=3), 2, HOME=str(tmp_path / "empty"))
    assert second.returncode == 0, second.stderr

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


def test_wandb_online_without_a_network_goes_offline(write_config: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    tracking = {"trackers": ["wandb"], "wandb": {"mode": "online"}}
    variables = {"HOME": str(tmp_path / "home"), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "k" * 40}
    done = local(write_config(tracking=tracking), 1, **variables)
    assert done.returncode == 0, done.stderr
    assert "wandb: offline, as 127.0.0.1 cannot be reached" in done.stdout
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1


def test_wandb_online_without_a_key_goes_offline(write_config: WriteConfig, tmp_path: Path) -> None:
    """A server answers, but there is nothing to log in with."""
    (tmp_path / "home").mkdir()
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tracking = {"trackers": ["wandb"], "wandb": {"mode": "online"}}
    variables = {"HOME": str(tmp_path / "home"), "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
    done = local(write_config(tracking=tracking), 1, **variables)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert "wandb: offline, as it cannot start online" in done.stdout
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1


def test_wandb_mode_of_the_environment_is_checked(write_config: WriteConfig, tmp_path: Path) -> None:
    done = local(write_config(tracking={"trackers": ["wandb"]}), 1, WANDB_MODE="foo")
    assert done.returncode == 2
    assert done.stderr == "error: WANDB_MODE=foo in the environment; it must be online, offline or disabled\n"


def test_digits_config_is_the_shipped_one() -> None:
    """The other tests lean on a batch that splits over 1, 2 and 3 processes."""
    config = yaml.safe_load((REPOSITORY / "configs" / "digits.yaml").read_text())
    assert config["train"]["batch_size"] % 6 == 0
