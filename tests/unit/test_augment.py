"""The device half of image handling: what it draws, what it does with it, and on what the bits depend."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import nightly
from drawn import keys
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as image_functional

from trainer.config_data import AugmentConfig, NormalizeConfig
from trainer.data.augment import AugmentationPlan, DeviceAugmentation, SymmetricBeta, mix_targets
from trainer.errors import UserError

NORMALIZE = NormalizeConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HEIGHT, WIDTH = 24, 36


def pictures(count: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def everything(**changes: Any) -> DeviceAugmentation:
    augment = {"mixup": 0.2, "cutmix": 1.0, "mix_probability": 0.8, "erase": 0.5, "erase_with": "noise"}
    return DeviceAugmentation(NORMALIZE, AugmentConfig(**{**augment, **changes}), 0.5, 0.5)


def only(**augment: Any) -> DeviceAugmentation:
    return DeviceAugmentation(None, AugmentConfig(**augment))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


class TestNormalize:
    @pytest.mark.parametrize("count", [1, 5, 16])
    def test_bits_are_those_of_torchvision(self, count: int) -> None:
        images = pictures(count)
        expected = v2.Normalize(list(NORMALIZE.mean), list(NORMALIZE.std))(
            image_functional.to_dtype(images, torch.float32, scale=True)
        )
        assert same_bits(DeviceAugmentation(NORMALIZE)(images), expected)
        floats = image_functional.to_dtype(images, torch.float32, scale=True)
        assert same_bits(DeviceAugmentation(NORMALIZE)(floats), expected)
        assert same_bits(DeviceAugmentation(None)(images), floats)

    def test_all_256_values(self) -> None:
        images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
        transforms = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(NORMALIZE.mean, NORMALIZE.std)])
        assert same_bits(DeviceAugmentation(NORMALIZE)(images), transforms(images))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(4, 3, 8, 10), (1, 3, 8, 10), (4, 1, 8, 10)])
    def test_result_has_the_dtype_of_the_step_in_channels_last(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        for config in (None, NormalizeConfig(mean=(0.5,) * shape[1], std=(0.5,) * shape[1])):
            result = DeviceAugmentation(config, dtype=dtype)(images)
            assert result.dtype == dtype
            assert result.is_contiguous(memory_format=torch.channels_last)
            assert same_bits(result, DeviceAugmentation(config)(images).to(dtype))

    def test_the_callers_images_are_left_as_they_are(self) -> None:
        for images in (pictures(6), pictures(6) / 255, (pictures(6) / 255).to(memory_format=torch.channels_last)):
            before = images.clone()
            augmentation = everything()
            augmentation(images, augmentation.plan(keys(6), tuple(images.shape)))
            DeviceAugmentation(NORMALIZE)(images)
            assert torch.equal(images, before)

    def test_other_images_are_a_users_mistake(self) -> None:
        with pytest.raises(UserError, match=r"data.normalize: .*\(batch, 3, height, width\), not \[2, 1, 4, 4\]"):
            DeviceAugmentation(NORMALIZE)(torch.zeros(2, 1, 4, 4))
        with pytest.raises(UserError, match=r"\(batch, channels, height, width\), not \[2, 4\]"):
            DeviceAugmentation(None)(torch.zeros(2, 4))
        with pytest.raises(UserError, match="horizontal flip must be between 0 and 1"):
            DeviceAugmentation(None, horizontal_flip=1.5)


class TestSymmetricBeta:
    @pytest.mark.parametrize("concentration", [0.05, 0.2, 0.5, 1.0, 2.0, 8.0, 100.0])
    def test_moments(self, concentration: float) -> None:
        middles = (np.arange(1_000_000) + 0.5) / 1_000_000
        values = SymmetricBeta(concentration)(middles)
        assert values.mean() == pytest.approx(0.5, abs=1e-9)
        assert values.var() == pytest.approx(1 / (4 * (2 * concentration + 1)), rel=1e-4)
        assert (np.diff(values) >= 0).all()
        assert values.min() >= 0
        assert values.max() <= 1

    def test_quantiles_with_a_formula(self) -> None:
        p = np.linspace(0, 1, 10_001)[:-1]
        assert np.abs(SymmetricBeta(1.0)(p) - p).max() < 1e-6
        assert np.abs(SymmetricBeta(0.5)(p) - np.sin(np.pi * p / 2) ** 2).max() < 1e-6  # the arcsine distribution
        x = SymmetricBeta(2.0)(p)
        assert np.abs(x * x * (3 - 2 * x) - p).max() < 1e-6

    def test_quantiles_near_the_infinite_density_at_0(self) -> None:
        for concentration in (0.05, 0.2):
            p = np.array([1e-9, 1e-6, 1e-3])
            beta = math.gamma(concentration) ** 2 / math.gamma(2 * concentration)
            tail = (p * concentration * beta) ** (1 / concentration)  # the first term of the series around 0
            assert SymmetricBeta(concentration)(p) == pytest.approx(tail, rel=1e-3)

    def test_quantiles_by_another_integration(self) -> None:
        p = np.linspace(0.001, 0.5, 500)
        grid = np.linspace(0, 0.5**0.2, 1_000_001)  # in s = x^0.2 the density of Beta(0.2, 0.2) has no pole at 0
        density = (1 - grid**5) ** -0.8
        mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
        expected = np.interp(p, 0.5 * mass / mass[-1], grid) ** 5
        assert np.abs(SymmetricBeta(0.2)(p) - expected).max() < 1e-6
        assert np.abs(SymmetricBeta(0.2)(1 - p) - (1 - expected)).max() < 1e-6


class TestPlan:
    def test_nothing_is_drawn_that_is_off(self) -> None:
        assert only().plan(keys(4), (3, 8, 8)) == AugmentationPlan()
        assert not only().is_random
        plan = only(erase=0.5).plan(keys(4), (3, 8, 8))
        assert [name for name, value in plan._asdict().items() if value is not None] == ["erase_boxes"]

    @pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
    def test_flip_probabilities(self, probability: float) -> None:
        plan = DeviceAugmentation(None, None, probability, 0.5).plan(keys(20_000), (3, 8, 8))
        if probability == 0:
            assert plan.flip_horizontally is None
        else:
            assert plan.flip_horizontally is not None
            assert plan.flip_horizontally.float().mean().item() == pytest.approx(probability, abs=0.01)
        assert plan.flip_vertically is not None
        assert plan.flip_vertically.float().mean().item() == pytest.approx(0.5, abs=0.01)

    def test_one_share_and_box_per_pair(self) -> None:
        plan = everything().plan(keys(9), (3, HEIGHT, WIDTH))
        for values, single in ((plan.mix_share, 1), (plan.mix_boxes, 0), (plan.target_share, 1)):
            assert values is not None
            assert torch.equal(values[0:8:2], values[1:8:2])
            assert (values[8] == single).all()

    def test_mixup_shares(self) -> None:
        plan = only(mixup=0.4, mix_probability=0.6).plan(keys(40_000), (3, 8, 8))
        assert plan.mix_share is not None
        assert plan.target_share is not None
        assert torch.equal(plan.mix_share, plan.target_share)
        changed = plan.mix_share[::2][plan.mix_share[::2] != 1]
        # The shares of Beta(0.4, 0.4) above 1 - 2^-17 are rounded to 1: half a percent.
        assert len(changed) / 20_000 == pytest.approx(0.6, abs=0.015)
        assert changed.mean().item() == pytest.approx(0.5, abs=0.02)
        assert changed.var().item() == pytest.approx(1 / (4 * 1.8), abs=0.01)
        assert torch.equal(changed * 65536, (changed * 65536).round())

    def test_cutmix_boxes(self) -> None:
        plan = only(cutmix=1.0, mix_probability=0.5).plan(keys(20_000), (3, 200, 100))
        assert plan.mix_boxes is not None
        assert plan.target_share is not None
        boxes = plan.mix_boxes[::2].double()
        top, left, bottom, right = boxes.unbind(1)
        assert (top >= 0).all()
        assert (bottom <= 200).all()
        assert (left >= 0).all()
        assert (right <= 100).all()
        area = (bottom - top) * (right - left)
        assert torch.equal(plan.target_share[::2], (1 - area / 20_000).float())
        assert plan.mix_share is not None
        assert torch.equal(plan.mix_share, torch.ones(20_000))
        is_changed = (area > 0).double()
        assert is_changed.mean().item() == pytest.approx(0.5, abs=0.02)
        inner = (top > 0) & (bottom < 200) & (left > 0) & (right < 100) & (area > 2000)  # not clipped
        ratio = (bottom - top)[inner] / (right - left)[inner]
        assert ratio.mean().item() == pytest.approx(2.0, abs=0.05)

    def test_cutmix_share_of_the_changed_pairs(self) -> None:
        plan = only(mixup=8.0, cutmix=1.0, cutmix_share=0.3).plan(keys(20_000), (3, 64, 64))
        assert plan.mix_share is not None
        assert (plan.mix_share[::2] == 1).double().mean().item() == pytest.approx(0.3, abs=0.015)

    def test_erase_boxes_are_those_of_torchvision(self) -> None:
        height, width = 96, 64
        plan = only(erase=0.25).plan(keys(40_000), (3, height, width))
        assert plan.erase_boxes is not None
        top, left, bottom, right = plan.erase_boxes.double().unbind(1)
        h, w = bottom - top, right - left
        is_erased = h * w > 0
        assert is_erased.double().mean().item() == pytest.approx(0.25, abs=0.01)
        assert (top >= 0).all()
        assert (bottom <= height).all()
        assert (left >= 0).all()
        assert (right <= width).all()
        torch.manual_seed(0)
        drawn = [v2.RandomErasing(p=1.0).make_params(torch.zeros(1, height, width)) for _ in range(4000)]
        theirs = torch.tensor([[d["i"], d["j"], d["h"], d["w"]] for d in drawn if d["v"] is not None]).double()
        ours = torch.stack([top, left, h, w], dim=1)[is_erased]
        assert ours.mean(0).tolist() == pytest.approx(theirs.mean(0).tolist(), rel=0.05)
        assert ours.std(0).tolist() == pytest.approx(theirs.std(0).tolist(), rel=0.05)

    def test_tiny_images(self) -> None:
        for shape in ((3, 1, 1), (3, 2, 3), (3, 1, 9)):
            augmentation = everything(erase=1.0)
            images = torch.full((6, *shape), 9, dtype=torch.uint8)
            assert augmentation(images, augmentation.plan(keys(6), shape)).isfinite().all()

    def test_epochs_differ(self) -> None:
        first, second = (everything().plan(keys(64, epoch), (3, 64, 64)) for epoch in (0, 1))
        for a, b in zip(first, second, strict=True):
            assert a is not None
            assert b is not None
            assert not torch.equal(a, b)


class TestForward:
    def test_flips(self) -> None:
        images = pictures(4)
        plan = AugmentationPlan(
            flip_horizontally=torch.tensor([True, False, True, False]),
            flip_vertically=torch.tensor([True, True, False, False]),
        )
        result = DeviceAugmentation(NORMALIZE, None, 0.5, 0.5)(images, plan)
        flipped = torch.stack([images[0].flip(-1, -2), images[1].flip(-2), images[2].flip(-1), images[3]])
        assert same_bits(result, DeviceAugmentation(NORMALIZE)(flipped))

    def test_mixup(self) -> None:
        images = pictures(5)
        augmentation = DeviceAugmentation(NORMALIZE, AugmentConfig(mixup=1.0))
        plan = augmentation.plan(keys(5), tuple(images.shape))
        assert plan.mix_share is not None
        result, plain = augmentation(images, plan), DeviceAugmentation(NORMALIZE)(images)
        for a, b in ((0, 1), (1, 0), (2, 3), (3, 2)):
            share = plan.mix_share[a].item()
            assert 0 < share < 1
            assert torch.allclose(result[a], share * plain[a] + (1 - share) * plain[b], atol=2e-6)
        assert same_bits(result[4], plain[4])

    def test_cutmix_swaps_one_box(self) -> None:
        images = pictures(7)
        augmentation = DeviceAugmentation(NORMALIZE, AugmentConfig(cutmix=1.0))
        plan = augmentation.plan(keys(7), tuple(images.shape))
        assert plan.mix_boxes is not None
        expected = images.clone()
        for i in range(6):
            top, left, bottom, right = plan.mix_boxes[i].tolist()
            expected[i, :, top:bottom, left:right] = images[i ^ 1, :, top:bottom, left:right]
        assert not torch.equal(expected, images)
        assert same_bits(augmentation(images, plan), DeviceAugmentation(NORMALIZE)(expected))

    def test_both_in_one_batch_are_what_each_is_alone(self) -> None:
        images = pictures(64)
        both = DeviceAugmentation(NORMALIZE, AugmentConfig(mixup=0.4, cutmix=1.0, mix_probability=0.7))
        plan = both.plan(keys(64), tuple(images.shape))
        assert plan.mix_share is not None
        assert plan.mix_boxes is not None
        result = both(images, plan)
        is_cut = plan.mix_boxes[:, 2] > 0
        is_mixed = plan.mix_share < 1
        assert not (is_cut & is_mixed).any()
        for which, augment in ((is_cut, AugmentConfig(cutmix=1.0)), (is_mixed, AugmentConfig(mixup=1.0))):
            assert which.any()
            alone = DeviceAugmentation(NORMALIZE, augment)(images, plan)
            assert same_bits(result[which], alone[which])
        rest = ~is_cut & ~is_mixed
        assert rest.any()
        assert same_bits(result[rest], DeviceAugmentation(NORMALIZE)(images)[rest])

    def test_mixing_bytes_is_exact(self) -> None:
        images = pictures(16)
        augmentation = only(mixup=0.4)
        plan = augmentation.plan(keys(16), tuple(images.shape))
        assert plan.mix_share is not None
        share = plan.mix_share.double()[:, None, None, None]
        exact = images.double() * share + images[torch.arange(16) ^ 1].double() * (1 - share)
        assert same_bits(augmentation(images, plan), exact.float() * (1.0 / 255))

    @pytest.mark.parametrize("erase_with", ["zero", "noise"])
    def test_erasing_is_after_normalisation(self, erase_with: str) -> None:
        images = pictures(16)
        augmentation = DeviceAugmentation(
            NORMALIZE, AugmentConfig.model_validate({"erase": 0.6, "erase_with": erase_with})
        )
        plan = augmentation.plan(keys(16), tuple(images.shape))
        assert plan.erase_boxes is not None
        result, plain = augmentation(images, plan), DeviceAugmentation(NORMALIZE)(images)
        num_erased = 0
        for i, (top, left, bottom, right) in enumerate(plan.erase_boxes.tolist()):
            num_erased += bottom > top
            erased = result[i, :, top:bottom, left:right]
            assert (
                (erased == 0).all() if erase_with == "zero" else (erased != plain[i, :, top:bottom, left:right]).all()
            )
            untouched = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
            untouched[top:bottom, left:right] = False
            assert torch.equal(result[i][:, untouched], plain[i][:, untouched])
        assert 0 < num_erased < 16

    def test_noise_is_normal_and_a_function_of_the_sample(self) -> None:
        augmentation = only(erase=1.0, erase_with="noise")
        images = torch.zeros(8, 3, 128, 128, dtype=torch.uint8)
        whole = torch.tensor([[0, 0, 128, 128]] * 8, dtype=torch.int32)
        plan = augmentation.plan(keys(8), (128, 128))._replace(erase_boxes=whole)
        noise = augmentation(images, plan)
        assert noise.mean().item() == pytest.approx(0, abs=0.01)
        assert noise.var().item() == pytest.approx(1, abs=0.01)
        assert (noise.abs() < 1).float().mean().item() == pytest.approx(0.6827, abs=0.005)
        assert (noise.abs() > 3).float().mean().item() == pytest.approx(0.0027, abs=0.0005)
        shifted = [noise.roll(shift, dims) for shift, dims in ((1, 0), (1, 1), (1, 2), (1, 3), (3, 3), (8, 2))]
        for other in shifted:  # neighbouring samples, channels and pixels have nothing in common
            assert (noise * other).mean().item() == pytest.approx(0, abs=0.01)
        assert plan.noise_keys is not None
        reversed_plan = plan._replace(noise_keys=plan.noise_keys.flip(0))
        assert same_bits(augmentation(images, reversed_plan), noise.flip(0))

    def test_bits_do_not_depend_on_the_batch(self) -> None:
        images, all_keys = pictures(64), keys(64)
        augmentation = everything()
        whole = augmentation(images, augmentation.plan(all_keys, tuple(images.shape)))
        targets = mix_targets(torch.arange(64) % 10, augmentation.plan(all_keys, tuple(images.shape)), 10)
        pairs = torch.arange(64).view(32, 2)
        generator = torch.Generator().manual_seed(0)
        shares = [pairs[r::num_ranks] for num_ranks in (2, 3, 32) for r in range(num_ranks)]
        shares += [pairs[torch.randperm(32, generator=generator)], pairs[:5].flip(0)]
        for share in shares:
            order = share.reshape(-1)
            plan = augmentation.plan(all_keys[order.numpy()], tuple(images.shape))
            assert same_bits(augmentation(images[order], plan), whole[order])
            assert same_bits(mix_targets(order % 10, plan, 10), targets[order])

    def test_memory_format_of_the_images_does_not_matter(self) -> None:
        images = pictures(6)
        augmentation = everything()
        plan = augmentation.plan(keys(6), tuple(images.shape))
        stored = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        assert same_bits(augmentation(stored, plan), augmentation(images, plan))

    @nightly
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_compiled_bits_are_the_same(self, dtype: torch.dtype) -> None:
        torch.compiler.reset()
        augment = AugmentConfig(mixup=0.2, cutmix=1.0, mix_probability=0.8, erase=0.5, erase_with="noise")
        augmentation = DeviceAugmentation(NORMALIZE, augment, 0.5, 0.5, dtype)
        compiled = torch.compile(augmentation, fullgraph=True)
        for count in (6, 8, 9):
            images = pictures(count)
            plan = augmentation.plan(keys(count), tuple(images.shape))
            result = compiled(images, plan)
            assert result.is_contiguous(memory_format=torch.channels_last)
            assert same_bits(result, augmentation(images, plan))

    def test_plans_move(self) -> None:
        plan = everything().plan(keys(4), (3, 8, 8))
        moved = plan.to(torch.device("meta"), non_blocking=True)
        assert all(t is not None and t.device.type == "meta" for t in moved)
        assert AugmentationPlan().to(torch.device("meta")) == AugmentationPlan()


class TestTargets:
    def test_labels_become_probabilities(self) -> None:
        plan = only(mixup=1.0).plan(keys(5), (3, 8, 8))
        assert plan.target_share is not None
        labels = torch.tensor([0, 2, 1, 1, 2])
        mixed = mix_targets(labels, plan, 3)
        share = plan.target_share[0].item()
        assert mixed.dtype == torch.float32
        assert mixed[0].tolist() == pytest.approx([share, 0, 1 - share])
        assert mixed[1].tolist() == pytest.approx([1 - share, 0, share])
        assert mixed[2].tolist() == mixed[3].tolist() == [0, 1, 0]
        assert mixed[4].tolist() == [0, 0, 1]
        probabilities = torch.nn.functional.one_hot(labels, 3).double()
        assert same_bits(mix_targets(probabilities, plan, 3), mixed)

    def test_pairs_that_are_not_mixed_have_probabilities_too(self) -> None:
        plan = only(cutmix=1.0, mix_probability=0.5).plan(keys(64), (3, 32, 32))
        assert plan.target_share is not None
        labels = torch.arange(64) % 7
        unmixed = plan.target_share == 1
        assert unmixed.any()
        mixed = mix_targets(labels, plan, 7)
        assert torch.equal(mixed[unmixed], torch.nn.functional.one_hot(labels, 7).float()[unmixed])
        assert mixed.sum(1).tolist() == pytest.approx([1.0] * 64)

    def test_ignored_labels_have_no_probability(self) -> None:
        plan = only(mixup=1.0, mix_probability=1e-9).plan(keys(2), (3, 8, 8))
        assert mix_targets(torch.tensor([-100, 1]), plan, 2).tolist() == [[0, 0], [0, 1]]

    @pytest.mark.parametrize("targets", [torch.zeros(4), torch.zeros(4, 2), torch.zeros(4, 3, 3)])
    def test_other_targets_are_a_users_mistake(self, targets: torch.Tensor) -> None:
        plan = only(mixup=1.0).plan(keys(4), (3, 8, 8))
        with pytest.raises(UserError, match=r"data.augment: mixing needs labels \(batch,\) or probabilities"):
            mix_targets(targets, plan, 3)
