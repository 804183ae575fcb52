"""Devices by name, by memory and at hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from trainer.errors import UserError
from trainer.memory.devices import DEVICES, find_device, known_device, named_device, parse_bytes, this_device

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("24GiB", 24 * GIB), ("24 GB", 24 * 10**9), ("512 MiB", 512 * 2**20), ("1.5TiB", 3 * 2**39), ("7KB", 7000)],
)
def test_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "24", "24g", "GiB", "-1GiB", "1e3MB", "24 gib", "1GiB 2"])
def test_no_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="write bytes like"):
        parse_bytes(text)


def test_device_by_name() -> None:
    assert find_device(" H100-80G ") is DEVICES["h100-80g"]
    assert find_device("rtx-4090").memory_bytes < 24 * GIB


@pytest.mark.parametrize(("text", "num_bytes"), [("24GiB", 24 * GIB), ("24 GB", 24 * 10**9), ("80g", 80 * GIB)])
def test_device_by_memory(text: str, num_bytes: int) -> None:
    device = find_device(text)
    assert device.memory_bytes == num_bytes
    assert "with the speed of a1" in device.name
    assert device.flops.bfloat16


@pytest.mark.parametrize("num_gib", [1, 16, 24, 40, 48, 80, 192, 1000])
def test_every_amount_has_a_speed(num_gib: int) -> None:
    assert find_device(f"{num_gib}GiB").flops.of("bfloat16") > 1e12


@pytest.mark.parametrize(
    ("text", "hint"),
    [("h10-80g", "did you mean 'h100-80g'"), ("toaster", "memory such as 24GiB"), ("0g", "needs memory")],
)
def test_unknown_device(text: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        find_device(text)


def test_figures_are_in_proportion() -> None:
    for device in DEVICES.values():
        flops = device.flops
        assert 8 * GIB < device.memory_bytes < 200 * GIB
        assert 2e11 < device.bandwidth < 1e13
        assert flops.float32 <= (flops.tf32 or flops.float32) <= (flops.float16 or 0) <= (flops.fp8 or 1e16)
        nominal = device.name.rpartition("-")[2]
        if nominal.endswith("g"):
            assert 0.9 * int(nominal[:-1]) < device.memory_bytes / GIB < int(nominal[:-1])


def test_speed_of_a_type() -> None:
    v100, h100 = DEVICES["v100-16g"].flops, DEVICES["h100-80g"].flops
    assert v100.of("bfloat16") == v100.of("float32", allow_tf32=True) == v100.float32
    assert h100.of("float32", allow_tf32=True) == h100.tf32 == pytest.approx(h100.of("bfloat16") / 2)
    assert h100.of("float8_e4m3fn") == h100.fp8
    assert h100.of("float64") == h100.float32


@pytest.mark.parametrize(
    ("name", "gib", "like"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100-80g"),
        ("NVIDIA H100 PCIe", 79.2, "h100-pcie-80g"),
        ("NVIDIA H100 NVL", 93.1, "h100-nvl-94g"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA GH200 480GB", 94.5, "gh200-96g"),
        ("NVIDIA B200", 178.4, "b200"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40g"),
        ("NVIDIA A100 80GB PCIe", 79.2, "a100-80g"),
        ("NVIDIA A10", 22.1, "a10-24g"),
        ("NVIDIA L4", 22.2, "l4-24g"),
        ("NVIDIA L40S", 44.4, "l40s-48g"),
        ("Tesla V100-SXM2-32GB", 31.7, "v100-32g"),
        ("Tesla T4", 14.6, "t4-16g"),
        ("NVIDIA GeForce RTX 3090", 23.7, "rtx-3090"),
        ("NVIDIA RTX A6000", 47.5, "rtx-a6000"),
    ],
)
def test_names_of_the_driver(name: str, gib: float, like: str) -> None:
    device = named_device(name, int(gib * GIB))
    assert device.name == like
    assert device.memory_bytes == int(gib * GIB)


@pytest.mark.parametrize(
    "name", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10G"]
)
def test_slower_cards_of_a_similar_name_are_not_in_the_table(name: str) -> None:
    assert known_device(name, 24 * GIB) is None


def test_an_unknown_card_has_its_own_name() -> None:
    assert named_device("NVIDIA Z1", 24 * GIB).name == "NVIDIA Z1 with the speed of a10-24g"


def test_this_cpu() -> None:
    device = this_device(torch.device("cpu"))
    assert device.memory_bytes > 2**28
    assert device.flops.of("float32") > 1e9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_this_gpu() -> None:
    device = this_device(torch.device("cuda", 0))
    assert device.memory_bytes == torch.cuda.get_device_properties(0).total_memory


def test_nothing_imports_torch() -> None:
    code = "import sys, trainer.memory.devices as d; d.find_device('24GiB'); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "False"
