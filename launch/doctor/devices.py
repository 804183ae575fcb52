"""What the devices are, whether one is slower than its peers, and how they and the link to the host are doing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from launch.doctor import nvml
from launch.doctor.situation import Situation
from launch.doctor.verdicts import (
    COMPUTE,
    TRANSFER,
    Finding,
    Judgement,
    Reading,
    Skip,
    Values,
    Verdict,
    find_slow,
    group,
    odd_ones,
    span,
)
from launch.host_facts import devices, listed

_NO_GPU = "no GPU here"
_CPU_SIZE, _GPU_SIZE = 1024, 8192  # rows and columns of the matrices
_WARM_UP, _SECONDS, _MOST = 1, 1.0, 200  # products before, time for and number of those that count
_COPY_BYTES, _COPIES = 256 << 20, 5
_NEAR_SLOWDOWN = 5  # degrees


# ---- what there is ------------------------------------------------------------------------------------------------


def measure_devices(situation: Situation) -> Values:
    """Returns kind and number of this machine's accelerators, and the fast links that it has."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    names = list(devices())
    memory = [torch.cuda.get_device_properties(i).total_memory for i in range(len(names))] if _is_cuda(kind) else []
    values: Values = {"names": names, "memory": memory, "nvlinks": None, "infiniband": infiniband_ports()}
    if situation.is_on_gpu:
        try:
            values["nvlinks"] = [nvml.read(torch.device("cuda", i))["nvlinks"] for i in range(len(names))]
        except Skip as reason:
            values["nvlinks_unknown"] = str(reason)
    return values


def _is_cuda(kind: torch.device | None) -> bool:
    return kind is not None and kind.type == "cuda"


def infiniband_ports(folder: Path = Path("/sys/class/infiniband")) -> dict[str, str]:
    """Returns state and rate of each port of InfiniBand or RoCE, such as `ACTIVE, 400 Gb/sec (4X NDR)`."""
    found = {}
    for port in sorted(folder.glob("*/ports/*")):
        try:
            state = (port / "state").read_text().strip().rpartition(": ")[2]
            found[f"{port.parents[1].name}:{port.name}"] = f"{state}, {(port / 'rate').read_text().strip()}"
        except OSError:
            continue
    return found


def judge_devices(readings: Sequence[Reading]) -> Judgement:
    """Wants the same devices and links everywhere, and all links up."""
    findings: list[Finding] = []
    hint = "the slowest device sets the pace of all"
    flat = [Reading(r.place, {**r.values, "names": listed(r.values["names"])}) for r in readings]
    findings += odd_ones(flat, "names", hint, Verdict.WARN, "devices:")
    for reading in readings:
        ports, host = reading.values["infiniband"], reading.place.host
        down = [name for name, state in ports.items() if not state.startswith("ACTIVE")]
        if down and len(down) < len(ports):
            findings.append(Finding(Verdict.WARN, f"{host}: {', '.join(down)} is not active", "look at ibstat there"))
    counts = [Reading(r.place, {"ports": len(r.values["infiniband"])}) for r in readings]
    findings += odd_ones(
        counts, "ports", "NCCL takes sockets where a machine has none", Verdict.WARN, "InfiniBand ports:"
    )
    for reading in readings:
        links = reading.values["nvlinks"] or []
        usual = max((n for n in links if n is not None), default=0)
        for i, number in enumerate(links):
            if number is not None and number < usual:
                message = f"{reading.place.host} cuda:{i}: {number} NVLinks are up, and {usual} on its neighbours"
                findings.append(Finding(Verdict.WARN, message, "nvidia-smi nvlink --status there"))
    values = readings[0].values
    summary = listed(values["names"]) + ("" if values["names"] else ", training is on the CPU")
    summary += " on each machine" if len(readings) > 1 else ""
    if values["nvlinks"] and any(values["nvlinks"]):
        summary += f", {max(n or 0 for n in values['nvlinks'])} NVLinks each"
    elif len(values["names"]) > 1:
        summary += ", NVLinks: " + values.get("nvlinks_unknown", "none")
    summary += f", {len(values['infiniband'])} InfiniBand ports" if values["infiniband"] else ", no InfiniBand"
    return Judgement(summary, tuple(findings))


# ---- a fixed product ----------------------------------------------------------------------------------------------


class Product:
    """The product of two square matrices, in what training uses: bf16 or fp16 on a GPU, float32 on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.dtype = torch.float32
        if device.type == "cuda":
            self.dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        self.size = _GPU_SIZE if device.type == "cuda" else _CPU_SIZE
        self._device = device
        generator = torch.Generator().manual_seed(0)
        left, right = torch.randn(2, self.size, self.size, generator=generator).to(device, self.dtype)
        self._left, self._right, self._out = left, right, torch.empty_like(left)

    def start(self) -> None:
        """Begins one product; on a GPU it goes on behind the host."""
        torch.mm(self._left, self._right, out=self._out)

    def seconds(self) -> float:
        """Returns how long one product takes."""
        return timed(self.start, self._device)

    @property
    def flops(self) -> float:
        """Floating-point operations of one product."""
        return 2.0 * self.size**3


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Returns how long some work takes, on the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda *_: None
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def measure_product(situation: Situation, product: Product | None = None) -> Values:
    """Returns the speed of a fixed product, over and over for a second.

    On a GPU what counts is the second half, when its clock has settled. On a CPU it is the best of all, as what else
    runs there disturbs most of them.
    """
    product = product or Product(situation.device)
    for _ in range(_WARM_UP):
        product.seconds()
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < _MOST and (len(seconds) < 3 or time.perf_counter() - began < _SECONDS):
        seconds.append(product.seconds())
        situation.now(f"product {len(seconds)}")  # one that is very slow is measured, too
    counted = statistics.median(seconds[len(seconds) // 2 :]) if situation.is_on_gpu else min(seconds)
    return {
        "size": product.size,
        "dtype": str(product.dtype).removeprefix("torch."),
        "kind": torch.cuda.get_device_name(situation.device) if situation.is_on_gpu else "cpu",
        "threads": None if situation.is_on_gpu else torch.get_num_threads(),
        "repeats": len(seconds),
        "seconds": counted,
        "median_seconds": statistics.median(seconds),
        "tflops": product.flops / counted / 1e12,
    }


def judge_product(readings: Sequence[Reading]) -> Judgement:
    """Compares each device with the others of its kind."""
    findings: list[Finding] = []
    for kind, peers in group(readings, lambda r: r.values["kind"]).items():
        slow = find_slow({r.place: r.values["tflops"] for r in peers}, COMPUTE)
        for place, found in slow.items():
            message = f"{place}: {_flops(found.rate)}, {found.percent}% less than its peers' {_flops(found.peers)}"
            hint = "see its clocks and temperature" if kind != "cpu" else "see what else runs on its cores"
            findings.append(Finding(found.verdict, message, hint))
    first = readings[0].values
    text = span([r.values["tflops"] for r in readings], _flops)
    return Judgement(f"{text}, {first['dtype']} {first['size']}x{first['size']}", tuple(findings))


def _flops(tflops: float) -> str:
    return f"{tflops:.0f} TFLOP/s" if tflops >= 10 else f"{1e3 * tflops:.0f} GFLOP/s"


# ---- how a GPU is doing -------------------------------------------------------------------------------------------


def measure_health(situation: Situation) -> Values:
    """Returns clocks, temperature and errors of this rank's GPU, while it is busy."""
    if not situation.is_on_gpu:
        raise Skip(_NO_GPU)
    product = Product(situation.device)
    one = min(product.seconds() for _ in range(3))
    for _ in range(min(max(int(_SECONDS / one), 1), 4 * _MOST)):
        product.start()
    time.sleep(0.6 * _SECONDS)  # the readings are of a card at work
    values = nvml.read(situation.device)
    torch.cuda.synchronize(situation.device)
    return values


def judge_health(readings: Sequence[Reading]) -> Judgement:
    """Looks for cards that are held back, are hot, or have lost memory."""
    findings: list[Finding] = []
    for reading in readings:
        values, place = reading.values, reading.place

        def add(verdict: Verdict, what: str, hint: str, place: object = place) -> None:
            findings.append(Finding(verdict, f"{place}: {what}", hint))

        held_back = [reason for reason in values["reasons"] or () if reason != "power cap"]
        if held_back:
            what = f"runs at {values['sm_clock_mhz']} of {values['max_sm_clock_mhz']} MHz: {', '.join(held_back)}"
            add(Verdict.WARN, what, "its cooling and power supply: nvidia-smi -q -d PERFORMANCE there")
        if values["uncorrected_errors"]:
            what = f"{values['uncorrected_errors']} memory errors since the driver was loaded that could not be mended"
            add(Verdict.FAIL, what, "take the card out of use: nvidia-smi -q -d ECC there")
        if values["remapping_failed"]:
            add(Verdict.FAIL, "broken memory rows could not be replaced", "have the card exchanged")
        elif values["remapping_pending"]:
            add(Verdict.WARN, "broken memory rows wait to be replaced", "reset the GPU, or restart the machine")
        temperature, limit = values["temperature"], values["slowdown_temperature"]
        if temperature is not None and limit is not None and temperature > limit - _NEAR_SLOWDOWN:
            add(Verdict.WARN, f"{temperature} C, and it slows down at {limit} C", "its cooling")
    modes = [Reading(r.place, {"ecc": r.values["ecc"]}) for r in readings]
    findings += odd_ones(modes, "ecc", "nvidia-smi --ecc-config there, and a restart", Verdict.WARN, "ECC")
    clocks = {r.place: float(r.values["sm_clock_mhz"]) for r in readings if r.values["sm_clock_mhz"] is not None}
    for place, found in find_slow(clocks, COMPUTE).items():
        message = f"{place}: runs at {found.rate:.0f} MHz, and its peers at {found.peers:.0f} MHz"
        findings.append(Finding(Verdict.WARN, message, "nvidia-smi -q -d CLOCK,PERFORMANCE there"))
    parts = [_known(readings, "sm_clock_mhz", "MHz"), _known(readings, "temperature", "C")]
    parts += [_known(readings, "uncorrected_errors", "uncorrected errors")]
    return Judgement(", ".join(part for part in parts if part) or "this card tells nothing", tuple(findings))


def _known(readings: Sequence[Reading], name: str, unit: str) -> str:
    values = [r.values[name] for r in readings if r.values[name] is not None]
    return f"{span(values, '{:.0f}'.format)} {unit}" if values else ""


# ---- between host and device --------------------------------------------------------------------------------------


def measure_copies(situation: Situation) -> Values:
    """Returns how fast host memory comes to the device, pinned as the loader's is, and pageable."""
    if not situation.is_on_gpu:
        raise Skip(_NO_GPU)
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=situation.device)
    values: Values = {"bytes": _COPY_BYTES}
    for name, pin in (("pinned", True), ("pageable", False)):
        source = torch.ones(_COPY_BYTES, dtype=torch.uint8, pin_memory=pin)
        target.copy_(source, non_blocking=pin)
        times = [timed(lambda: target.copy_(source, non_blocking=pin), situation.device) for _ in range(_COPIES)]  # noqa: B023
        values[f"{name}_gb_s"] = _COPY_BYTES / statistics.median(times) / 1e9
    return values


def judge_copies(readings: Sequence[Reading]) -> Judgement:
    """Compares each GPU's link to its host with the others'."""
    findings = []
    for name in ("pinned", "pageable"):
        for place, found in find_slow({r.place: r.values[f"{name}_gb_s"] for r in readings}, TRANSFER).items():
            message = (
                f"{place}: {name} host memory comes at {found.rate:.1f} GB/s, {found.percent}% less than to its peers"
            )
            verdict = found.verdict if name == "pinned" else Verdict.WARN
            findings.append(Finding(verdict, message, "its PCIe link (nvidia-smi -q -d PCIE), and parallel.pin_cores"))
    rates = {
        name: span([r.values[f"{name}_gb_s"] for r in readings], "{:.1f}".format) for name in ("pinned", "pageable")
    }
    return Judgement(f"{rates['pinned']} GB/s pinned, {rates['pageable']} GB/s pageable", tuple(findings))
