"""Where the output of ranks goes: every rank's to `logs/rank-N.log` in the run folder, that of rank 0 to the terminal.

A rank writes into a pipe, or into a pseudo-terminal where rank 0 shows a progress bar on a real one, and a thread here
takes it from there. Files are added to by every attempt, and made when there is something to write.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import sys
import tempfile
import termios
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest

logger = logging.getLogger("lockstep")

_CHUNK = 1 << 16
_KEPT_LINES = 400  # of a rank's errors, to be shown when it was the first to fail
_SHOWN_LINES = 25  # where there is no traceback among them
_DRAIN_SECONDS = 2.0  # for what is still in the pipes when the ranks have ended
_PROBLEM = b"error: "  # a line that says all, of a user's mistake
_TRACEBACK = b"Traceback (most recent call last):"


class RankLogs:
    """The output of this machine's ranks, through all attempts.

    Args:
        run_dir: whose folder `logs` the files are in.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "logs"
        self._outputs: dict[int, Output] = {}
        self._errors: tempfile.TemporaryDirectory[str] | None = None

    def error_folder(self) -> str:
        """Returns a folder for the files in which torch passes on errors, until `close`."""
        if self._errors is None:
            self._errors = tempfile.TemporaryDirectory(prefix="lockstep-")
        return self._errors.name

    def open(self, rank: int) -> Output:
        """Returns where the next process of a rank writes."""
        if rank in self._outputs:
            self._outputs.pop(rank).close()
        output = self._outputs[rank] = Output(self.folder / f"rank-{rank}.log", rank)
        return output

    def close(self) -> None:
        """Takes what is left in the pipes; what was kept of errors can still be shown."""
        for output in self._outputs.values():
            output.close()
        if self._errors is not None:
            self._errors.cleanup()
            self._errors = None

    def show_end(self, rank: int) -> None:
        """Shows why a rank has ended on the terminal, if it was not shown there when it came."""
        output = self._outputs.get(rank)
        if output is None or output.is_shown:
            return
        lines = list(output.errors)
        starts = [i for i, line in enumerate(lines) if line.startswith(_TRACEBACK)]
        lines = lines[starts[-1] :] if starts else lines[-_SHOWN_LINES:]
        if lines and not all(line.startswith(_PROBLEM) for line in lines):
            head = f"rank {rank} on {socket.gethostname()} failed first; {output.file}:\n"
            lines.insert(0, head.encode())
        sys.stderr.flush()
        sys.stderr.buffer.write(b"".join(lines))
        sys.stderr.flush()


class AgentLogs(DefaultLogsSpecs):
    """The same for ranks that torch's agent starts, which asks where their output goes before each attempt."""

    def __init__(self, logs: RankLogs) -> None:
        self._logs = logs
        super().__init__(logs.error_folder())

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Returns where each local rank writes. Its global rank is among its variables."""
        destinations = super().reify(envs)
        outputs = {local_rank: self._logs.open(_rank(variables)) for local_rank, variables in envs.items()}
        return replace(
            destinations,
            stdouts={local_rank: output.stdout for local_rank, output in outputs.items()},
            stderrs={local_rank: output.stderr for local_rank, output in outputs.items()},
        )


class Output:
    """Both streams of one process, each a path to open for writing.

    Args:
        file: is added to.
        rank: of the process; rank 0 is shown on the terminal.
    """

    def __init__(self, file: Path, rank: int) -> None:
        self.file, self.is_shown = file, rank == 0
        self.errors: deque[bytes] = deque(maxlen=_KEPT_LINES)
        self._file_descriptor: int | None = None
        self._is_lost = self._is_closed = False
        self._selector = selectors.DefaultSelector()
        self._partial: dict[int, bytes] = {}
        self._ours: list[int] = []  # ends that the process writes to; while one is open here the stream does not end
        self.stdout = self._make(1)
        self.stderr = self._make(2)
        self._thread = threading.Thread(target=self._pump, name=f"output-{rank}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Takes what is left, when the process has ended."""
        if self._is_closed:
            return
        self._is_closed = True
        for descriptor in self._ours:
            os.close(descriptor)
        self._thread.join(_DRAIN_SECONDS)

    def _make(self, shown_on: int) -> str:
        if self.is_shown and os.isatty(shown_on):
            ours, theirs = os.openpty()
            attributes = termios.tcgetattr(theirs)
            attributes[1] &= ~termios.OPOST  # the real terminal begins new lines
            termios.tcsetattr(theirs, termios.TCSANOW, attributes)
            termios.tcsetwinsize(theirs, termios.tcgetwinsize(shown_on))
            path = os.ttyname(theirs)
        else:
            ours, theirs = os.pipe()
            path = f"/dev/fd/{theirs}"
        self._ours.append(theirs)
        self._selector.register(ours, selectors.EVENT_READ, shown_on)
        return path

    def _pump(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                try:
                    chunk = os.read(key.fd, _CHUNK)
                except OSError:  # how Linux says that nobody has a pseudo-terminal open any more
                    chunk = b""
                if chunk:
                    self._take(key.data, chunk)
                else:
                    self._selector.unregister(key.fileobj)
                    os.close(key.fd)
                    self._write(key.data, self._partial.pop(key.data, b""))
        self._selector.close()
        if self._file_descriptor is not None:
            os.close(self._file_descriptor)

    def _take(self, stream: int, chunk: bytes) -> None:
        if self.is_shown:
            with contextlib.suppress(OSError):  # nobody may be reading any more
                rest = memoryview(chunk)
                while rest:
                    rest = rest[os.write(stream, rest) :]
        whole, newline, rest_of_line = (self._partial.get(stream, b"") + chunk).rpartition(b"\n")
        self._partial[stream] = rest_of_line[-_CHUNK:]
        self._write(stream, whole + newline)

    def _write(self, stream: int, text: bytes) -> None:
        # Of a progress bar the last state of a line.
        lines = [line.rsplit(b"\r", 1)[-1] for line in text.replace(b"\r\n", b"\n").splitlines(keepends=True)]
        if stream == 2:
            self.errors.extend(lines)
        if not lines or self._is_lost:
            return
        try:
            if self._file_descriptor is None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self._file_descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                os.write(self._file_descriptor, f"--- {time.strftime('%F %T')} on {socket.gethostname()}\n".encode())
            os.write(self._file_descriptor, b"".join(lines))
        except OSError as error:  # a full disk must not stop the training
            self._is_lost = True
            logger.warning("no more of the output is written to %s: %s", self.file, error)


def _rank(variables: Mapping[str, str]) -> int:
    return int(variables["RANK"])
