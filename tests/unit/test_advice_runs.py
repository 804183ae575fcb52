"""Runs of one process that really have a problem: what they are told, and what following it gains.

The promise is kept where the measured gain is between half and twice of it. What takes time here sleeps wherever it
can, so that the load of the machine does not decide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from advising import follow
from conftest import SUPPORT, Train, WriteConfig
from run_results import summary

SLEEPING = "bottlenecks:Sleeping"


@pytest.fixture(autouse=True)
def _support(monkeypatch: pytest.MonkeyPatch) -> None:


def _model(forward: float, backward: float, **arguments: Any) -> dict[str, Any]:
    return {"name": SLEEPING, "args": {"forward": forward, "backward": backward, **arguments}}


def test_more_workers_for_slow_samples(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(
        data__train={"name": "slow:Steady", "args": {"length": 120, "seconds": 0.01}},
        data__eval=None,
        data__workers=1,
        model=_model(0.02, 0.02),
        train={"steps": 40, "batch_size": 12},
        log__every=10,
    )
    followed = follow(train, config, tmp_path, "data_wait")
    assert followed.advice["settings"] == {"data.workers": pytest.approx(4, abs=1)}
    assert followed.advice["text"].startswith("The device waited 6")
    assert followed.keeps_its_promise(), followed
    assert followed.advice["text"].split(":")[0] in followed.log  # live, too
    assert followed.remaining == []
