"""Which hosts a job is for, and what is typed on them; without a network."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteConfig

from launch import host_facts, hosts
from launch.checks import Findings, Meeting
from launch.cli import main
from launch.hosts_job import HostsJob
from launch.ssh import Host, Ssh
from trainer.config import load_config
from trainer.config_values import NodeRange
from trainer.errors import UserError

HOST = Host("host1", 0)
BAD_NAMES = ["-oProxyCommand=evil", "a b", "a'b", ""]


def test_a_hostfile(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# ours\nnode-1 slots=8\n\nme@node-2   slots=8 max_slots=16 # new\nnode-3\n")
    assert hosts.read_hostfile(str(file)) == ["node-1", "me@node-2", "node-3"]
    file.write_text("node-1 cpu=8\nnode-2, node-3\n")
    with pytest.raises(UserError) as raised:
        hosts.read_hostfile(str(file))
    assert [str(problem) for problem in raised.value.problems] == [
        f"{file}:1: write `name` or `name slots=N` (got 'cpu=8')",
        f"{file}:2: write `name` or `name slots=N` (got 'node-3')",
    ]
    with pytest.raises(UserError, match="cannot be read: No such file"):
        hosts.read_hostfile(str(tmp_path / "none"))


def test_which_hosts(write_config: WriteConfig, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("c\n")
    named = load_config(str(write_config(launch__hosts__names=["a", "b"])))
    filed = load_config(str(write_config(launch__hosts__hostfile=str(file))))
    assert hosts.choose_names(None, None, named) == ["a", "b"]
    assert hosts.choose_names(None, None, filed) == ["c"]
    assert hosts.choose_names(["d"], None, filed) == ["d"]
    assert hosts.choose_names(None, str(file), named) == ["c"]
    for wrong, text in ((["a", "a"], "named twice: a"), ([], "no host"), *(([bad], "cannot be") for bad in BAD_NAMES)):
        with pytest.raises(UserError, match=text):
            hosts.choose_names(wrong, None, named)


@pytest.mark.parametrize(
    ("wanted", "num_hosts", "expected"),
    [
        (None, 3, NodeRange(3, 3)),
        (NodeRange(2, 2), 3, NodeRange(2, 2)),
        (NodeRange(1, 8), 3, NodeRange(1, 3)),
        (NodeRange(4, 4), 3, None),
    ],
)
def test_how_many_machines(wanted: NodeRange | None, num_hosts: int, expected: NodeRange | None) -> None:
    if expected is not None:
        assert hosts.count_nodes(wanted, num_hosts) == expected
        return
    with pytest.raises(UserError, match="4 machines are needed, and 3 hosts are named"):
        hosts.count_nodes(wanted, num_hosts)


def bash(script: str) -> subprocess.CompletedProcess[str]:
    """Runs what a host would, with its user's shell in between."""
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("setup", [(), ("export GREETING='good day' # said", "if true; then", "cat; fi")])
def test_what_a_host_is_told_arrives_as_it_is(setup: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    words = ["plain", "two words", "it's", '"$HOME"', "a;b", "key=[1, {a: 'b'}]", "\\"]
    ssh = Ssh(("-F", "file"), str(folder), "printf", setup, {"VARIABLE": "a b"})
    line = ssh.line(HOST, ssh.script(["%s\\n", *words]))
    assert line[:3] == ["ssh", "-F", "file"]
    assert line[-2] == "host1"
    assert bash(line[-1]).stdout.splitlines() == words
    ssh = replace(ssh, python="bash")
    shown = bash(ssh.line(HOST, ssh.script(["-c", "pwd; echo $VARIABLE; echo $GREETING"]))[-1]).stdout
    assert shown.splitlines() == [str(folder), "a b", "good day" if setup else ""]


@pytest.mark.parametrize(
    ("changes", "stages", "code"),
    [
        ({"folder": "/nowhere"}, ["reached"], 1),
        ({"setup": ("false", "true")}, ["reached", "folder"], 1),
        ({"python": "/nowhere/python"}, ["reached", "folder", "setup"], 127),
    ],
)
def test_how_far_a_host_gets(changes: dict[str, Any], stages: list[str], code: int) -> None:
    ssh = replace(Ssh((), "/", "python3"), **changes)
    done = bash(ssh.line(HOST, ssh.facts_script())[-1])
    assert done.stdout.splitlines() == [f"{host_facts.MARK}{stage}" for stage in stages]
    assert done.returncode == code


def test_a_setup_line_that_fails_stops_an_agent() -> None:
    ssh = Ssh((), "/", "echo", ("false",))
    assert (bash(ssh.line(HOST, ssh.script(["started"]))[-1]).stdout) == ""


def test_dry_run(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_config())
    command = ["hosts", "--config", file, "--hosts", "a,me@b,c", "--nodes", "2", "--processes", "4", "--dry-run"]
    settings = ["launch.hosts.folder=/code", "launch.hosts.python=/python", "launch.hosts.ssh_options=[-F, file]"]
    assert main([*command, "launch.port=1234", *settings]) == 0
    lines = capsys.readouterr().out.splitlines()
    agents = [line for line in lines if "launch agent" in line]
    assert len(agents) == 2
    assert sum("::lockstep reached" in line for line in lines) == 2
    for rank, (line, name) in enumerate(zip(agents, ["a", "me@b"], strict=True)):
        heartbeat, _, ssh = line.partition(" | ")
        assert heartbeat == "while sleep 5; do echo; done"
        *options, host, script = shlex.split(ssh)
        assert options[:3] == ["ssh", "-F", "file"]
        assert host == name
        inner = shlex.split(script)[-1]
        assert inner.startswith("cd /code && exec env ")
        assert f" /python -m launch agent --config {file} --node-rank {rank} --rendezvous a:1234 --job tiny-" in inner
        assert " --leash launch.port=1234 " in inner
        assert inner.endswith("launch.processes=4 launch.nodes=2")


def test_a_trial_of_a_sweep_is_the_same_run_on_every_host(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "t", "WANDB_PROJECT": "p", "WANDB_ENTITY": "e"}
    for name, value in trial.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_SWEEP_PARAM_PATH", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    file = str(write_config())
    launch = hosts.HostsLaunch(["a"], file, [], load_config(file))
    there = {name: value for name, value in launch.ssh.variables.items() if name.startswith("WANDB")}
    assert there == trial
    assert " WANDB_SWEEP_ID=s WANDB_RUN_ID=t " in launch.command(HOST, 0, "job", Meeting("a", 1))[-1]
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "wandb/trial.yaml")
    assert hosts._ssh(launch.config).variables["WANDB_SWEEP_PARAM_PATH"] == "wandb/trial.yaml"
    assert host_facts.collect(file, []).config["run"]["name"] == "tiny-t"


def test_lines_before_python(write_config: WriteConfig) -> None:
    ssh = hosts.HostsLaunch(["a"], "file", [], load_config(str(write_config(launch__hosts__setup=["echo set up"])))).ssh
    assert bash(ssh.line(HOST, ssh.script(["--version"]))[-1]).stdout.startswith("set up\nPython 3")


def test_how_long_lost_hosts_are_waited_for(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Job(HostsJob):
        def run(self, present: Sequence[Host], meeting: Meeting) -> int:
            asked.append(self._settings)
            return 0

    found = Findings({Host("a", 0): []}, meeting=Meeting("a", 1))
    monkeypatch.setattr(hosts, "HostsJob", Job)
    monkeypatch.setattr(hosts.HostsLaunch, "check", lambda *_: found)
    file = str(write_config(launch__hosts__return_timeout="7 s", launch__max_restarts=2))
    assert hosts.HostsLaunch(["a"], file, [], load_config(file)).run() == 0
    assert [(job.return_seconds, job.max_restarts) for job in asked] == [(7.0, 2)]


def test_one_way_to_name_hosts(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_config())
    with pytest.raises(SystemExit):
        main(["hosts", "--config", file, "--hosts", "a", "--hostfile", "b"])
    assert main(["hosts", "--config", file]) == 2
    assert "error: no host: " in capsys.readouterr().err
