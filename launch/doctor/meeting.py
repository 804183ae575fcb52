"""How the doctor's ranks find each other and hand in what they have found: a key-value store, and no collectives.

A rank that is lost, stopped or held up must not keep the others from saying so: nothing here waits for one that has
not got on for a while, and whoever did not come is returned by number.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

_LOOK_SECONDS = 0.5
_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.001, 0.05
_LEAVING_SECONDS = 10.0


class Meeting:
    """The ranks of one doctor.

    Args:
        rank: of this process.
        num_ranks: of all.
        patience: seconds after which a rank that does not get on is given up.
        store: None to find the launcher's, or for one process alone.

    Raises:
        OSError: rank 0 cannot be reached.
    """

    def __init__(self, rank: int, num_ranks: int, patience: float, store: Store | None = None) -> None:
        self.rank, self.num_ranks, self.patience = rank, num_ranks, patience
        self.missing: dict[int, str] = {}  # ranks that were given up, and where they were last
        self._store = store if store is not None or num_ranks == 1 else _open_store(rank, patience)
        self._num_places = 0  # where this rank has been
        self._own: dict[str, Any] = {}  # what it has handed in

    def at(self, place: str) -> None:
        """Says where this rank is now: whoever waits for it then waits anew."""
        if self._store is not None:
            self._num_places += 1
            self._store.set(f"at/{self.rank}", f"{self._num_places} {place}")

    def put(self, name: str, value: Any) -> None:
        """Hands in a value of this rank."""
        self._own[name] = value
        if self._store is not None:
            self._store.set(f"{name}/{self.rank}", json.dumps(value))

    def found(self, name: str) -> dict[int, Any]:
        """Returns the values of a name that ranks have handed in so far, by rank."""
        if self._store is None:
            return {self.rank: self._own[name]} if name in self._own else {}
        keys = {rank: f"{name}/{rank}" for rank in range(self.num_ranks)}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._has([key])}

    def collect(self, name: str, own: Any) -> dict[int, Any]:
        """Returns every rank's value of a name, but for those ranks that do not come, and hands in this one's."""
        self.put(name, own)
        if self._store is None:
            return {self.rank: own}
        here = self._wait([f"{name}/{rank}" for rank in range(self.num_ranks)])
        values = self._store.multi_get([f"{name}/{rank}" for rank in here]) if here else []
        return {rank: json.loads(value) for rank, value in zip(here, values, strict=True)}

    def gather(self, name: str) -> list[int]:
        """Waits until every rank is here, and returns the numbers of those that are."""
        if self._store is None:
            return [self.rank]
        self._store.set(f"{name}/{self.rank}", "")
        return self._wait([f"{name}/{rank}" for rank in range(self.num_ranks)])

    def from_main(self, name: str, value: Any = None) -> Any:
        """Returns rank 0's value of a name, which it gives here; None where it does not come."""
        if self._store is None:
            return value
        if self.rank == 0:
            self._store.set(name, json.dumps(value))
            return value
        seen, since = self._progress(0), time.monotonic()
        while not self._has([name], _LOOK_SECONDS):
            if (progress := self._progress(0)) != seen:
                seen, since = progress, time.monotonic()
            elif time.monotonic() - since > self.patience:
                return None
        return json.loads(self._store.get(name))

    def part(self, name: str) -> Store | None:
        """Returns a part of the store for somebody else."""
        return None if self._store is None else PrefixStore(name, self._store)

    def leave(self) -> None:
        """Waits a little for the others: with rank 0 the store goes."""
        if self._store is None:
            return
        self._store.set(f"bye/{self.rank}", "")
        if self.rank == 0:
            end = time.monotonic() + _LEAVING_SECONDS
            keys = [f"bye/{rank}" for rank in range(self.num_ranks) if rank not in self.missing]
            while not self._has(keys, _LOOK_SECONDS) and time.monotonic() < end:
                pass

    def _wait(self, keys: list[str]) -> list[int]:
        """Waits for a key of each rank, and returns the ranks whose key is there."""
        waiting = [rank for rank in range(self.num_ranks) if rank not in self.missing]
        seen = {rank: (self._progress(rank), time.monotonic()) for rank in waiting}
        while waiting and not self._has([keys[rank] for rank in waiting], _LOOK_SECONDS):
            waiting = [rank for rank in waiting if not self._has([keys[rank]])]
            for rank in list(waiting):
                progress, since = self._progress(rank), seen[rank][1]
                if progress != seen[rank][0]:
                    seen[rank] = progress, time.monotonic()
                elif time.monotonic() - since > self.patience:
                    self.missing[rank] = progress.partition(" ")[2] if progress else "not started"
                    waiting.remove(rank)
        return [rank for rank in range(self.num_ranks) if rank not in self.missing]

    def _has(self, keys: Sequence[str], seconds: float = 0.0) -> bool:
        """Tells whether all keys are there, or come in so many seconds."""
        assert self._store is not None
        end, pause = time.monotonic() + seconds, _POLL_SECONDS
        while not self._store.check(list(keys)):  # not `wait`, whose time-outs torch logs
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL_SECONDS)
        return True

    def _progress(self, rank: int) -> str | None:
        assert self._store is not None
        return self._store.get(f"at/{rank}").decode() if self._store.check([f"at/{rank}"]) else None


def _open_store(rank: int, patience: float) -> Store:
    """Opens the store where torch's launchers say that it is; waits for nobody but the one that holds it."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_ours = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(
        host, port, is_master=is_ours, timeout=timedelta(seconds=patience), wait_for_workers=False, multi_tenant=True
    )
    return PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
