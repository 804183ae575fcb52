"""Goodput: the parts add up to the wall time, and lost work is what was lost, in whatever way a run is interrupted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config

from trainer.config import Config
from trainer.goodput import FILE, PARTS, Goodput, read_attempts
from trainer.ledger import Ledger
from trainer.run_folder import RunFolder

START = 1_000_000.0  # seconds since 1970, of the first attempt


class FakeTime:
    """Stands in for the module `time`: passes when told to."""

    def __init__(self) -> None:
        self.wall = START
        self.passed = 0.0

    def sleep(self, seconds: float) -> None:
        self.wall += seconds
        self.passed += seconds

    def time(self) -> float:
        return self.wall

    def perf_counter(self) -> float:
        return self.passed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr("trainer.ledger.time", fake)
    return fake


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(Config.model_validate(tiny_config(tmp_path / "run")))


class Life:
    """An attempt: its process starts now, and its steps take as long as they are told."""

    def __init__(self, folder: RunFolder, clock: FakeTime, first_step: int = 0, startup: float = 10.0) -> None:
        self.clock, self.step, self.left_out = clock, first_step, 0
        self.phases = {"total": 0.0, "train": 0.0, "startup": 0.0, "evaluation": 0.0, "checkpoint": 0.0}
        self.data_wait = 0.0
        started = clock.wall
        clock.sleep(startup / 2)  # imports
        self.ledger = Ledger(folder, started)
        self._spend("startup", startup / 2)
        self.ledger.begin(first_step, num_processes=2)

    def _spend(self, phase: str, seconds: float) -> None:
        self.clock.sleep(seconds)
        self.phases[phase] += seconds
        self.phases["total"] += seconds

    def train(self, steps: int, each: float = 1.0, waiting: float = 0.0) -> Life:
        for _ in range(steps):
            self._spend("train", each)
            self.data_wait += waiting
            self.step += 1
        return self

    def part_of_a_step(self, seconds: float) -> Life:
        self._spend("train", seconds)
        return self

    def evaluate(self, seconds: float) -> Life:
        self._spend("evaluation", seconds)
        return self

    def report(self) -> Life:
        self.ledger.update(self.step, self.phases, self.data_wait, self.left_out)
        return self

    def save(self, seconds: float = 0.0) -> Life:
        self.ledger.update(self.step, self.phases, self.data_wait, self.left_out, saves=True)
        self._spend("checkpoint", seconds)
        self.ledger.saved(self.step)
        return self

    def roll_back(self, step: int) -> Life:
        self.ledger.rolled_back(self.step, step, self.phases, self.data_wait, self.left_out)
        self.step = step
        return self

    def end(self, status: Any) -> Goodput:
        self.ledger.end(status, self.step, self.phases, self.data_wait, self.left_out)
        return self.ledger.summary()


def parts(found: Goodput, total: float) -> dict[str, Any]:
    """Returns the parts that are not zero, after checking that they add up."""
    assert found.total == pytest.approx(total, abs=1e-4)
    assert sum(found.seconds.values()) == pytest.approx(found.total, abs=1e-9)
    assert found.goodput == pytest.approx(found.seconds["train"] / found.total)
    assert min(found.seconds.values()) >= 0
    assert set(found.seconds) >= set(PARTS)
    return {part: pytest.approx(value, abs=1e-4) for part, value in found.seconds.items() if value > 1e-4}


def test_parts_add_up(folder: RunFolder, clock: FakeTime) -> None:
    life = Life(folder, clock, startup=8).train(10, each=2, waiting=0.5).report().evaluate(3).save(4)
    found = life.end("finished")
    assert parts(found, 35) == {"startup": 8, "train": 15, "data_wait": 5, "evaluation": 3, "checkpoint": 4}
    assert found.num_attempts == 1
    assert found.line() == (
        "goodput 42.9% of 35.0 s in 1 attempt: "
        "start-up 22.9%, data wait 14.3%, checkpoint stalls 11.4%, evaluation 8.6%"
    )


def test_a_phase_that_is_not_known_has_its_own_name(folder: RunFolder, clock: FakeTime) -> None:
    life = Life(folder, clock).train(5).save()
    life.phases["warming_up"] = 0.0
    life._spend("warming_up", 5)
    found = life.end("finished")
    assert parts(found, 20) == {"startup": 10, "train": 5, "warming_up": 5}
    assert "warming up 25.0%" in found.line()


def test_killed_and_started_again(folder: RunFolder, clock: FakeTime) -> None:
    first = Life(folder, clock).train(10).save().train(7).report()
    first.train(3).report()  # so soon that it is not written
    clock.sleep(100)
    second = Life(folder, clock, first_step=10)
    assert (first.ledger.number, second.ledger.number) == (1, 2)
    found = second.train(10).save().end("finished")
    assert parts(found, 150) == {"startup": 20, "train": 20, "lost": 7, "restarts": 103}
    assert [a.status for a in read_attempts(folder.path / FILE)] == ["killed", "finished"]


def test_lost_work_is_exact(folder: RunFolder, clock: FakeTime) -> None:
    """Steps take different times, and the checkpoint was not saved when a report was made."""
    life = Life(folder, clock).train(10, each=1, waiting=0.5).save().train(1, each=10).train(9, each=3, waiting=2)
    life.report().part_of_a_step(1.5)
    life.end("failed")
    clock.sleep(30)
    again = Life(folder, clock, first_step=10).train(10).save()
    found = again.end("finished")
    expected = {"startup": 20, "train": 5 + 10, "data_wait": 5, "lost": 10 + 27 + 1.5, "restarts": 30}
    assert parts(found, 108.5) == expected
    kept = read_attempts(folder.path / FILE)
    assert [(a.first_step, a.step, a.counted_step, a.status) for a in kept] == [
        (0, 20, 10, "failed"),
        (10, 20, 20, "finished"),
    ]


def test_a_step_between_two_known_ones(folder: RunFolder, clock: FakeTime) -> None:
    Life(folder, clock).train(10).save().train(10, each=3, waiting=1).save().end("failed")
    found = Life(folder, clock, first_step=14).end("stopped")
    assert parts(found, 60) == {"startup": 20, "train": 10 + 8, "data_wait": 4, "lost": 18}


def test_stopped_and_started_again_loses_nothing(folder: RunFolder, clock: FakeTime) -> None:
    life = Life(folder, clock).train(10).save(2)
    life.part_of_a_step(0.01)  # what no phase claims
    life.end("stopped")
    clock.sleep(60)
    found = Life(folder, clock, first_step=10).train(5).save().end("stopped")
    assert parts(found, 97.01) == {"startup": 20, "train": 15.01, "checkpoint": 2, "restarts": 60}


def test_work_that_no_checkpoint_holds_is_lost_when_a_run_fails(folder: RunFolder, clock: FakeTime) -> None:
    life = Life(folder, clock).train(10).save().train(5)
    assert parts(life.report().ledger.summary(), 25) == {"startup": 10, "train": 15}  # not lost yet
    assert parts(life.end("failed"), 25) == {"startup": 10, "train": 10, "lost": 5}
    # A save that was on its way then has ended well after all.
    found = Life(folder, clock, first_step=15).end("stopped")
    assert parts(found, 35) == {"startup": 20, "train": 15}


def test_failed_without_a_checkpoint(folder: RunFolder, clock: FakeTime) -> None:
    assert parts(Life(folder, clock).train(5).end("failed"), 15) == {"startup": 10, "lost": 5}


def test_damaged_checkpoints_lose_the_work_of_several_attempts(folder: RunFolder, clock: FakeTime) -> None:
    Life(folder, clock).train(5).save().train(5, each=2).save().train(1).end("failed")
    Life(folder, clock, first_step=10).train(5, each=4).save().end("stopped")
    Life(folder, clock, first_step=15).train(5).save().evaluate(7).end("finished")
    found = Life(folder, clock, first_step=5).train(3).save().end("stopped")
    assert parts(found, 40 + 16 + 20 + 12 + 3) == {
        "startup": 40,
        "train": 5 + 3,
        "evaluation": 7,
        "lost": 10 + 1 + 20 + 5,
    }
    # And again, as far as the beginning.
    found = Life(folder, clock).train(1).save().end("stopped")
    assert found.seconds["train"] == pytest.approx(1)
    assert found.seconds["lost"] == pytest.approx(36 + 8)


def test_rolled_back(folder: RunFolder, clock: FakeTime) -> None:
    life = Life(folder, clock).train(10).save().train(5, each=2, waiting=1).roll_back(10)
    life.train(5, each=3).save().train(2).report()
    assert parts(life.ledger.summary(), 47) == {"startup": 10, "train": 10 + 15 + 2, "lost": 10}
    life.roll_back(15).train(1).roll_back(10).train(1).save()
    assert parts(life.ledger.summary(), 49) == {"startup": 10, "train": 11, "lost": 28}
    life.end("stopped")
    found = Life(folder, clock, first_step=10).end("stopped")
    assert parts(found, 59) == {"startup": 20, "train": 10, "lost": 29}


def test_rolled_back_behind_its_own_start(folder: RunFolder, clock: FakeTime) -> None:
    Life(folder, clock).train(10).save().train(10).save().end("stopped")
    life = Life(folder, clock, first_step=20).train(5).roll_back(10).train(15).save()
    assert parts(life.end("stopped"), 60) == {"startup": 20, "train": 25, "lost": 15}
    found = Life(folder, clock, first_step=15).end("stopped")
    assert parts(found, 70) == {"startup": 30, "train": 15, "lost": 25}


def test_updates_left_out(folder: RunFolder, clock: FakeTime) -> None:
    life = Life(folder, clock).train(10).report()
    life.left_out = 2
    life.train(10, each=2, waiting=1).save().train(5).save()
    expected = {"startup": 10, "train": 10 + 8 + 5, "data_wait": 8, "lost": 4}
    assert parts(life.ledger.summary(), 45) == expected
    life.train(5).roll_back(20).train(5)
    assert parts(life.end("finished"), 55) == expected | {"lost": 4 + 10}


def test_steps_left_out_by_earlier_attempts_are_not_counted_again(folder: RunFolder, clock: FakeTime) -> None:
    life = Life(folder, clock)
    life.ledger.begin(0, 2, left_out=3)
    life.left_out = 3
    assert parts(life.train(10).save().end("finished"), 20) == {"startup": 10, "train": 10}


def test_time_after_the_end_is_no_restart(folder: RunFolder, clock: FakeTime) -> None:
    Life(folder, clock).train(10).save().end("finished")
    clock.sleep(10_000)
    Life(folder, clock, first_step=10).train(10).save().end("failed")
    clock.sleep(100)
    found = Life(folder, clock, first_step=20).train(10).save().end("finished")
    assert parts(found, 160) == {"startup": 30, "train": 30, "restarts": 100}


def test_a_clock_that_went_back(folder: RunFolder, clock: FakeTime) -> None:
    life = Life(folder, clock).train(10).save()
    clock.wall -= 5000
    life.train(5).save().end("stopped")
    clock.wall -= 5000
    found = Life(folder, clock, first_step=15).train(5).save().end("finished")
    assert parts(found, 40) == {"startup": 20, "train": 20}
    later = Ledger(folder, started=clock.wall + 1000)  # a start in the future
    later.begin(20, 1)
    assert later.summary().seconds["startup"] == pytest.approx(20)


def test_a_second_run_in_the_same_process(folder: RunFolder, clock: FakeTime) -> None:
    """The process started before the earlier attempt ended, and that time must not count twice."""
    Life(folder, clock).train(10).save().end("stopped")
    clock.sleep(5)
    ledger = Ledger(folder, started=START)
    ledger.begin(10, 1)
    clock.sleep(2)
    ledger.end("finished", 11, {"total": 2, "train": 2}, 0)
    assert parts(ledger.summary(), 27) == {"startup": 15, "train": 12}


def test_a_clock_older_than_the_ledger(folder: RunFolder, clock: FakeTime) -> None:
    clock.sleep(3)
    ledger = Ledger(folder, started=clock.wall)
    ledger.begin(0, 1)
    clock.sleep(2)
    ledger.end("finished", 1, {"total": 5, "train": 2, "startup": 3}, 0)
    assert parts(ledger.summary(), 5) == {"startup": 3, "train": 2}
    assert read_attempts(folder.path / FILE)[0].started == START


def test_an_attempt_that_failed_before_it_began(folder: RunFolder, clock: FakeTime) -> None:
    Life(folder, clock).train(10).save().train(5).save()  # and killed
    clock.sleep(20)
    ledger = Ledger(folder, started=clock.wall)
    clock.sleep(4)
    ledger.end("failed", 0, {"total": 4, "train": 0.5, "startup": 3.5}, 0)
    found = Life(folder, clock, first_step=15)
    assert found.ledger.number == 3
    assert parts(found.end("stopped"), 59) == {"startup": 23.5, "lost": 0.5, "train": 15, "restarts": 20}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "\x00" * 50, '[{"number": 1}]', "{}", "null"],
    ids=["empty", "cut", "numbers", "zeros", "fields", "object", "null"],
)
def test_a_damaged_file_is_put_aside(
    content: str, folder: RunFolder, clock: FakeTime, caplog: pytest.LogCaptureFixture
) -> None:
    (folder.path / FILE).write_text(content)
    life = Life(folder, clock)
    (record,) = caplog.records
    assert "goodput counts from this attempt on" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert (folder.path / f"{FILE}.damaged").read_text() == content
    assert life.ledger.number == 1
    assert parts(life.train(5).save().end("finished"), 15) == {"startup": 10, "train": 5}
    assert len(read_attempts(folder.path / FILE)) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("seconds", {}), ("started", float("nan")), ("started", -1), ("status", "asleep"), ("seconds", {"train": -1})],
)
def test_values_that_cannot_be(
    key: str, value: Any, folder: RunFolder, clock: FakeTime, caplog: pytest.LogCaptureFixture
) -> None:
    Life(folder, clock).train(5).save().end("stopped")
    attempts = json.loads((folder.path / FILE).read_text())
    attempts[0][key] = value
    (folder.path / FILE).write_text(json.dumps(attempts))
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_attempts(folder.path / FILE)
    assert Ledger(folder).number == 1
    assert len(caplog.records) == 1


def test_a_file_that_cannot_be_read(folder: RunFolder, clock: FakeTime, caplog: pytest.LogCaptureFixture) -> None:
    (folder.path / FILE).mkdir()
    assert parts(Life(folder, clock).train(5).save().end("finished"), 15) == {"startup": 10, "train": 5}
    assert "Is a directory" in caplog.text
    assert (folder.path / FILE).is_file()


def test_nothing_is_written_before_it_begins(folder: RunFolder, clock: FakeTime) -> None:
    Life(folder, clock).train(5).save().end("finished")
    before = (folder.path / FILE).read_bytes()
    assert Ledger(folder).number == 2
    assert (folder.path / FILE).read_bytes() == before


def test_writes_are_few_unless_they_matter(folder: RunFolder, clock: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life(folder, clock)
    written: list[str] = []
    monkeypatch.setattr(folder, "write", lambda name, text: written.append(name))
    for _ in range(100):
        life.train(1, each=0.1).report()
    assert len(written) == pytest.approx(2, abs=1)  # in 10 seconds
    written.clear()
    life.save().save().save()
    assert written == [FILE]  # a checkpoint that is there is news once
    life.end("finished")
    assert written == [FILE, FILE]


def test_a_long_run_stays_small(folder: RunFolder, clock: FakeTime) -> None:
    """A thousand saves and a hundred attempts; the newest twenty saves are known exactly, the others nearly."""
    life = Life(folder, clock)
    for i in range(1000):
        life.train(1, each=1 + i % 2).report().save()
    life.end("failed")
    passed = read_attempts(folder.path / FILE)[0].passed
    assert len(passed) <= 60
    assert [p.step for p in passed[-20:]] == list(range(981, 1001))
    copy = read_attempts(folder.path / FILE)[0]
    assert copy.at(991).train == 1486
    assert copy.at(501).train == pytest.approx(751, abs=2)
    for _ in range(100):
        Life(folder, clock, first_step=1000).train(30, each=0.1).report().save().end("failed")
    assert (folder.path / FILE).stat().st_size < 60_000
    found = Life(folder, clock, first_step=500).end("stopped")
    assert found.num_attempts == 102
    assert found.seconds["train"] == pytest.approx(750, abs=10)


@pytest.mark.parametrize("seed", range(20))
def test_random_lives_against_a_list_of_all_steps(seed: int, folder: RunFolder, clock: FakeTime) -> None:
    draw = random.Random(seed)
    made: list[tuple[int, float, float]] = []  # steps that count so far: number, seconds, seconds of waiting
    spent = dict.fromkeys(PARTS, 0.0)
    saves = [0]

    def lose_after(step: int) -> None:
        spent["lost"] += sum(seconds for number, seconds, _ in made if number > step)
        made[:] = [entry for entry in made if entry[0] <= step]
        saves[:] = [s for s in saves if s <= step]

    for attempt in range(6):
        first = draw.choice(saves[-3:])
        lose_after(first)
        startup = draw.uniform(1, 20)
        spent["startup"] += startup
        life = Life(folder, clock, first, startup)
        for _ in range(draw.randrange(60)):
            seconds = draw.uniform(0.1, 5)
            waiting = draw.uniform(0, seconds)
            life.train(1, seconds, waiting)
            made.append((life.step, seconds, waiting))
            if draw.random() < 0.2:
                life.report()
            if draw.random() < 0.2:
                stall = draw.uniform(0, 3)
                life.save(stall)
                saves.append(life.step)
                spent["checkpoint"] += stall
            if draw.random() < 0.05:
                back = draw.choice([s for s in saves if s <= life.step][-3:])
                life.roll_back(back)
                lose_after(back)
        partial = draw.uniform(0, 2)
        status = draw.choice(["stopped", "failed"]) if attempt < 5 else "finished"
        if status == "failed":
            life.part_of_a_step(partial)
            spent["lost"] += partial
        else:
            life.save()
            saves.append(life.step)
        found = life.end(status)
        if attempt < 5:
            gap = draw.uniform(0, 100)
            clock.sleep(gap)
            spent["restarts"] += gap
    spent["data_wait"] = sum(waiting for _, _, waiting in made)
    spent["train"] = sum(seconds for _, seconds, _ in made) - spent["data_wait"]
    parts(found, clock.wall - START)
    assert found.seconds == pytest.approx(spent, abs=1e-3)


def test_lines() -> None:
    seconds = dict.fromkeys(PARTS, 0.0)
    assert Goodput(1.0, seconds | {"train": 7200.0}, 2, 7200.0).line() == "goodput 100.0% of 2 h 00 min in 2 attempts"
    assert Goodput(0.0, seconds, 1, 0.0).line() == "goodput 0.0% of 0.0 s in 1 attempt"
    assert Goodput.of([]).total == 0
    uneven = Goodput(0.9, seconds | {"train": 90.0, "lost": 2.0, "restarts": 7.97, "startup": 0.03}, 3, 100.0)
    assert uneven.line() == "goodput 90.0% of 1 min 40 s in 3 attempts: restarts 8.0%, lost work 2.0%"
