"""The connections of one rank's watch: rank 0's to all others, theirs to rank 0.

Rank 0 listens, the others connect; only who knows the token is listened to. Whoever waits here for news can be woken
up by another thread.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

from trainer.faults.wire import Listener, Peer, connect, line

logger = logging.getLogger("lockstep")

_MOST_STRANGERS = 64  # connections that have not shown the token
_STRANGER_SECONDS = 10.0  # to show it
_GOODBYE_SECONDS = 0.5

Message = Mapping[str, Any]


class Links:
    """This rank's connections. All but `wake` is for one thread.

    Args:
        rank: of this process.
        num_ranks: of the job.
        take: called with each message, and the rank that it comes from.
        lost: called with a rank whose connection ended without goodbye, and with how (`Peer.ended`).
        welcome: what rank 0 says to a rank that connects.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        take: Callable[[int, Message], None],
        lost: Callable[[int, str], None],
        welcome: Callable[[], Message],
    ) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        self._take, self._lost, self._welcome = take, lost, welcome
        self.peers: dict[int, Peer] = {}
        self._strangers: dict[Peer, float] = {}  # and since when
        self._server: Mapping[str, Any] | None = None
        # Not epoll, whose registrations are shared with forked workers.
        self._selector = selectors.PollSelector() if hasattr(selectors, "PollSelector") else selectors.SelectSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._woken)
        self._listener: Listener | None = None
        if rank == 0 and num_ranks > 1:
            try:
                self._listener = Listener(num_ranks)
                self._selector.register(self._listener.socket, selectors.EVENT_READ, self._accept)
            except OSError as error:
                logger.warning("rank 0 cannot open a port, so deaths and hangs of ranks are not watched: %s", error)

    def server(self) -> dict[str, Any] | None:
        """Returns what the others need to reach this rank, if it listens."""
        return self._listener.address() if self._listener is not None else None

    def reach(self, server: Mapping[str, Any], is_here: bool) -> bool:
        """Connects to rank 0; returns whether that worked.

        Args:
            server: what `server` returned there.
            is_here: rank 0 runs on this machine.
        """
        self._server = server
        local = ["127.0.0.1"] if is_here else []
        return self._connect([*local, os.environ.get("MASTER_ADDR", ""), *server["addresses"]])

    def wait(self, seconds: float) -> None:
        """Takes what arrives; returns when something did, when woken up, or after so many seconds."""
        for key, _ in self._selector.select(max(0.0, seconds)):
            key.data()
        now = monotonic()
        for peer, since in list(self._strangers.items()):
            if now - since > _STRANGER_SECONDS:
                self._dismiss(peer)

    def wake(self) -> None:
        """Makes `wait` return; for other threads."""
        with suppress(OSError):
            self._wake_writer.send(b"\0")

    def tell(self, message: Message) -> None:
        """Sends a message to all ranks that are connected to this one."""
        text = line(message)
        for peer in self.peers.values():
            peer.send(text)

    def part(self, rank: int) -> None:
        """Closes the connection to a rank, if there is one."""
        if rank in self.peers:
            peer = self.peers.pop(rank)
            self._selector.unregister(peer.socket)
            peer.close()

    def close(self) -> None:
        """Sends what is not sent yet, within half a second, and closes everything."""
        deadline = monotonic() + _GOODBYE_SECONDS
        while not all(peer.flush() for peer in self.peers.values()) and monotonic() < deadline:
            sleep(0.01)
        for peer in [*self.peers.values(), *self._strangers]:
            peer.close()
        if self._listener is not None:
            self._listener.close()
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def _connect(self, addresses: Iterable[str]) -> bool:
        assert self._server is not None
        made = connect(addresses, self._server, {"rank": self._rank})
        if made is None:
            return False
        self._add(0, made[0])
        self._take(0, made[1])
        return True

    def _accept(self) -> None:
        assert self._listener is not None
        peer = self._listener.accept()
        if peer is None:
            return
        if len(self._strangers) >= max(_MOST_STRANGERS, self._num_ranks):
            peer.close()
            return
        self._strangers[peer] = monotonic()
        self._selector.register(peer.socket, selectors.EVENT_READ, lambda: self._greet(peer))

    def _greet(self, peer: Peer) -> None:
        """Makes a stranger who knows the token a peer, and dismisses any other."""
        assert self._listener is not None
        messages = peer.receive()
        if not messages and peer.ended is None:
            return
        rank = self._listener.rank_of(messages[0]) if messages and peer.ended is None else None
        if rank is None:
            self._dismiss(peer)
            return
        del self._strangers[peer]
        self._selector.unregister(peer.socket)
        self.part(rank)  # which has lost its connection, and comes again
        self._add(rank, peer)
        peer.send({**self._welcome(), "answer": self._listener.answer})
        for message in messages:
            self._take(rank, message)

    def _add(self, rank: int, peer: Peer) -> None:
        self.peers[rank] = peer
        self._selector.register(peer.socket, selectors.EVENT_READ, lambda: self._hear(rank, peer))

    def _dismiss(self, peer: Peer) -> None:
        del self._strangers[peer]
        self._selector.unregister(peer.socket)
        peer.close()

    def _hear(self, rank: int, peer: Peer) -> None:
        for message in peer.receive():
            self._take(rank, message)
        if peer.ended is None or self.peers.get(rank) is not peer:
            return
        self.part(rank)
        if self._rank > 0 and self._connect([peer.address]):  # it was the network
            return
        self._lost(rank, peer.ended)

    def _woken(self) -> None:
        with suppress(BlockingIOError):
            self._wake_reader.recv(1 << 12)
