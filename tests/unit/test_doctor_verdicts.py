"""The doctor's verdicts on good and bad numbers."""

from __future__ import annotations

from typing import Any

import pytest
from doctoring import Judge, readings, said

from launch.doctor import devices, disks, exchange, machine
from launch.doctor.verdicts import COMPUTE, Judgement, Verdict, find_slow

# ---- verdicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "slow"),
    [
        ([100, 100], {}),
        ([100, 90], {}),
        ([100, 84], {1: "warn"}),
        ([100, 69], {1: "fail"}),
        ([100, 60, 102, 98], {1: "fail"}),
        ([50, 50, 100, 100, 100], {0: "fail", 1: "fail"}),
        ([100], {}),
    ],
)
def test_the_slow_one_is_told_from_its_peers(rates: list[float], slow: dict[int, str]) -> None:
    found = find_slow(dict(enumerate(rates)), COMPUTE)
    assert {key: value.verdict for key, value in found.items()} == slow


def health(**changes: Any) -> dict[str, Any]:
    good: dict[str, Any] = {
        "sm_clock_mhz": 1980,
        "max_sm_clock_mhz": 1980,
        "temperature": 50,
        "slowdown_temperature": 87,
        "ecc": True,
    }
    good |= {"reasons": ["power cap"], "uncorrected_errors": 0, "remapping_failed": False, "remapping_pending": False}
    return {**good, **changes}


def copies(pinned: float, pageable: float = 8.0) -> dict[str, Any]:
    return {"pinned_gb_s": pinned, "pageable_gb_s": pageable}


def written(rate: float = 5e8, **changes: Any) -> dict[str, Any]:
    return {"location": "runs/x", "free": 1 << 40, "bytes_per_s": rate, "publish_seconds": 0.01, **changes}


def read(rate: float | None = 1e9, exists: bool = True, **changes: Any) -> dict[str, Any]:
    values = {"place": "/data", "needed": True, "exists": exists, "bytes_per_s": rate, "cached_share": 0.0, **changes}
    return {"places": {"data.train.args.root": values}}


def pair(rate: float, is_inside: bool = False) -> dict[str, Any]:
    return {"pairs": [{"to": "host9 rank 9 cpu", "is_inside": is_inside, "bytes_per_s": rate}]}


def files(limit: int | None) -> dict[str, Any]:
    return {"limit": limit, "hard_limit": 1 << 20, "needed": 320}


MANY = 10 << 30
GPUS = {"nvlinks": [18, 18], "infiniband": {"mlx5_0:1": "ACTIVE, 400 Gb/sec"}, "names": ["H100", "H100"]}
CASES: list[tuple[Judge, list[dict[str, Any]], list[tuple[str, str]]]] = [
    (machine.judge_versions, [{"torch": "2.15"}] * 2, []),
    (
        machine.judge_versions,
        [{"torch": "2.15", "code": "a"}, {"torch": "2.15", "code": "a"}, {"torch": "2.11", "code": "a"}],
        [("fail", "host3 rank 2: torch 2.11, and 2.15 on host1 rank 0, host2 rank 1")],
    ),
    (
        machine.judge_versions,
        [{"driver": "580"}, {"driver": "570"}],
        [("warn", "host2 rank 1: driver 570, and 580 on host1 rank 0")],
    ),
    (machine.judge_variables, [{"variables": {"GLOO_SOCKET_IFNAME": name}} for name in ("a", "b")], []),
    (
        machine.judge_variables,
        [{"variables": {"NCCL_ALGO": "Ring"}}, {"variables": {}}],
        [("warn", "host2 rank 1: NCCL_ALGO (unset), and Ring on host1 rank 0")],
    ),
    (
        machine.judge_variables,
        [{"variables": {"NCCL_P2P_DISABLE": "1"}}],
        [("warn", "host1: NCCL_P2P_DISABLE=1; GPUs then copy through host memory")],
    ),
    (machine.judge_open_files, [files(None), files(65536)], []),
    (
        machine.judge_open_files,
        [files(400), files(100)],
        [
            ("warn", "host1: a process may have 400 files open, and a rank needs about 320"),
            ("fail", "host2: a process may have 100 files open, and a rank needs about 320"),
        ],
    ),
    (machine.judge_shared_memory, [{"free": MANY, "wanted": 0}], []),
    (
        machine.judge_shared_memory,
        [{"free": 64 << 10, "wanted": 256 << 20}, {"free": 0, "wanted": 0, "error": "No space left on device"}],
        [
            ("warn", "host1: 64 KiB free in /dev/shm; NCCL may want 0.25 GiB"),
            ("fail", "host2: /dev/shm cannot be used: No space left on device (0 KiB free)"),
        ],
    ),
    (machine.judge_cores, [{"cores": 8, "ranks": 8, "model": "x", "numa_nodes": 2, "load": 0.0}] * 2, []),
    (
        machine.judge_cores,
        [{"cores": cores, "ranks": 8, "model": "x", "numa_nodes": None, "load": 0.0} for cores in (8, 8, 4)],
        [
            ("warn", "host3: 8 ranks share 4 cores"),
            ("warn", "host3 rank 2: cores 4, and 8 on host1 rank 0, host2 rank 1"),
        ],
    ),
    (machine.judge_memory, [{"available": MANY, "ranks": 2}], []),
    (
        machine.judge_memory,
        [{"available": 1 << 30, "ranks": 2}, {"available": 1 << 28, "ranks": 2}],
        [
            ("warn", "host1: 1.00 GiB of memory are left for 2 ranks"),
            ("fail", "host2: 0.25 GiB of memory are left for 2 ranks"),
        ],
    ),
    (machine.judge_ports, [{"port": 29400, "is_free": True}, {"port": None, "is_free": None}], []),
    (
        machine.judge_ports,
        [{"port": 29400, "is_free": False, "error": "in use"}],
        [("fail", "host1: launch.port 29400: in use")],
    ),
    (machine.judge_wandb, [{"server": "https://x", "has_key": True, "error": None}], []),
    (
        machine.judge_wandb,
        [{"server": "https://x", "has_key": True, "error": "timed out"}],
        [("warn", "host1: https://x cannot be reached: timed out")],
    ),
    (devices.judge_devices, [GPUS, GPUS], []),
    (
        devices.judge_devices,
        [GPUS, {**GPUS, "nvlinks": [18, 16]}, {**GPUS, "names": ["A100"], "nvlinks": None, "infiniband": {}}],
        [
            ("warn", "host3 rank 2: devices: 1 x A100, and 2 x H100 on host1 rank 0, host2 rank 1"),
            ("warn", "host3 rank 2: InfiniBand ports: 0, and 1 on host1 rank 0, host2 rank 1"),
            ("warn", "host2 cuda:1: 16 NVLinks are up, and 18 on its neighbours"),
        ],
    ),
    (
        devices.judge_product,
        [{"kind": "cpu", "tflops": tflops, "dtype": "float32", "size": 1024} for tflops in (0.1, 0.1, 0.05)],
        [("fail", "host3 rank 2 cpu: 50 GFLOP/s, 50% less than its peers' 100 GFLOP/s")],
    ),
    # Two kinds of device are no peers.
    (
        devices.judge_product,
        [{"kind": str(tflops), "tflops": tflops, "dtype": "bfloat16", "size": 8192} for tflops in (700.0, 200.0)],
        [],
    ),
    (devices.judge_health, [health(), health(sm_clock_mhz=None, reasons=None, uncorrected_errors=None)], []),
    (
        devices.judge_health,
        [
            health(reasons=["too hot (hardware)"], sm_clock_mhz=1800),
            health(uncorrected_errors=3),
            health(temperature=85),
        ],
        [
            ("warn", "host1 rank 0 cpu: runs at 1800 of 1980 MHz: too hot (hardware)"),
            ("fail", "host2 rank 1 cpu: 3 memory errors since the driver was loaded that could not be mended"),
            ("warn", "host3 rank 2 cpu: 85 C, and it slows down at 87 C"),
        ],
    ),
    (
        devices.judge_health,
        [health(), health(sm_clock_mhz=1200), health(ecc=False, remapping_failed=True)],
        [
            ("fail", "host3 rank 2 cpu: broken memory rows could not be replaced"),
            ("warn", "host3 rank 2: ECC False, and True on host1 rank 0, host2 rank 1"),
            ("warn", "host2 rank 1 cpu: runs at 1200 MHz, and its peers at 1980 MHz"),
        ],
    ),
    (devices.judge_copies, [copies(50), copies(48)], []),
    (
        devices.judge_copies,
        [copies(50), copies(12)],
        [("fail", "host2 rank 1 cpu: pinned host memory comes at 12.0 GB/s, 76% less than to its peers")],
    ),
    (exchange.judge_clock, [{"ahead": 0.0, "tolerance": 5.0}, {"ahead": -0.02, "tolerance": 5.0}], []),
    (
        exchange.judge_clock,
        [{"ahead": ahead, "tolerance": 5.0} for ahead in (0.0, 2.0, -90.0)],
        [
            ("warn", "host2: its clock is 2.00 s ahead of that of host1"),
            ("fail", "host3: its clock is 90.00 s behind that of host1"),
        ],
    ),
    (exchange.judge_pairs, [pair(1e9), pair(1.1e9), pair(9e9, is_inside=True)], []),
    (
        exchange.judge_pairs,
        [pair(1e9), pair(1.1e9), pair(1e8), pair(9e9, is_inside=True)],
        [("fail", "host3 rank 2 cpu -> host9 rank 9 cpu: 0.10 GB/s, 90% less than its peers' 1.05 GB/s")],
    ),
    (
        exchange.judge_pairs,
        [pair(1e9, is_inside=True), pair(1e8, is_inside=True)],
        [("warn", "host2 rank 1 cpu -> host9 rank 9 cpu: 0.10 GB/s, 90% less than its peers' 1.00 GB/s")],
    ),
    (
        exchange.judge_pairs,
        [pair(1e7)],
        [("warn", "host1 rank 0 cpu -> host9 rank 9 cpu: 10.00 MB/s; gradients will wait for that")],
    ),
    (disks.judge_reading, [read(), read()], []),
    (
        disks.judge_reading,
        [read(), read(None, exists=False), read(1e8)],
        [
            ("fail", "host2: data.train.args.root: there is no '/data', and host1 has it"),
            ("warn", "host3: data.train.args.root: 100 MB/s, 90% less than elsewhere"),
        ],
    ),
    (
        disks.judge_reading,
        [read(None, error="Permission denied")],
        [("fail", "host1: data.train.args.root: Permission denied")],
    ),
    (disks.judge_reading, [read(None, exists=False, needed=False)], []),
    (disks.judge_writing, [written(), written(4e8)], []),
    (
        disks.judge_writing,
        [written(free=1 << 20), written(), {"location": "runs/x", "free": None, "error": "Read-only file system"}],
        [
            ("fail", "host1: 1.00 MiB free in 'runs/x'"),
            ("fail", "host3: no checkpoint can be written to 'runs/x': Read-only file system"),
        ],
    ),
    (
        disks.judge_writing,
        [written(), written(1e7)],
        [("warn", "host2: a checkpoint is written at 10 MB/s, 98% less than elsewhere")],
    ),
    (disks.judge_sharing, [{"folder": "runs/x", "unseen": []}] * 2, []),
    (
        disks.judge_sharing,
        [{"folder": "runs/x", "unseen": []}, {"folder": "runs/x", "unseen": ["host1"]}],
        [("fail", "host2: does not see what host1 left in 'runs/x'")],
    ),
]


@pytest.mark.parametrize(("judge", "values", "expected"), CASES)
def test_verdicts(judge: Judge, values: list[dict[str, Any]], expected: list[tuple[str, str]]) -> None:
    judgement = judge(readings(values))
    assert said(judgement) == expected
    assert judgement.verdict == (Verdict.FAIL if "fail" in str(expected) else "warn" if expected else "ok")
    assert all(finding.hint for finding in judgement.findings)


def test_all_reduce_tells_latency_and_bandwidth() -> None:
    sizes = [{"bytes": 1024, "seconds": 2e-4, "bus_gb_s": 0.005}, {"bytes": 64 << 20, "seconds": 0.1, "bus_gb_s": 0.67}]
    judgement = exchange.judge_all_reduce(readings([{"sizes": sizes, "left_out": []}]))
    assert judgement == Judgement("200 us for 1 KiB, 0.67 GB/s for 64 MiB")
    judgement = exchange.judge_all_reduce(readings([{"sizes": sizes[:1], "left_out": [64 << 20]}]))
    assert judgement.verdict == "warn"
