"""Which signals a launcher passes on, and how long ranks have to end after one. Imports no torch."""

from __future__ import annotations

import math

from trainer.config import Config

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")  # passed on to the ranks
_SHUTDOWN_SECONDS = 30  # which ranks have after a signal before they are killed, at least
_SHUTDOWN_MARGIN = 15  # beyond faults.grace


def shutdown_seconds(config: Config) -> int:
    """Returns what ranks have after a signal before they are killed."""
    return max(_SHUTDOWN_SECONDS, math.ceil(config.faults.grace.seconds) + _SHUTDOWN_MARGIN)
