"""Importing torch, and what needs it, without the garbage collector. Imports no torch itself."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Keeps the garbage collector out of the first imports of torch, and what they make out of its later rounds.

    Hundreds of thousands of objects come of them, and no garbage; looking through them again and again takes about a
    third of the time of these imports, and a second at the end of the program. Where torch is there already nothing is
    done: what is exempted for good could then be a model.
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
