"""How the ranks of a job that may be started again find each other.

torchrun and `accelerate launch` keep one key-value store for the life of the job, restarts included, so that the
ranks of this attempt read what those of the last one wrote there: gloo then connects to ports of dead processes
(`connectFullMesh failed ... Connection refused`). Here rank 0 names each attempt afresh, and everybody's keys begin
with that name. torchrun's count of restarts would not do: after a change of hosts it differs between them.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

_SCHEME = "lockstep"
_POLL_SECONDS = 0.01


def is_elastic() -> bool:
    """Tells whether torch's elastic agent, which torchrun and `accelerate launch` run, is this process's parent."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def init_method() -> str:
    """Returns the `init_method` of the process group: torch's own unless the store outlives the ranks."""
    return f"{_SCHEME}://" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "env://"


def _meet(url: str, timeout: timedelta) -> Iterator[tuple[Store, int, int]]:
    store, rank, world_size = next(rendezvous(url.replace(_SCHEME, "env", 1), timeout=timeout))
    store.set_timeout(timeout)
    yield fresh_part(store, rank, world_size, timeout), rank, world_size
    raise RuntimeError("a process group cannot be initialised twice with one rendezvous")


def fresh_part(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """Returns a part of a used store that is new, and the same on every rank. All ranks call it.

    Raises:
        RuntimeError: a rank did not come in time.
    """
    if rank != 0:
        # Nobody else has ever used this name, so an answer to it comes from the rank 0 of now.
        me = uuid.uuid4().hex
        store.set(f"lockstep/ask/{rank}", me)
        name = store.get(f"lockstep/answer/{me}").decode()
        store.set(f"lockstep/{name}/{rank}", "here")
        return PrefixStore(f"lockstep/{name}", store)
    name, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"lockstep/{name}/{other}"]):
                missing.discard(other)
            elif store.check([f"lockstep/ask/{other}"]):  # maybe of an earlier attempt: asked again until it is not
                store.set(f"lockstep/answer/{store.get(f'lockstep/ask/{other}').decode()}", name)
        if missing and time.monotonic() > end:
            raise RuntimeError(f"rank {min(missing)} of {world_size} did not come to the rendezvous")
        time.sleep(_POLL_SECONDS if missing else 0)
    return PrefixStore(f"lockstep/{name}", store)


register_rendezvous_handler(_SCHEME, _meet)
