"""One agent on another machine, as seen from here: its output line by line, its leash, its end.

It runs under an ssh whose standard input is the leash: a line now and then says that we are alive, one with a signal's
name is obeyed, and its end has the agent stop.
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from launch.ssh import Host, start

KEEP_ALIVE_SECONDS = 5.0  # between signs of life
_ERROR = "error: "
_SSH_SAYS = (
    r"ssh: |Timeout, server|Connection |client_loop: |kex_|Read from |Write failed|packet_|ssh_dispatch|Bad packet"
)
_OUTPUT_SECONDS = 5.0  # for what is still on its way when an ssh has ended


class Screen:
    """Our terminal: whole lines, each after the name of its host."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._width = max(len(host.name) for host in hosts)
        self._lock = threading.Lock()

    def show(self, host: Host, line: str, is_error: bool) -> None:
        """Shows a line of a host's on the stream that it came from."""
        stream = sys.stderr if is_error else sys.stdout
        with self._lock, suppress(OSError):  # nobody may be reading any more
            stream.write(f"{host.name:<{self._width}} | {line}\n")
            stream.flush()


class RemoteAgent:
    """An agent that is being run on a host.

    Args:
        host: where.
        command: the ssh that runs it.
        screen: for its output.
        ended: gets this object when it has ended, and all of its output is shown.
    """

    def __init__(self, host: Host, command: Sequence[str], screen: Screen, ended: queue.Queue[RemoteAgent]) -> None:
        self.host = host
        self.code: int | None = None  # of ssh, which is that of the agent
        self.errors: list[tuple[float, str]] = []  # when it said what the error is
        self.is_killed = False  # by us
        self._last_error = ""
        self._screen = screen
        self._process = start(command)
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._heard = time.monotonic()
        threading.Thread(target=self._wait, args=(self._process, ended), daemon=True).start()

    @property
    def reason(self) -> str:
        """Why it is lost: the last words of ssh, which has none where the agent was killed or ssh has to be quiet."""
        is_of_ssh = re.match(_SSH_SAYS, self._last_error) is not None
        return self._last_error if is_of_ssh else "the connection is gone, or somebody has killed its agent"

    def keep_alive(self) -> None:
        """Gives the agent a sign of life, if one is due."""
        if time.monotonic() - self._heard >= KEEP_ALIVE_SECONDS:
            self.say("")

    def say(self, word: str) -> None:
        """Writes a line on its leash. What a connection that hangs does not take is lost with it."""
        assert self._process.stdin is not None
        self._heard = time.monotonic()
        with suppress(OSError):
            os.write(self._process.stdin.fileno(), f"{word}\n".encode())

    def cut(self) -> None:
        """Ends the ssh at once. What runs on the host ends by its leash."""
        self._process.kill()

    def _wait(self, process: subprocess.Popen[bytes], ended: queue.Queue[RemoteAgent]) -> None:
        streams = ((process.stdout, False), (process.stderr, True))
        readers = [threading.Thread(target=self._read, args=stream, daemon=True) for stream in streams]
        for reader in readers:
            reader.start()
        self.code = process.wait()
        for reader in readers:
            reader.join(_OUTPUT_SECONDS)
        ended.put(self)

    def _read(self, stream: IO[bytes], is_error: bool) -> None:
        with stream:
            for raw in stream:
                line = raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
                if is_error and line:
                    self._last_error = line
                if is_error and line.startswith(_ERROR):
                    self.errors.append((time.monotonic(), line.removeprefix(_ERROR)))
                self._screen.show(self.host, line, is_error)
