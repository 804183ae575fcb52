"""What is the case on a machine: versions, variables, limits, memory, cores, ports, and W&B as seen from it."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from launch import host_facts
from launch.doctor import nvml
from launch.doctor.situation import Situation
from launch.doctor.verdicts import Finding, Judgement, Reading, Skip, Values, Verdict, odd_ones, span
from trainer.data.tuning import cores_of_a_rank
from trainer.units import format_bytes

_VARIABLES = re.compile(r"(NCCL|GLOO|TORCH_NCCL|UCX|FI)_\w+|CUDA_VISIBLE_DEVICES|CUDA_DEVICE_MAX_CONNECTIONS")
_OF_ONE_MACHINE = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # interfaces may have other names elsewhere
_SLOW_SWITCHES = {
    "NCCL_P2P_DISABLE": "GPUs then copy through host memory",
    "NCCL_SHM_DISABLE": "processes of one machine then talk through the network",
    "NCCL_IB_DISABLE": "NCCL then leaves InfiniBand alone and takes sockets",
    "CUDA_LAUNCH_BLOCKING": "the host then waits for every kernel",
}
_FILES, _FILES_PER_WORKER = 256, 8  # that a rank opens for itself, and for a loader worker
_SHM_TRIAL = 1 << 20  # bytes
_SHM_PER_RANK = 32 << 20  # bytes that NCCL takes for a rank's peers on one machine, roughly
_MEMORY_WARN, _MEMORY_FAIL = 2 << 30, 256 << 20  # bytes for a rank: torch with CUDA takes about the former


# ---- versions -----------------------------------------------------------------------------------------------------


def measure_versions(situation: Situation) -> Values:
    """Returns the versions of all that must be the same everywhere."""
    found: Values = dict(host_facts.versions())
    try:
        found["torchvision"] = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        found["torchvision"] = "none"
    files = host_facts.code_digests()
    found["code"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
    if situation.is_on_gpu:
        found["CUDA"] = torch.version.cuda or torch.version.hip
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = nvml.driver_version()
    return found


def judge_versions(readings: Sequence[Reading]) -> Judgement:
    """Wants all versions to be equal."""
    findings: list[Finding] = []
    for name in readings[0].values:
        hint = "install the same everywhere" if name != "code" else "bring the same files of trainer/ and launch/ there"
        verdict = Verdict.WARN if name == "driver" else Verdict.FAIL
        findings += odd_ones(readings, name, hint, verdict)
    known = {name: value for name, value in readings[0].values.items() if value is not None}
    return Judgement(", ".join(f"{name} {value}" for name, value in known.items()), tuple(findings))


# ---- variables ----------------------------------------------------------------------------------------------------


def measure_variables(situation: Situation) -> Values:
    """Returns the environment variables that change how devices are chosen and how ranks talk."""
    return {"variables": {k: v for k, v in sorted(os.environ.items()) if _is_known(k)}}


def _is_known(name: str) -> bool:
    return _VARIABLES.fullmatch(name) is not None or name in _SLOW_SWITCHES


def judge_variables(readings: Sequence[Reading]) -> Judgement:
    """Warns of differences between machines, and of switches that make things slower."""
    findings: list[Finding] = []
    names = sorted({name for reading in readings for name in reading.values["variables"]})
    for name in names:
        flat = [Reading(r.place, {name: r.values["variables"].get(name, "(unset)")}) for r in readings]
        if name not in _OF_ONE_MACHINE:
            findings += odd_ones(flat, name, "set it alike everywhere, as in launch.environment", Verdict.WARN)
        for reading in flat:
            if name in _SLOW_SWITCHES and reading.values[name] not in ("0", "(unset)", ""):
                message = f"{reading.place.host}: {name}={reading.values[name]}; {_SLOW_SWITCHES[name]}"
                findings.append(Finding(Verdict.WARN, message, "unset it unless that is what you want"))
    first = readings[0].values["variables"]
    return Judgement(" ".join(f"{n}={v}" for n, v in first.items()) or "none set", tuple(findings))


# ---- limits and resources -----------------------------------------------------------------------------------------


def measure_open_files(situation: Situation) -> Values:
    """Returns the limit of open files, and an estimate of what a rank opens."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    needed = _FILES + _FILES_PER_WORKER * num_workers(situation)
    return {
        "limit": None if soft == unlimited else soft,
        "hard_limit": None if hard == unlimited else hard,
        "needed": needed,
    }


def num_workers(situation: Situation) -> int:
    """Returns how many loader workers a rank would start at most."""
    wanted = situation.config.data.workers if situation.config is not None else "auto"
    return cores_of_a_rank(situation.num_local_ranks) if wanted == "auto" else int(wanted)


def judge_open_files(readings: Sequence[Reading]) -> Judgement:
    """Wants room for what a rank opens, and better twice that."""
    findings = []
    for reading in readings:
        limit, hard, needed = (reading.values[name] for name in ("limit", "hard_limit", "needed"))
        if limit is not None and limit < 2 * needed:
            verdict = Verdict.FAIL if limit < needed else Verdict.WARN
            message = f"{reading.place.host}: a process may have {limit} files open, and a rank needs about {needed}"
            way = f"ulimit -n {2 * needed}" if hard is None or hard >= 2 * needed else "raise it in limits.conf"
            findings.append(Finding(verdict, message, f"{way} before the launch"))
    limits = [r.values["limit"] if r.values["limit"] is not None else math.inf for r in readings]
    return Judgement(f"at most {span(limits, '{:.0f}'.format)}", tuple(findings))


def measure_shared_memory(situation: Situation) -> Values:
    """Tries out /dev/shm: semaphores of Python's multiprocessing live there, and NCCL's buffers on one machine."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        raise Skip("no /dev/shm here")
    usage = shutil.disk_usage(folder)
    values: Values = {"free": usage.free, "total": usage.total, "wanted": 0}
    if situation.is_on_gpu and situation.num_local_ranks > 1:
        values["wanted"] = _SHM_PER_RANK * situation.num_local_ranks
    file = folder / f"lockstep-doctor-{os.getpid()}"
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, _SHM_TRIAL)
        finally:
            os.close(descriptor)
            file.unlink()
        multiprocessing.get_context("spawn").Semaphore(1)
    except OSError as error:
        values["error"] = error.strerror or str(error)
    return values


def judge_shared_memory(readings: Sequence[Reading]) -> Judgement:
    """Wants it to be writable, and large enough for NCCL on machines with several GPUs."""
    findings = []
    for reading in readings:
        values, host = reading.values, reading.place.host
        hint = "remove old files there, or give the container more: --shm-size, launch.kubernetes.shared_memory"
        if "error" in values:
            message = f"{host}: /dev/shm cannot be used: {values['error']} ({format_bytes(values['free'])} free)"
            findings.append(Finding(Verdict.FAIL, message, hint))
        elif values["free"] < values["wanted"]:
            free, wanted = format_bytes(values["free"]), format_bytes(values["wanted"])
            message = f"{host}: {free} free in /dev/shm; NCCL may want {wanted}"
            findings.append(Finding(Verdict.WARN, message, hint))
    return Judgement(f"{span([r.values['free'] for r in readings], format_bytes)} free in /dev/shm", tuple(findings))


def measure_cores(situation: Situation) -> Values:
    """Returns the cores that this rank's machine gives to all ranks on it."""
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    return {
        "cores": cores_of_a_rank(1),
        "machine_cores": os.cpu_count(),
        "numa_nodes": nodes or None,
        "ranks": situation.num_local_ranks,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "model": _cpu_model(),
    }


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def judge_cores(readings: Sequence[Reading]) -> Judgement:
    """Wants a core for each rank, and the same machines everywhere."""
    findings: list[Finding] = []
    for reading in readings:
        cores, ranks = reading.values["cores"], reading.values["ranks"]
        if cores < ranks:
            message = f"{reading.place.host}: {ranks} ranks share {cores} cores"
            findings.append(Finding(Verdict.WARN, message, "start fewer processes, or give the job more cores"))
    findings += odd_ones(readings, "cores", "the slowest machine sets the pace of all", Verdict.WARN)
    findings += odd_ones(readings, "model", "the slowest machine sets the pace of all", Verdict.WARN, "CPU")
    values = readings[0].values
    text = span([r.values["cores"] for r in readings], "{:.0f}".format)
    parts = [f"{text} for {values['ranks']} rank{'s' * (values['ranks'] > 1)}"]
    if values["numa_nodes"]:
        parts.append(f"{values['numa_nodes']} NUMA node{'s' * (values['numa_nodes'] > 1)}")
    parts.append(f"load {span([r.values['load'] for r in readings], '{:.1f}'.format)}")
    return Judgement(", ".join(parts), tuple(findings))


def measure_memory(situation: Situation) -> Values:
    """Returns the host memory that is left, of the machine or of the container."""
    memory = psutil.virtual_memory()
    limit, used = cgroup_memory()
    available = memory.available if limit is None else min(memory.available, limit - used)
    return {
        "available": available,
        "total": memory.total,
        "container_limit": limit,
        "ranks": situation.num_local_ranks,
    }


def cgroup_memory(folder: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int]:
    """Returns the limit of this container's memory, None where there is none, and how much of it is not cache."""
    with suppress(OSError, ValueError):
        limit = int((folder / "memory.max").read_text())
        facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / "memory.current").read_text()) - int(facts.get("inactive_file", 0))
        return limit, used
    return None, 0


def judge_memory(readings: Sequence[Reading]) -> Judgement:
    """Wants enough for torch in every rank."""
    findings = []
    for reading in readings:
        available, ranks = reading.values["available"], reading.values["ranks"]
        if available < _MEMORY_WARN * ranks:
            verdict = Verdict.FAIL if available < _MEMORY_FAIL * ranks else Verdict.WARN
            message = f"{reading.place.host}: {format_bytes(available)} of memory are left for {ranks} ranks"
            findings.append(Finding(verdict, message, "end what else runs there, or start fewer processes"))
    return Judgement(f"{span([r.values['available'] for r in readings], format_bytes)} available", tuple(findings))


# ---- ports and W&B ------------------------------------------------------------------------------------------------


def measure_ports(situation: Situation) -> Values:
    """Tries to listen on a free port, and on `launch.port` where ranks meet."""
    with socket.create_server(("", 0)) as server:
        values: Values = {"free": server.getsockname()[1], "port": None, "is_free": None}
    port = situation.config.launch.port if situation.config is not None else None
    if port is None or situation.place.rank != 0:
        return values
    values["port"] = port
    if len(situation.hosts) > 1:
        values["is_free"] = True  # this very job meets there
        return values
    try:
        socket.create_server(("", port)).close()
        values["is_free"] = True
    except OSError as error:
        values.update(is_free=False, error="in use" if error.errno == errno.EADDRINUSE else error.strerror)
    return values


def judge_ports(readings: Sequence[Reading]) -> Judgement:
    """Wants `launch.port` to be free."""
    findings = []
    summary = "any free one can be listened on"
    for reading in readings:
        port = reading.values["port"]
        if port is not None and not reading.values["is_free"]:
            message = f"{reading.place.host}: launch.port {port}: {reading.values['error']}"
            findings.append(Finding(Verdict.FAIL, message, "choose another launch.port, or end what listens there"))
        elif port is not None:
            summary = f"launch.port {port} is free"
    return Judgement(summary, tuple(findings))


def measure_wandb(situation: Situation) -> Values:
    """Asks the W&B server for a sign of life, where a run would talk to it."""
    if situation.config is None:
        raise Skip("no config was given")
    tracking = situation.config.tracking
    if "wandb" not in tracking.trackers:
        raise Skip("tracking.trackers does not name wandb")
    mode = tracking.wandb.mode or os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled"):
        raise Skip(f"W&B is {mode} in this run")
    from trainer.tracking import has_wandb_key, wandb_server  # import wandb

    server, has_key = wandb_server(), has_wandb_key()
    if not has_key and mode is None:
        raise Skip("no W&B key here: the run is kept offline, and can be uploaded later")
    values: Values = {"server": server, "has_key": has_key, "error": None}
    try:
        urllib.request.urlopen(server, timeout=min(10.0, situation.patience / 2)).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        values["error"] = str(getattr(error, "reason", error))
    return values


def judge_wandb(readings: Sequence[Reading]) -> Judgement:
    """Warns where it does not answer: a run then keeps its records offline."""
    findings = []
    for reading in readings:
        values, host = reading.values, reading.place.host
        if values["error"] is not None:
            message = f"{host}: {values['server']} cannot be reached: {values['error']}"
            findings.append(Finding(Verdict.WARN, message, "the run is kept offline; `wandb sync` uploads it later"))
        elif not values["has_key"]:
            message = f"{host}: no W&B key, and tracking.wandb.mode is online"
            findings.append(Finding(Verdict.WARN, message, "wandb login, or WANDB_API_KEY"))
    return Judgement(f"{readings[0].values['server']} answers", tuple(findings))
