"""Faults on purpose: only in the run that they are for, only for a while, and each of them once."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train, WriteConfig
from injecting import STEP, injector
from run_results import summary

from trainer.errors import UserError
from trainer.faults.injection import Injector
from trainer.faults.plan import VARIABLE, Event, done_file, read_notes, starts_file, write_plan


def changed(fault_plan: Path, **values: Any) -> None:
    fault_plan.write_text(json.dumps({**json.loads(fault_plan.read_text()), **values}))


# ---- on only where it is meant ----------------------------------------------------------------------------


def test_is_off_unless_the_environment_says_otherwise(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Injector.from_environment(run_dir, 0) is None
    monkeypatch.setenv(VARIABLE, "")
    assert Injector.from_environment(run_dir, 0) is None


def test_says_so_loudly_and_once(run_dir: Path, fault_plan: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_plan(fault_plan, run_dir, [Event("kill", step=1000)], seconds_valid=600)
    injector(run_dir, rank=1)
    assert caplog.records == []
    injector(run_dir)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    expected = (
        f"FAULTS ARE INJECTED INTO THIS RUN ON PURPOSE: {VARIABLE} names '{fault_plan}', for 10 minutes from now; 1 "
    )
    assert record.getMessage().startswith(expected)


def test_another_run_does_not_start(run_dir: Path, fault_plan: Path, tmp_path: Path) -> None:
    write_plan(fault_plan, run_dir, [])
    link = tmp_path / "link"
    link.symlink_to(run_dir)
    injector(link)  # the same folder by another name
    with pytest.raises(UserError, match=f"breaks another run on purpose, '{run_dir}': unset {VARIABLE}"):
        Injector.from_environment(tmp_path / "mine", 0)


def test_an_old_plan_starts_nothing(run_dir: Path, fault_plan: Path) -> None:
    write_plan(fault_plan, run_dir, [], seconds_valid=600)
    now = time.time()
    changed(fault_plan, written=now - 700, until=now - 100)
    with pytest.raises(UserError, match=f"ended 100 s ago: unset {VARIABLE}"):
        Injector.from_environment(run_dir, 0)


@pytest.mark.parametrize(("written", "until"), [(0, 25 * 3600), (3600, 7200), (0, -10), (0, 0)])
def test_no_plan_lasts_longer_than_a_day(run_dir: Path, fault_plan: Path, written: float, until: float) -> None:
    write_plan(fault_plan, run_dir, [])
    changed(fault_plan, written=time.time() + written, until=time.time() + until)
    with pytest.raises(UserError, match=r"must be written in the past and end within a day|ended"):
        Injector.from_environment(run_dir, 0)


def test_nothing_happens_after_the_end_of_the_plan(
    run_dir: Path, fault_plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan(fault_plan, run_dir, [Event("raise"), Event("nan")], seconds_valid=100)
    found, now = injector(run_dir), time.time()
    monkeypatch.setattr(time, "time", lambda: now + 101)
    found.at(STEP, 1)
    assert not found.spoil(torch.zeros(2), 1).isnan().any()


def test_a_missing_or_broken_plan_starts_nothing(run_dir: Path, fault_plan: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Injector.from_environment(run_dir, 0)
    for text in ("", "[]", "{}", '{"run_dir": 3}'):
        fault_plan.write_text(text)
        with pytest.raises(UserError, match="is no plan of faults"):
            Injector.from_environment(run_dir, 0)


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        ({"action": "kil"}, "there is no action 'kil'; did you mean 'kill'?"),
        ({"action": "kill", "place": "bakward"}, "there is no place 'bakward'; did you mean 'backward'?"),
        ({"action": "nan", "place": "forward"}, "'nan' takes no place"),
        ({"action": "kill", "in_turn": True}, "an event in turn needs after_seconds"),
        ({"action": "stop-at"}, "'stop-at' and an event that repeats need a step"),
        ({"action": "kill", "stp": 3}, "an event has no 'stp'; did you mean 'step'?"),
        ({"action": "kill", "step": 0}, "step and times at least 1"),
        ({"action": "nan", "repeats": True}, "an event that repeats need a step"),
    ],
)
def test_an_event_that_makes_no_sense(run_dir: Path, fault_plan: Path, event: dict[str, Any], problem: str) -> None:
    write_plan(fault_plan, run_dir, [])
    changed(fault_plan, events=[{"action": "kill"}, event])
    with pytest.raises(UserError) as error:
        Injector.from_environment(run_dir, 0)
    assert problem in str(error.value)
    if "stp" not in event:
        with pytest.raises(UserError, match="event 0"):
            write_plan(fault_plan, run_dir, [Event(**event)])


def test_any_rank_is_rank_0(run_dir: Path, fault_plan: Path) -> None:
    write_plan(fault_plan, run_dir, [])
    changed(fault_plan, events=[{"action": "raise", "rank": "any"}])
    injector(run_dir, rank=1).at(STEP, 1)
    with pytest.raises(RuntimeError, match="injected"):
        injector(run_dir).at(STEP, 1)


# ---- when, where, and once --------------------------------------------------------------------------------


def test_happens_at_its_place_and_step(run_dir: Path, fault_plan: Path) -> None:
    events = [Event("raise", step=3, place="backward"), Event("raise-user-error", rank=1, step=2)]
    write_plan(fault_plan, run_dir, events)
    first, second = injector(run_dir), injector(run_dir, rank=1)
    for step, place in [(1, STEP), (1, "backward"), (2, "backward"), (3, STEP), (3, "forward")]:
        first.at(place, step)
    with pytest.raises(RuntimeError, match="injected"):
        first.at("backward", 3)
    second.at("building", 0)
    second.at("backward", 2)
    with pytest.raises(UserError, match="injected"):
        second.at(STEP, 7)  # at its first chance
    done = first.done()
    assert [(d["action"], d["rank"], d["step"], d["place"]) for d in done] == [
        ("raise", 0, 3, "backward"),
        ("raise-user-error", 1, 7, STEP),
    ]
    assert time.time() - 60 < done[0]["time"] <= done[1]["time"] <= time.time()


def test_happens_before_training(run_dir: Path, fault_plan: Path) -> None:
    write_plan(fault_plan, run_dir, [Event("raise", place="building")])
    with pytest.raises(RuntimeError, match="injected"):
        injector(run_dir).at("building", 0)


def test_happens_once_over_all_attempts(run_dir: Path, fault_plan: Path) -> None:
    write_plan(fault_plan, run_dir, [Event("raise", step=2), Event("raise", step=2), Event("nan", step=2)])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="injected"):
            injector(run_dir).at(STEP, 2)
    last = injector(run_dir)
    last.at(STEP, 2)
    assert last.spoil(torch.zeros(2), 2).isnan().any()
    assert not injector(run_dir).spoil(torch.zeros(2), 2).isnan().any()
    assert len(last.done()) == 3
    write_plan(fault_plan, run_dir, [Event("raise", step=2)])  # a new plan knows nothing of it
    assert injector(run_dir).done() == []


def test_repeats_in_every_attempt_if_asked_to(run_dir: Path, fault_plan: Path) -> None:
    write_plan(fault_plan, run_dir, [Event("nan", step=3, repeats=True), Event("raise", step=4, repeats=True)])
    for _ in range(2):
        found = injector(run_dir)
        for step in (2, 3, 2, 3):  # rolled back in between
            found.at(STEP, step)
            assert bool(found.spoil(torch.zeros(2), step).isnan().any()) == (step == 3)
            assert not found.spoil(torch.zeros(2), step).isnan().any()  # of the next micro-batch
        for _ in range(2):
            found.at("restoring a checkpoint", 3)
            with pytest.raises(RuntimeError, match="injected"):
                found.at(STEP, 4)
        found.at(STEP, 5)


def test_waits_for_its_time(run_dir: Path, fault_plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plan(fault_plan, run_dir, [Event("raise", rank=1, after_seconds=10), Event("raise", after_seconds=20)])
    first, second, now = injector(run_dir), injector(run_dir, rank=1), time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    second.at(STEP, 1)  # before rank 0 has begun
    monkeypatch.setattr(time, "time", lambda: now + 100)
    second.at(STEP, 1)
    first.at(STEP, 1)
    (start,) = read_notes(starts_file(fault_plan))
    assert start == {"step": 1, "time": now + 100, "attempt": str(os.getpid())}
    monkeypatch.setattr(time, "time", lambda: now + 111)
    first.at(STEP, 2)
    with pytest.raises(RuntimeError, match="injected"):
        second.at(STEP, 2)
    again = injector(run_dir)  # in which the clock goes on
    monkeypatch.setattr(time, "time", lambda: now + 121)
    with pytest.raises(RuntimeError, match="injected"):
        again.at(STEP, 2)
    assert [start["step"] for start in read_notes(starts_file(fault_plan))] == [1, 2]


def test_waits_for_its_turn(run_dir: Path, fault_plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000 + time.time()

    def at(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: now + seconds)

    at(0)
    turns = [Event("raise", rank=r, after_seconds=s, in_turn=True) for r, s in ((1, 10), (0, 5), (1, 5))]
    write_plan(fault_plan, run_dir, turns)
    first, second = injector(run_dir), injector(run_dir, rank=1)
    for rank in (first, second):
        rank.at(STEP, 1)
    at(20)
    first.at(STEP, 2)
    with pytest.raises(RuntimeError, match="injected"):
        second.at(STEP, 2)
    at(24)
    first.at(STEP, 3)
    again = [injector(run_dir), injector(run_dir, rank=1)]
    at(100)
    for rank in again:  # what was due is not due at once
        rank.at(STEP, 2)
    at(105)
    again[1].at(STEP, 3)  # not its turn
    with pytest.raises(RuntimeError, match="injected"):
        again[0].at(STEP, 3)
    at(109)
    again[1].at(STEP, 4)
    at(110)
    with pytest.raises(RuntimeError, match="injected"):
        again[1].at(STEP, 5)


def test_delays_steps_in_a_row(run_dir: Path, fault_plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plan(fault_plan, run_dir, [Event("delay", step=2, seconds=7.0, times=3, place="forward")])
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    found, at = injector(run_dir), []
    for step in range(1, 7):
        found.at("forward", step)
        found.at("forward", step)  # of the next micro-batch
        at.append(len(slept))
    assert at == [0, 1, 2, 3, 3, 3]
    assert slept == [7.0] * 3
    assert len(found.done()) == 1


def test_is_on_disk_before_the_deed(run_dir: Path, fault_plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plan(fault_plan, run_dir, [Event("delay", seconds=1)])
    seen: list[int] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: seen.append(len(read_notes(done_file(fault_plan)))))
    injector(run_dir).at(STEP, 1)
    assert seen == [1]


def test_stops_at_a_step_on_all_ranks(run_dir: Path, fault_plan: Path) -> None:
    write_plan(fault_plan, run_dir, [Event("stop-at", step=3)])
    for number in (0, 1):
        found = injector(run_dir, number)
        assert [found.stops_after(step) for step in (2, 3)] == [False, True]
        assert [(d["action"], d["rank"], d["step"]) for d in found.done()] == [("stop-at", 0, 3)]
    again = injector(run_dir)
    assert again.stops_after(4)
    assert len(again.done()) == 1


# ---- in a real run ----------------------------------------------------------------------------------------


def test_a_run_follows_its_plan(train: Train, write_config: WriteConfig, run_dir: Path, fault_plan: Path) -> None:
    write_plan(fault_plan, run_dir, [Event("raise-user-error", step=3, place="backward"), Event("stop-at", step=7)])
    code, out, err = train("--config", write_config())
    assert (code, err) == (2, "error: injected\n")
    assert "FAULTS ARE INJECTED INTO THIS RUN ON PURPOSE" in out
    assert train("--config", write_config()).code == 75
    found = summary(run_dir)
    assert (found["status"], found["step"]) == ("stopped", 7)
    done = [(fault["action"], fault["step"], fault["place"]) for fault in found["injected_faults"]]
    assert done == [("raise-user-error", 3, "backward"), ("stop-at", 7, "exchange of decisions")]


def test_a_run_without_a_plan_has_no_injected_faults(train: Train, write_config: WriteConfig, run_dir: Path) -> None:
    assert train("--config", write_config(train={"steps": 1, "batch_size": 12})).code == 0
    assert summary(run_dir)["injected_faults"] == []


def test_a_run_refuses_the_plan_of_another(
    train: Train, write_config: WriteConfig, run_dir: Path, fault_plan: Path, tmp_path: Path
) -> None:
    write_plan(fault_plan, tmp_path / "other", [])
    code, _, err = train("--config", write_config())
    assert code == 2
    assert err.startswith(f"error: {VARIABLE} names '{fault_plan}', which breaks another run on purpose")
    assert list(run_dir.iterdir()) == []
