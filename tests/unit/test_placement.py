"""Placement: each rank on its share of the cores next to its GPU, and one thread in each loader worker."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer import placement
from trainer.placement import as_ranges, gpus_beside, parse_ranges, plan_cores

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="cores are chosen on Linux only")

NODES = {0: "0-31,64-95", 1: "32-63,96-127"}  # two sockets of 32 cores with two threads each
EIGHT = [f"0000:{bus:02x}:00.0" for bus in (0x1B, 0x43, 0x52, 0x61, 0x9D, 0xC3, 0xD1, 0xDF)]
NVIDIA = "0x10de"


def add_device(sysfs: Path, address: str, node: int, cores: str | None, kind: str = "0x030200") -> None:
    folder = sysfs / "bus/pci/devices" / address
    folder.mkdir(parents=True)
    for name, text in (("numa_node", str(node)), ("vendor", NVIDIA), ("class", kind), ("local_cpulist", cores)):
        if text is not None:
            (folder / name).write_text(f"{text}\n")


def add_cores(sysfs: Path, nodes: Mapping[int, str], sibling_distance: int = 0) -> None:
    for node, cores in nodes.items():
        folder = sysfs / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cores}\n")
        for core in parse_ranges(cores) if sibling_distance else ():  # otherwise no topology, as in some containers
            topology = sysfs / f"devices/system/cpu/cpu{core}/topology"
            topology.mkdir(parents=True)
            first = core % sibling_distance
            (topology / "thread_siblings_list").write_text(f"{first},{first + sibling_distance}\n")


@pytest.fixture
def two_nodes(tmp_path: Path) -> Path:
    """Eight GPUs, four on each of two nodes, with an audio function and a bridge beside them."""
    add_cores(tmp_path, NODES, 64)
    for i, address in enumerate(EIGHT):
        add_device(tmp_path, address, i // 4, NODES[i // 4])
    add_device(tmp_path, "0000:1b:00.1", 0, NODES[0], kind="0x040300")
    add_device(tmp_path, "0000:07:00.0", 0, NODES[0], kind="0x068000")
    return tmp_path


def shares(addresses: list[str], allowed: set[int], sysfs: Path) -> list[frozenset[int]]:
    planned = [plan_cores(addresses, rank, allowed, sysfs) for rank in range(len(addresses))]
    return [cores for cores in planned if cores is not None]


@pytest.mark.parametrize("text", ["", "0", "0-31,64-95", "3,5-6,9"])
def test_core_lists_are_read_and_written_as_the_kernel_does(text: str) -> None:
    assert as_ranges(parse_ranges(f"{text}\n")) == text


def test_core_lists_as_numbers() -> None:
    assert parse_ranges("0-2,64-65") == {0, 1, 2, 64, 65}
    with pytest.raises(ValueError, match="invalid literal"):
        parse_ranges("all")


def test_ranks_share_the_cores_of_their_node_evenly(two_nodes: Path) -> None:
    found = shares(EIGHT, set(range(128)), two_nodes)
    assert [as_ranges(cores) for cores in found[:4]] == ["0-7,64-71", "8-15,72-79", "16-23,80-87", "24-31,88-95"]
    assert frozenset().union(*found[4:]) == parse_ranges(NODES[1])
    assert sum(len(cores) for cores in found) == 128


def test_a_share_is_of_the_job_s_own_ranks(two_nodes: Path) -> None:
    assert [len(cores) for cores in shares(EIGHT[:2], set(range(128)), two_nodes)] == [32, 32]
    assert plan_cores(EIGHT[5:6], 0, set(range(128)), two_nodes) == parse_ranges(NODES[1])


def test_hardware_threads_of_a_core_stay_together_and_shares_differ_by_one_core(two_nodes: Path) -> None:
    allowed = set(parse_ranges("0-6,64-69,32-63"))  # seven cores for three ranks, one core without its second thread
    found = shares(EIGHT[:3], allowed, two_nodes)
    assert sorted(len({core % 64 for core in cores}) for cores in found) == [2, 2, 3]
    assert sum(len(cores) for cores in found) == 13
    assert frozenset().union(*found) == parse_ranges("0-6,64-69")
    for cores in found:
        assert all((core + 64) % 128 in cores for core in cores if core != 6)


def test_too_few_or_no_allowed_cores_leave_all_ranks_as_they_are(
    two_nodes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lockstep")
    assert shares(EIGHT[:4], {0, 64, 1, 65, 2, 66}, two_nodes) == []  # three cores for four ranks
    assert "on NUMA node 0, allowed cores: 3, ranks: 4" in caplog.text
    assert shares(EIGHT[:1], {32, 33}, two_nodes) == []  # on the other node only
    assert "on NUMA node 0, allowed cores: 0, ranks: 1" in caplog.text


def test_unknown_node_among_several(two_nodes: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lockstep")
    add_device(two_nodes, "0000:f0:00.0", -1, "0-127")
    assert plan_cores(["0000:f0:00.0"], 0, set(range(128)), two_nodes) is None
    assert "the NUMA node of GPU 0000:f0:00.0 is not known" in caplog.text


def test_unknown_node_is_the_only_one(tmp_path: Path) -> None:
    add_cores(tmp_path, {0: "0-15"})
    for address in EIGHT[:2]:
        add_device(tmp_path, address, -1, "0-15")
    assert [as_ranges(cores) for cores in shares(EIGHT[:2], set(range(16)), tmp_path)] == ["0-7", "8-15"]
    assert plan_cores(EIGHT[:1], 0, set(range(16)), tmp_path) == set(range(16))


def test_missing_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lockstep")
    assert plan_cores(EIGHT[:1], 0, {0, 1}, tmp_path) is None
    assert f"No such file or directory: '{tmp_path}" in caplog.text
    add_cores(tmp_path, {0: "0-3"})
    add_device(tmp_path, EIGHT[0], 0, None)  # no local_cpulist: its node's list says the same
    assert plan_cores(EIGHT[:1], 0, {0, 1, 7}, tmp_path) == {0, 1}


def test_gpus_beside_counts_gpus_only(two_nodes: Path) -> None:
    assert gpus_beside(EIGHT[5], two_nodes) == EIGHT[4:]
    assert gpus_beside(EIGHT[0], two_nodes) == EIGHT[:4]
    assert gpus_beside("0000:ff:00.0", two_nodes) == ["0000:ff:00.0"]


@pytest.fixture
def moved(two_nodes: Path, monkeypatch: pytest.MonkeyPatch) -> list[frozenset[int]]:
    """Pretends to be on the machine of `two_nodes`, without a binding; receives where threads are moved."""
    moves: list[frozenset[int]] = []
    monkeypatch.setattr(plan_cores, "__defaults__", (two_nodes,))
    monkeypatch.setattr(gpus_beside, "__defaults__", (two_nodes,))
    monkeypatch.setattr(placement, "move_all_threads", moves.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.delenv("SLURM_CPU_BIND_TYPE", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    show_gpus(monkeypatch, EIGHT)
    return moves


def show_gpus(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
    def properties(index: int) -> SimpleNamespace:
        domain, bus, device = (int(part, 16) for part in addresses[index].removesuffix(".0").split(":"))
        return SimpleNamespace(pci_domain_id=domain, pci_bus_id=bus, pci_device_id=device)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(addresses))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)


@linux_only
def test_rank_i_is_placed_next_to_device_i(moved: list[frozenset[int]]) -> None:
    line = placement.place_this_process(torch.device("cuda:5"), 5, 8)
    assert line == "runs on 16 of 128 CPU cores (40-47,104-111), next to GPU 0000:c3:00.0"
    assert moved == [parse_ranges("40-47,104-111")]


@linux_only
def test_a_process_that_sees_its_own_gpu_only(moved: list[frozenset[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    for address in EIGHT:
        show_gpus(monkeypatch, [address])
        assert placement.place_this_process(torch.device("cuda:0"), EIGHT.index(address), 8)
    assert [len(cores) for cores in moved] == [16] * 8
    assert len(frozenset().union(*moved)) == 128


@linux_only
def test_a_sandbox_that_forbids_it(
    moved: list[frozenset[int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(cores: frozenset[int]) -> None:
        raise PermissionError(1, "Operation not permitted")

    caplog.set_level(logging.INFO, "lockstep")
    monkeypatch.setattr(placement, "move_all_threads", refuse)
    assert placement.place_this_process(torch.device("cuda:0"), 0, 8) is None
    assert "Operation not permitted; the process keeps the cores that it has" in caplog.text


@linux_only
def test_nothing_is_moved_where_it_does_not_apply(moved: list[frozenset[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert placement.place_this_process(torch.device("cpu"), 0, 2) is None
    assert placement.place_this_process(torch.device("cuda:3"), 1, 2) is None  # another mapping
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: set(parse_ranges("0-7,64-71")))
        assert placement.place_this_process(torch.device("cuda:0"), 0, 1) is None  # all are next to it already
    monkeypatch.setenv("SLURM_CPU_BIND_TYPE", "mask_cpu:")
    assert placement.place_this_process(torch.device("cuda:1"), 1, 2) is None
    assert moved == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # Slurm bound the launcher, whose children share its cores
    assert placement.place_this_process(torch.device("cuda:1"), 1, 2) is not None


_MOVE = """
import json, os, threading
from pathlib import Path
from trainer.placement import move_all_threads

def allowed(folder):
    return [line.split()[1] for file in Path(folder).glob("task/*/status") for line in file.read_text().splitlines()
            if line.startswith("Cpus_allowed_list")]

core = max(os.sched_getaffinity(0))
end = threading.Event()
threading.Thread(target=end.wait).start()
move_all_threads({core})
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, json.dumps(allowed("/proc/self")).encode())
    os._exit(0)
os.wait()
print(json.dumps([str(core), allowed("/proc/self"), json.loads(os.read(reader, 10000))]))
end.set()
"""


def with_threads() -> dict[str, str]:
    """Returns an environment in which libraries take as many threads as they like."""
    return {name: text for name, text in os.environ.items() if not name.endswith("_NUM_THREADS")}


@linux_only
def test_all_threads_move_and_forks_inherit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MOVE], env=with_threads(), capture_output=True, text=True, timeout=60, check=True
    )
    core, threads, in_fork = json.loads(done.stdout)
    assert len(threads) >= 2
    assert set(threads) == {core}
    assert in_fork == [core]


_ONE_THREAD = """
import json, os, sys, types
import numpy as np, torch
from threadpoolctl import threadpool_info
from trainer.placement import use_one_thread

np.ones((400, 400)) @ np.ones((400, 400))
sys.modules["cv2"] = types.SimpleNamespace(setNumThreads=lambda count: os.environ.update(ASKED_OF_CV2=str(count)))
if os.fork() == 0:
    use_one_thread()
    np.ones((400, 400)) @ np.ones((400, 400))
    pools = [pool["num_threads"] for pool in threadpool_info()]
    print(json.dumps([torch.get_num_threads(), os.environ["ASKED_OF_CV2"], os.environ["OMP_NUM_THREADS"], pools]))
    sys.stdout.flush()
    os._exit(0)
os.wait()
"""


@linux_only
def test_a_worker_computes_with_one_thread() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ONE_THREAD],
        env=with_threads(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    in_torch, in_cv2, in_environment, pools = json.loads(done.stdout)
    assert (in_torch, in_cv2, in_environment) == (1, "1", "1")
    assert pools
    assert set(pools) == {1}
