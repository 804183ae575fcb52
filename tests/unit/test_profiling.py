"""Profiles of a few steps: what is recorded, when, what is found in it, and that the training is the same."""

from __future__ import annotations

import gzip
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train, WriteConfig
from resuming import assert_same_end
from run_results import records, summary
from torch.profiler import profile

from trainer.cli import main
from trainer.config_reporting import ProfileConfig
from trainer.profiling.kinds import kind_of
from trainer.profiling.recording import Profiling
from trainer.profiling.summary import combine, summarise, summary_text
from trainer.profiling.traces import analyse
from trainer.telemetry.clock import Clock

PLACES = ["loading a batch", "forward", "backward", "optimizer", "exchange of decisions", "report"]


def read_trace(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    with gzip.open(folder / "profile" / f"rank-{rank}.trace.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def read_kernels(folder: Path, rank: int = 0) -> dict[str, Any]:
    summarise(folder)  # looks into the trace where its own process has not done so yet
    return json.loads((folder / "profile" / f"rank-{rank}.kernels.json").read_text())


def waited_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def ranges(events: list[dict[str, Any]]) -> list[str]:
    found = sorted((e["ts"], e["name"]) for e in events if e.get("cat") == "user_annotation")
    return [name for _, name in found]


def test_a_run_leaves_a_profile_and_is_the_same(
    train: Train, write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = {"name": "mlp", "args": {"in_features": 8, "hidden": [256, 256], "dropout": 0.2}}
    assert train("--config", write_config("plain.yaml", run__dir=str(tmp_path / "plain"), model=model)).code == 0
    assert not (tmp_path / "plain" / "profile").exists()
    folder = tmp_path / "run"
    (folder / "profile").mkdir(parents=True)
    (folder / "profile" / "rank-7.kernels.json").touch()  # of an earlier start with more ranks
    done = train("--config", write_config(profile={"steps": [3, 5]}, model=model))
    assert done.code == 0, done.err
    assert "profile    steps 3 to 5" in done.out
    assert_same_end(folder, tmp_path / "plain")
    written = summary(folder)["goodput_seconds"]["profile"]
    assert written > 0
    split = summary(folder)["time_split"]  # nor does writing seem to be part of a step
    assert split["host"] * summary(folder)["seconds"]["total"] > 0.9 * written

    # What is traced reads like the loop.
    names = ranges(read_trace(folder))
    assert [name for name in names if name.startswith("step ")] == ["step 3", "step 4", "step 5"]
    third = names[names.index("step 3") + 1 : names.index("step 4")]
    made = ["loading a batch", "forward", "backward", "loading a batch"]  # the last one finds no more
    assert [name for name in third if name in PLACES] == [*made, *PLACES[3:]]
    assert "evaluation" not in names  # comes after the last of them

    table = folder / "profile" / "rank-0.kernels.json"
    assert waited_for(table.exists)  # comes by itself, a moment after the trace
    files = {file.name for file in (folder / "profile").iterdir()}
    assert files == {f"rank-0.{end}" for end in ("trace.json.gz", "memory.json", "kernels.json", "kernels.txt")}
    kernels = read_kernels(folder)
    assert kernels["steps"] == [3, 4, 5]
    assert kernels["is_warmed_up"]
    assert kernels["given_up"] is None
    assert sum(kernels["step_seconds"].values()) == pytest.approx(kernels["traced_seconds"])
    between = kernels["traced_seconds"] - sum(kernels["kind_seconds"].values())  # steps and operators, on a busy core
    assert -0.02 < between / kernels["traced_seconds"] < 0.5
    assert set(PLACES) <= set(kernels["place_seconds"])
    calls = {(row["name"], row["kind"]): row["calls"] for row in kernels["kernels"]}
    assert calls["aten::addmm", "matmul"] == 3 * 3  # an MLP of three layers
    assert "aten::addmm" in (folder / "profile" / "rank-0.kernels.txt").read_text()

    # The memory: gradients are there at the peak.
    memory = json.loads((folder / "profile" / "rank-0.memory.json").read_text())
    alive = [row[memory["columns"].index("bytes_alive")] for row in memory["allocations"]]
    assert max(alive) == kernels["memory"]["peak_bytes"]
    held = {(row["operator"], row["place"]): row for row in kernels["memory"]["held_by"]}
    assert held["aten::mm", "backward"]["bytes"] >= 256 * 256 * 4

    capfd.readouterr()
    assert main(["profile", str(folder)]) == 0
    text = capfd.readouterr().out
    assert re.search(r"rank 0 \(cpu, .*\): steps 3 to 5 in .* a step, the slowest [345]: ", text)
    assert re.search(r"matrix products, convolutions, attention +\d+\.\d% ", text)
    assert re.search(r"loading a batch +\d+\.\d% ", text)
    assert re.search(r"memory of rank 0: peak .* held then:\n +.* x  aten::", text)
    assert "rank-N.trace.json.gz   open it at https://ui.perfetto.dev (N = 0)" in text
    assert main(["profile", str(folder), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["ranks"][0]["steps"] == [3, 4, 5]
    assert found["kernels"][0]["name"] == kernels["kernels"][0]["name"]
    assert found["differences"] == []
    assert set(found["files"]) == files


def test_a_stop_and_a_resume_in_the_midst_of_the_steps(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {"steps": [2, 8], "stacks": True, "shapes": True, "memory": False}
    data = {"name": "vectors:Interrupting", "args": {"length": 60, "after": 4 * 12}}
    assert train("--config", write_config(data__train=data, profile=settings)).code == 75
    stopped = summary(folder)["step"]
    assert 2 <= stopped < 8
    assert [s for s in read_kernels(folder)["steps"] if s <= stopped] == list(range(2, stopped + 1))
    events = read_trace(folder)
    assert any("Input Dims" in event.get("args", {}) for event in events)
    assert any(event.get("cat") == "python_function" for event in events)
    assert read_kernels(folder)["memory"] is None
    assert not (folder / "profile" / "rank-0.memory.json").exists()

    changes: dict[str, Any] = {"checkpoint": {"allow_changes": ["data.train"]}}
    assert train("--config", write_config(profile={"steps": [2, 8]}, **changes)).code == 0
    assert read_kernels(folder)["steps"] == list(range(stopped + 1, 9))
    assert not read_kernels(folder)["is_warmed_up"]
    assert [r["step"] for r in records(folder) if "train/loss" in r] == list(range(1, 11))

    before = (folder / "profile" / "rank-0.trace.json.gz").stat().st_mtime_ns
    assert train("--config", write_config(profile={"steps": [2, 8]}, train__epochs=3, **changes)).code == 0
    assert summary(folder)["step"] == 15
    assert (folder / "profile" / "rank-0.trace.json.gz").stat().st_mtime_ns == before


BAD = {
    "order": ([5, 3], r"profile.steps: the first step \(5\) comes after the last \(3\)"),
    "many": ([1, 500], r"profile.steps: 500 steps, and a trace that can be opened has at most 100"),
    "zero": ([0, 3], r"profile.steps\S*: .*greater than or equal to 1"),
    "beyond": ([11, 12], r"profile.steps: the run has 10 steps, and the first to trace is 11"),
}


@pytest.mark.parametrize("name", BAD)
def test_steps_that_cannot_be_traced(name: str, train: Train, write_config: WriteConfig) -> None:
    steps, expected = BAD[name]
    done = train("--config", write_config(profile={"steps": steps}))
    assert done.code == 2
    assert re.search(rf"^error: .*tiny.yaml:\d+: {expected}", done.err), done.err


def test_without_a_profile(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(tmp_path)]) == 2
    assert "holds no profile; train with profile.steps=[10,15]" in capfd.readouterr().err
    assert main(["profile", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capfd.readouterr().err
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "rank-0.kernels.json").write_text("{")
    assert main(["profile", str(tmp_path)]) == 2
    assert "rank-0.kernels.json' cannot be read" in capfd.readouterr().err


def test_a_profile_that_cannot_be_written_ends_no_run(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").touch()
    done = train("--config", write_config(profile={"steps": [1, 2]}))
    assert done.code == 0, done.err
    assert re.search("step 2: the profile is not whole in '.*/run/profile': .*File exists", done.out)
    assert summary(tmp_path / "run")["status"] == "finished"


def make(folder: Path, first: int, last: int, at: Callable[[str], None] = lambda place: None) -> Profiling:
    config = ProfileConfig(steps=(first, last))
    made = Profiling.wanted(config, folder, 0, 1, torch.device("cpu"), Clock(), at, total_steps=100)
    assert made is not None
    return made


def pass_step(profiling: Profiling, step: int) -> None:
    profiling.before_step(step)
    profiling.at("forward")
    torch.zeros(8, 8) @ torch.ones(8, 8)
    profiling.after_step(step)


def test_steps_that_come_again_are_traced_again(tmp_path: Path) -> None:
    """A run that goes back to a checkpoint leaves a profile of what was made, and in the end one of all steps."""
    profiling = make(tmp_path / "profile", 4, 6)
    for step in (1, 2, 3, 2, 3, 4, 5):  # the first time back is in the step of warming up
        pass_step(profiling, step)
    assert not (tmp_path / "profile").exists()
    pass_step(profiling, 2)
    assert read_kernels(tmp_path)["steps"] == [4, 5]
    for step in (3, 4, 5, 6, 7):
        pass_step(profiling, step)
    assert read_kernels(tmp_path)["steps"] == [4, 5, 6]
    for step in (2, 3, 4, 5, 6, 7):  # back once more, when all is written
        pass_step(profiling, step)
    profiling.close()
    assert [name for name in ranges(read_trace(tmp_path)) if name != "forward"] == ["step 4", "step 5", "step 6"]
    with profile():  # nothing is left running
        torch.zeros(3)


def test_a_step_given_up_half_way(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    profiling = make(tmp_path / "profile", 1, 6)
    pass_step(profiling, 1)
    profiling.before_step(2)
    profiling.close()
    assert main(["profile", str(tmp_path)]) == 0
    text = capfd.readouterr().out
    assert "step 2 was given up half-way" in text
    assert "step 1 was the first of its process" in text


@pytest.mark.parametrize("half", ['{"traceEvents": [', None])
def test_no_room_for_the_trace(
    half: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch writes half of a trace to a full disk, or nothing, and says nothing."""
    profiling = make(tmp_path / "profile", 1, 1)
    monkeypatch.setattr(profile, "export_chrome_trace", lambda _, path: Path(path).write_text(half) if half else None)
    with caplog.at_level(logging.WARNING):
        pass_step(profiling, 1)
    assert "step 1: the profile is not whole in" in caplog.text
    assert "torch could not write the trace; is there room in" in caplog.text


def test_a_trace_that_is_too_large_to_look_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pass_step(made := make(tmp_path / "profile", 1, 1), 1)
    made.close()
    assert waited_for(lambda: len(list((tmp_path / "profile").glob("rank-*"))) == 4)
    for place in ("recording", "finding"):
        monkeypatch.setattr(f"trainer.profiling.{place}.MOST_BYTES", 1000)
    with caplog.at_level(logging.WARNING):
        pass_step(make(tmp_path / "profile", 1, 1), 1)
    assert "KiB are too much to look into; trace fewer steps" in caplog.text
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["rank-0.trace.json.gz"]
    assert "step 1" in ranges(read_trace(tmp_path))
    assert main(["profile", str(tmp_path)]) == 2
    assert "rank-0.trace.json.gz' cannot be read: more than 1 KiB are too much" in capfd.readouterr().err


def test_the_command_looks_into_what_nobody_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "profile"
    told: list[str] = []
    monkeypatch.setattr("sys.executable", "/none")
    with caplog.at_level(logging.WARNING):
        pass_step(make(folder, 1, 1, told.append), 1)
    assert "No such file or directory: '/none'" in caplog.text
    assert len(told) >= 4  # a beat between any two parts of the writing
    assert set(told) == {"writing a profile"}
    assert [file.name for file in folder.iterdir()] == ["rank-0.trace.json.gz"]
    (folder / "rank-1.trace.json.gz").write_bytes((folder / "rank-0.trace.json.gz").read_bytes()[:-50])
    (folder / "rank-2.trace.json.gz").write_bytes(gzip.compress(b"[]"))
    assert main(["profile", str(tmp_path)]) == 0
    text = capfd.readouterr().out
    assert "rank 0 (cpu, " in text
    assert "rank-1.trace.json.gz' cannot be read: it is not whole" in text
    assert "rank-2.trace.json.gz' cannot be read: it is not a trace" in text
    assert {file.name for file in folder.glob("rank-0.*")} == {
        f"rank-0.{ending}" for ending in ("trace.json.gz", "memory.json", "kernels.json", "kernels.txt")
    }


@pytest.mark.parametrize("since", [1, 2, 3])
def test_beside_another_profiler_nothing_is_traced(
    since: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It begins before this one warms up, between that and the first step to trace, or in the midst of these."""
    profiling = make(tmp_path / "profile", 2, 3)
    other = profile()
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3, 4):
            if step == since:
                other.start()
            pass_step(profiling, step)
    other.stop()
    profiling.close()
    if since < 3:
        assert caplog.text.count("nothing is traced, as another profiler of torch's is on") == 1
        assert not (tmp_path / "profile").exists()
        assert "aten::mm" in {event.name for event in other.events() or ()}


def test_a_run_that_fails_leaves_what_it_traced(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    data = {"name": "vectors:Buggy", "args": {"length": 60}}
    assert train("--config", write_config(data__train=data, profile={"steps": [1, 10]})).code == 1
    kernels = read_kernels(tmp_path / "run")
    assert kernels["given_up"] == kernels["steps"][-1]
    assert kernels["steps"][0] == 1


# ---- a GPU's trace, made by hand ------------------------------------------------------------------------------


def host(name: str, start: float, duration: float, category: str = "user_annotation", **args: Any) -> dict[str, Any]:
    event = {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": args.pop("tid", 1)}
    return {**event, "ts": start, "dur": duration, "args": args}


def kernel(name: str, start: float, duration: float, correlation: int, category: str = "kernel") -> dict[str, Any]:
    return host(name, start, duration, category, tid="stream 7", correlation=correlation)


def gpu_allocation(start: float, num_bytes: int, address: int, total: int) -> dict[str, Any]:
    args = {"Device Type": 1, "Device Id": 0, "Bytes": num_bytes, "Addr": address, "Total Allocated": total}
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "pid": 1, "tid": 1, "ts": start, "args": args}


GPU_TRACE = [
    host("step 7", 0, 1000),
    host("loading a batch", 0, 100),
    host("forward", 100, 200),
    host("aten::addmm", 110, 50, "cpu_op"),
    gpu_allocation(115, 4096, 1, 10_000 + 4096),
    gpu_allocation(120, 1024, 2, 10_000 + 5120),
    host("cudaLaunchKernel", 120, 10, "cuda_runtime", correlation=1),
    host("backward", 300, 300),
    gpu_allocation(310, -1024, 2, 10_000 + 4096),
    host("autograd::engine::evaluate_function: AddmmBackward0", 310, 100, "cpu_op", tid=2),
    host("cudaLaunchKernel", 320, 10, "cuda_runtime", tid=2, correlation=2),
    host("cudaLaunchKernel", 340, 10, "cuda_runtime", tid=2, correlation=3),
    host("cudaMemcpyAsync", 350, 10, "cuda_runtime", tid=3, correlation=4),  # on a thread of the feed
    host("cudaLaunchKernel", 360, 10, "cuda_runtime", tid=3, correlation=5),
    host("optimizer", 600, 300),
    host("cudaLaunchKernel", 610, 10, "cuda_runtime", correlation=6),
    host("cudaDeviceSynchronize", 900, 90, "cuda_runtime", correlation=9),
    kernel("nvjet_hsh_128x256_64x4_2x1_v_bz_TNT", 150, 100, 1),
    kernel("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", 350, 100, 2),
    kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 400, 150, 3),
    kernel("Memcpy HtoD (Pinned -> Device)", 560, 20, 4, "gpu_memcpy"),
    kernel("void at::native::vectorized_elementwise_kernel<4, Flip>(int)", 600, 20, 5),
    kernel("void at::native::vectorized_elementwise_kernel<4, Add>(int)", 700, 200, 6),
]


def test_what_a_trace_of_a_gpu_says() -> None:
    record = analyse({"traceEvents": GPU_TRACE}).record()
    microseconds = {kind: round(seconds * 1e6) for kind, seconds in record["kind_seconds"].items()}
    assert record["kinds_are_of"] == "gpu"
    assert microseconds == {"matmul": 200, "communication": 150, "copies": 20, "data": 20, "optimizer": 200}
    gpu = record["gpu"]
    assert gpu["idle_share"] == pytest.approx(1 - (100 + 200 + 20 + 20 + 200) / 1000)
    assert gpu["communication_alone_share"] == pytest.approx(0.1)
    assert gpu["host_waits_seconds"] == pytest.approx(90e-6)
    first, second = gpu["gaps"][:2]
    assert first["seconds"] == pytest.approx(150e-6)
    assert (first["step"], first["host_in"]) == (7, "loading a batch")
    assert first["before"].startswith("nvjet")
    assert second["seconds"] == pytest.approx(100e-6)
    memory = record["memory"]
    assert (memory["of"], memory["before_bytes"], memory["peak_bytes"]) == ("gpu", 10_000, 15_120)
    assert memory["held_by"] == [{"operator": "aten::addmm", "place": "forward", "bytes": 5120, "allocations": 2}]

    about = {"device": "NVIDIA H200", "host": "h", "steps": [7], "is_warmed_up": True, "given_up": None}
    ranks = [{**record, **about, "rank": rank} for rank in (0, 1)]
    slow = {**ranks[1], "place_seconds": {**record["place_seconds"], "loading a batch": 300e-6}}
    found = combine([{**rank, "num_ranks": 3, "torch": "2.14"} for rank in (ranks[0], slow)])
    text = summary_text({**found, "folder": "runs/a/profile", "files": ["rank-0.memory.pickle"]})
    assert "2 ranks, torch 2.14; profiles of 1 more are not in this folder, or cannot be read" in text
    assert "rank-N.memory.pickle   drop it on https://pytorch.org/memory_viz (N = 0)" in text
    assert "the GPU was idle 46% of the traced steps" in text
    assert "did nothing but communicate 10% of them" in text
    assert "the host waited for it 9% of the time" in text
    assert "150.0 us  at 0.0000 s: step 7, the host in 'loading a batch', then nvjet_hsh" in text
    assert "rank 1: 300.0 us in 'loading a batch', rank 0: 100.0 us" in text
    assert (
        "peak 15 KiB in forward of step 7, 10 KiB of it from before these steps; allocated since and held then:" in text
    )


@pytest.mark.parametrize(
    ("name", "place", "kind"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "optimizer", "communication"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float>", "forward", "normalisation"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "forward", "normalisation"),
        ("sm80_xmma_fprop_implicit_gemm_bf16bf16", "forward", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "backward", "matmul"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "forward", "matmul"),
        ("triton_poi_fused_add_relu_3", "forward", "elementwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer", "optimizer"),
        ("Memset (Device)", "forward", "copies"),
        ("aten::convolution_backward", "backward", "matmul"),
        ("## Call CompiledFxGraph f7jgda3c6t3cekw4 ##", "forward", "elementwise"),
        ("aten::convert_something", "forward", "other"),
        ("aten::linalg_vector_norm", "backward", "elementwise"),
        ("aten::copy_", "loading a batch", "copies"),
        ("aten::mm", "evaluation", "evaluation"),
        ("aten::addmm", "report", "python"),
    ],
)
def test_kinds_by_name_and_place(name: str, place: str, kind: str) -> None:
    assert kind_of(name, place) == kind
