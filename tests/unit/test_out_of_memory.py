"""Running out of memory: what counts as such, the report, and going on with a smaller micro-batch."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Train, WriteConfig
from hungry import PEBIBYTE
from run_results import weights
from torch import nn
from torch._subclasses import FakeTensorMode

from launch import starting
from trainer.config import Config, load_config
from trainer.data.sampler import BatchPlan
from trainer.memory import out_of_memory
from trainer.memory.out_of_memory import Situation, advice, handle_out_of_memory, is_out_of_memory, live_tensors
from trainer.memory.shrink import Shrink, halved, micro_batch_at_most, read_shrink, write_shrink


def caught(size: int = PEBIBYTE) -> BaseException:
    """A real failed allocation."""
    try:
        torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("this machine has a pebibyte")


def wrapped(error: BaseException, explicit: bool) -> BaseException:
    try:
        try:
            raise error
        except BaseException as inner:
            if explicit:
                raise ValueError("no") from inner
            raise ValueError("no")  # noqa: B904
    except ValueError as outer:
        return outer


def unrelated(error: BaseException) -> BaseException:
    try:
        try:
            raise error
        except BaseException:
            raise ValueError("no") from None
    except ValueError as outer:
        return outer


@pytest.fixture
def config(write_config: WriteConfig) -> Config:
    return load_config(str(write_config()))


def shrinking(write_config: WriteConfig, **changes: Any) -> Config:
    return load_config(str(write_config(memory={"on_oom": "shrink"}, **changes)))


def plan_of(batch_size: int, micro_batch_size: int | None = None, num_ranks: int = 1, group_size: int = 1) -> BatchPlan:
    return BatchPlan.split(960, batch_size, micro_batch_size, num_ranks, False, group_size)


def situation(**changes: Any) -> Situation:
    known: dict[str, Any] = {"device": torch.device("cpu"), "plan": plan_of(32), "step": 119, "micro_batch": 0}
    return Situation(**{**known, "model": nn.Linear(8, 3), **changes})


def record(**changes: Any) -> Shrink:
    known: dict[str, Any] = {"micro_batch_size": 16, "was": 32, "configured": 32, "step": 120, "rank": 0}
    return Shrink(**{**known, "attempt": 1, "time": 0.0, **changes})


# ---- telling it apart ---------------------------------------------------------------------------------------


def test_a_failed_allocation_on_the_host() -> None:
    assert is_out_of_memory(caught())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
)
def test_errors_that_are(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert is_out_of_memory(wrapped(error, explicit=True))
    assert is_out_of_memory(wrapped(error, explicit=False))
    assert not is_out_of_memory(unrelated(error))


@pytest.mark.parametrize(
    "error", [ValueError("CUDA out of memory"), RuntimeError("size mismatch"), KeyboardInterrupt()]
)
def test_errors_that_are_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_a_chain_of_errors_that_ends_in_itself() -> None:
    first, second = ValueError(), TypeError()
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)


# ---- advice and arithmetic ------------------------------------------------------------------------------------


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
        assert plan_of(2 * share, smaller, 2, group_size).micro_batch_size == smaller


def test_the_largest_micro_batch_that_splits() -> None:
    assert micro_batch_at_most(99, 12, 1) == 12
    assert micro_batch_at_most(5, 12, 1) == 4
    assert micro_batch_at_most(1, 12, 2) is None


def test_the_advice_is_a_setting(config: Config, write_config: WriteConfig) -> None:
    assert advice(config, plan_of(32)).startswith("train.micro_batch_size=16 ")
    assert advice(config, plan_of(64, 16, 2), "backward").startswith("train.micro_batch_size=8 ")
    assert advice(config, plan_of(32, 1)).startswith("memory.checkpointing=full ")
    assert advice(config, plan_of(32, 2, group_size=2)).startswith("memory.checkpointing=full ")
    assert advice(config, plan_of(32), "evaluation").startswith("eval.batch_size=16 ")
    assert advice(config, plan_of(32), "startup").startswith("a device with more memory")
    assert advice(config, None).startswith("a device with more memory")
    assert advice(config, plan_of(32, 1), "evaluation").startswith("a device with more memory")
    checkpointed = load_config(str(write_config("c.yaml", memory={"checkpointing": "full"}, eval={"batch_size": 7})))
    assert advice(checkpointed, plan_of(32, 1)).startswith("a device with more memory")
    assert advice(checkpointed, plan_of(32), "evaluation").startswith("eval.batch_size=3 ")


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


def test_records_are_read_as_written_and_rubbish_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_shrink(tmp_path) is None
    write_shrink(tmp_path, record())
    assert read_shrink(tmp_path) == record()
    file = tmp_path / "out-of-memory" / "shrink.json"
    assert [path.name for path in file.parent.iterdir()] == ["shrink.json"]
    for rubbish in ("", "{}", "[1]", file.read_text().replace('"micro_batch_size": 16', '"micro_batch_size": 0')):
        file.write_text(rubbish)
        assert read_shrink(tmp_path) is None


# ---- the report -----------------------------------------------------------------------------------------------


def test_the_report(config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(400, 300), nn.BatchNorm1d(300))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 400)).sum().backward()
    optimizer.step()
    known = situation(
        model=model, optimizer=optimizer, plan=plan_of(32, 8), micro_batch=1, memory_plan=lambda: "a  b\nc  d"
    )
    handle_out_of_memory(caught(), config, 3, lambda: known)
    err = capfd.readouterr().err
    lines = err.splitlines()
    assert lines[0] == "error: rank 3 ran out of memory in step 120, micro-batch 2 of 4 (training)"
    assert f"you tried to allocate {PEBIBYTE} bytes" in lines[1]
    assert f"{__file__}:" in lines[2]
    assert "torch.empty(size, dtype=torch.uint8)" in lines[2]
    assert err.endswith("\n  planned\n    a  b\n    c  d\n")  # which takes a while: last
    assert "0.46 MiB  0.weight  (float32 300x400 on cpu)" in err
    assert "0.46 MiB  gradient of 0.weight  (" in err
    assert err.count("0.46 MiB  optimizer state of 0.weight: exp_avg") == 2
    assert lines[-5].split() == [
        "try",
        "train.micro_batch_size=4",
        "(instead",
        "of",
        "8;",
        "the",
        "same",
        "optimisation)",
    ]
    file = config.run_dir / "out-of-memory" / "rank-3.json"
    assert lines[-4] == f"  files    {file}"
    facts = json.loads(file.read_text())
    assert (facts["rank"], facts["step"], facts["micro_batch"], facts["micro_batch_size"]) == (3, 120, 2, 8)
    assert facts["tensors"][0]["num_bytes"] == 480_000
    assert len(facts["tensors"]) == 10
    assert facts["memory_plan"] == "a  b\nc  d"
    assert facts["host_bytes"]["in all"] > 0
    assert not (config.run_dir / "out-of-memory" / "shrink.json").exists()  # on_oom: stop


def test_the_report_of_a_gpu(
    config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 70 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 75 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda name: Path(name).write_bytes(b"s"))
    known = situation(device=torch.device("cuda", 2))
    handle_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), config, 2, lambda: known)
    err = capfd.readouterr().err
    assert "  asked    OutOfMemoryError: CUDA out of memory. Tried\n" in err
    assert "  device   cuda:2: 70.00 GiB allocated, 75.00 GiB reserved, 80.00 GiB in all\n" in err
    folder = config.run_dir / "out-of-memory"
    assert err.splitlines()[-1] == f"  files    {folder / 'rank-2.json'}, {folder / 'rank-2-snapshot.pickle'}"
    found = json.loads((folder / "rank-2.json").read_text())
    assert found["snapshot"] == "rank-2-snapshot.pickle"
    assert found["device_bytes"] == {"allocated": 70 * 2**30, "reserved": 75 * 2**30, "in all": 80 * 2**30}


def test_live_tensors_share_memory() -> None:
    whole = torch.zeros(2_000_000)
    views = [whole[:10], whole.view(1000, 2000)]
    found = [t for t in live_tensors() if t.num_bytes == 8_000_000 and t.dtype == "float32"]
    assert [(t.name, t.num_bytes) for t in found] == [("a tensor", 8_000_000)]
    assert views


def test_gradients_in_one_bucket_are_counted_once() -> None:
    model = nn.Linear(400, 300)
    bucket = torch.zeros(300 * 400 + 300)
    model.weight.grad = bucket[: 300 * 400].view(300, 400)
    model.bias.grad = bucket[300 * 400 :]
    (found,) = [t for t in live_tensors(model) if "gradient" in t.name]
    assert (found.name, found.num_bytes) == ("gradient of weight and 1 more", 481_200)


def test_tensors_without_memory_are_passed_over() -> None:
    nothing = [torch.empty(3, device="meta"), torch.zeros(0), torch.eye(3).to_sparse()]
    assert all(t.device != "meta" and t.num_bytes for t in live_tensors())
    assert nothing


def test_tensors_of_a_plan_are_passed_over() -> None:
    with FakeTensorMode():
        planned = torch.ones(1234, 567)
    real = torch.ones(1234, 568)
    shapes = {tensor.shape for tensor in live_tensors()}
    assert tuple(real.shape) in shapes
    assert tuple(planned.shape) not in shapes


@pytest.mark.parametrize("broken", ["_tell_place", "_tell_memory", "_tell_tensors", "write_json", "advice"])
def test_what_cannot_be_told_costs_nothing_else(
    broken: str, config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(out_of_memory, broken, fails)
    handle_out_of_memory(caught(), config, 0, situation)
    err = capfd.readouterr().err
    assert "error: rank 0 ran out of memory" in err
    assert "  try      " in err


def test_nothing_known_and_nowhere_to_write(
    write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    config = shrinking(write_config, run__dir=str(tmp_path / "file" / "run"))

    def unknown() -> Situation:
        raise AttributeError("half built")

    handle_out_of_memory(MemoryError(), config, 1, unknown)
    handle_out_of_memory(MemoryError(), config, 1, situation)
    err = capfd.readouterr().err
    assert err.count("error: rank 1 ran out of memory") == 2
    assert "  files  " not in err


def test_the_host_of_a_gpu_is_not_helped_by_a_smaller_micro_batch(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shrinking(write_config)
    monkeypatch.setattr(out_of_memory, "_tell_memory", lambda *_: None)  # there is no GPU here
    known = situation(device=torch.device("cuda", 0))
    handle_out_of_memory(MemoryError(), config, 0, lambda: known)
    assert read_shrink(config.run_dir) is None
    handle_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"), config, 0, lambda: known)
    found = read_shrink(config.run_dir)
    assert found is not None
    assert (found.micro_batch_size, found.was, found.step, found.attempt) == (16, 32, 120, 1)


# ---- whole runs -----------------------------------------------------------------------------------------------


def hungry(write_config: WriteConfig, args: dict[str, Any], **changes: Any) -> Path:
    return write_config(model={"name": "hungry:Hungry", "args": args}, **changes)


def losses(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out-of-memory" / "rank-0.json").read_text())


def test_a_run_that_runs_out(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    done = train("--config", hungry(write_config, {"limit": 6, "after": 2}))
    assert done.code == 1
    assert "error: rank 0 ran out of memory in step 3, micro-batch 1 of 1 (forward)\n" in done.err
    assert "the model (Hungry), " in done.err
    assert "hungry.py:40 in devour: torch.empty(PEBIBYTE, dtype=torch.uint8, device=device)" in done.err
    assert "try      train.micro_batch_size=6 " in done.err
    assert "Traceback" not in done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "can't allocate memory" in summary["error"]
    assert facts(tmp_path / "run")["phase"] == "forward"
    assert not (tmp_path / "run" / "out-of-memory" / "shrink.json").exists()
    again = train("--config", hungry(write_config, {"limit": 6, "after": 2}))  # nothing shrinks
    assert again.code == 1


def test_in_evaluation(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    args = {"limit": 6, "in_eval": True}
    changes = {"memory": {"on_oom": "shrink"}, "eval": {"batch_size": 8}}
    done = train("--config", hungry(write_config, args, **changes))
    assert done.code == 1
    assert "error: rank 0 ran out of memory during evaluation after step 5\n" in done.err
    assert "try      eval.batch_size=4 " in done.err
    assert "next     " not in done.err  # a smaller micro-batch would not help
    done = train(
        "--config", hungry(write_config, args, **changes), "eval.batch_size=4", "run.dir=" + str(tmp_path / "b")
    )
    assert done.code == 0, done.err
    done = train("--config", hungry(write_config, args, memory={"on_oom": "shrink"}), "run.dir=" + str(tmp_path / "c"))
    assert done.code == 1
    assert "next     the next start takes 6 " in done.err  # evaluation has the micro-batch of training


def test_a_model_that_does_not_fit(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    done = train("--config", write_config(model={"name": "hungry:TooLarge"}, memory={"on_oom": "shrink"}))
    assert done.code == 1
    assert "error: rank 0 ran out of memory during startup\n" in done.err
    assert "in __init__: self.table = nn.Parameter(" in done.err
    assert "try      a device with more memory: the model and its optimizer state alone do not fit\n" in done.err
    assert "Traceback" not in done.err
    assert facts(tmp_path / "run")["step"] is None
    assert not (tmp_path / "run" / "out-of-memory" / "shrink.json").exists()


def test_the_next_start_takes_half(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = hungry(write_config, {"limit": 6}, memory={"on_oom": "shrink"})
    first = train("--config", config)
    assert first.code == 1
    assert "next     the next start takes 6 (memory.on_oom: shrink)" in first.err
    second = train("--config", config)
    assert second.code == 0, second.err
    assert "train.micro_batch_size: 6 instead of 12, which ran out of memory at step 1\n" in second.out
    assert "changed " not in second.out
    assert "micro_batch_size: null" in (tmp_path / "run" / "config.yaml").read_text()

    asked = train("--config", config, "train.micro_batch_size=6", "run.dir=" + str(tmp_path / "asked"))
    assert asked.code == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "asked")
    ours, theirs = weights(tmp_path / "run", 10), weights(tmp_path / "asked", 10)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_shrunk_within_a_run_equals_one_that_fits(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    config = hungry(write_config, {"limit": 3, "after": 7}, memory={"on_oom": "shrink"})
    assert train("--config", config).code == 1
    assert train("--config", config).code == 1
    last = train("--config", config)
    assert last.code == 0, last.err
    found = read_shrink(tmp_path / "run")
    assert found is not None
    assert (found.micro_batch_size, found.was, found.configured, found.attempt) == (3, 6, None, 2)
    assert "train.micro_batch_size: 3 instead of 6, which ran out of memory at step 9\n" in last.out
    assert "continuing from step 5 " in last.out

    whole = train("--config", hungry(write_config, {"limit": 99}), "run.dir=" + str(tmp_path / "whole"))
    assert whole.code == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    ours, theirs = weights(tmp_path / "run", 10), weights(tmp_path / "whole", 10)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_a_size_that_the_user_chooses_wins_over_the_record(train: Train, write_config: WriteConfig) -> None:
    config = hungry(write_config, {"limit": 3}, memory={"on_oom": "shrink"})
    assert train("--config", config).code == 1  # 6 is recorded
    done = train("--config", config, "train.micro_batch_size=3")
    assert done.code == 0, done.err
    assert "instead of" not in done.out


def test_the_record_is_ignored_with_stop(train: Train, write_config: WriteConfig) -> None:
    config = hungry(write_config, {"limit": 6}, memory={"on_oom": "shrink"})
    assert train("--config", config).code == 1
    done = train("--config", config, "memory.on_oom=stop")
    assert done.code == 1
    assert "instead of 12, which" not in done.out


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
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    code = "import signal, pathlib; signal.signal(15, lambda *_: None); pathlib.Path(%r).touch(); signal.pause()"
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
