"""Faults on purpose: only in the run that they are for, only for a while, and each of them once."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import Train, WriteConfig, few
from launching import environment
from run_results import summary
from torch import Tensor

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Damaged, FileRecord, Manifest, Progress, checksum
from trainer.checkpoint.storage import LocalStorage
from trainer.errors import UserError
from trainer.faults import injection
from trainer.faults.injection import Injector
from trainer.faults.plan import EXIT_CODE, SPIKE_FACTOR, VARIABLE, Event, done_file, read_notes, starts_file, write_plan

STEP = "loading a batch"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "plan.json"
    monkeypatch.setenv(VARIABLE, str(file))
    return file


def injector(run_dir: Path, rank: int = 0) -> Injector:
    found = Injector.from_environment(run_dir, rank)
    assert found is not None
    return found


def changed(plan: Path, **values: Any) -> None:
    plan.write_text(json.dumps({**json.loads(plan.read_text()), **values}))


# ---- on only where it is meant ----------------------------------------------------------------------------


def test_is_off_unless_the_environment_says_otherwise(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Injector.from_environment(run_dir, 0) is None
    monkeypatch.setenv(VARIABLE, "")
    assert Injector.from_environment(run_dir, 0) is None


def test_says_so_loudly_and_once(run_dir: Path, plan: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_plan(plan, run_dir, [Event("kill", step=1000)], seconds_valid=600)
    injector(run_dir, rank=1)
    assert caplog.records == []
    injector(run_dir)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    expected = f"FAULTS ARE INJECTED INTO THIS RUN ON PURPOSE: {VARIABLE} names '{plan}', for 10 minutes from now; 1 "
    assert record.getMessage().startswith(expected)


def test_another_run_does_not_start(run_dir: Path, plan: Path, tmp_path: Path) -> None:
    write_plan(plan, run_dir, [])
    link = tmp_path / "link"
    link.symlink_to(run_dir)
    injector(link)  # the same folder by another name
    with pytest.raises(UserError, match=f"breaks another run on purpose, '{run_dir}': unset {VARIABLE}"):
        Injector.from_environment(tmp_path / "mine", 0)


def test_an_old_plan_starts_nothing(run_dir: Path, plan: Path) -> None:
    write_plan(plan, run_dir, [], seconds_valid=600)
    now = time.time()
    changed(plan, written=now - 700, until=now - 100)
    with pytest.raises(UserError, match=f"ended 100 s ago: unset {VARIABLE}"):
        Injector.from_environment(run_dir, 0)


@pytest.mark.parametrize(("written", "until"), [(0, 25 * 3600), (3600, 7200), (0, -10), (0, 0)])
def test_no_plan_lasts_longer_than_a_day(run_dir: Path, plan: Path, written: float, until: float) -> None:
    write_plan(plan, run_dir, [])
    changed(plan, written=time.time() + written, until=time.time() + until)
    with pytest.raises(UserError, match=r"must be written in the past and end within a day|ended"):
        Injector.from_environment(run_dir, 0)


def test_nothing_happens_after_the_end_of_the_plan(run_dir: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plan(plan, run_dir, [Event("raise"), Event("nan")], seconds_valid=100)
    found, now = injector(run_dir), time.time()
    monkeypatch.setattr(time, "time", lambda: now + 101)
    found.at(STEP, 1)
    assert not found.spoil(torch.zeros(2), 1).isnan().any()


def test_a_missing_or_broken_plan_starts_nothing(run_dir: Path, plan: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Injector.from_environment(run_dir, 0)
    for text in ("", "[]", "{}", '{"run_dir": 3}'):
        plan.write_text(text)
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
def test_an_event_that_makes_no_sense(run_dir: Path, plan: Path, event: dict[str, Any], problem: str) -> None:
    write_plan(plan, run_dir, [])
    changed(plan, events=[{"action": "kill"}, event])
    with pytest.raises(UserError) as error:
        Injector.from_environment(run_dir, 0)
    assert problem in str(error.value)
    if "stp" not in event:
        with pytest.raises(UserError, match="event 0"):
            write_plan(plan, run_dir, [Event(**event)])


def test_any_rank_is_rank_0(run_dir: Path, plan: Path) -> None:
    write_plan(plan, run_dir, [])
    changed(plan, events=[{"action": "raise", "rank": "any"}])
    injector(run_dir, rank=1).at(STEP, 1)
    with pytest.raises(RuntimeError, match="injected"):
        injector(run_dir).at(STEP, 1)


# ---- when, where, and once --------------------------------------------------------------------------------


def test_happens_at_its_place_and_step(run_dir: Path, plan: Path) -> None:
    events = [Event("raise", step=3, place="backward"), Event("raise-user-error", rank=1, step=2)]
    write_plan(plan, run_dir, events)
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


def test_happens_before_training(run_dir: Path, plan: Path) -> None:
    write_plan(plan, run_dir, [Event("raise", place="building")])
    with pytest.raises(RuntimeError, match="injected"):
        injector(run_dir).at("building", 0)


def test_happens_once_over_all_attempts(run_dir: Path, plan: Path) -> None:
    write_plan(plan, run_dir, [Event("raise", step=2), Event("raise", step=2), Event("nan", step=2)])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="injected"):
            injector(run_dir).at(STEP, 2)
    last = injector(run_dir)
    last.at(STEP, 2)
    assert last.spoil(torch.zeros(2), 2).isnan().any()
    assert not injector(run_dir).spoil(torch.zeros(2), 2).isnan().any()
    assert len(last.done()) == 3
    write_plan(plan, run_dir, [Event("raise", step=2)])  # a new plan knows nothing of it
    assert injector(run_dir).done() == []


def test_repeats_in_every_attempt_if_asked_to(run_dir: Path, plan: Path) -> None:
    write_plan(plan, run_dir, [Event("nan", step=3, repeats=True), Event("raise", step=4, repeats=True)])
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


def test_waits_for_its_time(run_dir: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plan(plan, run_dir, [Event("raise", rank=1, after_seconds=10), Event("raise", after_seconds=20)])
    first, second, now = injector(run_dir), injector(run_dir, rank=1), time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    second.at(STEP, 1)  # before rank 0 has begun
    monkeypatch.setattr(time, "time", lambda: now + 100)
    second.at(STEP, 1)
    first.at(STEP, 1)
    (start,) = read_notes(starts_file(plan))
    assert start == {"step": 1, "time": now + 100, "attempt": str(os.getpid())}
    monkeypatch.setattr(time, "time", lambda: now + 111)
    first.at(STEP, 2)
    with pytest.raises(RuntimeError, match="injected"):
        second.at(STEP, 2)
    again = injector(run_dir)  # in which the clock goes on
    monkeypatch.setattr(time, "time", lambda: now + 121)
    with pytest.raises(RuntimeError, match="injected"):
        again.at(STEP, 2)
    assert [start["step"] for start in read_notes(starts_file(plan))] == [1, 2]


def test_waits_for_its_turn(run_dir: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000 + time.time()

    def at(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: now + seconds)

    at(0)
    turns = [Event("raise", rank=r, after_seconds=s, in_turn=True) for r, s in ((1, 10), (0, 5), (1, 5))]
    write_plan(plan, run_dir, turns)
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


def test_delays_steps_in_a_row(run_dir: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plan(plan, run_dir, [Event("delay", step=2, seconds=7.0, times=3, place="forward")])
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


def test_is_on_disk_before_the_deed(run_dir: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plan(plan, run_dir, [Event("delay", seconds=1)])
    seen: list[int] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: seen.append(len(read_notes(done_file(plan)))))
    injector(run_dir).at(STEP, 1)
    assert seen == [1]


def test_stops_at_a_step_on_all_ranks(run_dir: Path, plan: Path) -> None:
    write_plan(plan, run_dir, [Event("stop-at", step=3)])
    for number in (0, 1):
        found = injector(run_dir, number)
        assert [found.stops_after(step) for step in (2, 3)] == [False, True]
        assert [(d["action"], d["rank"], d["step"]) for d in found.done()] == [("stop-at", 0, 3)]
    again = injector(run_dir)
    assert again.stops_after(4)
    assert len(again.done()) == 1


# ---- in a real run ----------------------------------------------------------------------------------------


def test_a_run_follows_its_plan(train: Train, write_config: WriteConfig, run_dir: Path, plan: Path) -> None:
    write_plan(plan, run_dir, [Event("raise-user-error", step=3, place="backward"), Event("stop-at", step=7)])
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
    train: Train, write_config: WriteConfig, run_dir: Path, plan: Path, tmp_path: Path
) -> None:
    write_plan(plan, tmp_path / "other", [])
    code, _, err = train("--config", write_config())
    assert code == 2
    assert err.startswith(f"error: {VARIABLE} names '{plan}', which breaks another run on purpose")
    assert list(run_dir.iterdir()) == []


# ---- numbers ----------------------------------------------------------------------------------------------


def test_spoils_the_first_sample_of_a_copy(run_dir: Path, plan: Path) -> None:
    write_plan(plan, run_dir, [Event("nan", step=2, times=2)])
    found = injector(run_dir)
    batch = {"image": torch.ones(3, 2), "label": torch.arange(3), "name": "x", "scale": torch.tensor(1.0)}
    assert found.spoil(batch, 1) is batch
    for step in (2, 3):
        spoiled = found.spoil(batch, step)
        assert spoiled["image"][0].isnan().all()
        assert torch.equal(spoiled["image"][1:], batch["image"][1:])
        assert torch.equal(spoiled["label"], batch["label"])
        assert spoiled["scale"] == 1
        assert found.spoil(batch, step) is batch  # the next micro-batch
    assert found.spoil(batch, 4) is batch
    assert not batch["image"].isnan().any()


def test_a_batch_of_integers_is_left_alone(run_dir: Path, plan: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_plan(plan, run_dir, [Event("nan")])
    tokens = torch.arange(4)
    assert injector(run_dir).spoil(tokens, 1) is tokens
    assert "a batch without floating numbers stays as it is" in caplog.text


def test_spikes_and_infinite_gradients(run_dir: Path, plan: Path) -> None:
    write_plan(plan, run_dir, [Event("spike", step=2), Event("inf-gradient", step=3)])
    found = injector(run_dir)

    def step(number: int) -> tuple[Tensor, Tensor]:
        weight = torch.tensor([1.0, 2.0], requires_grad=True)
        loss = found.loss((weight * 3.0).sum(), number)
        loss.backward()
        assert weight.grad is not None
        return loss.detach(), weight.grad

    assert step(1)[0] == 9
    loss, gradient = step(2)
    assert loss == 9 * SPIKE_FACTOR
    assert torch.equal(gradient, torch.full((2,), 3 * SPIKE_FACTOR))
    loss, gradient = step(3)
    assert loss == 9
    assert gradient.isinf().all()
    assert torch.equal(step(4)[1], torch.full((2,), 3.0))


# ---- deeds that a process does not survive ----------------------------------------------------------------

_RANK = """
import logging, sys
from pathlib import Path
from trainer.faults import injection
from trainer.faults.injection import Injector
logging.basicConfig()
injector = Injector.from_environment(Path(sys.argv[1]), 0)
print("ready", flush=True)
for step in range(1, 4):
    injector.at("loading a batch", step)
print("survived", flush=True)
"""


def rank(run_dir: Path, plan: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _RANK, str(run_dir)]
    variables = environment(**{VARIABLE: str(plan)})
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("kill", -signal.SIGKILL),
        ("signal:SIGTERM", -signal.SIGTERM),
        ("signal-launcher:SIGUSR1", -signal.SIGUSR1),  # it was started by no launcher, so it is its own
        ("exit", EXIT_CODE),
        ("segfault", -signal.SIGSEGV),
        ("raise", 1),
    ],
)
def test_ends_its_process(action: str, code: int, run_dir: Path, plan: Path) -> None:
    write_plan(plan, run_dir, [Event(action, step=2)])
    process = rank(run_dir, plan)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "ready\n"), err
    assert [note["action"] for note in read_notes(done_file(plan))] == [action]
    again = rank(run_dir, plan)
    assert again.communicate(timeout=60)[0] == "ready\nsurvived\n"


def test_kills_all_ranks_and_nobody_else(run_dir: Path, plan: Path) -> None:
    write_plan(plan, run_dir, [Event("kill-all", step=2)])
    own_plan = plan.with_name("other.json")
    write_plan(own_plan, run_dir, [Event("hang")])
    other, bystander = rank(run_dir, own_plan), subprocess.Popen(["sleep", "60"])
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        process = rank(run_dir, plan)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        other.communicate(timeout=60)
        assert other.returncode == -signal.SIGKILL
        assert bystander.poll() is None
    finally:
        for started in (other, bystander):
            started.kill()
            started.wait()


@pytest.mark.parametrize(
    ("action", "status"), [("stop", "stopped"), ("hang", "sleeping"), ("hang-with-gil", "sleeping")]
)
def test_goes_no_further(action: str, status: str, run_dir: Path, plan: Path) -> None:
    write_plan(plan, run_dir, [Event(action)])
    with rank(run_dir, plan) as process:
        try:
            end = time.monotonic() + 60
            while not (read_notes(done_file(plan)) and psutil.Process(process.pid).status() == status):
                assert time.monotonic() < end
                time.sleep(0.02)
            if action == "hang-with-gil":
                time.sleep(0.2)
                process.send_signal(signal.SIGTERM)  # which nothing of it can answer
            time.sleep(0.3)
            assert process.poll() is None
        finally:
            process.kill()


def test_out_of_memory_as_torch_says_it(run_dir: Path, plan: Path) -> None:
    write_plan(plan, run_dir, [Event("oom")])
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        injector(run_dir).at(STEP, 1)


def test_the_stop_file(run_dir: Path, plan: Path) -> None:
    write_plan(plan, run_dir, [Event("stop-file")])
    injector(run_dir).at(STEP, 1)
    assert (run_dir / "STOP").exists()


def test_a_rank_without_workers_kills_none(run_dir: Path, plan: Path) -> None:
    write_plan(plan, run_dir, [Event("kill-worker")])
    found = injector(run_dir)
    found.at(STEP, 1)
    assert found.done() == []


def publish(storage: LocalStorage, step: int) -> None:
    name, content = CheckpointFolder.name(step), bytes(range(256)) * 8
    staged = storage.begin(name)
    storage.write(staged, "rank-00000.safetensors", [memoryview(content)])
    files = {"rank-00000.safetensors": FileRecord(len(content), checksum(content))}
    manifest = Manifest(Progress(step=step), config={}, num_samples=1, num_ranks=1, values={}, tensors={}, files=files)
    storage.publish(staged, name, manifest.to_bytes())


DAMAGES = ["corrupt-checkpoint", "truncate-checkpoint", "remove-checkpoint-file"]


@pytest.mark.parametrize("action", few(DAMAGES, "corrupt-checkpoint"))
def test_damages_a_checkpoint_that_is_not_the_last_good_one(
    action: str, run_dir: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        raise InterruptedError("killed")

    monkeypatch.setattr(injection, "_kill", kill)
    storage = LocalStorage(run_dir / "checkpoints")
    checkpoints = CheckpointFolder(storage, keep=3)
    publish(storage, 3)
    write_plan(plan, run_dir, [Event(action)] * 10)
    injector(run_dir).at(STEP, 4)  # the only one is spared
    publish(storage, 6)
    with pytest.raises(InterruptedError, match="killed"):
        injector(run_dir).at(STEP, 7)
    checkpoints.open(3).verify()
    with pytest.raises(Damaged):
        checkpoints.open(6).verify()
    injector(run_dir).at(STEP, 7)  # and so is a newest one that is damaged already, and may be put aside any moment
    storage.set_aside(checkpoints.name(6))
    injector(run_dir).at(STEP, 7)
    assert [note["action"] for note in read_notes(done_file(plan))] == [action]
