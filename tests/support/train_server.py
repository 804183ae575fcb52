"""Runs `train.py` again and again, each time in processes of its own that need not import torch first.

For every line of JSON with `arguments`, `ranks`, `variables` (of the environment), `folder` (to run in), `out` and
`err` (files) there is a line with the ranks' exit codes.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from typing import Any

import trainer.loop  # noqa: F401 (what takes seconds to import)
from trainer.cli import leave, train
from trainer.telemetry import efficiency


def start(request: dict[str, Any], rank: int, port: int) -> int:
    """Starts a rank and returns its process id."""
    child = os.fork()
    if child == 0:
        if request["ranks"] > 1:  # as torchrun would set them
            ranks, addresses = str(request["ranks"]), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            os.environ.update({**addresses, **places, "ACCELERATE_USE_CPU": "true"})
        os.environ.update(request["variables"])
        os.chdir(request["folder"])
        for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        leave(train(request["arguments"]))
    return child


# It takes each process a quarter of a second; that it is measured is tested in test_efficiency.py.
efficiency._measured_flops = lambda *_: 1e11  # type: ignore[assignment]
gc.freeze()  # the children need not look at it, and would copy it
for line in sys.stdin:
    task = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        chosen = free.getsockname()[1]
    children = [start(task, rank, chosen) for rank in range(task["ranks"])]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.stdout.write(json.dumps(codes) + "\n")
    sys.stdout.flush()
