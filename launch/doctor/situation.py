"""Where a check is made: this rank among the others, its device and the config; and a time limit around each."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from launch.doctor.meeting import Meeting
from launch.doctor.verdicts import Judgement, Place, Reading, Skip, Values, Verdict
from trainer.config import Config
from trainer.errors import one_line_text


@dataclass
class Situation:
    """This rank of the doctor.

    Args:
        place: of this rank.
        places: of all that came, by rank.
        num_local_ranks: on this machine.
        device: of this rank.
        config: None where none was given.
        meeting: of all ranks.
        patience: seconds that a single step of a check may take.
    """

    place: Place
    places: list[Place]
    num_local_ranks: int
    device: torch.device
    config: Config | None
    meeting: Meeting
    patience: float
    stalled: str = field(default="", init=False)  # the exchange that did not end well
    doing: str = field(default="", init=False)
    num_steps: int = field(default=0, init=False)
    _made: list[Path] = field(default_factory=list, init=False)

    @property
    def num_ranks(self) -> int:
        """Ranks that came."""
        return len(self.places)

    @property
    def hosts(self) -> list[Place]:
        """The first rank of every machine."""
        return [place for place in self.places if place.is_first]

    @property
    def is_on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def now(self, what: str) -> None:
        """Says what this rank is at, for the others and for what is said when it stalls."""
        self.doing, self.num_steps = what, self.num_steps + 1
        self.meeting.at(what)

    def make_folder(self, folder: Path) -> None:
        """Makes a folder; what was not there before is removed in the end, where nothing was put into it.

        Raises:
            OSError: it cannot be made.
        """
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made += missing

    def clean(self) -> None:
        """Removes the folders that were made, if they are empty. Call when all ranks are done with them."""
        for folder in sorted(self._made, key=lambda path: -len(path.parts)):
            with suppress(OSError):
                folder.rmdir()


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Args:
        name: of the check.
        measure: returns what there is to know on one rank; it raises Skip, or OSError and RuntimeError.
        judge: says what the readings of all come to.
        on: who measures: every rank, the first of each machine, or rank 0.
        is_together: it begins on all ranks at a time.
        is_exchange: ranks talk to each other in it, and after one that does not end well there is no other.
        on_problem: the verdict where a rank cannot measure.
    """

    name: str
    measure: Callable[[Situation], Values]
    judge: Callable[[Sequence[Reading]], Judgement]
    on: str = "ranks"
    is_together: bool = False
    is_exchange: bool = False
    on_problem: Verdict = Verdict.FAIL

    def concerns(self, place: Place) -> bool:
        """Tells whether a rank measures."""
        return {"ranks": True, "hosts": place.is_first, "main": place.rank == 0}[self.on]


_LOOK_SECONDS = 0.5
SKIPPED, PROBLEM = "skipped", "problem"  # what stands in place of values


def take(check: Check, situation: Situation) -> Values:
    """Measures, and returns the values; or why there are none, also after a while without an answer."""
    if check.is_exchange:
        if situation.num_ranks == 1 and not situation.meeting.missing:
            return {SKIPPED: "one process has nobody to exchange with"}
        if situation.meeting.missing:
            return {SKIPPED: f"rank {min(situation.meeting.missing)} did not come"}
        if situation.stalled:
            return {SKIPPED: f"{situation.stalled} did not end well"}
    box: list[Values] = []

    def measure() -> None:
        try:
            if situation.is_on_gpu:
                torch.cuda.set_device(situation.device)  # each thread has its own
            box.append(check.measure(situation))
        except Skip as reason:
            box.append({SKIPPED: str(reason)})
        except Exception as error:  # whatever a driver, a file system or a library says
            text = re.sub(r"\[\S+:\d+\] ", "", one_line_text(error))  # gloo's files and lines
            box.append({PROBLEM: text[:300], "at": situation.doing})

    # A file system or a collective that does not answer cannot be interrupted, but it can be left behind.
    thread = threading.Thread(target=measure, name=check.name, daemon=True)
    thread.start()
    seen, since = situation.num_steps, time.monotonic()
    while thread.is_alive() and time.monotonic() - since < situation.patience:
        thread.join(_LOOK_SECONDS)
        if situation.num_steps != seen:
            seen, since = situation.num_steps, time.monotonic()
    values = box[0] if box else {PROBLEM: f"no answer within {situation.patience:.0f} s", "at": situation.doing}
    if check.is_exchange and PROBLEM in values:
        situation.stalled = check.name
    return values
