"""The doctor on this machine's GPUs: what it asks NVIDIA's driver, and what it measures there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import run

from launch.doctor import devices
from launch.doctor.meeting import Meeting
from launch.doctor.situation import SKIPPED, Situation, take
from launch.doctor.verdicts import Place

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def test_one_gpu() -> None:
    from launch.doctor.checks import CHECKS

    device = torch.device("cuda", 0)
    place = Place(0, 0, "here", str(device), is_first=True)
    here = Situation(place, [place], 1, device, None, Meeting(0, 1, 60.0), 60.0)
    found = {check.name: take(check, here) for check in CHECKS}
    assert not any("problem" in values for values in found.values()), found
    json.dumps(found)
    assert found["versions"]["driver"]
    assert found["versions"]["NCCL"]
    assert found["devices"]["names"] == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    assert found["matmul"]["tflops"] > 1
    assert found["host to GPU"]["pinned_gb_s"] > 0.5
    assert found["host to GPU"]["pageable_gb_s"] > 0.2
    health = found["GPU health"]
    if SKIPPED not in health:  # nvidia-ml-py is installed
        assert health["sm_clock_mhz"] > 0
        assert health["temperature"] > 0


def test_a_product_is_timed_on_the_device() -> None:
    product = devices.Product(torch.device("cuda", 0))
    one = min(product.seconds() for _ in range(5))
    assert product.flops / one < 5e15  # a launch alone would look faster than any card


def test_all_gpus_of_this_machine(tmp_path: Path) -> None:
    everything = ",".join(map(str, range(torch.cuda.device_count())))
    command = [sys.executable, "-m", "launch", "doctor", "--json", "found.json"]
    done = run(command, tmp_path, CUDA_VISIBLE_DEVICES=everything)
    data = json.loads((tmp_path / "found.json").read_text())
    assert data["num_ranks"] == torch.cuda.device_count()
    assert not [f for c in data["checks"] for f in c["findings"] if "no answer" in f["message"]], done.stdout
    if data["num_ranks"] > 1:
        (connecting,) = [check for check in data["checks"] if check["name"] == "connecting"]
        assert connecting["ranks"][0]["values"]["backend"] == "nccl"
