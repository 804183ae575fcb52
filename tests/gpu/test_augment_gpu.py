"""The device half of image handling on a GPU: the bits of the CPU, and no waiting."""

from __future__ import annotations

import pytest
import torch
from conftest import no_waiting

from trainer.config_data import AugmentConfig, NormalizeConfig
from trainer.data.augment import DeviceAugmentation, mix_targets
from trainer.data.draws import sample_keys
from trainer.data.sampler import SampleKey

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

NORMALIZE = NormalizeConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CASES = {
    "plain": None,
    "mixup": AugmentConfig(mixup=0.2),
    "cutmix": AugmentConfig(cutmix=1.0),
    "zero": AugmentConfig(erase=0.5),
    "all": AugmentConfig(mixup=0.2, cutmix=1.0, mix_probability=0.8, erase=0.5, erase_with="noise"),
}


def pictures(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, 64, 48), dtype=torch.uint8, generator=generator)


def on_both(augmentation: DeviceAugmentation, count: int, compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the results of the CPU and of the GPU; the second call on the GPU may not wait for it."""
    images = pictures(count)
    plan = augmentation.plan(sample_keys(3, [SampleKey(0, i) for i in range(count)]), tuple(images.shape))
    expected = augmentation(images, plan)
    device = torch.device("cuda")
    augmentation.to(device)
    forward = torch.compile(augmentation, fullgraph=True) if compiled else augmentation
    pinned = images.pin_memory(), plan.pin_memory(), torch.arange(count).pin_memory()
    forward(images.to(device), plan.to(device))
    with no_waiting():
        on_device = pinned[1].to(device, non_blocking=True)
        result = forward(pinned[0].to(device, non_blocking=True), on_device)
        if augmentation.mixes:
            targets = mix_targets(pinned[2].to(device, non_blocking=True) % 7, on_device, 7)
    if augmentation.mixes:
        assert torch.equal(targets.cpu(), mix_targets(torch.arange(count) % 7, plan, 7))
    return expected, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 7, 64])
@pytest.mark.parametrize("case", list(CASES))
def test_bits_are_those_of_the_cpu(case: str, count: int, dtype: torch.dtype) -> None:
    expected, result = on_both(DeviceAugmentation(NORMALIZE, CASES[case], 0.5, 0.5, dtype), count, compiled=False)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("case", ["plain", "all"])
def test_compiled_results_are_within_rounding(case: str) -> None:
    torch.compiler.reset()
    expected, result = on_both(DeviceAugmentation(NORMALIZE, CASES[case], 0.5, 0.5), 64, compiled=True)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-6, atol=1e-6)
