"""The record of a micro-batch that did not fit, by which the next start of a run takes a smaller one.

Owns `out-of-memory/shrink.json` in the run folder and the arithmetic of smaller micro-batches. Who writes it is
`trainer.memory.out_of_memory`, who obeys it the Trainer; `launch.starting` starts again because of it. Imports
no torch.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.files import write_json

logger = logging.getLogger("lockstep")


@dataclass(frozen=True)
class Shrink:
    """A micro-batch that ran out of memory, and the one to take instead."""

    micro_batch_size: int
    was: int
    configured: int | str | None  # `train.micro_batch_size` of then: once the user changes it, the record is void
    step: int
    rank: int
    attempt: int  # how often this run has shrunk, this time included
    time: float

    def limit(self, configured: int | str | None, share: int, group_size: int) -> int | None:
        """Returns the micro-batch to take instead of the configured one, or None where that one stands.

        Args:
            configured: `train.micro_batch_size` of now.
            share: samples of a global batch per rank.
            group_size: neighbours that stay together; the micro-batch is a multiple of it.
        """
        if configured != self.configured:
            return None
        size = min(configured, share) if isinstance(configured, int) else share
        fitting = micro_batch_at_most(min(size, self.micro_batch_size), share, group_size) or group_size
        return fitting if fitting < size else None

    def follows(self, before: Shrink | None) -> bool:
        """Tells whether this says something new after `before`: the same configured size, shrunk further."""
        if before is None or before.configured != self.configured:
            return True
        return self.micro_batch_size < before.micro_batch_size


def micro_batch_at_most(limit: int, share: int, group_size: int) -> int | None:
    """Returns the largest micro-batch of at most `limit` samples that splits `share` evenly, in whole groups."""
    low = [d for d in range(1, math.isqrt(share) + 1) if share % d == 0]
    sizes = {*low, *(share // d for d in low)}
    return max((size for size in sizes if size <= limit and size % group_size == 0), default=None)


def halved(micro_batch_size: int, share: int, group_size: int) -> int | None:
    """Returns the largest micro-batch of at most half the size that splits `share`, or None where there is none."""
    return micro_batch_at_most(micro_batch_size // 2, share, group_size)


def folder_of(run_dir: Path) -> Path:
    """Returns where everything about running out of memory is written."""
    return run_dir / "out-of-memory"


def read_shrink(run_dir: Path) -> Shrink | None:
    """Returns what the run's last failure recorded, or None; a file that is no record is ignored with a warning."""
    file = folder_of(run_dir) / "shrink.json"
    try:
        record = Shrink(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.warning("'%s' is ignored: %s", file, error)
        return None
    if not (isinstance(record.micro_batch_size, int) and record.micro_batch_size >= 1):
        logger.warning("'%s' is ignored: micro_batch_size is %r", file, record.micro_batch_size)
        return None
    return record


def write_shrink(run_dir: Path, record: Shrink) -> None:
    """Writes the record. Ranks that fail together write the same size, so whichever comes last is right."""
    write_json(folder_of(run_dir) / "shrink.json", asdict(record))
