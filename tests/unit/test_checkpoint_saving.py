"""Saving behind the training: what may change meanwhile, what is waited for, what happens when it fails."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train, WriteConfig, nightly
from resuming import interrupted
from run_results import checkpoint, identical, losses, records, summary, tensors, weights
from torch import nn

from benchmarks.checkpoint_methods import Alone
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.layout import make_layout
from trainer.checkpoint.manifest import Damaged, Manifest, Progress
from trainer.checkpoint.reading import Checkpoint
from trainer.checkpoint.state import Parts, State
from trainer.checkpoint.storage import LocalStorage
from trainer.checkpoint.writing import Saver
from trainer.errors import UserError
from trainer.telemetry.clock import Timer


class Job:
    """A model, its optimizer and a saver of theirs."""

    def __init__(self, folder: Path, behind: bool = True) -> None:
        self.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.step = 0
        self.take_step()
        self.folder = CheckpointFolder(LocalStorage(folder), keep=2)
        self.saver = Saver(self.folder, Alone(), None, behind, torch.device("cpu"))

    def take_step(self) -> None:
        self.model(torch.randn(8, 4)).sum().backward()
        self.optimizer.step()
        self.step += 1

    def state(self) -> State:
        own = {"window.loss_sum": torch.zeros(()), "window.num_samples": torch.tensor(0)}
        return Parts(self.model, self.optimizer, None, None, own, 0, 1).collect()

    def save(self) -> dict[str, torch.Tensor]:
        """Saves, and returns a copy of what must be in the checkpoint."""
        state = self.state()
        manifest = Manifest(Progress(step=self.step), {}, 1, 1, state.values)
        self.saver.save(state, manifest)
        return {name: tensor.clone() for name, tensor in state.tensors.items()}

    def saved(self) -> dict[str, torch.Tensor]:
        found = Checkpoint(self.folder.storage, CheckpointFolder.name(self.step))
        found.verify()
        return {name: found.read(name) for name in found.names("")}


class Gate:
    """Holds the writing thread until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        write = LocalStorage.write

        def held(storage: LocalStorage, folder: str, file: str, parts: Iterable[memoryview]) -> None:
            assert self.opened.wait(30)
            write(storage, folder, file, parts)

        monkeypatch.setattr(LocalStorage, "write", held)


@pytest.mark.parametrize("behind", [True, False])
def test_what_is_saved_is_the_state_of_that_moment(behind: bool, tmp_path: Path) -> None:
    job = Job(tmp_path, behind)
    for _ in range(3):
        expected, step = job.save(), job.step
        job.model(torch.randn(8, 4))  # BatchNorm's statistics may change at any time
        job.saver.before_update()
        job.take_step()  # and from here on everything else
        job.saver.wait()
        taken, job.step = job.step, step
        assert identical(job.saved(), expected)
        job.step = taken


def test_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, gate = Job(tmp_path), Gate(monkeypatch)
    expected = job.save()
    assert job.saver.holds_state
    job.saver.before_update()
    assert not job.saver.holds_state
    first = job.step
    job.take_step()
    assert job.saver.saved_step is None  # the thread is held, and nobody waited for it
    gate.opened.set()
    job.save()  # at most one in flight: this waits for the first
    assert job.saver.saved_step == first
    job.saver.wait()
    assert job.folder.steps() == [1, 2]
    job.step = first
    assert identical(job.saved(), expected)


def test_weights_changed_meanwhile_spoil_that_save_alone(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save()
    with torch.no_grad():
        job.model[0].bias.add_(1)  # type: ignore[operator]
    job.saver.before_update()
    job.saver.wait()
    assert len(job.saver.failures) == 1
    assert "changed outside of the optimizer's step" in job.saver.failures[0]
    assert (job.folder.steps(), list(tmp_path.iterdir())) == ([], [])
    job.step = 2
    expected = job.save()
    job.saver.wait()
    assert (len(job.saver.failures), identical(job.saved(), expected)) == (1, True)


def test_a_model_that_changes_its_weights_is_told_what_to_set(
    train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    file = write_config(checkpoint={"every": 1}, model={"name": "odd_parts:Meddling"})
    _, out, _ = train("--config", file)
    assert "set checkpoint.async_save to false" in out
    file = write_config(checkpoint={"every": 1, "async_save": False}, model={"name": "odd_parts:Meddling"})
    code, out, _ = train("--config", file, f"run.dir={tmp_path / 'waiting'}")
    assert code == 0
    assert "async_save" not in out


def fail(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> None:
    """Has the n-th tensor file that is written run into a full disk, after half of it."""
    write, count = LocalStorage.write, 0

    def full(storage: LocalStorage, folder: str, file: str, parts: Iterable[memoryview]) -> None:
        nonlocal count
        if file.endswith(".safetensors"):
            count += 1
            if when(count):
                write(storage, folder, file, [next(iter(parts))])
                raise OSError(errno.ENOSPC, "No space left on device")
        write(storage, folder, file, parts)

    monkeypatch.setattr(LocalStorage, "write", full)


def test_a_failed_save_is_said_and_the_next_one_tried(
    train: Train, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("--config", write_config("quiet.yaml", run__dir=str(tmp_path / "quiet")))
    fail(monkeypatch, lambda n: n == 2)
    code, out, err = train("--config", write_config(checkpoint={"every": 3, "keep": 9}, eval={"every": 99}))
    assert (code, err) == (0, "")
    assert "checkpoint of step 6 failed, and that of step 3 stands: rank 0: [Errno 28] No space left on device" in out
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("*-*")) == [
        f"step-{step:08d}" for step in (3, 9, 10)
    ]
    assert summary(tmp_path / "run")["checkpoints"]["num_failed"] == 1
    assert identical(weights(tmp_path / "run", 10), weights(tmp_path / "quiet", 10))


def test_a_failed_save_may_end_the_run(
    train: Train, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, lambda n: n == 2)
    code, _, err = train("--config", write_config(checkpoint={"every": 3, "on_error": "raise"}, train__epochs=200))
    assert code == 1
    assert err.splitlines()[-1].startswith("error: checkpoint.on_error is raise, and a checkpoint failed: rank 0: [Err")
    assert "Traceback" not in err
    assert summary(tmp_path / "run")["status"] == "failed"
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()


def test_the_end_of_a_run_is_tried_twice(
    train: Train, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, lambda n: n == 2)
    assert train("--config", write_config(data__eval=None)).code == 0
    checkpoint(tmp_path / "run", 10).verify()


def test_an_end_that_cannot_be_saved_is_no_success(
    train: Train, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, lambda n: n >= 2)
    code, _, err = train("--config", write_config())
    assert code == 1
    assert "the last step, 10, could not be saved: rank 0: [Errno 28] No space left on device" in err
    assert "Traceback" not in err
    assert CheckpointFolder(LocalStorage(tmp_path / "run" / "checkpoints"), keep=2).newest().step == 5
    monkeypatch.undo()
    assert train("--config", write_config()).code == 0


# ---- when ---------------------------------------------------------------------------------------------------


def test_by_the_clock(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    data = {"name": "slow:Steady", "args": {"length": 60, "seconds": 0.02}}
    often = {"every": "0.01 minutes", "keep": 99}  # 0.6 s: a step takes at least 0.24 s
    assert train("--config", write_config(checkpoint=often, data__train=data, data__eval=None)).code == 0
    found = CheckpointFolder(LocalStorage(tmp_path / "run" / "checkpoints"), keep=99).steps()
    assert found[-1] == 10
    assert len(found) >= 3
    seldom = {"every": "60 minutes", "keep": 99}
    file = write_config("seldom.yaml", run__dir=str(tmp_path / "seldom"), checkpoint=seldom, data__eval=None)
    assert train("--config", file).code == 0
    assert CheckpointFolder(LocalStorage(tmp_path / "seldom" / "checkpoints"), keep=99).steps() == [10]


def test_a_timer_rings_once_per_period(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("trainer.telemetry.clock.time.monotonic", lambda: now)
    timer = Timer(60)
    assert not timer.rings()
    now = 161.0
    assert timer.rings()
    assert not timer.rings()
    now = 222.0
    assert timer.rings()


def test_kept_for_good(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    kept = {"every": 1, "keep": 1, "keep_every": 4}
    assert train("--config", write_config(checkpoint=kept, data__eval=None)).code == 0
    assert CheckpointFolder(LocalStorage(tmp_path / "run" / "checkpoints"), keep=1).steps() == [4, 8, 10]


def test_what_is_damaged_and_cannot_be_moved_pushes_no_good_one_out(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.folder.keep = 1
    (tmp_path / "step-00000009").mkdir()
    job.save()
    job.saver.wait()
    assert job.folder.newest().step == 1


# ---- exactness ----------------------------------------------------------------------------------------------


def test_a_report_tells_the_same_wherever_it_was_interrupted(
    train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    interrupted(train, write_config, tmp_path, 61, log__every=4)  # in step 6, between the reports of 4 and 8
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert list(losses(tmp_path / "run")) == [4, 8, 10]


@pytest.mark.parametrize(
    "optim",
    [
        pytest.param({"name": "sgd", "lr": 0.01}, marks=nightly),
        pytest.param({"name": "sgd", "lr": 0.01, "args": {"momentum": 0.9}}, marks=nightly),
        {"name": "adamw", "lr": 0.01, "args": {"amsgrad": True}},
        {"name": "Adafactor", "lr": 0.01},
        pytest.param({"name": "Rprop", "lr": 0.01}, marks=nightly),
        {"name": "odd_parts:Remembering", "lr": 0.01},
    ],
    ids=["sgd", "momentum", "amsgrad", "Adafactor", "Rprop", "plain values"],
)
def test_every_optimizer_goes_on_as_it_was(
    optim: dict[str, Any], train: Train, write_config: WriteConfig, tmp_path: Path
) -> None:
    interrupted(train, write_config, tmp_path, 61, optim=optim)
    for prefix in ("model.", "optimizer."):
        assert identical(tensors(tmp_path / "run", 10, prefix), tensors(tmp_path / "whole", 10, prefix))
    values = [checkpoint(tmp_path / name, 10).manifest.values["optimizer"] for name in ("run", "whole")]
    assert values[0] == values[1]


def test_an_optimizer_without_state_stays_so(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    """torch's own way would take a step to make some, and the step would count: fp16 has skipped all steps here."""
    huge = {"name": "vectors:Huge", "args": {"length": 60}}
    fp16 = {"precision": "fp16", "data__train": huge, "checkpoint": {"every": 1, "keep": 99}}
    assert train("--config", write_config("whole.yaml", run__dir=str(tmp_path / "whole"), **fp16)).code == 0
    assert summary(tmp_path / "whole")["skipped_steps"] > 1
    assert not checkpoint(tmp_path / "whole", 1).names("optimizer.")
    assert train("--config", write_config(**fp16, train__steps=1, train__epochs=None)).code == 0
    assert train("--config", write_config(**fp16)).code == 0
    for prefix in ("model.", "optimizer."):
        assert identical(tensors(tmp_path / "run", 10, prefix), tensors(tmp_path / "whole", 10, prefix))


def test_state_that_cannot_be_saved_is_found_at_the_first_step(train: Train, write_config: WriteConfig) -> None:
    code, _, err = train("--config", write_config(optim={"name": "odd_parts:Unsaveable", "lr": 0.01}))
    assert code == 2
    assert "helper is a object, which a checkpoint cannot hold" in err


def test_extra_state_and_evaluations_that_draw(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    """A module's extra state is saved, and how often one evaluates changes nothing of the training."""
    for name, every in (("often", 1), ("seldom", 99)):
        file = write_config(eval={"every": every}, model={"name": "odd_parts:Counting"})
        assert train("--config", file, f"run.dir={tmp_path / name}").code == 0
    assert losses(tmp_path / "often") == losses(tmp_path / "seldom")
    assert checkpoint(tmp_path / "often", 10).manifest.values["model._extra_state"] == {"num_calls": 10}
    file = write_config(train__epochs=3, model={"name": "odd_parts:Counting"})
    assert train("--config", file, f"run.dir={tmp_path / 'often'}").code == 0
    assert checkpoint(tmp_path / "often", 15).manifest.values["model._extra_state"] == {"num_calls": 15}


def test_ended_in_the_middle_of_an_evaluation(
    train: Train, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step was saved before: it is evaluated again, and not trained again."""
    assert train("--config", write_config("whole.yaml", run__dir=str(tmp_path / "whole"))).code == 0
    from trainer.loop import Trainer

    evaluate, count = Trainer.evaluate, 0

    def ends(trainer: Trainer) -> dict[str, float] | None:
        nonlocal count
        count += 1
        if count == 1:
            raise MemoryError("as if killed")
        return evaluate(trainer)

    monkeypatch.setattr(Trainer, "evaluate", ends)
    assert train("--config", write_config()).code == 1
    code, out, _ = train("--config", write_config())
    assert code == 0
    assert "continuing from step 5" in out
    assert out.index("step 5/10  epoch 1.00  eval/loss") < out.index("step 6/10")
    evaluations = [
        [(r["step"], r["eval/loss"]) for r in records(tmp_path / name) if "eval/loss" in r] for name in ("run", "whole")
    ]
    assert evaluations[0] == evaluations[1]
    assert identical(weights(tmp_path / "run", 10), weights(tmp_path / "whole", 10))


# ---- the format ---------------------------------------------------------------------------------------------


def test_all_types_and_shapes_come_back(tmp_path: Path) -> None:
    state = {
        "f64": torch.randn(3, dtype=torch.float64),
        "bf16": torch.randn(3, 5).bfloat16(),
        "f16": torch.randn(7).half(),
        "bool": torch.tensor([True, False, True]),
        "u8": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(3.5),
        "int": torch.tensor(2**60),
        "empty": torch.empty(0, 3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 6).t(),
    }
    saver = Saver(CheckpointFolder(LocalStorage(tmp_path), 1), Alone(), None, True, torch.device("cpu"))
    saver.save(State(state, {}, frozenset()), Manifest(Progress(step=1), {}, 1, 1, {}))
    saver.wait()
    assert saver.failures == []
    found = Checkpoint(LocalStorage(tmp_path), "step-00000001")
    found.verify()
    assert found.names("") == list(state)
    assert identical({name: found.read(name) for name in state}, state)
    targets = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    found.load_into(targets)
    assert identical(targets, state)


@pytest.mark.parametrize("says", ["nothing", "of another tensor", "no JSON", "more than there is"])
def test_a_file_that_does_not_say_where_a_tensor_is_cannot_be_read(says: str, tmp_path: Path) -> None:
    """It was verified before, as a rule; who reads without that gets one line, not another tensor."""
    saver = Saver(CheckpointFolder(LocalStorage(tmp_path), 1), Alone(), None, True, torch.device("cpu"))
    saver.save(State({"ranks.0.x": torch.ones(3)}, {}, frozenset()), Manifest(Progress(step=1), {}, 1, 1, {}))
    saver.wait()
    assert torch.equal(Checkpoint(LocalStorage(tmp_path), "step-00000001").read("ranks.0.x"), torch.ones(3))
    file = tmp_path / "step-00000001" / "rank-00000.safetensors"
    whole = file.read_bytes()
    changed = {
        "nothing": b"",
        "of another tensor": whole.replace(b"ranks.0.x", b"ranks.0.y"),
        "no JSON": whole.replace(b'{"', b'["'),
        "more than there is": b"\xff" * 8 + whole[8:],
    }
    file.write_bytes(changed[says])
    with pytest.raises(
        UserError,
        match=r"rank-00000\.safetensors' (ends too early|does not say where ('ranks\.0\.x' is|its tensors are))",
    ):
        Checkpoint(LocalStorage(tmp_path), "step-00000001").read("ranks.0.x")


def test_types_that_the_format_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'z' has type torch\.complex64, which a checkpoint cannot hold"):
        make_layout({"z": torch.zeros(2, dtype=torch.complex64)}, Alone())


def test_a_manifest_vouches_for_itself() -> None:
    progress = Progress(step=3, best_value=0.1 + 0.2, eval_metrics={"loss": float("nan")})
    manifest = Manifest(progress, {"a": [1, None]}, 5, 2, {"scale": 65536.0})
    data = manifest.to_bytes()
    assert Manifest.from_bytes(data).progress.best_value == 0.1 + 0.2
    for i in range(0, len(data), 7):
        changed = bytearray(data)
        changed[i] ^= 1
        try:
            assert Manifest.from_bytes(bytes(changed)).to_bytes() == data  # white space
        except Damaged:
            continue
    for cut in (0, 1, len(data) // 2):
        with pytest.raises(Damaged):
            Manifest.from_bytes(data[:cut])
