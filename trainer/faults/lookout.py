"""Where this rank is, what befalls it there, and how its process ends when the job does.

Puts the watch (`trainer.faults.watch`) and the injection of faults (`trainer.faults.injection`) at the places that the
loop comes through.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.checkpoint.writing import SaveFailed
from trainer.config_run import FaultsConfig
from trainer.data.feed import MicroBatch
from trainer.errors import UserError, one_line, one_line_text
from trainer.faults.fault import Fault, fault_folder, is_lost_peer
from trainer.faults.injection import Injector
from trainer.faults.judging import METRICS
from trainer.faults.numbers import BadNumbers
from trainer.faults.watch import Watch
from trainer.world import World

_FIRST_STEP = 5.0  # times `faults.hang_timeout` for a first step, which may compile
_LONGEST_LEAVE_SECONDS = 60.0  # for a rank that fails by itself, where a tracker or a file system hangs
_LEAVE_SECONDS = 2.0  # that a main thread gets to begin to leave by itself when the job ends; then twice as long


class Lookout:
    """This rank's place among the others, in the good sense and the bad.

    Args:
        config: the `faults` section.
        world: the processes that train together; all ranks make their lookouts together.
        run_dir: the run folder.
        attempt: number of this attempt at the run, from 1.
        describe_feeds: returns what is being read at this moment, in lines; called on the watch's thread.
        summarise: leaves a summary of a run that such a fault has ended; called on the watch's thread.

    Raises:
        UserError: faults are to be injected, but not into this run; on every rank alike.
    """

    def __init__(
        self,
        config: FaultsConfig,
        world: World,
        run_dir: Path,
        attempt: int,
        describe_feeds: Callable[[], list[str]],
        summarise: Callable[[Fault], None],
    ) -> None:
        self._world = world
        self._summarise = summarise
        self._is_leaving, self._has_left = threading.Event(), threading.Event()
        self.injector = world.agree(lambda: Injector.from_environment(run_dir, world.rank))
        self.watch = Watch(
            world.rank,
            world.num_ranks,
            world.gather,
            config.hang_timeout.seconds if config.hang_timeout is not None else None,
            fault_folder(run_dir, attempt),
            describe_feeds,
            self._end_with,
            world.num_collectives,
        )

    def at(self, place: str, step: int, batch: MicroBatch | None = None, is_first: bool = False) -> None:
        """The main thread comes to a place.

        Args:
            place: one of `judging.PLACES`.
            step: the optimizer step that is being made, or was made last, counted from 1.
            batch: what it works on.
            is_first: whether this is the first step, which may take longer.
        """
        takes_longer = is_first or place == "restoring a checkpoint"
        allowance = 0.0 if place in ("building", METRICS) else _FIRST_STEP if takes_longer else 1.0
        self.watch.at(place, step, () if batch is None else batch.sample_ids.numpy(), allowance)
        if self.injector is not None:
            self.injector.at(place, step)

    @contextmanager
    def last_words(self) -> Iterator[None]:
        """Tells the other ranks of an error in the body, before it ends this process."""
        try:
            yield
        except BaseException as error:
            self.tell(error)
            if is_lost_peer(error):
                self.ended_by()  # whoever it was: it is written down before this process ends
            self.close()
            raise

    def tell(self, error: BaseException) -> None:
        """Tells the other ranks that this one fails, unless they fail alike, or one of them is the reason."""
        if isinstance(error, KeyboardInterrupt | SaveFailed) or is_lost_peer(error):
            return
        if isinstance(error, BadNumbers):
            self.watch.failed(error.fault)
        elif not (isinstance(error, UserError) and error.agreed):
            place, step, samples = self.watch.place()
            can_restart = not isinstance(error, UserError)
            message = one_line(error) if can_restart else one_line_text(error)
            self.watch.failed(Fault(self._world.rank, "error", message, step, place, samples, restart=can_restart))

    def ended_by(self) -> Fault | None:
        """Returns which rank ended the job, if it is known; waits a moment for the news."""
        return self.watch.first_fault(seconds=1.0)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """The main thread ends the run in order; if the body takes too long, the process ends without it."""
        self._is_leaving.set()
        limit = threading.Timer(_LONGEST_LEAVE_SECONDS, os._exit, [1])
        limit.daemon = True
        limit.start()
        try:
            yield
        finally:
            self.watch.close()  # which waits for what is being written about the fault
            self._has_left.set()
            limit.cancel()

    def close(self) -> None:
        """Says goodbye to the other ranks' watches."""
        self.watch.close()

    def _end_with(self, fault: Fault) -> None:
        """Ends this process because of a rank; called on the watch's thread."""
        survivors = [rank for rank in range(self._world.num_ranks) if rank != fault.rank]
        if self._world.rank == min(survivors, default=0):
            sys.stderr.write(f"the job ends because of {fault}\n")
            sys.stderr.flush()
        # A main thread that waits for the lost rank mostly fails by itself, and leaves in order.
        if self._is_leaving.wait(_LEAVE_SECONDS) and self._has_left.wait(2 * _LEAVE_SECONDS):
            return
        last_rites = threading.Thread(target=self._summarise, args=[fault], daemon=True)
        last_rites.start()  # in a thread: a file system that hangs must not keep the process
        last_rites.join(_LEAVE_SECONDS)
        os._exit(1)
