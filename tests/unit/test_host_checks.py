"""What hosts say of themselves, and how it is judged before a job starts on them; without a network."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, WriteConfig

from launch import checks, host_facts
from launch.checks import Clock
from launch.host_facts import Facts
from launch.ssh import Host, Ssh
from trainer.config import Config, load_config

HOSTS = [Host(f"host{number + 1}", number) for number in range(3)]


@pytest.fixture
def config(write_config: WriteConfig) -> Config:
    return load_config(str(write_config()), ["launch.processes=2"])


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
