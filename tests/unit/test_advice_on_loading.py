"""What the rules of loading say of given figures. Runs show that it is true: test_advice_runs.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from healthy_run import GIB, MIB, heard, said

from trainer.advice.measured import Host, Loading
from trainer.advice.stretches import WorkerMemory


def test_workers() -> None:
    # 64 samples in 0.1 s, of which 0.031 s are waited: a worker loads for 0.4 s, and 4 deliver 640 samples/s.
    found = heard("data_wait", {"data_wait": 0.31}, loading=Loading(num_workers=4, seconds=0.4, cpu_seconds=0.4))
    assert found.text == (
        "The device waited 31% of the time for data. 4 workers deliver 640 samples/s, the model can take "
        "928 samples/s: set data.workers=8 (11 cores are free)"
    )
    assert found.settings == {"data.workers": 8}
    assert found.gain == pytest.approx(0.1 / 0.069 - 1)


def test_workers_that_wait_for_a_disk_need_no_cores() -> None:
    loading = Loading(num_workers=1, seconds=0.3, cpu_seconds=0.003)
    found = heard("data_wait", {"data_wait": 0.6}, loading=loading, host=Host(num_cores=2))
    assert found.settings == {"data.workers": 10}
    assert found.text.endswith("(a worker waits 98% of the time, and all need 0.2 of a core)")


def test_cores_limit_the_gain_of_workers() -> None:
    """A step of 50 ms and 60 ms of loading: beside one thread of two cores, or with every core taken by the step."""
    loading = Loading(num_workers=0, seconds=0.06, cpu_seconds=0.06)
    one = heard("data_wait", {"data_wait": 0.6}, loading=loading, host=Host(num_cores=2, num_threads=1), device="cpu")
    assert one.settings == {"data.workers": 2}
    assert one.gain == pytest.approx(0.1 / 0.06 - 1)
    assert "Loading in the thread of the step leaves 640 samples/s" in one.text
    both = heard("data_wait", {"data_wait": 0.6}, loading=loading, host=Host(num_cores=2, num_threads=2), device="cpu")
    assert both.settings == {}
    assert both.gain is None
    assert "and no core of 2 is left for more workers: make reading a sample cheaper" in both.text


@pytest.mark.parametrize(
    ("alternatives", "settings"),
    [
        (("resident", "device_decode", "cache"), {"data.feed": "resident"}),
        (("device_decode", "cache"), {"data.feed": "device_decode"}),
        (("cache",), {"data.cache.path": "cache"}),
        ((), {}),
    ],
)
def test_cheaper_loading_where_no_core_is_left(alternatives: tuple[str, ...], settings: dict[str, str]) -> None:
    loading = Loading(num_workers=3, seconds=0.3, cpu_seconds=0.3, alternatives=alternatives, resident_bytes=4 * GIB)
    found = heard("data_wait", {"data_wait": 0.15}, loading=loading, host=Host(num_cores=4))
    assert found.settings == settings
    assert found.gain is None
    assert "no core of 4 is left for more workers" in found.text
    assert found.text.endswith("at most 18% are to be gained.")


def test_data_lives_on_the_device_where_steps_leave_room() -> None:
    """Of 72 GiB a step takes 60."""
    loading = Loading(num_workers=2, seconds=0.01, alternatives=("resident",), resident_bytes=10 * GIB)
    found = heard("copies", {"h2d": 0.2}, loading=loading)
    assert found.settings == {"data.feed": "resident"}
    assert "10.00 GiB of 12.00 GiB that steps leave free" in found.text
    assert found.gain == pytest.approx(0.25)
    assert heard("copies", {"h2d": 0.2}, loading=replace(loading, resident_bytes=11 * GIB)).settings == {}
    slow = replace(loading, seconds=0.3, cpu_seconds=0.3, resident_bytes=11 * GIB)
    assert heard("data_wait", {"data_wait": 0.15}, loading=slow, host=Host(num_cores=3)).settings == {}


def test_workers_need_memory() -> None:
    """One takes 1 GiB and has two batches of 128 MiB ready or in work: 6 GiB that are free hold 3 more, with care."""
    loading = Loading(num_workers=4, seconds=0.4, cpu_seconds=0.1, batch_bytes=128 * MIB, bytes_per_worker=GIB)
    host = Host(num_cores=64, free_memory=6 * GIB)
    found = heard("data_wait", {"data_wait": 0.6}, loading=loading, host=host)
    assert found.settings == {"data.workers": 7}
    assert found.gain == pytest.approx(0.1 / (0.4 / 7) - 1)
    found = heard("data_wait", {"data_wait": 0.6}, loading=loading, host=replace(host, free_memory=GIB))
    assert found.settings == {}
    assert "the host has no memory for more workers" in found.text
    found = heard("data_wait", {"data_wait": 0.6}, loading=replace(loading, num_workers=64, seconds=6.4))
    assert "64 workers are many" in found.text


def test_a_deeper_queue() -> None:
    loading = Loading(num_workers=4, seconds=0.1, cpu_seconds=0.1, prefetch_factor=2, batch_bytes=MIB)
    found = heard("data_wait", {"data_wait": 0.2}, loading=loading)
    assert found.settings == {"data.prefetch_factor": 8}
    assert found.gain is None
    assert "at most 25%" in found.text
    assert "They take up to 32.00 MiB of pinned host memory." in found.text
    deep = replace(loading, prefetch_factor=8)
    assert heard("data_wait", {"data_wait": 0.2}, loading=deep).settings == {"data.prefetch_factor": 16}
    assert said("data_wait", {"data_wait": 0.2}, loading=replace(loading, prefetch_factor=16)) is None
    assert said("data_wait", {"data_wait": 0.2}, loading=loading, host=Host(16, free_memory=20 * MIB)) is None


def test_copies() -> None:
    loading = Loading(num_workers=0, seconds=0.01, cpu_seconds=0.01)
    found = heard("copies", {"h2d": 0.2, "data_wait": 0.1}, loading=loading)
    assert found.settings == {"data.workers": 1}
    assert found.gain == pytest.approx(0.1 / 0.07 - 1)
    found = heard("copies", {"h2d": 0.2}, loading=replace(loading, num_workers=2, alternatives=("resident",)))
    assert found.settings == {"data.feed": "resident"}
    assert found.gain == pytest.approx(0.25)
    found = heard("copies", {"h2d": 0.2}, loading=replace(loading, num_workers=2))
    assert found.settings == {}
    assert found.gain is None


def test_memory_of_workers() -> None:
    """Of 4 workers each grows by 25 MiB in a minute; a run of 10,000 s takes 17 GiB in the end."""

    def loading(series: Iterable[tuple[float, int]]) -> Loading:
        return Loading(num_workers=4, seconds=0.1, worker_bytes=tuple(series))

    grows = tuple((60.0 * i, (GIB + i * 100 * MIB) // 4) for i in range(7))
    roomy = Host(num_cores=16, free_memory=20 * GIB)
    found = heard("loader_memory", loading=loading(grows), host=roomy)
    assert found.text.startswith("Loader workers grew from 1.00 GiB to 1.59 GiB in 6 min, 5.86 GiB an hour.")
    assert (found.settings, found.gain) == ({}, None)
    full = heard("loader_memory", loading=loading(grows), host=replace(roomy, free_memory=10 * GIB))
    assert "fills the memory" in full.text
    assert full.rank > 1 > 0.02 > found.rank
    for stays in (
        grows[:5],  # too few to tell
        (*grows, (420.0, grows[-1][1])),  # it has come to an end
        ((60.0 * i, (GIB + i * MIB) // 4) for i in range(7)),  # hardly
        (*grows, *((60.0 * i, grows[-1][1] + 1024 * i) for i in range(7, 13))),  # hardly any more
    ):
        assert said("loader_memory", loading=loading(stays), host=roomy) is None


def test_memory_is_compared_with_that_of_as_many_settled_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("trainer.advice.stretches.time.monotonic", lambda: now)
    memory = WorkerMemory()
    for at, num_workers, size in (
        (1.0, 2, 10),  # just started
        (50.0, 2, 20),
        (61.0, 2, 30),
        (70.0, 2, None),
        (80.0, 2, 40),
    ):
        now = at
        memory.add(num_workers, size)
    assert memory.series == [(61.0, 30), (80.0, 40)]
    now = 90.0
    memory.add(3, 50)
    assert (memory.series, memory.latest) == ([], 50)
