"""A data set that asks its run to stop, as a cluster would, named by import path."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from vectors import Dicts


class Stopping(Dicts):
    """The first rank gets SIGTERM with its n-th sample; n is what the file says, if it is there.

    Args:
        length: samples.
        file: such as could be removed between two starts of a run.
    """

    def __init__(self, length: int, file: str) -> None:
        super().__init__(length)
        first = os.environ.get("RANK", "0") == "0"
        self.left = int(Path(file).read_text()) if first and Path(file).exists() else 0

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)
