"""Memory in a trace: what is allocated and given back, the peak, and what holds it. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_NUM_HOLDERS = 10


class Place(NamedTuple):
    """A part of a step on the main thread; times in microseconds."""

    start: float
    end: float
    name: str
    step: int


@dataclass(frozen=True)
class Allocation:
    """A change of memory.

    Args:
        time: microseconds.
        num_bytes: negative where memory is given back.
        address: of it.
        total: that torch says is allocated since then.
        operator: that the main thread, or whichever thread it was, was in; None outside of any.
    """

    time: float
    num_bytes: int
    address: int
    total: int
    operator: str | None


@dataclass
class Memory:
    """All changes of memory on the GPU; those of the host where there is no GPU.

    Args:
        changes: in order of time, once `sort` was called.
        is_gpu: whose it is.
    """

    changes: list[Allocation] = field(default_factory=list)
    is_gpu: bool = False

    def add(self, change: Allocation, is_gpu: bool) -> None:
        """Adds a change; memory of the host is of no interest beside that of a GPU."""
        if is_gpu and not self.is_gpu:
            self.changes.clear()
            self.is_gpu = True
        if is_gpu == self.is_gpu:
            self.changes.append(change)

    def sort(self) -> None:
        """Puts changes of several threads in order. Equal times keep theirs."""
        self.changes.sort(key=lambda change: change.time)

    def record(self, place_at: Callable[[float], Place | None]) -> dict[str, Any] | None:
        """Returns the peak and what held it, for JSON; None where nothing was recorded.

        Args:
            place_at: where the main thread was at a time.
        """
        if not self.changes:
            return None
        first = self.changes[0]
        before = first.total - first.num_bytes if self.is_gpu else 0  # on a CPU torch's own total begins at 0
        peak, num_until_peak = self._peak(before)
        alive: dict[int, Allocation] = {}
        for change in self.changes[:num_until_peak]:
            if change.num_bytes > 0:
                alive[change.address] = change
            else:
                alive.pop(change.address, None)
        holders: dict[tuple[str, str], list[int]] = defaultdict(list)
        for change in alive.values():
            place = place_at(change.time)
            where = place.name if place else "another thread"
            holders[change.operator or "no operator", where].append(change.num_bytes)
        largest = sorted(holders.items(), key=lambda item: -sum(item[1]))[:_NUM_HOLDERS]
        peak_place = place_at(self.changes[num_until_peak - 1].time) if num_until_peak else None
        return {
            "of": "gpu" if self.is_gpu else "cpu",
            "peak_bytes": peak,
            "before_bytes": before,
            "step": peak_place.step if peak_place else None,
            "place": peak_place.name if peak_place else None,
            "held_by": [
                {"operator": operator, "place": where, "bytes": sum(sizes), "allocations": len(sizes)}
                for (operator, where), sizes in largest
            ],
        }

    def _peak(self, before: int) -> tuple[int, int]:
        """Returns the most bytes that were alive, and after how many changes."""
        live, peak, num_until_peak = before, before, 0
        for i, change in enumerate(self.changes, start=1):
            live += change.num_bytes
            if live > peak:
                peak, num_until_peak = live, i
        return peak, num_until_peak

    def table(self, start: float) -> dict[str, Any]:
        """Returns every change, with the bytes that were alive after it, for JSON.

        Args:
            start: of the first step, microseconds.
        """
        live, rows = 0, []
        for change in self.changes:
            live += change.num_bytes
            rows.append([round((change.time - start) / 1e6, 9), change.num_bytes, live, change.operator])
        return {"columns": ["seconds", "bytes", "bytes_alive", "operator"], "allocations": rows}
