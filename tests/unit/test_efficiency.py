"""FLOPs are counted, not guessed; where they cannot be, training goes on without them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import Train, WriteConfig
from run_results import records, summary
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.tasks.classification import Classification
from trainer.telemetry import efficiency
from trainer.telemetry.efficiency import FlopCounter, peak_flops


def counted(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> FlopCounter:
    counter = FlopCounter(model, Classification(), peak=1e12)
    counter.count(batch, len(batch[0]))
    assert not counter.is_due
    return counter


def test_a_model_takes_what_torch_counts_on_real_tensors() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    generator = torch.get_rng_state()
    counter = counted(model, (images, labels))
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with FlopCounterMode(display=False) as real:
        model(images).sum().backward()
    assert counter.per_sample == real.get_total_flops() / 4
    assert counter.utilisation(100) == pytest.approx(100 * real.get_total_flops() / 4 / 1e12)


def test_resnet50_takes_what_its_paper_says() -> None:
    batch = torch.empty(2, 3, 224, 224), torch.zeros(2, dtype=torch.int64)
    per_sample = counted(torchvision.models.resnet50(), batch).per_sample
    # 4.09e9 multiply-adds in forward (torchvision's table), each two operations; backward takes twice as many, but for
    # the gradient of the input, which nobody needs.
    assert per_sample == pytest.approx(3 * 2 * 4.09e9, rel=0.02)


def test_attention_is_counted_in_the_precision_of_any_feed() -> None:
    model = torchvision.models.vit_b_16()  # with float32 weights, as autocast wants them
    images = torch.empty(2, 3, 224, 224, dtype=torch.bfloat16)
    per_sample = counted(model, (images, torch.zeros(2, dtype=torch.int64))).per_sample
    assert per_sample == pytest.approx(3 * 2 * 17.56e9, rel=0.02)  # torchvision's table


class _NeedsNumbers(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * float(x.abs().max().item() >= 0)


class _CannotBeCopied(nn.Linear):
    def __deepcopy__(self, memo: object) -> nn.Module:
        raise RuntimeError("there is only one")


@pytest.mark.parametrize("model", [_NeedsNumbers(8, 3), _CannotBeCopied(8, 3)])
def test_what_cannot_be_counted_is_left_out(model: nn.Module) -> None:
    counter = FlopCounter(model, Classification(), peak=1e12)
    if counter.is_due:
        counter.count((torch.randn(2, 8), torch.zeros(2)), 2)
    assert counter.per_sample is None
    assert counter.utilisation(100) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_peak_of_a_cpu_is_measured(dtype: torch.dtype) -> None:
    peak = peak_flops(torch.device("cpu"), dtype, is_fp8=False, allow_tf32=False)
    a = torch.ones(512, 512)
    started = time.perf_counter()
    for _ in range(3):
        torch.mm(a, a)
    slower = 2 * 512**3 * 3 / (time.perf_counter() - started)
    assert slower / 10 < peak < slower * 100  # of the same order, however busy the machine is; no CPU of today has more


def test_reports_and_summary_have_it(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    task = {"name": "vectors_model:Tokens", "args": {}}
    assert train("--config", write_config(log__every=5, task=task)).code == 0
    found = summary(tmp_path / "run")
    # 8 x 16 and 16 x 3 weights: two operations each in forward, and as many for the gradients of weights and of inputs,
    # but for those of the first layer's input.
    assert found["flops_per_sample"] == 2 * (8 * 16 + 16 * 3) * 2 + 2 * 16 * 3
    assert 0 < found["mfu"] < 1
    reports = [record for record in records(tmp_path / "run") if "train/loss" in record]
    for report in reports:
        rate = report["train/samples_per_second"]
        assert report["train/samples_per_second_per_device"] == rate
        assert report["train/tokens_per_second"] == 7 * rate
        assert 0 < report["train/mfu"] < 1
        assert 0 < report["memory/allocated_gib"] <= report["memory/peak_gib"]
        assert "memory/reserved_gib" not in report


def test_a_peak_is_measured_once_for_each_precision_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[torch.dtype] = []
    efficiency._measured_flops.cache_clear()

    def counted(matrix: torch.Tensor) -> float:
        products.append(matrix.dtype)
        return 1.0

    monkeypatch.setattr(efficiency, "_product_seconds", counted)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, is_new in (("highest", True), ("highest", False), ("medium", True)):
            torch.set_float32_matmul_precision(precision)
            products.clear()
            peak_flops(torch.device("cpu"), torch.float32, is_fp8=False, allow_tf32=False)
            assert bool(products) == is_new
    finally:
        torch.set_float32_matmul_precision(before)
        efficiency._measured_flops.cache_clear()
