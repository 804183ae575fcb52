"""Every rank's watch: who is alive, who gets on, and whose fault it was when the job ends.

The watch is a thread that talks to rank 0's watch over TCP (`trainer.faults.wire`), beside torch.distributed, so that
it works while main threads hang in collectives. A connection that ends without goodbye is a death. Once per second
every rank reports where it is, and rank 0 judges (`trainer.faults.judging`); where rank 0 itself is silent, the others
do. Whatever ends the job is the same `Fault` on all ranks: each writes down what it was doing, ends those on its
machine that cannot end themselves, and leaves the rest to `on_end`. Imports no torch.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from trainer.faults.board import MOST_SAMPLES, Board, Position, Samples
from trainer.faults.fault import Fault
from trainer.faults.judging import EVALUATION, LOADING, SILENT_TICKS, Hang, Report, Standing, find_hang, name_ranks
from trainer.faults.links import Links
from trainer.faults.neighbours import Neighbours, introduce
from trainer.faults.stacks import (
    OWN_THREADS,
    FaultFiles,
    SignalledStacks,
    aside,
    capture_stacks,
    format_stacks,
    within,
)
from trainer.faults.wire import SILENT_SECONDS

logger = logging.getLogger("lockstep")

TICK = 1.0  # seconds between reports
_GRACE = 0.3  # seconds in which a rank's last words still come before another's death that they explain
_JUMP = 5.0  # ticks: a watch that was away for so long knows nothing about the others
_WRITE_SECONDS = 3.0
_ANSWER_SECONDS = 0.4  # for rank 0 to say whose fault was the first
_FEW_SAMPLES = 64  # that a report carries, but for one of a rank that is stuck


class _Death(NamedTuple):
    """A death that is known, and until when another rank's last words still come before it."""

    until: float
    kind: str  # of `Fault`
    message: str
    report: Report


class Watch:
    """This rank's watch. Threads other than its own may call its methods.

    Args:
        rank: of this process.
        num_ranks: of the job.
        share: a collective that returns every rank's object on every rank; called once.
        hang_seconds: what a rank may take without getting on; None: no hang is looked for.
        folder: where files about a fault go, or what returns it then.
        describe_feed: says in lines what the feed is reading; called in the watch's threads.
        on_end: called in the watch's thread, once, when a fault has ended the job, except on a rank that `failed`.
        sequence_numbers: returns how many collectives this rank has begun.
        tick: seconds between reports.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        share: Callable[[Any], list[Any]],
        hang_seconds: float | None,
        folder: Callable[[], Path] | Path,
        describe_feed: Callable[[], list[str]] = list,
        on_end: Callable[[Fault], None] | None = None,
        sequence_numbers: Callable[[], int] | None = None,
        tick: float = TICK,
    ) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        self._hang_seconds, self._tick = hang_seconds, tick
        self._describe_feed, self._on_end, self._sequence_numbers = describe_feed, on_end, sequence_numbers
        self._files = FaultFiles(rank, folder)
        # Where the main thread is. One tuple, so that the watch never sees half of a change.
        self._at: tuple[str, int | None, Samples, float, float] = ("building", None, (), 0.0, monotonic())
        self._board = Board()
        self._beaten = 0.0
        self._resumed = 0.0  # when the watch itself came back after having been away
        self._feed_call: threading.Thread | None = None
        self._feed_lines: list[str] = []

        self._fault: Fault | None = None
        self._lock = threading.Lock()
        self._decided, self._written = threading.Event(), threading.Event()
        self._words: deque[Fault] = deque()
        self._has_failed = self._closing = False

        self._standings: dict[int, Standing] = {}
        self._deaths: dict[int, _Death] = {}
        self._turned = self._next_tick = monotonic()

        self._stacks = SignalledStacks()
        self._links = Links(rank, num_ranks, self._take, self._lose, self._welcome)
        introduction = introduce(self._stacks, self._board) | {"server": self._links.server()}
        introductions = share(introduction) if num_ranks > 1 else [introduction]
        self._server: dict[str, Any] | None = introductions[0]["server"]
        self._neighbours = Neighbours(rank, introductions)
        self._thread = threading.Thread(target=self._run, name=OWN_THREADS, daemon=True)
        self._thread.start()

    # ---- what the trainer calls ---------------------------------------------------------------------------

    def at(self, place: str, step: int | None = None, samples: Samples = (), allowance: float = 1.0) -> None:
        """Notes where the main thread is from now on, which is progress.

        Args:
            place: one of `judging.PLACES`, for its order.
            step: the optimizer step that is being made; None before training.
            samples: ids of the micro-batch; not to be changed afterwards.
            allowance: how many times `hang_seconds` it may stay there; 0: without a limit.
        """
        has_other_limit = allowance != self._at[3]
        self._at = (place, step, samples, allowance, monotonic())
        if has_other_limit:  # the others hear of it now: this process may be stopped before its next report
            self._next_tick = 0.0
            self._links.wake()
        self._board.write(place, step, samples)

    def place(self) -> Position:
        """Returns where the main thread is: place, step and sample ids."""
        place, step, samples, _, _ = self._at
        return place, step, _ids(samples)

    def beat(self) -> None:
        """Notes progress without a change of place."""
        self._beaten = monotonic()

    def failed(self, fault: Fault) -> None:
        """Tells all ranks what this one dies of, and writes it down. Takes less than a second, whatever hangs.

        The rank then ends by itself: its `on_end` is not called.
        """
        stacks = capture_stacks()
        error = sys.exception()
        if fault.step is None:  # a fault that knows its step knows its samples, too
            place, step, samples = self.place()
            fault = replace(fault, place=place, step=step, samples=samples)
        self._has_failed = True
        if self._thread.is_alive():
            self._words.append(fault)
            self._links.wake()
            self._decided.wait(_ANSWER_SECONDS)
        with self._lock:
            first = self._fault = self._fault or fault
        self._decided.set()

        def write() -> None:
            try:
                cause = "".join(traceback.format_exception(error)) if error is not None else ""
                self._files.write_first(first)
                self._files.append(self._describe_end(first, self._report(), []) + cause + "\n" + format_stacks(stacks))
            finally:
                self._written.set()

        within(_ANSWER_SECONDS, write, None)

    def first_fault(self, seconds: float) -> Fault | None:
        """Returns what ended the job first, as far as is known; waits for news for so many seconds at most."""
        self._decided.wait(seconds)
        return self._fault

    def close(self) -> None:
        """Says goodbye: from here on this process may end without being missed."""
        if self._fault is not None:
            self._written.wait(_WRITE_SECONDS)  # what is being written would end with the process
        self._closing = True
        self._links.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(1.0)
        self._stacks.close()
        self._board.close()

    # ---- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            server, is_here = self._server, self._neighbours.is_here(0)
            if self._rank > 0 and server is not None and not self._links.reach(server, is_here):
                logger.warning(
                    "rank %d cannot reach rank 0 at any of its addresses (a firewall?): whether it dies or hangs is "
                    "not watched",
                    self._rank,
                )
            while not self._closing:
                self._turn()
            self._links.tell({"bye": True})
            self._links.close()
            self._neighbours.close()
        except Exception as error:  # a healthy job goes on without it
            message = "the watch of rank %d has ended, and the run goes on without it: %s: %s"
            logger.warning(message, self._rank, type(error).__name__, error)
            with suppress(Exception):  # and without closing anything, which would look like a death
                self._links.tell({"bye": True})

    def _turn(self) -> None:
        now = monotonic()
        if now - self._turned > _JUMP * self._tick:
            self._restart_clocks(now)
        self._turned = now
        if now >= self._next_tick:
            self._next_tick = now + self._tick
            self._report_and_judge(now)
        deadline = min([self._next_tick, *(death.until for death in self._deaths.values())])
        self._links.wait(deadline - monotonic())
        while self._words and self._fault is None:
            self._say(self._words.popleft())
        for rank, death in sorted(self._deaths.items(), key=lambda item: item[1].until)[:1]:  # the first one counts
            if monotonic() >= death.until:
                self._decide(self._fault_of(rank, death.kind, death.message, death.report, is_late=True))

    def _restart_clocks(self, now: float) -> None:
        """Forgets how long all have been silent: this process, or the whole machine, was stopped or busy itself."""
        self._resumed = now
        self._standings = {rank: Standing(s.report, now) for rank, s in self._standings.items()}

    def _report_and_judge(self, now: float) -> None:
        written = self._stacks.new()
        if written:
            aside(lambda: logger.info("stacks, asked for by SIGUSR2, are in '%s'", self._files.append(written)))
        if self._fault is not None:
            return
        report = self._report()
        self._links.tell({"report": report.to_message()})
        if self._hang_seconds is None or (self._rank > 0 and not self._links.peers):
            return
        standings = {**self._standings, self._rank: Standing(report, now)}
        hang = find_hang(standings, now, self._hang_seconds, self._tick)
        if hang is not None and (self._rank == 0 or hang.silent):  # all else is for rank 0 to judge
            self._decide(self._fault_of_hang(hang, standings), hang.silent)

    def _report(self) -> Report:
        place, step, samples, allowance, since = self._at
        idle = monotonic() - max(since, self._beaten, self._resumed)
        is_stuck = idle > self._tick  # all others send and read little
        return Report(
            place,
            step,
            _ids(samples if is_stuck else samples[:_FEW_SAMPLES]),
            round(idle, 3),
            allowance,
            self._sequence_number(),
            tuple(self._feed()) if is_stuck and place in (LOADING, EVALUATION) else (),
        )

    def _sequence_number(self) -> int | None:
        with suppress(Exception):  # of a process group that is being taken down
            return self._sequence_numbers() if self._sequence_numbers is not None else None
        return None

    def _feed(self) -> list[str]:
        """Returns what the feed says of itself; what it said before, if it has not answered yet."""
        if self._feed_call is None or not self._feed_call.is_alive():

            def ask() -> None:
                try:
                    self._feed_lines = [str(text) for text in self._describe_feed()]
                except Exception as error:
                    self._feed_lines = [f"the feed cannot say what it does: {type(error).__name__}: {error}"]

            self._feed_call = threading.Thread(target=ask, name=f"{OWN_THREADS}-feed", daemon=True)
            self._feed_call.start()
            self._feed_call.join(0.2)
        return self._feed_lines

    # ---- the other ranks ----------------------------------------------------------------------------------

    def _welcome(self) -> dict[str, Any]:
        """Returns what rank 0 says to a rank that connects."""
        verdict = {"verdict": self._fault.to_json()} if self._fault is not None else {}
        return {"report": self._report().to_message(), **verdict}

    def _take(self, rank: int, message: Mapping[str, Any]) -> None:
        self._deaths.pop(rank, None)  # it was the network, and the rank has connected again
        if "report" in message:
            with suppress(KeyError, TypeError):
                self._standings[rank] = Standing(Report.from_message(message["report"]), monotonic())
        if "bye" in message:
            self._standings.pop(rank, None)
            self._links.part(rank)
        if "fault" in message:
            self._decide(Fault.from_json(message["fault"]))
        if "verdict" in message:
            self._decide(Fault.from_json(message["verdict"]), message.get("silent", ()))

    def _lose(self, rank: int, how: str) -> None:
        standing = self._standings.pop(rank, None)
        # A rank that has not reported since it connected may have said goodbye before it knew that it was connected.
        if self._fault is not None or standing is None:
            return
        age = monotonic() - standing.heard
        if how == "closed":
            message = f"the process ended without a word, {age:.1f} s after its last report"
            # A rank 0 that was silent was ended by a neighbour who has found that out a moment before this one.
            is_hang = rank == 0 and self._hang_seconds is not None and age > SILENT_TICKS * self._tick
            self._deaths[rank] = _Death(monotonic() + _GRACE, "hang" if is_hang else "lost", message, standing.report)
        elif how == "silent":
            message = f"its machine has not answered for {SILENT_SECONDS} s: it is down, or was cut off"
            self._deaths[rank] = _Death(monotonic() + _GRACE, "lost", message, standing.report)
        else:
            logger.warning("the connection of rank %d to rank 0's watch broke: it is not watched any more", rank)

    # ---- the end of the job -------------------------------------------------------------------------------

    def _fault_of_hang(self, hang: Hang, standings: Mapping[int, Standing]) -> Fault:
        message: str = hang.message
        if hang.silent:
            state = self._neighbours.state(hang.rank) if self._neighbours.is_here(hang.rank) else ""
            unknown = "its process is stopped, native code holds Python's lock, or its machine or network is down"
            message += f": {state or unknown}"
        unknown_ranks = sorted(set(range(self._num_ranks)).difference(standings)) if self._rank == 0 else []
        if unknown_ranks:
            message += f"; nothing is known of {name_ranks(unknown_ranks)}"
        return self._fault_of(hang.rank, "hang", message, standings[hang.rank].report, is_late=bool(hang.silent))

    def _fault_of(self, rank: int, kind: str, message: str, report: Report, is_late: bool) -> Fault:
        """Returns another rank's fault, at the place where it is.

        Args:
            rank: whose it is.
            kind: of `Fault`.
            message: of `Fault`.
            report: the last one of that rank.
            is_late: the rank may have got on since.
        """
        place: str | None = report.place
        step, samples, own_step = report.step, report.samples, self._at[1]
        position = self._neighbours.position(rank)
        if position is not None:
            place, step, samples = position
        elif is_late and own_step is not None and (step is None or step < own_step):
            # All ranks make their steps together, so that it was in this one; where in it nobody knows.
            place, step, samples = None, own_step, ()
        host, pid = self._neighbours.host(rank), self._neighbours.pid(rank)
        return Fault(rank, kind, message, step, place, samples, host, pid)

    def _say(self, fault: Fault) -> None:
        """Brings this rank's last words to rank 0, whose verdict counts; without it they are the verdict."""
        if self._rank > 0 and self._links.peers:
            self._links.tell({"fault": fault.to_json()})
        else:
            self._decide(fault)

    def _decide(self, fault: Fault, silent: Sequence[int] = ()) -> None:
        """Makes `fault` what ended the job, unless something else has; rank 0 tells everybody."""
        with self._lock:
            if self._fault is not None:
                return
            self._fault = fault
        self._deaths.clear()
        if self._rank == 0:
            self._links.tell({"verdict": fault.to_json(), "silent": list(silent)})
        self._decided.set()
        if self._has_failed:
            return
        self._write_and_end(fault, {*silent})

    def _write_and_end(self, fault: Fault, silent: set[int]) -> None:
        stacks, feed, report = capture_stacks(), self._feed(), self._report()
        unable = silent | {fault.rank}
        neighbours = self._neighbours
        found = {rank: neighbours.end(rank, unable) for rank in sorted(silent) if neighbours.is_here(rank)}

        def write() -> None:
            try:
                if neighbours.speaks(apart_from=unable):
                    self._files.write_first(fault)
                for rank, text in found.items():
                    if text:
                        self._files.append(text, about=rank)
                self._files.append(self._describe_end(fault, report, feed) + "\n" + format_stacks(stacks))
                self._files.write_flight_recording()
            finally:
                self._written.set()

        within(_WRITE_SECONDS, write, None)
        if self._on_end is not None:
            self._on_end(fault)

    def _describe_end(self, fault: Fault, report: Report, feed: Sequence[str]) -> str:
        place = f"it has been in '{report.place}' for {report.idle:.1f} s"
        place += f", step {report.step}" if report.step is not None else ""
        place += f", samples {', '.join(map(str, report.samples))}" if report.samples else ""
        return f"the job ends: {fault}\n{place}\n" + "".join(f"feed: {text}\n" for text in feed)


def _ids(samples: Samples) -> tuple[int, ...]:
    return tuple(int(sample) for sample in samples[:MOST_SAMPLES])
