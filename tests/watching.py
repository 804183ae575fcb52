"""Ranks as forked processes under their watches, without torch.distributed, and what ended them."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.faults.fault import FIRST, Fault
from trainer.faults.judging import PLACES
from trainer.faults.watch import Watch

TICK = 0.5
HANG = 2.0  # seconds; a machine that stands still for less is no hang

Scenario = Callable[[Watch, int], Any]
Change = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


class WatchedJob:
    """Ranks as forked processes, each of which runs a scenario under its watch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[Any] = []

    def start(
        self,
        num_ranks: int,
        scenario: Scenario,
        hang: float | None = None,
        change: Change = list,
        is_cut: bool = False,
        **options: Any,
    ) -> None:
        """Starts ranks and returns when all of them are connected and about to begin.

        Args:
            num_ranks: processes.
            scenario: what each does, with its watch and its rank.
            hang: seconds without progress after which a rank hangs; None for no limit.
            change: what the introductions that ranks exchange become on their way.
            is_cut: whether that leaves ranks unconnected.
            **options: further arguments of `Watch`, each made from the rank.
        """
        context = multiprocessing.get_context("fork")
        for rank in range(num_ranks):
            arguments = (rank, num_ranks, scenario, hang, change, is_cut, options)
            self.processes.append(context.Process(target=self._run, args=arguments, daemon=True))
            self.processes[-1].start()
        for rank in range(num_ranks):
            self.wait_for(f"ready-{rank}")

    def pid(self, rank: int) -> int:
        return int(self.processes[rank].pid)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> float:
        os.kill(self.pid(rank), number)
        return time.monotonic()

    def end(self, rank: int, seconds: float = 30.0) -> tuple[Fault, float]:
        """Returns what ended the job as this rank saw it, and when."""
        text, when = json.loads(self.wait_for(f"end-{rank}", seconds))
        return Fault.from_json(text), when

    def ends(self, *ranks: int) -> Fault:
        """Returns what ended the job, the same on all these ranks and in `first.json`."""
        faults = [self.end(rank)[0] for rank in ranks]
        first = Fault.from_json((self.faults / FIRST).read_text())
        for fault in faults:
            assert (fault.rank, fault.kind, fault.step, fault.place) == (
                first.rank,
                first.kind,
                first.step,
                first.place,
            )
        return first

    def nothing_ended(self) -> bool:
        return not list(self.folder.glob("end-*")) and not self.faults.exists()

    def join(self, rank: int, seconds: float = 30.0) -> int | None:
        self.processes[rank].join(seconds)
        return self.processes[rank].exitcode

    @property
    def faults(self) -> Path:
        return self.folder / "faults" / "attempt-001"

    def log(self, rank: int) -> list[str]:
        return (self.folder / f"log-{rank}").read_text().splitlines()

    def text(self, rank: int) -> str:
        return (self.faults / f"rank-{rank}.txt").read_text()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(5)

    def wait_for(self, name: str, seconds: float = 30.0) -> str:
        """Returns the note of this name as soon as it is there."""
        deadline = time.monotonic() + seconds
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"no {name} after {seconds} s"
            time.sleep(0.01)
        return (self.folder / name).read_text()

    def note(self, name: str, text: str) -> None:
        """Leaves a note in the folder, whole or not at all."""
        (self.folder / f".{name}").write_text(text)
        (self.folder / f".{name}").rename(self.folder / name)

    def _run(
        self,
        rank: int,
        num_ranks: int,
        scenario: Scenario,
        hang: float | None,
        change: Change,
        is_cut: bool,
        options: dict[str, Any],
    ) -> None:
        def share(value: Any) -> list[Any]:
            self.note(f"share-{rank}", json.dumps(value))
            return change([json.loads(self.wait_for(f"share-{other}")) for other in range(num_ranks)])

        def on_end(fault: Fault) -> None:
            self.note(f"end-{rank}", json.dumps([fault.to_json(), time.monotonic()]))
            os._exit(1)

        logging.getLogger("lockstep").addHandler(logging.FileHandler(self.folder / f"log-{rank}"))
        made = {name: value(rank) for name, value in options.items()}
        watch = Watch(rank, num_ranks, share, hang, self.faults, on_end=on_end, tick=TICK, **made)
        while len(watch._standings) < (0 if is_cut else num_ranks - 1 if rank == 0 else min(rank, 1)):
            time.sleep(0.01)  # until all are connected
        self.note(f"ready-{rank}", "")
        for other in range(num_ranks):
            self.wait_for(f"ready-{other}")
        scenario(watch, rank)
        watch.close()
        self.note(f"done-{rank}", json.dumps(None if watch._fault is None else watch._fault.to_json()))


def stay(watch: Watch, rank: int) -> None:
    """Every rank stays in its own place and step."""
    watch.at(PLACES[2 + rank], step=rank + 5, samples=(rank, rank + 10), allowance=0)
    time.sleep(60)
