"""Samples that cannot be read: counted, named in the log, and too many of them the end of the run.

What takes their place in a batch is `trainer.data.loader`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from trainer.data.loader import Skipped
from trainer.errors import UserError

logger = logging.getLogger("lockstep")

_LOGGED = 10  # the others are only counted
_JUDGED_FROM = 1000  # samples read before the share of unreadable ones ends a run


class Unreadable:
    """What of one data set this rank could not read.

    Args:
        name: of the data set, for messages.
        num_samples: that it has.
        max_share: of the samples read so far: more end the run.
    """

    def __init__(self, name: str, num_samples: int, max_share: float) -> None:
        self._name = name
        self._num_samples = num_samples
        self._max_share = max_share
        self._num_read = 0
        self._samples: set[int] = set()
        self.num_skipped = 0
        """Reads that failed: a sample counts each time."""

    def count(self, num_read: int, skipped: Sequence[Skipped]) -> None:
        """Counts a batch.

        Args:
            num_read: samples that were asked for.
            skipped: which could not be read, and why.

        Raises:
            UserError: they are too many.
        """
        self._num_read += num_read
        if not skipped:
            return
        for sample, problem in skipped:
            self.num_skipped += 1
            if sample not in self._samples and len(self._samples) < _LOGGED:
                logger.warning("%s: skipped: %s", self._name, problem)
            self._samples.add(sample)
        read = min(max(self._num_read, _JUDGED_FROM), self._num_samples)
        if len(self._samples) > self._max_share * read:
            message = (
                f"{len(self._samples)} of the first {read} samples cannot be read, "
                f"more than data.max_skipped ({self._max_share:g}); the last: {skipped[-1].problem}"
            )
            raise UserError(message, path=self._name)
