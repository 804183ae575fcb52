"""One machine's part of a job: its command line, address and exit code, and the launcher that holds its leash."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from conftest import REPOSITORY, WriteConfig, nightly

from launch import agent, node, starting
from launch.cli import main
from launch.node import Place
from launch.starting import LaunchPlan
from trainer.config import load_config
from trainer.errors import UserError
from trainer.memory.shrink import Shrink


def options_of(plan: LaunchPlan) -> dict[str, str]:
    """Returns torchrun's options by name."""
    words = plan.command[1 : plan.command.index("train")]
    return dict(zip(words[::2], words[1::2], strict=True))


def planned(write_config: WriteConfig, place: Place, **changes: Any) -> LaunchPlan:
    return node.plan(place, ["--config", "x.yaml"], load_config(str(write_config(**changes))), script="train")


def test_what_an_agent_is_told(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name in ("NCCL_DEBUG", "N"):  # which come into this process
        monkeypatch.setenv(name, "")
    place = Place(node_rank=1, host="127.0.0.1", port=1234, job="a-job")
    launch = {"nodes": "1:4", "processes": 3, "max_restarts": 2, "environment": {"NCCL_DEBUG": "INFO", "N": 1}}
    plan = planned(write_config, place, launch=launch)
    options = options_of(plan)
    assert options["--nnodes"] == "1:4"
    assert options["--nproc-per-node"] == "3"
    assert options["--max-restarts"] == "2"
    assert options["--rdzv-endpoint"] == "127.0.0.1:1234"
    assert options["--rdzv-id"] == "a-job"
    assert options["--local-addr"] == "127.0.0.1"
    assert options["--rdzv-conf"].startswith("is_host=false,join_timeout=")
    assert plan.command[-3:] == ["train", "--config", "x.yaml"]
    assert plan.environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert plan.environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert "NCCL_SOCKET_IFNAME" not in plan.environment
    assert (plan.environment["NCCL_DEBUG"], plan.environment["N"]) == ("INFO", "1")
    assert options_of(planned(write_config, Place(0, "127.0.0.1", 1, "j", "10.1.2.3")))["--local-addr"] == "10.1.2.3"


def test_gpus_that_are_gone_do_not_become_cpus(write_config: WriteConfig) -> None:
    with pytest.raises(UserError, match="was to have 8 GPUs, and torch sees none"):
        planned(write_config, Place(0, "127.0.0.1", 1, "j", num_gpus=8))


def test_who_promised_gpus(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = [
        "--config",
        str(write_config()),
        "--node-rank",
        "0",
        "--rendezvous",
        "127.0.0.1",
        "--job",
        "j",
        "--dry-run",
    ]
    assert main(["agent", *where, "--replaceable", "launch.kubernetes.gpus_per_node=8"]) == 1  # another node may do
    assert "was to have 8 GPUs" in capsys.readouterr().err
    assert main(["agent", *where, "launch.kubernetes.gpus_per_node=8"]) == 0
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert main(["agent", *where]) == 2
    assert "was to have 4 GPUs" in capsys.readouterr().err


def test_options_that_do_not_go_together(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--config", str(write_config()), "--node-rank", "0", "--rendezvous", "127.0.0.1", "--job", "j"]
    for options, expected in (
        (["--timeout", "5"], "are for --doctor"),
        (["--json", "x"], "are for --doctor"),
        (["--doctor", "--replaceable"], "leave out --replaceable"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["agent", *where, *options])
        assert expected in capsys.readouterr().err


def test_the_environment_of_the_config_says_which_gpus(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    launch = {"environment": {"CUDA_VISIBLE_DEVICES": "0,1"}}
    assert options_of(planned(write_config, Place(0, "127.0.0.1", 1, "j"), launch=launch))["--nproc-per-node"] == "2"


def test_the_interface_that_was_asked_for(write_config: WriteConfig) -> None:
    plan = planned(write_config, Place(0, "127.0.0.1", 1, "j"), launch={"interface": "ib0"})
    assert plan.environment["GLOO_SOCKET_IFNAME"] == plan.environment["NCCL_SOCKET_IFNAME"] == "ib0"


def test_the_first_machine_is_not_its_loopback() -> None:
    """Debian maps a machine's own name to 127.0.1.1, which is no use to the others."""
    others = {a.address for addresses in psutil.net_if_addrs().values() for a in addresses} - {"127.0.0.1", "::1"}
    if not any("." in address for address in others):
        pytest.skip("this machine has no address but the loopback's")
    assert node.find_address(Place(0, "localhost", 1, "j")) in others


def test_an_unknown_first_machine() -> None:
    with pytest.raises(UserError, match=r"the first machine's name, nowhere\.invalid, is not known on "):
        node.find_address(Place(1, "nowhere.invalid", 1, "j"))


def test_a_start_after_a_shrink_has_a_name_of_its_own() -> None:
    record = Shrink(4, 8, 8, step=3, rank=0, attempt=1, time=1000.2)
    plan = LaunchPlan(["torchrun", "--rdzv-id", "j", "train"], {"A": "1"})
    assert plan.after(record) == LaunchPlan(["torchrun", "--rdzv-id", "j.1000", "train"], {"A": "1"})
    assert LaunchPlan(["python", "train"]).after(record) == LaunchPlan(["python", "train"])


@pytest.mark.parametrize(
    ("rendezvous", "expected"),
    [("10.0.0.1", "10.0.0.1:29400"), ("10.0.0.1:77", "10.0.0.1:77"), ("[::1]:78", "::1:78")],
)
def test_the_command(
    rendezvous: str, expected: str, write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--node-rank", "0", "--rendezvous", rendezvous, "--job", "j", "--address", "10.0.0.1", "--dry-run"]
    assert main(["agent", "--config", str(write_config()), *where, "--nodes", "2", "--processes", "2"]) == 0
    shown = capsys.readouterr().out
    assert (
        f" torchrun --nnodes 2 --nproc-per-node 2 --max-restarts 0 --rdzv-backend c10d --rdzv-endpoint {expected} "
        in shown
    )
    assert shown.endswith("launch.processes=2 launch.nodes=2\n")


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (agent.Outcome(0), 0),
        (agent.Outcome(1), 1),
        (agent.Outcome(1, is_own=False), 75),  # another machine's failure
        (agent.Outcome(1, told_to_stop=True), 75),  # before there was a rank
        (agent.Outcome(2, is_own=False), 2),
        (agent.Outcome(75), 75),
    ],
)
def test_only_one_machine_has_failed(
    outcome: agent.Outcome, expected: int, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "run_agent", lambda *_, **__: outcome)
    monkeypatch.setattr(starting.os, "environ", {})
    plan, config = LaunchPlan(["torchrun"]), load_config(str(write_config()))
    place = Place(0, "tiny-0.tiny", 29400, "tiny.abc", "10.1.2.3")
    assert node.run_replaceable(plan, place, config) == expected
    assert starting.run(plan, config) == outcome.code


def test_the_first_machine_is_waited_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(node, "_KEEP_ALIVE_SECONDS", 0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = Place(1, "127.0.0.1", server.getsockname()[1], "tiny.abc", join_seconds=0)
        assert node._first_machine_comes(place)
    assert not node._first_machine_comes(place)
    assert "error: the first machine, 127.0.0.1, cannot be reached at port" in capsys.readouterr().err
    place = replace(place, join_seconds=60)
    handler = signal.getsignal(signal.SIGTERM)
    threading.Timer(0.5, signal.raise_signal, [signal.SIGTERM]).start()
    assert not node._first_machine_comes(place)
    assert signal.getsignal(signal.SIGTERM) is handler


ON_A_LEASH = """
import signal, sys, time
from launch import node
node.LEASH_SECONDS = 4.0
def run(plan, config):
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: print(signal.Signals(number).name, flush=True))
    print("ready", sys.stdin.read() == "", flush=True)
    time.sleep(60)
node.shutdown_seconds = lambda config: -9
node.run_on_leash(None, None, run)
"""


@pytest.fixture
def on_a_leash() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_LEASH],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready True\n"  # the ranks have no input
    return process


def test_signals_come_down_the_leash(on_a_leash: subprocess.Popen[str]) -> None:
    assert on_a_leash.stdin is not None
    assert on_a_leash.stdout is not None
    on_a_leash.stdin.write("\nSIGUSR1\nSIGKILL\nnonsense\n")
    on_a_leash.stdin.flush()
    assert on_a_leash.stdout.readline() == "SIGUSR1\n"
    for _ in range(4):  # signs of life
        time.sleep(1.2)
        on_a_leash.stdin.write("\n")
        on_a_leash.stdin.flush()
    assert on_a_leash.poll() is None
    out, err = on_a_leash.communicate(timeout=20)  # closes the leash
    assert (out, err) == ("SIGTERM\n", "the launcher is gone: stopping\n")
    assert on_a_leash.returncode == 1


@nightly
def test_silence_ends_it(on_a_leash: subprocess.Popen[str]) -> None:
    assert on_a_leash.stdout is not None
    began = time.monotonic()
    assert on_a_leash.stdout.readline() == "SIGTERM\n"
    assert time.monotonic() - began < 10
    assert on_a_leash.wait(20) == 1
    on_a_leash.communicate()
