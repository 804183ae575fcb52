"""Faults on purpose, one by one: what each does to numbers, processes, memory and checkpoints."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import few
from injecting import STEP, injector
from launching import environment
from torch import Tensor

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Damaged, FileRecord, Manifest, Progress, checksum
from trainer.checkpoint.storage import LocalStorage
from trainer.faults import injection
from trainer.faults.plan import EXIT_CODE, SPIKE_FACTOR, VARIABLE, Event, done_file, read_notes, write_plan


def test_spoils_the_first_sample_of_a_copy(run_dir: Path, fault_plan: Path) -> None:
    write_plan(fault_plan, run_dir, [Event("nan", step=2, times=2)])
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


def test_a_batch_of_integers_is_left_alone(run_dir: Path, fault_plan: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_plan(fault_plan, run_dir, [Event("nan")])
    tokens = torch.arange(4)
    assert injector(run_dir).spoil(tokens, 1) is tokens
    assert "a batch without floating numbers stays as it is" in caplog.text


def test_spikes_and_infinite_gradients(run_dir: Path, fault_plan: Path) -> None:
    write_plan(fault_plan, run_dir, [Event("spike", step=2), Event("inf-gradient", step=3)])
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


def rank(run_dir: Path, fault_plan: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _RANK, str(run_dir)]
    variables = environment(**{VARIABLE: str(fault_plan)})
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
def test_ends_its_process(action: str, code: int, run_dir: Path, fault_plan: Path) -> None:
    write_plan(fault_plan, run_dir, [Event(action, step=2)])
    process = rank(run_dir, fault_plan)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "ready\n"), err
    assert [note["action"] for note in read_notes(done_file(fault_plan))] == [action]
    again = rank(run_dir, fault_plan)
    assert again.communicate(timeout=60)[0] == "ready\nsurvived\n"


def test_kills_all_ranks_and_nobody_else(run_dir: Path, fault_plan: Path) -> None:
    write_plan(fault_plan, run_dir, [Event("kill-all", step=2)])
    own_plan = fault_plan.with_name("other.json")
    write_plan(own_plan, run_dir, [Event("hang")])
    other, bystander = rank(run_dir, own_plan), subprocess.Popen(["sleep", "60"])
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        process = rank(run_dir, fault_plan)
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
def test_goes_no_further(action: str, status: str, run_dir: Path, fault_plan: Path) -> None:
    write_plan(fault_plan, run_dir, [Event(action)])
    with rank(run_dir, fault_plan) as process:
        try:
            end = time.monotonic() + 60
            while not (read_notes(done_file(fault_plan)) and psutil.Process(process.pid).status() == status):
                assert time.monotonic() < end
                time.sleep(0.02)
            if action == "hang-with-gil":
                time.sleep(0.2)
                process.send_signal(signal.SIGTERM)  # which nothing of it can answer
            time.sleep(0.3)
            assert process.poll() is None
        finally:
            process.kill()


def test_out_of_memory_as_torch_says_it(run_dir: Path, fault_plan: Path) -> None:
    write_plan(fault_plan, run_dir, [Event("oom")])
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        injector(run_dir).at(STEP, 1)


def test_the_stop_file(run_dir: Path, fault_plan: Path) -> None:
    write_plan(fault_plan, run_dir, [Event("stop-file")])
    injector(run_dir).at(STEP, 1)
    assert (run_dir / "STOP").exists()


def test_a_rank_without_workers_kills_none(run_dir: Path, fault_plan: Path) -> None:
    write_plan(fault_plan, run_dir, [Event("kill-worker")])
    found = injector(run_dir)
    found.at(STEP, 1)
    assert found.done() == []


def publish(storage: LocalStorage, step: int) -> None:
    name, content = CheckpointFolder.name(step), bytes(range(256)) * 8
    staged = storage.begin(name)
    storage.write(staged, "rank-00000.safetensors", [memoryview(content)])
    files = {"rank-00000.safetensors": FileRecord(len(content), checksum(content))}
    manifest = Manifest(Progress(step=step), config={}, num_samples=1, num_ranks=1, values={}, files=files)
    storage.publish(staged, name, manifest.to_bytes())


DAMAGES = ["corrupt-checkpoint", "truncate-checkpoint", "remove-checkpoint-file"]


@pytest.mark.parametrize("action", few(DAMAGES, "corrupt-checkpoint"))
def test_damages_a_checkpoint_that_is_not_the_last_good_one(
    action: str, run_dir: Path, fault_plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        raise InterruptedError("killed")

    monkeypatch.setattr(injection, "_kill", kill)
    monkeypatch.setattr(injection, "_QUIET_SECONDS", 0.02)
    storage = LocalStorage(run_dir / "checkpoints")
    checkpoints = CheckpointFolder(storage, keep=3)
    publish(storage, 3)
    write_plan(fault_plan, run_dir, [Event(action)] * 10)
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
    assert [note["action"] for note in read_notes(done_file(fault_plan))] == [action]
