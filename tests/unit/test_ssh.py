"""The end of a conversation with a host; `ssh` is a stand-in that runs the script here, as a process of its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import WriteConfig

from launch import checks, host_facts, ssh
from launch.ssh import Conversation, Host, Ssh
from trainer.config import load_config
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
    """What it does once its number is in a file and it has said that it is ready."""
    (folder / "python").write_text("\n".join(["#!/bin/bash", f"echo $$ >{folder}/number", READY, *lines, ""]))
    (folder / "python").chmod(0o755)


def test_what_ran_on_the_host_is_gone_when_the_conversation_is_closed(far: Ssh, tmp_path: Path) -> None:
    write_python(tmp_path, "cat >/dev/null", "sleep 0.5", f"touch {tmp_path}/ended")
    Conversation(far, HOST, 20).close()
    assert (tmp_path / "ended").exists()


def test_one_that_does_not_end_is_left(far: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_python(tmp_path, "exec sleep 60")
    monkeypatch.setattr(ssh, "_CLOSE_SECONDS", 0.5)
    conversation = Conversation(far, HOST, 20)
    conversation.close()
    assert conversation._process.returncode is not None
    os.kill(int((tmp_path / "number").read_text()), signal.SIGKILL)  # it was there


def test_one_that_is_gone_is_closed_as_well(far: Ssh, tmp_path: Path) -> None:
    write_python(tmp_path, "exec 0<&- 1>&- 2>&-")
    conversation = Conversation(far, HOST, 20)
    conversation._process.wait()
    with pytest.raises(UserError, match=r"host1: launch\.host_facts ended with exit code 0"):
        conversation.ask("facts", 20)
    with pytest.raises(UserError, match="ended with exit code 0"):  # at once, and not that it does not answer
        conversation.ask("clock", 0.01)
    conversation.close()


def test_ctrl_c_does_not_wait_for_answers(
    far: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_config: WriteConfig
) -> None:
    write_python(tmp_path, f"while read line; do echo >>{tmp_path}/asked; done; sleep 0.1")
    file = str(write_config())
    here = host_facts.collect(file, [])
    asked, main = tmp_path / "asked", threading.get_ident()

    def interrupt() -> None:
        while not asked.exists() or len(asked.read_text()) < 2:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore it
    threading.Thread(target=interrupt, daemon=True).start()
    begun = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            checks.check([HOST, Host("host2", 1)], far, load_config(file), (file, []), here)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < checks._ANSWER_SECONDS / 2
