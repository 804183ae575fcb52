"""Runs of two ranks that really have a problem: what they are told, and what following it gains.

`LOCKSTEP_NIGHTLY=1` follows it, in longer runs. A promise is kept within the margin of `advising.MARGIN`. The slow
network is a real one: the ranks live in a network namespace whose loopback device sends 50 MB/s and no more.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from advising import Followed, Told, check
from conftest import NIGHTLY, SUPPORT, Outcome, WriteConfig, nightly
from launching import environment
from resuming import TrainServer

from trainer.faults.plan import VARIABLE, Event, write_plan

pytestmark = pytest.mark.alone

SLOW = "ip link set lo up && tc qdisc add dev lo root tbf rate 400mbit burst 256kb latency 400ms"
NAMESPACE = ["unshare", "--map-root-user", "--net", "sh", "-c"]


class SlowNetworkServer(TrainServer):
    """Runs ranks that are connected by a slow network."""

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*NAMESPACE, f"{SLOW} && exec {sys.executable} {SUPPORT / 'train_server.py'}"],
            env=environment(OMP_NUM_THREADS="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def slow_network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainServer]:
    try:
        done = subprocess.run([*NAMESPACE, SLOW], capture_output=True, text=True, timeout=10, check=False)
    except OSError as error:
        pytest.skip(f"needs unshare (util-linux): {error}")
    if done.returncode:
        pytest.skip(f"needs ip and tc (iproute2), and the right to make a network namespace: {done.stderr.strip()}")
    with SlowNetworkServer(tmp_path_factory.mktemp("slow-network")) as running:
        yield running


def _config(write_config: WriteConfig, **changes: Any) -> Path:
    """Writes a run of about as few steps as can be told anything: 8 after the first report, and a second."""
    quiet = {"data__eval": None, "checkpoint__every": 1000, "log__every": 8 if NIGHTLY else 5}
    return write_config(**{**quiet, "train": {"steps": 32 if NIGHTLY else 17, "batch_size": 12}, **changes})


def _sleeping(backward: float, num_blocks: int, width: int) -> dict[str, Any]:
    arguments = {"forward": 0.02, "backward": backward, "num_blocks": num_blocks, "width": width}
    return {"name": "bottlenecks:Sleeping", "args": arguments}


@nightly
def test_half_the_bytes_over_a_slow_network(
    slow_network: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = _config(write_config, model=_sleeping(0.02, 2, 512))

    def is_right(told: Told) -> bool:
        num_said = told.log.count("advice: Exchanging gradients (4.0 MiB a step)")
        # In a longer run as soon as it is known, too.
        return told.settings == {"parallel.gradient_compression": "bf16"} and num_said >= (2 if NIGHTLY else 1)

    check(partial(slow_network.train, ranks=2), config, tmp_path, "communication", is_right)


@nightly
def test_smaller_buckets_where_there_is_one(
    slow_network: TrainServer, write_config: WriteConfig, tmp_path: Path
) -> None:
    config = _config(write_config, model=_sleeping(0.3, 8, 400))

    def is_right(told: Told) -> bool:
        return told.settings == {"parallel.bucket_mb": 2}

    check(partial(slow_network.train, ranks=2), config, tmp_path, "communication", is_right)


@nightly
def test_parameters_that_stay_gathered(slow_network: TrainServer, write_config: WriteConfig, tmp_path: Path) -> None:
    config = _config(write_config, model=_sleeping(0.02, 4, 256), parallel={"strategy": "fsdp"})

    def is_right(told: Told) -> bool:
        return told.settings == {"parallel.reshard_after_forward": False}

    check(partial(slow_network.train, ranks=2), config, tmp_path, "communication", is_right)


def test_a_rank_that_is_slow(server: TrainServer, write_config: WriteConfig, tmp_path: Path) -> None:
    """The advice is to look for what is wrong with it; in the second run it is mended."""
    config = _config(write_config, model=_sleeping(0.06, 2, 8))
    plan = tmp_path / "plan.json"
    event = Event("delay", rank=1, place="forward", seconds=0.06, times=1000)

    def run(*arguments: Any) -> Outcome:
        folder = Path(str(arguments[2]).removeprefix("run.dir="))
        is_mended = folder.name == "after"
        write_plan(plan, folder, [] if is_mended else [event])
        return server.train(*arguments, ranks=2, variables={VARIABLE: str(plan)})

    def is_right(told: Told) -> bool:
        return told.advice["text"].startswith("Rank 1 on ") and "launch doctor" in told.advice["text"]

    def holds(followed: Followed) -> bool:
        return followed.keeps_its_promise() and followed.remaining == []

    check(run, config, tmp_path, "straggler", is_right, holds=holds)
