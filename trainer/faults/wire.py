"""JSON objects, one a line, over TCP between the watches of all ranks. Never blocks a reader or a writer.

Nothing that arrives is trusted before a token has come, and nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hmac
import json
import logging
import os
import secrets
import socket
import time
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import psutil

logger = logging.getLogger("lockstep")

_LONGEST_LINE = 1 << 20
_MOST_UNSENT = 1 << 20
_CONNECT_SECONDS = 2.0  # for each address
_ANSWER_SECONDS = 20.0  # rank 0 may be busy in native code that holds Python's lock

SILENT_SECONDS = 20  # of a machine, after which a connection to it is lost

_UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)

# Loader workers are forked; with a copy of a connection one of them would keep it open when its rank is killed.
_open: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    for copy in list(_open):
        copy.close()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class Peer:
    """A connection to another rank's watch.

    `ended` says how it ended: `closed` when the other side's process closed it or went, `silent` when its machine has
    not answered for SILENT_SECONDS, `broken` when the network may be to blame or what came was no JSON object, and None
    as long as it is good.
    """

    def __init__(self, connection: socket.socket, address: str = "") -> None:
        _open.add(connection)
        connection.setblocking(False)
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _notice_silence(connection)
        self.socket = connection
        self.address = address
        self.ended: str | None = None
        self._received = bytearray()
        self._unsent = bytearray()

    def send(self, message: Mapping[str, Any] | bytes) -> None:
        """Sends an object (or a line ready to go); what there is no room for now goes out with the next, if it can."""
        if len(self._unsent) < _MOST_UNSENT:
            self._unsent += message if isinstance(message, bytes) else line(message)
        self.flush()

    def flush(self) -> bool:
        """Sends what waits to be sent; returns whether all is sent or never will be."""
        while self._unsent and self.ended is None:
            try:
                del self._unsent[: self.socket.send(self._unsent)]
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:  # reading from it tells why, after what came before
                return True
        return True

    def receive(self) -> list[dict[str, Any]]:
        """Returns the objects that have arrived, and notes in `ended` when there will be no more."""
        while self.ended is None:
            try:
                data = self.socket.recv(1 << 16)
            except (BlockingIOError, InterruptedError):
                break
            except (ConnectionResetError, BrokenPipeError):
                self.ended = "closed"
            except OSError as error:
                self.ended = "silent" if error.errno in _UNREACHABLE else "broken"
            else:
                self._received += data
                if not data:
                    self.ended = "closed"
                elif len(self._received) > _LONGEST_LINE:
                    break
        *lines, self._received = self._received.split(b"\n")
        messages: list[dict[str, Any]] = []
        try:
            for text in lines:
                messages.append(_object(text))
            if len(self._received) > _LONGEST_LINE:
                raise ValueError("no line")
        except ValueError:
            self.ended = "broken"
        return messages

    def close(self) -> None:
        """Closes the connection; what is not sent yet is lost."""
        _open.discard(self.socket)
        self.socket.close()


def _notice_silence(connection: socket.socket) -> None:
    """Has the kernel end a connection to a machine that was cut off or lost power: nobody there closes it.

    A process that is stopped or busy does not matter: its kernel answers.
    """
    seconds = SILENT_SECONDS
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (  # keep-alives are for a connection on which nothing is sent, the last one for all others
        ("TCP_KEEPIDLE", seconds // 4),
        ("TCP_KEEPINTVL", seconds // 4),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 1000 * seconds),
    ):
        if hasattr(socket, name):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def line(message: Mapping[str, Any]) -> bytes:
    """Returns an object as it is sent."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def _object(text: bytes | bytearray) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


class Listener:
    """Rank 0's end: a port on all interfaces.

    Raises:
        OSError: it cannot listen.
    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        backlog = max(128, num_ranks)
        try:
            self.socket = socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=socket.has_dualstack_ipv6()
            )
        except (OSError, ValueError):  # without IPv6
            self.socket = socket.create_server(("", 0), backlog=backlog)
        _open.add(self.socket)
        self.socket.setblocking(False)
        # What the others must say, and what proves to them that this is the right server.
        self.token, self.answer = secrets.token_hex(16), secrets.token_hex(16)

    def address(self) -> dict[str, Any]:
        """Returns what `connect` needs, for the other ranks and for nobody else."""
        return {
            "port": self.socket.getsockname()[1],
            "token": self.token,
            "answer": self.answer,
            "addresses": _own_addresses(),
        }

    def accept(self) -> Peer | None:
        """Returns a new connection, of whomever, if there is one."""
        try:
            return Peer(self.socket.accept()[0])
        except OSError:
            return None

    def rank_of(self, greeting: Mapping[str, Any]) -> int | None:
        """Returns which rank greets like this; None for anybody else."""
        if not hmac.compare_digest(str(greeting.get("token", "")).encode(), self.token.encode()):
            return None
        rank = greeting.get("rank")
        return rank if isinstance(rank, int) and 0 < rank < self._num_ranks else None

    def close(self) -> None:
        """Gives the port back."""
        _open.discard(self.socket)
        self.socket.close()


def connect(
    addresses: Iterable[str], server: Mapping[str, Any], greeting: Mapping[str, Any]
) -> tuple[Peer, dict[str, Any]] | None:
    """Connects to rank 0 at the first address that works.

    Args:
        addresses: to be tried; empty ones are passed over.
        server: what `Listener.address` returned there.
        greeting: what to say with the token.

    Returns:
        The connection and the server's answer; None where no address works.
    """
    for address in dict.fromkeys(filter(None, addresses)):
        try:
            connection = socket.create_connection((address, server["port"]), timeout=_CONNECT_SECONDS)
        except OSError:
            continue
        _open.add(connection)
        try:
            connection.sendall(line({**greeting, "token": server["token"]}))
            answer = _read_object(connection, time.monotonic() + _ANSWER_SECONDS)
            if hmac.compare_digest(str(answer.get("answer", "")).encode(), str(server["answer"]).encode()):
                return Peer(connection, address), answer
        except (OSError, ValueError):  # nobody of ours
            pass
        _open.discard(connection)
        connection.close()
    return None


def _read_object(connection: socket.socket, deadline: float) -> dict[str, Any]:
    data = bytearray()
    while not data.endswith(b"\n"):  # byte by byte: what follows the line is for the next reader
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        byte = connection.recv(1)
        if not byte or len(data) > _LONGEST_LINE:
            raise ValueError("no answer")
        data += byte
    return _object(data)


def _own_addresses() -> list[str]:
    """Returns this machine's addresses that others may reach, IPv4 first."""
    found: dict[int, list[str]] = {socket.AF_INET: [], socket.AF_INET6: []}
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family in found and not address.address.startswith(("127.", "fe80:", "::1")):
                found[address.family].append(address.address)
    return found[socket.AF_INET] + found[socket.AF_INET6]
