"""Which hosts, what is run on them, how their answers are judged, and how a job on them ends; without a network."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, WriteConfig

from launch import checks, host_facts, hosts, hosts_job
from launch.checks import Clock, Findings, Meeting
from launch.cli import main
from launch.host_facts import Facts
from launch.hosts_job import HostsJob, JobSettings
from launch.remote_agent import RemoteAgent
from launch.ssh import LOST, Host, Ssh
from trainer.config import Config, load_config
from trainer.config_values import NodeRange
from trainer.errors import UserError

HOSTS = [Host(f"host{number + 1}", number) for number in range(3)]
BAD_NAMES = ["-oProxyCommand=evil", "a b", "a'b", ""]


@pytest.fixture
def config(write_config: WriteConfig) -> Config:
    return load_config(str(write_config()), ["launch.processes=2"])


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
    line = ssh.line(HOSTS[0], ssh.script(["%s\\n", *words]))
    assert line[:3] == ["ssh", "-F", "file"]
    assert line[-2] == "host1"
    assert bash(line[-1]).stdout.splitlines() == words
    ssh = replace(ssh, python="bash")
    shown = bash(ssh.line(HOSTS[0], ssh.script(["-c", "pwd; echo $VARIABLE; echo $GREETING"]))[-1]).stdout
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
    done = bash(ssh.line(HOSTS[0], ssh.facts_script())[-1])
    assert done.stdout.splitlines() == [f"{host_facts.MARK}{stage}" for stage in stages]
    assert done.returncode == code


def test_a_setup_line_that_fails_stops_an_agent() -> None:
    ssh = Ssh((), "/", "echo", ("false",))
    assert (bash(ssh.line(HOSTS[0], ssh.script(["started"]))[-1]).stdout) == ""


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
    assert " WANDB_SWEEP_ID=s WANDB_RUN_ID=t " in launch.command(HOSTS[0], 0, "job", Meeting("a", 1))[-1]
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "wandb/trial.yaml")
    assert hosts._ssh(launch.config).variables["WANDB_SWEEP_PARAM_PATH"] == "wandb/trial.yaml"
    assert host_facts.collect(file, []).config["run"]["name"] == "tiny-t"


def test_lines_before_python(write_config: WriteConfig) -> None:
    ssh = hosts.HostsLaunch(["a"], "file", [], load_config(str(write_config(launch__hosts__setup=["echo set up"])))).ssh
    assert bash(ssh.line(HOSTS[0], ssh.script(["--version"]))[-1]).stdout.startswith("set up\nPython 3")


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


def facts(config: Config, **changes: Any) -> Facts:
    made = Facts(
        hostname="host",
        addresses=("10.0.0.1",),
        versions={"python": "3.11.7", "torch": "2.14.1+cu130"},
        code={"train.py": "1", "trainer/loop.py": "2"},
        config=config.model_dump(mode="json"),
        devices=(),
        num_cores=8,
    )
    return replace(made, **changes)


H100, A100 = "NVIDIA H100", "NVIDIA A100"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {}, []),
        ({}, {"code": {"train.py": "1", "trainer/loop.py": "3"}}, ["host2: other code than here: trainer/loop.py"]),
        ({}, {"code": {"train.py": "1"}}, ["host2: other code than here: trainer/loop.py"]),
        (
            {},
            {"versions": {"python": "3.12.1", "torch": "2.14.1+cpu"}},
            ["host2: python 3.12.1; host1 has 3.11.7", "host2: torch 2.14.1+cpu; host1 has 2.14.1+cu130"],
        ),
        ({"devices": (H100,) * 2}, {"devices": (H100,)}, ["host2: 2 processes: it has 1 GPUs", "warning"]),
        ({"devices": (H100,) * 2}, {}, ["host2: has no GPU; host1 has 2 x NVIDIA H100"]),
        ({"devices": (H100,) * 2}, {"devices": (A100,) * 2}, ["warning"]),
        ({}, {"addresses": ()}, ["host2: has no network interface None (launch.interface)"]),
    ],
)
def test_what_is_wrong_with_a_host(
    first: dict[str, Any], second: dict[str, Any], expected: list[str], config: Config
) -> None:
    found = {HOSTS[0]: facts(config, **first), HOSTS[1]: facts(config, **second)}
    errors, warnings = checks.judge(found, {}, facts(config), config)
    assert errors[HOSTS[0]] == []
    assert errors[HOSTS[1]] + ["warning"] * len(warnings) == expected


def test_another_config(config: Config) -> None:
    other = config.model_dump(mode="json")
    other["optim"]["lr"] = 0.5
    errors, _ = checks.judge({HOSTS[0]: replace(facts(config), config=other)}, {}, facts(config), config)
    assert errors[HOSTS[0]] == ["host1: other config than here: optim.lr is 0.5 (here 0.01)"]


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        ([0.0, 4.9], []),
        ([0.0, 5.1], ["host2: its clock is 5.1 s ahead of the others (launch.hosts.clock_tolerance: 5 seconds)"]),
        ([-9.0, 0.1], ["host1: its clock is 9.0 s behind the others (launch.hosts.clock_tolerance: 5 seconds)"]),
        ([60.0, 60.1], []),  # ours is wrong
    ],
)
def test_clocks(ahead: list[float], expected: list[str], config: Config) -> None:
    found = {host: facts(config) for host in HOSTS[: len(ahead)]}
    clocks = {host: Clock(seconds, 0.01) for host, seconds in zip(found, ahead, strict=True)}
    errors, _ = checks.judge(found, clocks, facts(config), config)
    assert [line for lines in errors.values() for line in lines] == expected


def test_the_tolerance_of_clocks(write_config: WriteConfig) -> None:
    config = load_config(str(write_config(launch__hosts__clock_tolerance="60 s")))
    found = {host: facts(config) for host in HOSTS[:2]}
    clocks = {HOSTS[0]: Clock(0.0, 0.01), HOSTS[1]: Clock(50.0, 0.01)}
    errors, _ = checks.judge(found, clocks, facts(config), config)
    assert not any(errors.values())


def test_the_way_to_a_clock_and_back_is_not_its_difference() -> None:
    slow, quick = (100.0, 107.0, 104.0), (110.0, 112.1, 110.2)
    clock = Clock.from_readings([slow, quick])
    assert (clock.ahead, clock.error) == (pytest.approx(2.0), pytest.approx(0.1))


def test_folders_that_must_be_shared(write_config: WriteConfig, tmp_path: Path) -> None:
    def folders(**changes: Any) -> list[str]:
        return checks.shared_folders(load_config(str(write_config(**changes))))

    assert folders() == [str(tmp_path / "run")]
    assert folders(checkpoint__dir="/saved") == [str(tmp_path / "run"), "/saved"]
    assert folders(checkpoint__dir="s3://bucket/run") == []
    assert folders(checkpoint__dir="s3://bucket/run", memory__on_oom="shrink") == [str(tmp_path / "run")]


def test_facts_of_this_machine(write_config: WriteConfig) -> None:
    found = host_facts.collect(str(write_config()), ["optim.lr=0.5"])
    assert found.config["optim"]["lr"] == 0.5
    assert {"train.py", "trainer/loop.py", "launch/host_facts.py"} <= set(found.code)
    assert found.hostname == socket.gethostname()
    assert found.versions["torch"] == torch.__version__
    assert host_facts.addresses("no-such-interface") == []


def test_devices_are_counted_as_the_ranks_will_see_them(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_facts, "devices", lambda: tuple(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    variables = {"CUDA_VISIBLE_DEVICES": "1,3", "LOCKSTEP_TEST": "x"}
    assert host_facts.collect(str(write_config(launch__environment=variables)), []).devices == ("1", "3")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert "LOCKSTEP_TEST" not in os.environ


OTHER_FACTS = """
from launch import host_facts

def asdict(facts):
    answer = dict(vars(facts))
    {change}
    return answer

host_facts.asdict = asdict
host_facts.main()
"""


def test_answers_are_lines_after_a_mark(write_config: WriteConfig, tmp_path: Path) -> None:
    """All questions, to this machine as if it were a host: no ssh is needed for that."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/bash\necho "Welcome!"; echo "Have a nice day" >&2; exec bash -c "${@: -1}"\n')
    ssh.chmod(0o755)
    settings = Ssh((), str(REPOSITORY), sys.executable, ("echo set up",), {"PYTHONPATH": str(REPOSITORY)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        config = load_config(str(write_config()))
        arguments = (str(tmp_path / "tiny.yaml"), list[str]())
        here = host_facts.collect(*arguments)
        findings = checks.check(HOSTS, settings, config, arguments, here)
        assert findings.lines(HOSTS) == []
        assert findings.meeting is not None
        assert not list(tmp_path.glob(".lockstep*"))
        for change in ("answer['new'] = 1", "del answer['devices']", "del answer['num_cores']"):
            other = tmp_path / "other.py"
            other.write_text(OTHER_FACTS.format(change=change))
            pretender = tmp_path / "python"
            pretender.write_text(f"#!/bin/bash\nexec {sys.executable} {other}\n")
            pretender.chmod(0o755)
            differs = checks.check(HOSTS[:1], replace(settings, python=str(pretender)), config, arguments, here)
            assert differs.lines(HOSTS[:1]) == ["host1: other code than here: launch/host_facts.py"]
            assert differs.meeting is None
        bad = checks.check(HOSTS[:1], settings, config, (str(tmp_path / "none.yaml"), []), here)
        assert "none.yaml" in bad.lines(HOSTS[:1])[0]
        missing = checks.check(HOSTS[:1], replace(settings, folder="/nowhere"), config, arguments, here)
        assert missing.lines(HOSTS[:1])[0].startswith("host1: there is no folder /nowhere (launch.hosts.folder)")


def test_hosts_of_one_name_look_for_a_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, found, unlink = host_facts._Machine(), list[bool](), Path.unlink
    path = machine.leave_file(str(tmp_path), ".lockstep-x")

    def another_is_quicker(file: Path, missing_ok: bool = False) -> None:
        monkeypatch.setattr(Path, "unlink", unlink)
        found.append(machine.find_file(path, 1.0))
        unlink(file, missing_ok)

    monkeypatch.setattr(Path, "unlink", another_is_quicker)
    found.append(machine.find_file(path, 1.0))
    assert found == [True, True]
    assert [file.name for file in tmp_path.iterdir()] == [".lockstep-x"]


def test_a_greeting_proves_who_listens() -> None:
    machine = host_facts._Machine()
    port = machine.listen(None, "hello")
    machine.connect("127.0.0.1", port, "hello", 5)
    with pytest.raises(OSError, match="somebody else"):
        machine.connect("127.0.0.1", port, "good day", 5)
    with pytest.raises(OSError, match="Address already in use"):
        host_facts._Machine().listen(port, "hello")
    machine.stop_listening()
    with pytest.raises(OSError, match="refused"):
        machine.connect("127.0.0.1", port, "hello", 5)


class Fake(RemoteAgent):
    """An agent that has ended."""

    def __init__(self, host: Host, code: int, *errors: str) -> None:
        self.host, self.code, self.is_killed = host, code, False
        self.errors = [(float(when), text) for when, text in enumerate(errors)]
        self._last_error = ""


def job(nodes: NodeRange, ended: Sequence[Fake], lost: dict[Host, str], told: bool = False) -> HostsJob:
    settings = JobSettings("job", nodes, 0, 30.0, 30.0)

    def recheck(hosts: Sequence[Host], is_joining: bool) -> Findings:
        raise AssertionError

    def command(host: Host, rank: int, name: str, meeting: Meeting) -> list[str]:
        raise AssertionError

    made = HostsJob(HOSTS, settings, Ssh((), "/", "python"), command, recheck)
    made._ended, made._lost = list(ended), lost
    made._needed = next(iter(lost), None) if len(HOSTS) - len(lost) < nodes.least else None
    made._asked_at = 1.0 if told else None
    return made


FIXED, ELASTIC = NodeRange(3, 3), NodeRange(1, 3)
FIRST, SECOND, THIRD = HOSTS


@pytest.mark.parametrize(
    ("nodes", "codes", "lost", "told", "expected"),
    [
        (FIXED, [0, 0, 0], 0, False, 0),
        (FIXED, [75, 75, 75], 0, True, 75),
        (FIXED, [0, 75, 75], 0, True, 75),
        (FIXED, [75, 75, 75], 0, False, 75),  # the file STOP
        (FIXED, [1, 2, 1], 0, False, 2),
        (FIXED, [1, 1, 1], 0, False, 1),
        (FIXED, [1, 75, 75], 0, False, 1),
        (FIXED, [75, 75], 1, False, 1),  # asked to end by us
        (FIXED, [], 1, False, 1),
        (ELASTIC, [0, 0], 1, False, 0),
        (ELASTIC, [0, 1, 0], 0, False, 0),  # it had come to join
        (ELASTIC, [75, 75], 1, False, 75),
        (NodeRange(2, 3), [75], 2, False, 1),  # asked to end by us
        (ELASTIC, [1, 1, 75], 0, False, 1),
    ],
)
def test_one_code_for_all_hosts(nodes: NodeRange, codes: list[int], lost: int, told: bool, expected: int) -> None:
    ended = [Fake(host, code) for host, code in zip(HOSTS, codes, strict=False)]
    gone = dict.fromkeys(HOSTS[len(codes) : len(codes) + lost], "gone")
    assert job(nodes, ended, gone, told)._exit_code() == expected


SAID = "another machine has ended the job, and said why"


@pytest.mark.parametrize(
    ("ended", "lost", "expected"),
    [
        (
            [Fake(FIRST, 1, SAID), Fake(SECOND, 1, "rank 1 on node-2, step 3: ZeroDivisionError: zero")],
            {},
            "rank 1 on node-2, step 3: ZeroDivisionError: zero",
        ),
        (
            [Fake(FIRST, 1, SAID), Fake(SECOND, 1, "rank 1 was ended by SIGKILL")],
            {},
            "host2: rank 1 was ended by SIGKILL",
        ),
        ([Fake(FIRST, 1, "rank 1 on host2: lost")], {SECOND: "Timeout"}, "host2 was lost: Timeout"),
        ([Fake(FIRST, 1)], {}, "host1 ended with exit code 1"),
    ],
)
def test_the_error_of_the_job(ended: list[Fake], lost: dict[Host, str], expected: str) -> None:
    assert job(FIXED, ended, lost)._reason() == expected


@pytest.mark.parametrize(
    ("nodes", "max_restarts", "host", "code", "joins", "is_ending", "is_tried"),
    [
        (FIXED, 5, SECOND, 1, 0, True, False),
        (FIXED, 5, SECOND, 0, 0, True, False),
        (FIXED, 5, SECOND, LOST, 0, True, False),
        (ELASTIC, 5, FIRST, 1, 0, True, False),
        (ELASTIC, 5, FIRST, LOST, 0, True, False),
        (ELASTIC, 5, SECOND, 1, 0, False, True),  # the others may be about to end, or it was cut off from them
        (ELASTIC, 5, SECOND, 1, 5, False, False),
        (ELASTIC, 5, SECOND, 75, 0, False, False),
        (ELASTIC, 5, SECOND, 2, 0, True, False),
        (ELASTIC, 5, SECOND, LOST, 0, False, True),
        (ELASTIC, 0, SECOND, 1, 0, True, False),
        (ELASTIC, 0, SECOND, LOST, 0, True, False),
        (NodeRange(3, 4), 5, SECOND, LOST, 0, True, False),
    ],
)
def test_what_the_end_of_one_agent_means(
    nodes: NodeRange, max_restarts: int, host: Host, code: int, joins: int, is_ending: bool, is_tried: bool
) -> None:
    made = job(nodes, [], {})
    made._settings = replace(made._settings, max_restarts=max_restarts)
    made._agents = {host: Fake(host, 0) for host in HOSTS}
    made._joins[host] = joins
    made._note_end(Fake(host, code))
    assert (made._is_ending, host in made._try_at) == (is_ending, is_tried)


def elastic_job_that_tries(monkeypatch: pytest.MonkeyPatch, recheck: Callable[..., Findings]) -> HostsJob:
    """Returns a job of which the second host is lost, and due to be tried again."""
    made = job(ELASTIC, [], {})
    made._lost, made._needed, made._recheck = {SECOND: "gone"}, None, recheck
    made._agents = {FIRST: Fake(FIRST, 0)}
    made._try_at = {SECOND: 0.0}
    monkeypatch.setattr(made, "_start", lambda host: made._agents.update({host: Fake(host, 0)}))
    return made


def test_an_attempt_that_breaks_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def recheck(hosts: Sequence[Host], is_joining: bool) -> Findings:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(hosts_job, "end_all", lambda *_: {SECOND: 0})
    made = elastic_job_that_tries(monkeypatch, recheck)
    made._try_lost()
    until = time.monotonic() + 10
    while SECOND not in made._try_at and time.monotonic() < until:
        time.sleep(0.01)
        made._try_lost()
    assert SECOND in made._try_at
    assert "ZeroDivisionError: ours" in made._lost[SECOND]


def test_nothing_of_an_earlier_start_kills_or_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    is_trying, may_end, events = threading.Event(), threading.Event(), list[str]()

    def end_all(ssh: Ssh, found: Sequence[Host], name: str) -> dict[Host, int | None]:
        if threading.current_thread() is not threading.main_thread():
            is_trying.set()
            may_end.wait(10)
            events.append("killed by an attempt")
        return dict.fromkeys(found, 0)

    def recheck(found: Sequence[Host], is_joining: bool) -> Findings:
        events.append("joining" if is_joining else "ready to start")
        return Findings({host: [] for host in found}, meeting=Meeting("host1", 1))

    monkeypatch.setattr(hosts_job, "end_all", end_all)
    made = elastic_job_that_tries(monkeypatch, recheck)
    earlier = made._tried
    made._try_lost()
    assert is_trying.wait(10)
    threading.Timer(0.5, may_end.set).start()
    gathered = made._gather()
    assert gathered is not None
    assert earlier.get(timeout=10) == (SECOND, None)
    assert events.index("killed by an attempt") < events.index("ready to start")
    made._tried.put((THIRD, None))
    made._begin([FIRST], gathered[1], 1)
    made._try_lost()
    assert list(made._agents) == [FIRST]
