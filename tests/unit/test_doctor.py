"""What the doctor measures in one process, its report, and what it makes of ranks that do not come.

A GPU's own figures need NVIDIA's driver: here NVML is a stand-in that answers as its documentation says. The rest is
measured on this machine.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteConfig
from doctoring import place, readings, said, situation
from torch.distributed import HashStore

from launch.doctor import devices, disks, exchange, machine, nvml, report, start
from launch.doctor.checks import CHECKS
from launch.doctor.meeting import Meeting
from launch.doctor.situation import Check, Situation, take
from launch.doctor.verdicts import Finding, Judgement, Reading, Skip, Verdict
from trainer.cli import EXIT_USAGE
from trainer.config import load_config

# ---- pairs and rounds ---------------------------------------------------------------------------------------------


def test_every_machine_is_in_one_pair_at_a_time() -> None:
    places = [place(rank, ranks_per_host=2) for rank in range(8)]
    pairs = exchange.pairs_of(places)
    assert {(0, 1), (1, 0), (1, 2), (7, 0), (0, 2), (6, 0), (2, 6)} <= set(pairs)
    assert len(pairs) == len(set(pairs)) == 16 + 12
    rounds = exchange.rounds_of(pairs, places)
    assert sorted(pair for chosen in rounds for pair in chosen) == sorted(pairs)
    for chosen in rounds:
        machines = [node for pair in chosen for node in {rank // 2 for rank in pair}]
        assert len(machines) == len(set(machines))


# ---- measuring here -----------------------------------------------------------------------------------------------


def test_one_process_measures_all_but_the_exchange(write_config: WriteConfig) -> None:
    here = situation(load_config(str(write_config())))
    found = {check.name: take(check, here) for check in CHECKS}
    here.clean()
    skipped = {name for name, values in found.items() if "skipped" in values}
    gpu = {"GPU health", "host to GPU"} if not torch.cuda.is_available() else set()
    assert skipped == {"connecting", "clocks", "all-reduce", "pairs", "reading data", "W&B", *gpu}
    assert not any("problem" in values for values in found.values()), found
    json.dumps(found)
    assert found["matmul"]["tflops"] > 0
    assert found["checkpoint"]["bytes_per_s"] > 0
    assert found["cores"]["cores"] >= 1
    assert found["memory"]["available"] > 0
    assert not Path(load_config(str(write_config())).run_dir).exists()  # nothing is left


def test_without_a_config_no_folder_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = {check.name: take(check, situation()) for check in CHECKS if check.name in ("run folder", "checkpoint")}
    assert found == {name: {"skipped": "no config was given"} for name in found}
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(write_config: WriteConfig) -> None:
    config = load_config(str(write_config(run__dir="/proc/nowhere")))
    for measure, judge in (
        (disks.measure_writing, disks.judge_writing),
        (disks.measure_sharing, disks.judge_sharing),
    ):
        judgement = judge([Reading(place(0), measure(situation(config)))])
        assert judgement.verdict == "fail"
        assert "/proc/nowhere" in judgement.findings[0].message


def test_checkpoints_in_an_object_store_are_tried_there(write_config: WriteConfig) -> None:
    config = load_config(str(write_config(checkpoint__dir="memory://doctor/run")))
    values = disks.measure_writing(situation(config))
    assert values["bytes_per_s"] > 0
    import fsspec

    assert not fsspec.filesystem("memory").find("/doctor")


def test_reading_is_not_from_the_cache(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.bin").write_bytes(os.urandom(1 << 20))
    os.sync()
    values = disks.read_sample(tmp_path)
    assert (values["files"], values["bytes"]) == (3, 3 << 20)
    # The kernel keeps pages that somebody else holds at that moment, or that are on their way to the disk.
    for _ in range(20):
        share = disks.read_sample(tmp_path)["cached_share"]
        if share is None or share < 0.5:  # None: the file system does not tell
            break
        time.sleep(0.5)
    assert share is None or share < 0.5
    assert disks.read_sample(tmp_path / "none") == {"exists": False}


def test_places_that_data_sets_are_built_from(write_config: WriteConfig) -> None:
    train = {"name": "image_folder", "args": {"root": "pictures", "classes": ["a", "b"]}}
    evaluation = {"name": "my:Set", "args": {"files": ["/data/x.npy"], "url": "https://x/y", "mode": "fast"}}
    config = load_config(str(write_config(data__train=train, data__eval=evaluation)))
    assert disks.data_places(config) == {
        "data.train.args.root": ("pictures", True),
        "data.eval.args.files.0": ("/data/x.npy", False),
    }
    assert machine.num_workers(situation(config)) == 0


def test_a_port_that_is_taken(write_config: WriteConfig) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        config = load_config(str(write_config()), [f"launch.port={port}"])
        judgement = machine.judge_ports([Reading(place(0), machine.measure_ports(situation(config)))])
    assert said(judgement) == [("fail", f"host1: launch.port {port}: in use")]


def test_wandb_that_does_not_answer(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(str(write_config()), ["tracking.trackers=[wandb]", "tracking.wandb.mode=online"])
    monkeypatch.setattr("trainer.tracking.wandb_server", lambda: "http://127.0.0.1:9")
    monkeypatch.setattr("trainer.tracking.has_wandb_key", lambda: True)
    judgement = machine.judge_wandb([Reading(place(0), machine.measure_wandb(situation(config)))])
    assert judgement.verdict == "warn"
    assert "http://127.0.0.1:9 cannot be reached" in judgement.findings[0].message
    offline = load_config(str(write_config()), ["tracking.trackers=[wandb]", "tracking.wandb.mode=offline"])
    with pytest.raises(Skip, match="offline"):
        machine.measure_wandb(situation(offline))


def test_memory_of_a_container(tmp_path: Path) -> None:
    assert machine.cgroup_memory(tmp_path) == (None, 0)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 250\n")
    assert machine.cgroup_memory(tmp_path) == (1000, 150)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.cgroup_memory(tmp_path) == (None, 0)


def test_infiniband_ports(tmp_path: Path) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    found = devices.infiniband_ports(tmp_path)
    assert found == {"mlx5_0:1": "ACTIVE, 400 Gb/sec (4X NDR)", "mlx5_1:1": "DOWN, 400 Gb/sec (4X NDR)"}
    judgement = devices.judge_devices(readings([{"names": [], "infiniband": found, "nvlinks": None}]))
    assert said(judgement) == [("warn", "host1: mlx5_1:1 is not active")]


# ---- NVML (a stand-in) --------------------------------------------------------------------------------------------


def stand_in() -> types.ModuleType:
    module = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def unsupported(*arguments: Any) -> Any:
        raise NVMLError("Not Supported")

    answers: dict[str, Any] = {
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x44,
        "nvmlDeviceGetRemappedRows": (0, 1, 1, 0),
        "nvmlDeviceGetEccMode": (1, 1),
        "nvmlDeviceGetClockInfo": 1400,
        "nvmlDeviceGetMaxClockInfo": 1980,
        "nvmlDeviceGetTemperature": 61,
        "nvmlDeviceGetTemperatureThreshold": 87,
        "nvmlDeviceGetPowerUsage": 650_400,
        "nvmlDeviceGetTotalEccErrors": 0,
    }
    for name in ("nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetNvLinkState"):
        setattr(module, name, unsupported)
    for name, answer in answers.items():
        setattr(module, name, lambda *_, answer=answer: answer)
    for i, name in enumerate(("CLOCK_SM", "TEMPERATURE_GPU", "TEMPERATURE_THRESHOLD_SLOWDOWN", "VOLATILE_ECC")):
        setattr(module, f"NVML_{name}", i)
    module.NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1  # type: ignore[attr-defined]
    module.NVML_MEMORY_ERROR_TYPE_CORRECTED = 0  # type: ignore[attr-defined]
    module.NVMLError = NVMLError  # type: ignore[attr-defined]
    module.nvmlInit = lambda: None  # type: ignore[attr-defined]
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid  # type: ignore[attr-defined]
    return module


def test_what_nvml_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1-2"))
    values = nvml.read(torch.device("cuda", 0))
    assert values["reasons"] == ["power cap", "too hot (hardware)"]
    assert (values["sm_clock_mhz"], values["power_w"], values["power_limit_w"]) == (1400, 650.4, None)
    assert (values["remapping_pending"], values["remapping_failed"], values["nvlinks"]) == (True, False, None)
    findings = devices.judge_health([Reading(place(0, device="cuda:0"), values)]).findings
    assert [finding.message for finding in findings] == [
        "host1 rank 0 cuda:0: runs at 1400 of 1980 MHz: too hot (hardware)",
        "host1 rank 0 cuda:0: broken memory rows wait to be replaced",
    ]


def test_without_nvml_its_figures_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(Skip, match="nvidia-ml-py"):
        nvml.read(torch.device("cuda", 0))


# ---- ranks that do not come ---------------------------------------------------------------------------------------


def test_a_rank_that_does_not_come_is_named() -> None:
    store = HashStore()
    meeting = Meeting(0, 3, 0.4, store)
    meeting.at("start")
    Meeting(2, 3, 0.4, store).at("matmul")
    began = time.monotonic()
    assert meeting.collect("place", {"x": 1}) == {0: {"x": 1}}
    assert 0.3 < time.monotonic() - began < 30
    assert meeting.missing == {1: "not started", 2: "matmul"}
    judgement = report.judge_ranks(3, {0: place(0), 2: place(2)}, meeting.missing, 60)
    assert said(judgement) == [
        ("fail", "rank 1: did not come, within 60 s"),
        ("fail", "host3 rank 2 cpu: was last seen at: matmul, within 60 s"),
    ]


def test_a_rank_that_gets_on_is_waited_for() -> None:
    store = HashStore()
    main, other = Meeting(0, 2, 2.0, store), Meeting(1, 2, 2.0, store)

    def work() -> None:
        for i in range(6):
            time.sleep(0.5)
            other.at(f"step {i}")
        other.collect("readings", {"rank": 1})

    thread = threading.Thread(target=work)
    thread.start()
    assert main.collect("readings", {"rank": 0}) == {0: {"rank": 0}, 1: {"rank": 1}}
    thread.join()
    assert not main.missing


def test_what_stalls_is_left_behind_and_ends_the_exchange() -> None:
    here = situation(patience=0.2)
    here.places.append(place(1))
    is_over = threading.Event()

    def stall(situation: Situation) -> dict[str, Any]:
        situation.now("rank 0 sends to rank 1")
        is_over.wait(60)
        return {}

    check = Check("pairs", stall, exchange.judge_pairs, is_exchange=True)
    values = take(check, here)
    assert values == {"problem": "no answer within 0 s", "at": "rank 0 sends to rank 1"}
    assert take(check, here) == {"skipped": "pairs did not end well"}
    is_over.set()
    judgement = report.judge(check, [Reading(place(0), values)])
    assert said(judgement) == [("fail", "host1 rank 0 cpu: no answer within 0 s, at: rank 0 sends to rank 1")]


def test_an_error_is_a_finding() -> None:
    def broken(situation: Situation) -> dict[str, Any]:
        raise RuntimeError("cuBLAS\n  says no")

    check = Check("matmul", broken, devices.judge_product)
    values = take(check, situation())
    assert values == {"problem": "cuBLAS says no", "at": ""}
    assert said(report.judge(check, [Reading(place(0), values)])) == [("fail", "host1 rank 0 cpu: cuBLAS says no")]


# ---- the report ---------------------------------------------------------------------------------------------------


def test_report() -> None:
    long = Finding(Verdict.FAIL, f"host2 rank 1 cpu: {'slow ' * 40}", "see what else runs there")
    good = Reading(place(0), {"tflops": 1.0})
    whole = report.Report(
        [place(0), place(1)],
        {"config": "digits.yaml"},
        [
            report.Line("versions", Judgement("torch 2.15")),
            report.Line("matmul", Judgement("1 TFLOP/s", (long,) * 9), (good,)),
            report.Line("W&B", Judgement("no config was given", verdict=Verdict.SKIPPED)),
        ],
    )
    lines = whole.table().splitlines()
    assert lines[0] == "doctor: 2 ranks on 2 machines (cpu), digits.yaml"
    assert lines[1] == "ok       versions      torch 2.15"
    assert lines[2] == "FAIL     matmul        1 TFLOP/s"
    assert lines[-2:] == ["skipped: W&B           no config was given", "1 ok, 1 skipped, 1 FAIL"]
    assert sum(line.strip() == "-> see what else runs there" for line in lines) == 6
    assert "and 3 more, in the JSON" in whole.table()
    assert max(map(len, lines)) <= 120
    assert len(whole.errors()) == 9
    assert whole.errors()[0].startswith("error: matmul on host2 rank 1 cpu: slow")
    data = json.loads(whole.to_json())
    assert data["verdict"] == "fail"
    assert data["checks"][1]["ranks"] == [
        {"rank": 0, "node": 0, "host": "host1", "device": "cpu", "is_first": True, "values": {"tflops": 1.0}}
    ]
    assert len(data["checks"][1]["findings"]) == 9


# ---- the command line ---------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    from launch.cli import main

    try:
        return main(["doctor", *arguments])
    except SystemExit as error:
        return int(error.code or 0)


@pytest.mark.parametrize(
    "arguments", [["--timeout", "0"], ["--nodes", "2"], ["--hosts", "a", "--slurm"], ["--config", "none.yaml"]]
)
def test_usage(arguments: list[str]) -> None:
    assert command(*arguments) == EXIT_USAGE


def test_dry_runs(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    file = str(write_config())
    assert command("--dry-run", "--processes", "2", "--json", "x.json") == 0
    here = capsys.readouterr().out
    assert "torchrun --standalone --nproc-per-node 2" in here
    assert "rank.py --json x.json --timeout 60 --config" in here
    assert command("--config", file, "--hosts", "a,b", "--dry-run", "launch.max_restarts=3") == 0
    hosts = capsys.readouterr().out
    assert hosts.count("--doctor --json") == 2
    assert "launch.max_restarts=0 launch.nodes=2" in hosts
    assert command("--config", file, "--slurm", "--nodes", "2", "--dry-run", "launch.slurm.partition=main") == 0
    asked = capsys.readouterr().out
    assert asked.startswith("salloc ")
    assert "--nodes=2" in asked
    assert "--partition=main" in asked
    assert "--signal" not in asked
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    assert command("--config", file, "--slurm", "--dry-run") == 0
    script = capsys.readouterr().out
    assert "srun --nodes=3" in script
    assert "--doctor --json" in script


def test_the_doctor_waits_for_the_nodes_of_its_allocation(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_config())
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for given, wanted, num_nodes in (("2", "1:4", 2), ("8", "1:4", 4), ("3", "3", 3)):
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", given)
        assert command("--config", file, "--slurm", "--nodes", wanted, "--dry-run") == 0
        shown = capsys.readouterr().out
        assert f"srun --nodes={num_nodes} " in shown
        assert [word for word in shown.split() if word.startswith("launch.nodes=")][-1] == f"launch.nodes={num_nodes}"
        assert "--nodes 1:" not in shown
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert command("--config", file, "--slurm", "--nodes", "2:4", "--dry-run") == 2


@pytest.mark.parametrize(("ended", "code"), [(0, 0), (1, 1), (2, 2), (75, 1), (-9, 1)])
def test_the_doctors_exit_code_from_an_allocation(
    ended: int, code: int, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr("shutil.which", lambda name: name)
    answer = subprocess.CompletedProcess[str]([], ended, "", "")
    monkeypatch.setattr(start.subprocess, "run", lambda *command, **options: answer)
    assert command("--config", str(write_config()), "--slurm") == code
