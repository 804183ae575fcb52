"""Who is slow, and what it costs."""

from __future__ import annotations

import pytest
import torch

from trainer.faults import pace as pace_module
from trainer.faults.pace import Pace, find_straggler, waited_share


@pytest.mark.parametrize(
    ("by_rank", "step_seconds", "rank", "share"),
    [
        ([1.0, 1.5, 1.0, 1.1], 2.0, 1, 0.25),
        ([1.5, 1.0], 2.0, 0, 0.25),
        ([1.0, 1.05], 2.0, None, 0.025),
        ([1.0, 1.0, 1.0], 1.0, None, 0.0),
        ([1.0], 1.0, None, 0.0),
        ([0.0, 0.0], 0.0, None, 0.0),
    ],
)
def test_the_slowest_is_named_where_it_matters(
    by_rank: list[float], step_seconds: float, rank: int | None, share: float
) -> None:
    found = find_straggler(by_rank, step_seconds)
    assert (found.rank if found is not None else None) == rank
    assert waited_share(by_rank, step_seconds) == pytest.approx(share)


def test_what_is_said_of_it() -> None:
    said = str(find_straggler([0.1, 0.2, 0.1], 0.4))
    assert said == (
        "rank 1 takes 200.0 ms to the exchange of gradients, the others 100.0 ms: it costs 25% of each step"
    )


def test_only_the_way_to_the_exchange_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(pace_module.time, "perf_counter", lambda: now[0])
    pace = Pace(torch.device("cpu"))
    assert pace.mean_seconds() == 0.0
    for seconds in (0.02, 0.04):
        pace.begin_step()
        now[0] += seconds
        pace.meet()
        now[0] += 0.05
    assert pace.mean_seconds() == pytest.approx(0.03)
    assert pace.mean_seconds() == 0.0
