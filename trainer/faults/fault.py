"""What ended an attempt at a run: the first rank's real error, and the files in which it is kept.

`faults/attempt-003/` in the run folder has `first.json` (the fault that ended the attempt, by whichever rank saw it
first) and `rank-1.txt` (what rank 1 was doing: its stacks, and what its feed read). Imports no torch.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

FIRST = "first.json"


@dataclass(frozen=True)
class Fault:
    """What went wrong on one rank.

    Args:
        rank: whose fault it is.
        kind: `error` (an exception), `lost` (the process is gone), `hang` (it does not get on), `numbers` (a loss or
            gradient that is not finite, or a spike).
        message: one line: the exception, or what is known of the death or the hang.
        step: the optimizer step that it was making, counted from 1; None before training.
        place: what it was doing, such as `backward`.
        samples: ids of the micro-batch that it was working on.
        host: name of its machine.
        pid: of its process.
        restart: whether starting again can help.
        time: seconds since 1970.
    """

    rank: int
    kind: str
    message: str
    step: int | None = None
    place: str | None = None
    samples: tuple[int, ...] = ()
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    restart: bool = True
    time: float = field(default_factory=lambda: round(time.time(), 3))

    def __str__(self) -> str:
        """Returns it in one line, for the person who has to mend it."""
        where = f"rank {self.rank} on {self.host}"
        if self.step is not None:
            where += f", step {self.step}"
        if self.place is not None:
            where += f" ({self.place})"
        shown = ", ".join(map(str, self.samples[:16])) + (", ..." if len(self.samples) > 16 else "")
        return f"{where}: {self.message}" + (f"; samples {shown}" if self.samples else "")

    def to_json(self) -> str:
        """Returns it as JSON, in one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Fault:
        """Reads what `to_json` wrote; raises ValueError on anything else."""
        try:
            values = json.loads(text)
            return cls(**{**values, "samples": tuple(values["samples"])})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError("not a fault") from error


def fault_folder(run_dir: Path, attempt: int) -> Path:
    """Returns where an attempt's files go; it is made when there is something to write."""
    return run_dir / "faults" / f"attempt-{attempt:03d}"


def next_attempt(run_dir: Path, number: int) -> int:
    """Returns a number of an attempt that no earlier one has left files under: `number`, or one more than theirs."""
    return max([number, *(_number(folder) + 1 for folder in run_dir.glob("faults/attempt-*"))])


def _number(folder: Path) -> int:
    name = folder.name.rpartition("-")[2]
    return int(name) if name.isdigit() else -1


def write_first(folder: Path, fault: Fault) -> bool:
    """Writes `first.json`, unless it is there: whichever rank comes first is right. Returns whether it did.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FIRST
    if file.exists():
        return False
    staged = folder / f".{FIRST}.{fault.rank}.{os.getpid()}"
    staged.write_text(fault.to_json() + "\n", encoding="utf-8")
    try:
        os.link(staged, file)  # which fails where the file exists
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: two ranks at once may both write it
        os.replace(staged, file)
    finally:
        with suppress(OSError):
            staged.unlink()
    return True


def read_first(run_dir: Path, since: float = 0.0) -> Fault | None:
    """Returns the fault that ended the newest attempt that has one, if it is not older than `since`."""
    for folder in sorted(run_dir.glob("faults/attempt-*"), key=_number, reverse=True):
        try:
            fault = Fault.from_json((folder / FIRST).read_bytes())
        except (OSError, ValueError):
            continue
        return fault if fault.time >= since else None
    return None


def is_lost_peer(error: BaseException) -> bool:
    """Tells whether a collective failed because another rank is gone, which is never the reason itself."""
    from torch import distributed as dist  # late: errors of a config are shown without torch

    text = str(error)
    gloo = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Read error", "Write error")
    nccl = ("remote process exited", "ncclRemoteError", "communicator was aborted", "collective operation timeout")
    is_collective = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and is_collective and any(part in text for part in (*gloo, *nccl))
