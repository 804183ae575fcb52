"""A smaller micro-batch after running out of memory: its size, the record of it, and the launcher that starts again."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteConfig

from launch import starting
from trainer.config import Config, load_config
from trainer.data.sampler import BatchPlan
from trainer.memory.shrink import Shrink, halved, micro_batch_at_most, read_shrink, write_shrink


def shrinking(write_config: WriteConfig, **changes: Any) -> Config:
    return load_config(str(write_config(memory={"on_oom": "shrink"}, **changes)))


def record(**changes: Any) -> Shrink:
    known: dict[str, Any] = {"micro_batch_size": 16, "was": 32, "configured": 32, "step": 120, "rank": 0}
    return Shrink(**{**known, "attempt": 1, "time": 0.0, **changes})


@pytest.mark.parametrize(
    ("micro_batch_size", "share", "group_size", "smaller"),
    [
        (32, 32, 1, 16),
        (12, 12, 1, 6),
        (3, 12, 1, 1),
        (15, 15, 1, 5),
        (7, 7, 1, 1),
        (1, 8, 1, None),
        (2, 8, 2, None),
        (6, 12, 2, 2),
        (12, 12, 2, 6),
        (10, 10, 2, 2),
    ],
)
def test_half_a_micro_batch(micro_batch_size: int, share: int, group_size: int, smaller: int | None) -> None:
    assert halved(micro_batch_size, share, group_size) == smaller
    if smaller is not None:
        assert BatchPlan.split(960, 2 * share, smaller, 2, False, group_size).micro_batch_size == smaller


def test_the_largest_micro_batch_that_splits() -> None:
    assert micro_batch_at_most(99, 12, 1) == 12
    assert micro_batch_at_most(5, 12, 1) == 4
    assert micro_batch_at_most(1, 12, 2) is None


def test_a_record_limits_what_was_configured_then() -> None:
    assert record().limit(32, 32, 1) == 16
    assert record().limit(32, 40, 1) == 10  # the batch has changed
    assert record().limit(32, 16, 1) is None  # it takes no more than that anyway
    assert record().limit(24, 48, 1) is None  # the user has chosen another
    assert record().limit(None, 32, 1) is None
    assert record(configured=None).limit(None, 32, 1) == 16
    assert record(configured="auto").limit("auto", 32, 1) == 16
    assert record(configured=None, micro_batch_size=1).limit(None, 8, 2) == 2


def test_a_record_is_new_or_not() -> None:
    assert record().follows(None)
    assert not record().follows(record())
    assert record(micro_batch_size=8).follows(record())
    assert record(configured=64, micro_batch_size=32).follows(record())


def test_records_are_read_as_written_and_rubbish_is_not(tmp_path: Path) -> None:
    assert read_shrink(tmp_path) is None
    write_shrink(tmp_path, record())
    assert read_shrink(tmp_path) == record()
    file = tmp_path / "out-of-memory" / "shrink.json"
    assert [path.name for path in file.parent.iterdir()] == ["shrink.json"]
    for rubbish in ("", "{}", "[1]", file.read_text().replace('"micro_batch_size": 16', '"micro_batch_size": 0')):
        file.write_text(rubbish)
        assert read_shrink(tmp_path) is None


# ---- the launcher ---------------------------------------------------------------------------------------------


@pytest.fixture
def _own_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "end_descendants", lambda: None)  # they would be pytest's


def child(code: str) -> starting.LaunchPlan:
    return starting.LaunchPlan([sys.executable, "-c", code])


@pytest.mark.usefixtures("_own_children")
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit(2)", 2),
        ("import sys; sys.exit(75)", 75),
        ("import sys; sys.exit(1)", 1),
        ("import os; os.kill(os.getpid(), 9)", 1),
        ("", 0),
    ],
)
def test_exit_codes_of_one_shrinking_process(code: str, expected: int, write_config: WriteConfig) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert starting.run(child(code), shrinking(write_config)) == expected
    assert signal.getsignal(signal.SIGINT) == before


# Fails after having recorded half of the last size, down to 1; afterwards without a record.
HALVES = """
import dataclasses, pathlib, sys
from trainer.memory.shrink import Shrink, read_shrink, write_shrink
folder = pathlib.Path(sys.argv[1])
with open(folder / "starts", "a") as file:
    file.write("x")
was = read_shrink(folder)
size = 8 if was is None else was.micro_batch_size
if size > 1:
    write_shrink(folder, Shrink(size // 2, size, None, 1, 0, 1, 0.0))
sys.exit(1)
"""


@pytest.mark.usefixtures("_own_children")
def test_starting_again_ends_when_nothing_is_left_to_shrink(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    config = shrinking(write_config)
    config.run_dir.mkdir()
    plan = starting.LaunchPlan([sys.executable, "-c", HALVES, str(config.run_dir)])
    assert starting.run(plan, config) == 1
    assert (config.run_dir / "starts").read_text() == "xxxx"  # 8, 4, 2, 1
    assert starting.run(plan, config) == 1  # the record of before is no reason
    assert (config.run_dir / "starts").read_text() == "xxxxx"


@pytest.mark.usefixtures("_own_children")
def test_no_start_where_a_run_may_not_be_resumed(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    config = shrinking(write_config, checkpoint={"resume": "never"})
    (config.run_dir / "checkpoints" / "step-00000005").mkdir(parents=True)
    assert starting.run(starting.LaunchPlan([sys.executable, "-c", HALVES, str(config.run_dir)]), config) == 1
    assert (config.run_dir / "starts").read_text() == "x"


@pytest.mark.usefixtures("_own_children")
def test_no_start_after_a_signal(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    config = shrinking(write_config)
    config.run_dir.mkdir()
    code = "import signal, pathlib, time; came = []; signal.signal(15, lambda *_: came.append(1))\n"
    code += "pathlib.Path(%r).touch()\nwhile not came: time.sleep(0.01)"
    ready = config.run_dir / "ready"

    def stop() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    plan = starting.LaunchPlan([sys.executable, "-c", code % str(ready) + HALVES, str(config.run_dir)])
    assert starting.run(plan, config) == 1
    thread.join()
    assert (config.run_dir / "starts").read_text() == "x"
