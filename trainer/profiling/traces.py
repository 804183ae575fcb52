"""What a trace of torch's profiler says: where the time of its steps went, on the host and on a GPU, and the memory.

Owns the reading of one trace, as torch writes it for Chrome and Perfetto. Imports no torch. What several ranks' traces
say together is `trainer.profiling.summary`.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from typing import Any

from trainer.faults.judging import LOADING
from trainer.profiling.allocations import Allocation, Memory, Place
from trainer.profiling.kinds import kind_of, kind_outside

_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_HOST_WORK = ("cpu_op", "user_annotation", *_LAUNCHES)
_WAITS = re.compile(r"Synchronize|EventQuery|WaitEvent")  # of the runtime: the host waits for the GPU
_ALLOCATES = re.compile(r"^aten::(empty|new_empty|resize_|set_|_empty|zeros|ones|full|to$|_to_copy)")  # says nothing
_STEP = re.compile(r"step (\d+)")
_SLACK = 2e-3  # microseconds: times are rounded to a nanosecond
_NUM_GAPS = 5
_NUM_KERNELS = 100


def step_range(step: int) -> str:
    """Returns the name of the range that holds a step, counted from 1."""
    return f"step {step}"


Span = tuple[float, float]


@dataclass
class Usage:
    """Calls of one operator or kernel, and their microseconds without those of what they call."""

    kind: str
    calls: int = 0
    microseconds: float = 0.0


@dataclass
class Analysis:
    """What is in a trace.

    Args:
        steps: the range of each, in order, microseconds.
        places: of the main thread, in order.
        operators: of the CPU by (name, kind): those of the main thread.
        kernels: of the GPU by (name, kind).
        host_kinds: microseconds of the main thread by kind.
        host_places: and by the place in the loop.
        host_waits: microseconds of it in which it waits for the GPU.
        pauses: start, end and kind of its time between operators.
        busy: when the GPU did anything, merged.
        computing: when it did anything but communicate, merged.
        work: start, end and name of everything that the GPU did, in order.
        memory: what became of it.
    """

    steps: dict[int, Span]
    places: list[Place]
    operators: dict[tuple[str, str], Usage] = field(default_factory=dict)
    kernels: dict[tuple[str, str], Usage] = field(default_factory=dict)
    host_kinds: dict[str, float] = field(default_factory=dict)
    host_places: dict[str, float] = field(default_factory=dict)
    host_waits: float = 0.0
    pauses: list[tuple[float, float, str]] = field(default_factory=list)
    busy: list[Span] = field(default_factory=list)
    computing: list[Span] = field(default_factory=list)
    work: list[tuple[float, float, str]] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    @property
    def start(self) -> float:
        return next(iter(self.steps.values()))[0]

    @property
    def end(self) -> float:
        return list(self.steps.values())[-1][1]

    @property
    def has_gpu(self) -> bool:
        return bool(self.kernels)

    def place_at(self, time: float) -> Place | None:
        """Returns where the main thread was."""
        i = bisect_right(self.places, time, key=lambda place: place.start) - 1
        return self.places[i] if i >= 0 and self.places[i].end >= time else None

    def step_seconds(self) -> dict[int, float]:
        """Returns how long each step took, to the begin of the next one."""
        begins = [start for start, _ in self.steps.values()]
        ends = [*begins[1:], self.end]
        return {step: (b - a) / 1e6 for step, a, b in zip(self.steps, begins, ends, strict=True)}

    def record(self) -> dict[str, Any]:
        """Returns all of it that is worth keeping, for JSON; times in seconds."""
        whole = self.end - self.start
        usages = self.kernels if self.has_gpu else self.operators
        kinds = _kinds(self.kernels.values()) if self.has_gpu else self.host_kinds
        return {
            "traced_seconds": whole / 1e6,
            "step_seconds": {str(step): seconds for step, seconds in self.step_seconds().items()},
            "kinds_are_of": "gpu" if self.has_gpu else "cpu",
            "kind_seconds": {kind: value / 1e6 for kind, value in kinds.items()},
            "place_seconds": {place: value / 1e6 for place, value in self.host_places.items()},
            "gpu": self._gpu() if self.has_gpu else None,
            "kernels": _table(usages, sum(kinds.values())),
            "memory": self.memory.record(self.place_at),
        }

    def _gpu(self) -> dict[str, Any]:
        whole = self.end - self.start
        busy, computing = _length(self.busy), _length(self.computing)
        return {
            "idle_share": 1 - busy / whole,
            "communication_alone_share": (busy - computing) / whole,
            "host_waits_seconds": self.host_waits / 1e6,
            "gaps": self._gaps(),
        }

    def _gaps(self) -> list[dict[str, Any]]:
        """Returns the longest times in which the GPU did nothing, and what the host did meanwhile."""
        edges = [(self.start, self.start), *self.busy, (self.end, self.end)]
        gaps = [(a, b) for (_, a), (b, _) in pairwise(edges) if b > a]
        gaps.sort(key=lambda gap: gap[0] - gap[1])
        return [self._gap(*gap) for gap in gaps[:_NUM_GAPS]]

    def _gap(self, start: float, end: float) -> dict[str, Any]:
        shares: dict[tuple[int, str], float] = defaultdict(float)
        i = max(bisect_right(self.places, start, key=lambda place: place.start) - 1, 0)
        for place in self.places[i:]:
            if place.start >= end:
                break
            shares[place.step, place.name] += max(min(end, place.end) - max(start, place.start), 0)
        step, name = max(shares, key=lambda key: shares[key]) if shares else (None, None)
        next_one = bisect_right(self.work, end - _SLACK, key=itemgetter(0))
        return {
            "at_seconds": (start - self.start) / 1e6,
            "seconds": (end - start) / 1e6,
            "step": step,
            "host_in": name,
            "before": self.work[next_one][2] if next_one < len(self.work) else None,
        }


def read_trace(text: str) -> dict[str, Any]:
    """Reads a trace, without the events that `analyse` does not look at, which may be the most.

    Raises:
        ValueError: it is none.
    """
    read = json.loads(text, object_hook=_looked_at)
    if not isinstance(read, dict):
        raise ValueError("it is not a trace")
    return read


def _looked_at(found: dict[str, Any]) -> dict[str, Any] | None:
    if "ph" not in found or found.get("cat") in (*_HOST_WORK, *_GPU_WORK) or found.get("name") == "[memory]":
        return found
    return None


def analyse(trace: Mapping[str, Any], is_alone: bool = True) -> Analysis:
    """Reads a trace.

    Args:
        trace: the object in the file.
        is_alone: it is that of the only rank.

    Raises:
        ValueError: it holds no step.
    """
    events = [event for event in trace["traceEvents"] if event is not None and event["ph"] in ("X", "i")]
    main, steps = _steps(events)
    found = Analysis(steps, [])
    by_thread: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in _HOST_WORK or event["name"] == "[memory]":
            by_thread[event["pid"], event["tid"]].append(event)
    for thread, of_thread in by_thread.items():
        _walk(found, of_thread, is_main=thread == main, is_alone=is_alone)
    _add_pauses(found, _merged(_exchanges(events, main)))
    _add_gpu(found, events, _launches(found, by_thread, main))
    found.memory.sort()
    return found


def _steps(events: Iterable[Mapping[str, Any]]) -> tuple[Any, dict[int, Span]]:
    """Returns the main thread and the ranges of its steps."""
    ranges = []
    for event in events:
        if event.get("cat") == "user_annotation" and (match := _STEP.fullmatch(event["name"])):
            ranges.append((event["ts"], event["ts"] + event["dur"], int(match[1]), (event["pid"], event["tid"])))
    if not ranges:
        raise ValueError("the trace holds no step")
    ranges.sort()
    return ranges[0][3], {step: (start, end) for start, end, step, _ in ranges}


@dataclass
class _Open:
    """A piece of the host's work that is not over."""

    name: str
    end: float
    category: str
    microseconds: float  # without those of what it calls
    reached: float  # the end of what it called last


def _walk(found: Analysis, events: list[dict[str, Any]], is_main: bool, is_alone: bool) -> None:
    """Follows one thread through its nested pieces of work, and through its allocations."""
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))  # stable: the outer ones come first
    stack: list[_Open] = []
    step: int | None = None
    place: str | None = None

    def pause(within: _Open, until: float) -> None:
        if is_main and step is not None and within.category == "user_annotation":
            found.pauses.append((within.reached, until, kind_outside(place, is_alone)))

    def leave() -> None:
        nonlocal step, place
        done = stack.pop()
        if is_main and step is not None:
            pause(done, done.end)
            _count_host(found, done, place)
        if len(stack) < 2:
            place = None
        if not stack:
            step = None

    for event in events:
        start = event["ts"]
        while stack and stack[-1].end <= start + _SLACK:
            leave()
        if event["name"] == "[memory]":
            _add_memory(found, event, _allocator(stack))
            continue
        name, category, duration = event["name"], event["cat"], event["dur"]
        if is_main and category == "user_annotation":  # a step, a place in it, or anything else
            if not stack and (match := _STEP.fullmatch(name)):
                step, place = int(match[1]), None
            elif len(stack) == 1 and step is not None:
                place = name
                found.places.append(Place(start, start + duration, name, step))
                found.host_places[name] = found.host_places.get(name, 0.0) + duration
        if stack:
            pause(stack[-1], start)
            stack[-1].reached = start + duration
            stack[-1].microseconds -= duration
        stack.append(_Open(name, start + duration, category, duration, start))
    while stack:
        leave()


def _allocator(stack: Iterable[_Open]) -> str | None:
    """Returns the operator that memory is allocated for: the innermost one that does more than that, if there is."""
    operators = [piece.name for piece in stack if piece.category == "cpu_op"]
    telling = [name for name in operators if not _ALLOCATES.match(name)]
    named = telling or operators
    return named[-1] if named else None


def _count_host(found: Analysis, done: _Open, place: str | None) -> None:
    microseconds = max(done.microseconds, 0.0)
    if done.category in _LAUNCHES:
        if _WAITS.search(done.name):
            found.host_waits += microseconds
        kind = "other"
    elif done.category == "cpu_op":
        kind = kind_of(done.name, place)
        _use(found.operators, done.name, kind, microseconds)
    else:  # counted by its pauses
        return
    found.host_kinds[kind] = found.host_kinds.get(kind, 0.0) + microseconds


def _exchanges(events: Iterable[Mapping[str, Any]], main: Any) -> list[Span]:
    """Returns when other threads of this process exchanged something, as gloo's do."""
    found = []
    for event in events:
        is_range = event.get("cat") == "user_annotation" and (event["pid"], event["tid"]) != main
        if is_range and kind_of(event["name"], None) == "communication":
            found.append((event["ts"], event["ts"] + event["dur"]))
    return found


def _add_pauses(found: Analysis, exchanges: list[Span]) -> None:
    """Adds the main thread's time between operators. While an exchange is under way, that is what it waits for."""
    for start, end, kind in found.pauses:
        waited = 0.0
        for i in range(max(bisect_right(exchanges, (start,)) - 1, 0), len(exchanges)):
            if exchanges[i][0] >= end:
                break
            waited += max(min(end, exchanges[i][1]) - max(start, exchanges[i][0]), 0.0)
        for name, microseconds in ((kind, end - start - waited), ("communication", waited)):
            if microseconds > 0:
                found.host_kinds[name] = found.host_kinds.get(name, 0.0) + microseconds


def _use(usages: dict[tuple[str, str], Usage], name: str, kind: str, microseconds: float) -> None:
    usage = usages.setdefault((name, kind), Usage(kind))
    usage.calls += 1
    usage.microseconds += microseconds


def _add_gpu(found: Analysis, events: Iterable[Mapping[str, Any]], launched_in: Mapping[int, str | None]) -> None:
    busy: list[Span] = []
    computing: list[Span] = []
    for event in events:
        if event.get("cat") not in _GPU_WORK:
            continue
        start, end = max(event["ts"], found.start), min(event["ts"] + event["dur"], found.end)
        if start > end:
            continue
        kind = kind_of(event["name"], launched_in.get(event["args"].get("correlation")))
        _use(found.kernels, event["name"], kind, end - start)
        found.work.append((start, end, event["name"]))
        busy.append((start, end))
        if kind != "communication":
            computing.append((start, end))
    found.work.sort()
    found.busy, found.computing = _merged(busy), _merged(computing)


def _launches(
    found: Analysis, by_thread: Mapping[Any, Iterable[Mapping[str, Any]]], main: Any
) -> dict[int, str | None]:
    """Returns in which place of the loop work was given to the GPU, by what connects the two.

    Autograd has threads of its own while the main thread is in backward; all others work for the feed.
    """
    launched_in: dict[int, str | None] = {}
    for thread, events in by_thread.items():
        is_in_loop = thread == main or any(event["name"].startswith("autograd::") for event in events)
        for event in events:
            if event.get("cat") in _LAUNCHES and "correlation" in event["args"]:
                place = found.place_at(event["ts"]) if is_in_loop else None
                name = place.name if place else None
                launched_in[event["args"]["correlation"]] = name if is_in_loop else LOADING
    return launched_in


def _merged(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)


def _add_memory(found: Analysis, event: Mapping[str, Any], operator: str | None) -> None:
    args = event["args"]
    change = Allocation(event["ts"], args["Bytes"], args["Addr"], args["Total Allocated"], operator)
    found.memory.add(change, is_gpu=args["Device Type"] != 0)


def _kinds(usages: Iterable[Usage]) -> dict[str, float]:
    kinds: dict[str, float] = defaultdict(float)
    for usage in usages:
        kinds[usage.kind] += usage.microseconds
    return dict(kinds)


def _table(usages: Mapping[tuple[str, str], Usage], all_microseconds: float) -> list[dict[str, Any]]:
    rows = sorted(usages.items(), key=lambda item: -item[1].microseconds)[:_NUM_KERNELS]
    return [
        {
            "name": name,
            "kind": kind,
            "calls": usage.calls,
            "seconds": usage.microseconds / 1e6,
            "mean_seconds": usage.microseconds / 1e6 / usage.calls,
            "share": usage.microseconds / all_microseconds if all_microseconds else 0.0,
        }
        for (name, kind), usage in rows
    ]
