"""Which CPU cores a rank runs on, and how many threads its loader workers may start.

Owns the choice of cores next to a rank's GPU and the process's affinity. Loader workers are forked afterwards and
inherit it; memory comes with it, because Linux takes a page from the node of the core that touches it first.

Accelerate's `set_numa_affinity` needs NVML's Python bindings and gives every rank of a NUMA node all of its cores;
torchrun's `--numa-binding` needs the numactl program. This reads sysfs, and no two ranks of a job share a core.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

logger = logging.getLogger("lockstep")

_SYSFS = Path("/sys")
_THREADS_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "OPENCV_FOR_THREADS_NUM",
)


def place_this_process(device: torch.device, local_rank: int, num_local_ranks: int) -> str | None:
    """Moves all threads of this process to its share of the cores next to its GPU.

    Local rank i has CUDA device i of those that every process sees; the ranks whose GPUs are on one NUMA node share
    its allowed cores. Where each process sees its own GPU only (Slurm's `--gpus-per-task`), the other ranks' GPUs are
    unknown: a node's cores are then divided among all GPUs that sysfs lists on it, used by this job or not. The
    cores of other jobs are not known either; only the affinity that this process was started with keeps to them.

    Nothing changes without CUDA, outside Linux, where rank i has another device than i, where Slurm bound each task
    to cores of its own, and where the share is what the process has already. Call it before workers are started.

    Returns:
        One line for the log that says what was done, or None where nothing changed.
    """
    if sys.platform != "linux" or device.type != "cuda" or device.index is None:
        return None
    if num_local_ranks > 1 and _slurm_bound_each_task(os.environ):
        logger.info("CPU placement: Slurm has given each task its cores; they stay as they are")
        return None
    num_visible = torch.cuda.device_count()
    if device.index == local_rank and num_local_ranks <= num_visible:
        addresses = [pci_address(i) for i in range(num_local_ranks)]
        place = local_rank
    elif num_visible == 1:
        address = pci_address(device.index)
        addresses = gpus_beside(address)
        place = addresses.index(address)
    else:
        return None
    allowed = os.sched_getaffinity(0)
    cores = plan_cores(addresses, place, allowed)
    if cores is None or cores == allowed:
        return None
    try:
        move_all_threads(cores)
    except OSError as error:  # a sandbox that forbids it
        logger.info("CPU placement: %s; the process keeps the cores that it has", error)
        return None
    if torch.get_num_threads() > len(cores):  # they would wait for each other
        torch.set_num_threads(len(cores))
    return f"runs on {len(cores)} of {len(allowed)} CPU cores ({as_ranges(cores)}), next to GPU {addresses[place]}"


def plan_cores(
    addresses: Sequence[str], local_rank: int, allowed: set[int], sysfs: Path = _SYSFS
) -> frozenset[int] | None:
    """Chooses the logical cores of one rank: its even share of the allowed ones on its GPU's NUMA node.

    The ranks whose GPUs are on one node get disjoint shares of it, in rank order, which differ by at most one
    physical core. The hardware threads of a physical core stay in one share.

    Args:
        addresses: PCI addresses of the local ranks' GPUs, such as `0000:3b:00.0`, by local rank.
        allowed: logical cores that all of these ranks may use.
        sysfs: where the kernel's description of the machine is mounted.

    Returns:
        The cores, or None, with the reason in the log, where the node of a GPU is not known or has not one allowed
        physical core for each rank. It is None for every rank of a node or for none.
    """
    try:
        return _share(addresses, local_rank, allowed, sysfs)
    except (OSError, ValueError) as error:
        logger.info("CPU placement: %s; the process keeps the cores that it has", error)
        return None


def pci_address(device_index: int) -> str:
    """Returns the PCI address of a visible CUDA device as sysfs writes it. Makes no CUDA context there."""
    properties = torch.cuda.get_device_properties(device_index)
    domain, bus, device = (getattr(properties, f"pci_{part}_id") for part in ("domain", "bus", "device"))
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def gpus_beside(address: str, sysfs: Path = _SYSFS) -> list[str]:
    """Returns the PCI addresses of all GPUs of a GPU's vendor on its NUMA node, itself included, in order."""

    def identity(of: str) -> tuple[str, str, str]:
        folder = sysfs / "bus/pci/devices" / of
        vendor, kind, node = ((folder / name).read_text().strip() for name in ("vendor", "class", "numa_node"))
        return vendor, kind[:4], node  # of the class 0x030200 the 0x03: a display controller of whichever kind

    try:
        wanted = identity(address)
    except OSError:
        return [address]  # plan_cores says what is missing
    found = {address}
    for folder in (sysfs / "bus/pci/devices").iterdir():
        try:
            if identity(folder.name) == wanted:
                found.add(folder.name)
        except OSError:
            continue  # a device without a node
    return sorted(found)


def move_all_threads(cores: Iterable[int]) -> None:
    """Restricts every thread that this process has to these logical cores; later threads and forks inherit them.

    Raises:
        OSError: this process may use none of the cores.
    """
    wanted = frozenset(cores)
    os.sched_setaffinity(0, wanted)  # of the calling thread alone
    moved: set[str] = set()
    while starting := set(os.listdir("/proc/self/task")) - moved:  # a thread not moved yet may have started others
        for thread in starting:
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(thread), wanted)
        moved |= starting


def use_one_thread() -> None:
    """Makes this process, a loader worker, compute with one thread: there is a worker for every core already.

    Limits torch, OpenCV, and whichever OpenMP, OpenBLAS, MKL and BLIS are loaded, and through the environment what is
    loaded later. With torch limited alone, numpy's matrix products in two workers on two cores take three to six
    times as long. Takes about 13 ms.
    """
    for variable in _THREADS_VARIABLES:
        os.environ[variable] = "1"
    torch.set_num_threads(1)
    threadpool_limits(1)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(1)


def parse_ranges(text: str) -> frozenset[int]:
    """Returns the numbers in a list as the kernel writes it, such as `0-31,64-95`.

    Raises:
        ValueError: it is not such a list.
    """
    numbers: set[int] = set()
    for part in text.strip().split(",") if text.strip() else []:
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def as_ranges(numbers: Iterable[int]) -> str:
    """Writes numbers as the kernel does: the inverse of `parse_ranges`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def _share(addresses: Sequence[str], local_rank: int, allowed: set[int], sysfs: Path) -> frozenset[int]:
    """Returns what `plan_cores` does.

    Raises:
        OSError, ValueError: why there is no such share.
    """
    nodes = [_node_of(address, sysfs) for address in addresses]
    node = nodes[local_rank]
    if node is None:
        raise ValueError(f"the NUMA node of GPU {addresses[local_rank]} is not known")
    usable = _cores_beside(addresses[local_rank], node, sysfs) & allowed
    physical = sorted({tuple(sorted(_siblings(core, sysfs) & usable)) for core in usable})
    sharers = [rank for rank, other in enumerate(nodes) if other == node]
    if len(physical) < len(sharers):
        raise ValueError(f"on NUMA node {node}, allowed cores: {len(physical)}, ranks: {len(sharers)}")
    place = sharers.index(local_rank)
    first, end = (len(physical) * i // len(sharers) for i in (place, place + 1))
    return frozenset(core for siblings in physical[first:end] for core in siblings)


def _node_of(address: str, sysfs: Path) -> int | None:
    """Returns a PCI device's NUMA node; None where firmware does not say and there are several."""
    node = int((sysfs / "bus/pci/devices" / address / "numa_node").read_text())
    if node >= 0:
        return node
    existing = [int(folder.name[4:]) for folder in (sysfs / "devices/system/node").glob("node[0-9]*")]
    return existing[0] if len(existing) == 1 else None


def _cores_beside(address: str, node: int, sysfs: Path) -> frozenset[int]:
    of_device = sysfs / "bus/pci/devices" / address / "local_cpulist"
    of_node = sysfs / f"devices/system/node/node{node}/cpulist"
    return parse_ranges((of_device if of_device.exists() else of_node).read_text())


def _siblings(core: int, sysfs: Path) -> frozenset[int]:
    """Returns the logical cores of the physical core that has this one; containers may hide them."""
    file = sysfs / f"devices/system/cpu/cpu{core}/topology/thread_siblings_list"
    return parse_ranges(file.read_text()) if file.exists() else frozenset({core})


def _slurm_bound_each_task(environment: Mapping[str, str]) -> bool:
    """Tells whether this rank is a Slurm task, not the child of a launcher in one, and has cores of its own."""
    binding = environment.get("SLURM_CPU_BIND_TYPE", "none")
    return binding.startswith(("rank", "map_cpu", "mask_cpu")) and "TORCHELASTIC_RUN_ID" not in environment
