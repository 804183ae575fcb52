"""The end of a conversation with a host; `ssh` is a stand-in that runs the script here, as a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch import ssh
from launch.ssh import Conversation, Host, Ssh
from trainer.errors import UserError

HOST = Host("host1", 0)
READY = """echo '::lockstep {"value": "ready"}'"""


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ssh:
    """What runs at the far end, `python` in the test's folder, outlives an ssh that is killed, as it does on a host."""
    stand_in = tmp_path / "bin" / "ssh"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\nbash -c "${!#}"\nexit $?\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}")
    return Ssh((), str(tmp_path), str(tmp_path / "python"))


def write_python(folder: Path, *lines: str) -> None:
    (folder / "python").write_text("\n".join(["#!/bin/bash", READY, *lines, ""]))
    (folder / "python").chmod(0o755)


def test_what_ran_on_the_host_is_gone_when_the_conversation_is_closed(far: Ssh, tmp_path: Path) -> None:
    write_python(tmp_path, "cat >/dev/null", "sleep 0.5", f"touch {tmp_path}/ended")
    with Conversation(far, HOST, 20):
        pass
    assert (tmp_path / "ended").exists()


def test_one_that_does_not_end_is_left(far: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_python(tmp_path, "sleep 5", f"touch {tmp_path}/ended")
    monkeypatch.setattr(ssh, "_CLOSE_SECONDS", 0.2)
    with Conversation(far, HOST, 20):
        pass
    assert not (tmp_path / "ended").exists()


def test_one_that_is_gone_is_closed_as_well(far: Ssh, tmp_path: Path) -> None:
    write_python(tmp_path, "exec 0<&- 1>&- 2>&-")
    conversation = Conversation(far, HOST, 20)
    conversation._process.wait()
    with pytest.raises(UserError, match=r"host1: launch\.host_facts ended with exit code 0"):
        conversation.ask("facts", 20)
    conversation.close()
