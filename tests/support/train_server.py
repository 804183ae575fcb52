"""Runs `train.py` again and again, each time in a process of its own that need not import torch first.

For every line of JSON with `arguments`, `out` and `err` (files) there is a line with the exit code.
"""

from __future__ import annotations

import gc
import json
import os
import sys

import trainer.loop  # noqa: F401 (what takes seconds to import)
from trainer.cli import leave, train

gc.freeze()  # the children need not look at it, and would copy it

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        leave(train(request["arguments"]))
    sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
    sys.stdout.flush()
