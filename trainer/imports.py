"""Importing torch, and what needs it, without the garbage collector. Imports no torch itself."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Keeps the garbage collector out of the first imports of torch, and what they make out of its later rounds.

    A million objects come of them, none of which is garbage. Looking through them over and over makes a third of the
    time of these imports, and once more of the program's end. Where torch is there already nothing is done: what is
    exempted for good could then be a model.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
