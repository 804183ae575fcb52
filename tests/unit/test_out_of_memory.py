"""Running out of memory: what counts as such, and what the report says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import WriteConfig
from hungry import PEBIBYTE
from torch import nn
from torch._subclasses import FakeTensorMode

from trainer.config import Config, load_config
from trainer.data.sampler import BatchPlan
from trainer.memory import out_of_memory
from trainer.memory.out_of_memory import Situation, advice, handle_out_of_memory, is_out_of_memory, live_tensors
from trainer.memory.shrink import read_shrink


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


def plan_of(batch_size: int, micro_batch_size: int | None = None, num_ranks: int = 1, group_size: int = 1) -> BatchPlan:
    return BatchPlan.split(960, batch_size, micro_batch_size, num_ranks, False, group_size)


def situation(**changes: Any) -> Situation:
    known: dict[str, Any] = {"device": torch.device("cpu"), "plan": plan_of(32), "step": 119, "micro_batch": 0}
    return Situation(**{**known, "model": nn.Linear(8, 3), **changes})


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
    config = load_config(str(write_config(run__dir=str(tmp_path / "file" / "run"), memory={"on_oom": "shrink"})))

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
    config = load_config(str(write_config(memory={"on_oom": "shrink"})))
    monkeypatch.setattr(out_of_memory, "_tell_memory", lambda *_: None)  # there is no GPU here
    known = situation(device=torch.device("cuda", 0))
    handle_out_of_memory(MemoryError(), config, 0, lambda: known)
    assert read_shrink(config.run_dir) is None
    handle_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"), config, 0, lambda: known)
    found = read_shrink(config.run_dir)
    assert found is not None
    assert (found.micro_batch_size, found.was, found.step, found.attempt) == (16, 32, 120, 1)
