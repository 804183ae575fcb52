"""OpenSSH: command lines for a host, quoting, one conversation with its `launch.host_facts`, ending what runs there.

Nobody is asked for a password, and a connection that is silent for 20 seconds is given up. What is said to hosts, and
what becomes of it, is decided by `launch.checks` and `launch.hosts_job`.
"""

from __future__ import annotations

import json
import queue
import shlex
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from launch.host_facts import MARK
from trainer.errors import UserError

MARK_VARIABLE = "LOCKSTEP_HOSTS_JOB"  # in the environment of all that a launch starts on a host
LOST = 255  # ssh's exit code where the connection, or what ran there, is gone
_CONNECT_SECONDS = 10
_ALIVE_SECONDS, _ALIVE_COUNT = 5, 3
_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": _CONNECT_SECONDS,
    "ServerAliveInterval": _ALIVE_SECONDS,
    "ServerAliveCountMax": _ALIVE_COUNT,
    "ControlPath": "none",  # a shared connection has the time-outs of whoever opened it
    "ForwardX11": "no",
}
_REACHED, _IN_FOLDER, _SET_UP = "reached", "folder", "setup"  # how far a host got towards Python
_CLOSE_SECONDS = 5  # for the end of a conversation
_END_SECONDS = 20  # for ending what is left on a host, all in all
# Every process that has the mark in its environment, and again, as some may have been starting others.
_END_SCRIPT = """for round in 1 2 3 4 5; do
  found=$(grep -lzxF {mark} /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3)
  [ -n "$found" ] || break
  echo $found
  kill -KILL $found 2>/dev/null
  sleep 0.2
done"""


@dataclass(frozen=True)
class Host:
    """A machine of the job.

    Args:
        name: as ssh takes it.
        number: its place in the list of hosts, from 0; tells its processes from those of the others.
    """

    name: str
    number: int

    @property
    def address(self) -> str:
        """The name without the user."""
        return self.name.rpartition("@")[2]


@dataclass(frozen=True)
class Ssh:
    """How every host is reached, and where things are there.

    Args:
        options: of every ssh, before ours: ssh takes the first value of each option.
        folder: of the code and of relative paths.
        python: the interpreter.
        setup: lines of bash before it.
        variables: of its environment.
    """

    options: tuple[str, ...]
    folder: str
    python: str
    setup: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    def line(self, host: Host, script: str, connect_seconds: int = _CONNECT_SECONDS) -> list[str]:
        """Returns the command that runs a bash script on a host, whatever shell the user has there."""
        options = {**_OPTIONS, "ConnectTimeout": connect_seconds}
        ours = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        return ["ssh", *self.options, *ours, "-T", "--", host.name, f"exec bash -c {shlex.quote(script)}"]

    def script(self, arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
        """Returns the bash script that becomes Python with these arguments.

        Args:
            arguments: of Python, such as `-m launch agent`.
            variables: of its environment, besides `self.variables`.
        """
        python, folder = self._python(arguments, variables or {}), f"cd {shlex.quote(self.folder)}"
        if not self.setup:
            return f"{folder} && {python}"
        return "\n".join([f"{folder} || exit", *self._setup_lines(), python])

    def facts_script(self) -> str:
        """Returns the script that starts `launch.host_facts`, and says how far it got."""
        said = {stage: f"echo {shlex.quote(MARK + stage)}" for stage in (_REACHED, _IN_FOLDER, _SET_UP)}
        steps = [said[_REACHED], f"cd {shlex.quote(self.folder)} || exit", said[_IN_FOLDER]]
        return "\n".join([*steps, *self._setup_lines(), said[_SET_UP], self._python(["-m", "launch.host_facts"], {})])

    def _python(self, arguments: Sequence[str], variables: Mapping[str, str]) -> str:
        assignments = [f"{name}={value}" for name, value in {**self.variables, **variables}.items()]
        return f"exec {shlex.join(['env', *assignments, self.python, *arguments])}"

    def _setup_lines(self) -> list[str]:
        # Standard input is for Python.
        return ["set -e", "{", *self.setup, "} </dev/null", "set +e"] if self.setup else []

    def end(self, host: Host, mark: str) -> int:
        """Kills what a launch has left on a host, and returns how many processes that were.

        Raises:
            UserError: the host does not answer.
        """
        script = _END_SCRIPT.format(mark=shlex.quote(f"{MARK_VARIABLE}={mark}"))
        try:
            done = subprocess.run(
                self.line(host, script, connect_seconds=5),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_END_SECONDS,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"{host.name}: does not answer") from None
        if done.returncode == LOST:
            raise UserError(f"{host.name}: {_reason(done.stderr.splitlines(), done.returncode)}")
        return len({number for line in done.stdout.splitlines() for number in line.split() if number.isdigit()})


class Conversation:
    """Questions to one host's `launch.host_facts`.

    Raises:
        UserError: the host cannot be reached, or has no folder, Python or Lockstep there.
    """

    def __init__(self, ssh: Ssh, host: Host, timeout: float) -> None:
        self.host = host
        self._ssh = ssh
        self._process = start(ssh.line(host, ssh.facts_script()))
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(stream, is_answers), daemon=True)
            for stream, is_answers in ((self._process.stdout, True), (self._process.stderr, False))
        ]
        for reader in self._readers:
            reader.start()
        self._stage = ""
        try:
            self._answer(timeout)  # it is ready
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, timeout: float, **arguments: object) -> Any:
        """Returns the answer to a question.

        Raises:
            UserError: the host says why it cannot answer, or does not answer in time; one problem per reason.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"ask": what, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # it is gone, and said why
            pass
        return self._answer(timeout)

    def close(self) -> None:
        """Ends the conversation, and with it what runs on the host for it.

        At the end of its input `launch.host_facts` ends, and ssh after it. Where it does not within a few seconds, ssh
        is killed, and what runs there is left to itself.
        """
        assert self._process.stdin is not None
        with suppress(OSError):  # it is gone, and a question to it is still in the buffer
            self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, stream: IO[bytes], is_answers: bool) -> None:
        with stream:
            for line in stream:
                text = line.decode(errors="replace").rstrip()
                if not is_answers:
                    self._errors.append(text)
                elif text.startswith(MARK):
                    self._lines.put(text.removeprefix(MARK))
        if is_answers:
            self._lines.put(None)

    def _answer(self, timeout: float) -> Any:
        while True:
            try:
                line = self._lines.get(timeout=timeout)
            except queue.Empty:
                raise UserError(f"{self.host.name}: does not answer ({timeout:.0f} s)") from None
            if line is None:
                self._lines.put(None)  # as an answer to the next question, too
                raise UserError(f"{self.host.name}: {self._why_it_ended()}")
            if line in (_REACHED, _IN_FOLDER, _SET_UP):
                self._stage = line
                continue
            answer = json.loads(line)
            if "errors" in answer:
                raise UserError(*(f"{self.host.name}: {error}" for error in answer["errors"]))
            return answer["value"]

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        self._readers[1].join(5)
        reason = _reason(self._errors, code)
        if self._stage == "":
            hint = "; there must be a key, as no password is asked for" if "Permission denied" in reason else ""
            return f"cannot be reached: {reason}{hint}"
        if code == LOST:
            return f"the connection has ended: {reason}"
        if self._stage == _REACHED:
            return f"there is no folder {self._ssh.folder} (launch.hosts.folder): {reason}"
        if self._stage == _IN_FOLDER:
            return f"launch.hosts.setup ended with exit code {code}: {reason}"
        if code == 127:
            return f"there is no Python {self._ssh.python} (launch.hosts.python): {reason}"
        if "No module named" in reason:
            return f"Lockstep does not start in {self._ssh.folder} with {self._ssh.python}: {reason}"
        return f"launch.host_facts ended with exit code {code}: {reason}"


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts an ssh that a terminal's Ctrl-C does not reach. It ends when we do, as its input is then at an end."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def end_all(ssh: Ssh, hosts: Sequence[Host], job: str) -> dict[Host, int | None]:
    """Kills what a launch has left on hosts, on all at once.

    Returns:
        How many processes that were; None for a host that does not answer.
    """

    def end(host: Host) -> int | None:
        try:
            return ssh.end(host, mark_of(job, host))
        except UserError:
            return None

    if not hosts:
        return {}
    with ThreadPoolExecutor(len(hosts)) as pool:
        return dict(zip(hosts, pool.map(end, hosts), strict=True))


def mark_of(job: str, host: Host) -> str:
    """Returns the value of MARK_VARIABLE in all that a launch starts on a host."""
    return f"{job}.{host.number}"


def _reason(lines: Sequence[str], code: int) -> str:
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else f"exit code {code}"
