"""What a model sees of each sample in each epoch: random transforms by name, and repeats of augmented pictures.

On several ranks, and stopped and resumed: `tests/dist/test_recipe_parts_dist.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NIGHTLY, Train, WriteConfig
from PIL import Image
from pydantic import ValidationError
from torch.nn import functional
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

from trainer.config import load_config
from trainer.config_data import _SAME_EACH_TIME, AugmentConfig, DataConfig
from trainer.config_values import Component
from trainer.data.datasets import ImageFolder, TorchFile
from trainer.data.feed import DeviceFeed
from trainer.data.sampler import BatchPlan, MicroBatchSampler, SampleKey, StepSampler, named_keys
from trainer.data.transforms import build_transforms
from trainer.errors import UserError
from trainer.loop import Trainer
from trainer.tasks.classification import Classification

CPU = torch.device("cpu")
NUM_SAMPLES, BATCH, SEED = 26, 8, 3
Appearance = tuple[int, bytes]  # of a sample: its index, and the bytes that the model gets


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> TorchFile:
    file = tmp_path_factory.mktemp("pictures") / "train.pt"
    coarse = torch.randint(0, 256, (NUM_SAMPLES, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    images = functional.interpolate(coarse, size=16, mode="bilinear").to(torch.uint8)
    torch.save((images, torch.arange(NUM_SAMPLES) % 3), file)
    return TorchFile(str(file))


def appearances(dataset: Any, ranks: int = 1, start: int = 0, stop: int = 4, **data: Any) -> list[list[Appearance]]:
    """Returns, for every step, what the model gets on all ranks, in the order of the global batch."""
    config = DataConfig.model_validate(
        {"train": {"name": "torch_file"}, "normalize": {"mean": [0.5] * 3, "std": [0.25] * 3}, "workers": 0, **data}
    )
    group = 2 if config.augment.mixes else 1
    by_rank = []
    for rank in range(ranks):
        plan = BatchPlan.split(len(dataset), BATCH, None, ranks, False, group, num_repeats=config.augment_repeats)
        feed = DeviceFeed(dataset, config, "train", CPU, SEED, Classification(num_classes=3))
        feed.start(StepSampler(plan, rank, SEED), start, stop)
        steps = []
        for step in range(start, stop):
            batches = list(feed.step_batches(step))
            images = [image for batch in batches if batch.num_samples for image in batch.data[0]]
            ids = [i for batch in batches if batch.num_samples for i in batch.sample_ids.tolist()]
            steps.append([(i, image.contiguous().numpy().tobytes()) for i, image in zip(ids, images, strict=True)])
        feed.close()
        by_rank.append(steps)
    found = []
    for shares in zip(*by_rank, strict=True):  # groups of the global batch go to ranks in turn
        groups = [[share[i : i + group] for i in range(0, len(share), group)] for share in shares]
        turns = max(map(len, groups))
        found.append([a for turn in range(turns) for of_rank in groups for a in (of_rank[turn : turn + 1] or [[]])[0]])
    return found


class TestTransforms:
    POLICIES = ("RandAugment", "TrivialAugmentWide", "AutoAugment", "AugMix")

    @pytest.mark.parametrize("name", POLICIES)
    def test_pictures_change_from_epoch_to_epoch_and_not_with_ranks(self, name: str, pictures: TorchFile) -> None:
        transforms = {"train": [{"name": name}]}
        found = appearances(pictures, transforms=transforms, stop=8)
        plain = appearances(pictures, stop=8)
        assert [[i for i, _ in step] for step in found] == [[i for i, _ in step] for step in plain]
        both = zip((a for step in found for a in step), (a for step in plain for a in step), strict=True)
        assert sum(a != b for a, b in both) > NUM_SAMPLES  # of twice as many; some draw the identity
        epochs = [dict(a for step in found[first : first + 4] for a in step) for first in (0, 4)]
        assert sum(epochs[0][i] != epochs[1][i] for i in range(NUM_SAMPLES)) > NUM_SAMPLES // 2
        assert appearances(pictures, 2, transforms=transforms, stop=8) == found
        assert appearances(pictures, transforms=transforms, start=5, stop=8) == found[5:]

    @pytest.mark.parametrize("name", POLICIES if NIGHTLY else POLICIES[:1])
    def test_pictures_do_not_change_with_workers(self, name: str, pictures: TorchFile) -> None:
        transforms = {"train": [{"name": name}, {"name": "RandomApply", "args": {"transforms": NESTED, "p": 0.7}}]}
        reference = appearances(pictures, transforms=transforms, stop=2)
        assert appearances(pictures, transforms=transforms, stop=2, workers=2) == reference

    def test_enums_are_written_by_name(self) -> None:
        built: Any = build_transforms(
            [
                Component(
                    name="AutoAugment", args={"policy": "cifar10", "interpolation": "bilinear", "fill": [9, 9, 9]}
                ),
                Component(name="Resize", args={"size": 8, "interpolation": "nearest-exact"}),
                Component(name="test_appearances:Named", args={"interpolation": "bicubic", "policy": "mine"}),
            ],
            "data.transforms.train",
        )
        assert built[0].policy is AutoAugmentPolicy.CIFAR10
        assert built[0].interpolation is InterpolationMode.BILINEAR
        assert built[1].interpolation is InterpolationMode.NEAREST_EXACT
        assert (built[2].interpolation, built[2].policy) == ("bicubic", "mine")  # one's own gets what is written

    def test_transforms_are_nested(self) -> None:
        (built,) = build_transforms([Component(name="RandomChoice", args={"transforms": NESTED, "p": [0.2, 0.8]})], "t")
        assert isinstance(built, v2.RandomChoice)
        blur, inner = built.transforms
        assert isinstance(blur, v2.GaussianBlur)
        assert isinstance(inner, v2.RandomApply)
        assert isinstance(inner.transforms[0], v2.RandomRotation)
        assert inner.transforms[0].interpolation is InterpolationMode.BILINEAR
        assert isinstance(built(Image.new("RGB", (16, 16))), Image.Image)

    @pytest.mark.parametrize(
        ("name", "args", "message"),
        [
            (
                "RandAugment",
                {"interpolation": "bicubik"},
                r"t.0.args.interpolation: there is no 'bicubik'; did you mean",
            ),
            ("AutoAugment", {"policy": "coco"}, r"t.0.args.policy: there is no 'coco'; there are: imagenet, cifar10"),
            ("RandomApply", {"transforms": "GaussianBlur"}, r"t.0.args.transforms: must be a list of transforms"),
            ("RandomApply", {"transforms": []}, r"t.0.args.transforms: must be a list of transforms"),
            ("RandomChoice", {"transforms": ["GaussianBlur"]}, r"t.0.args.transforms.0: must be a transform"),
            ("RandomOrder", {"transforms": [{"nam": "x"}]}, r"t.0.args.transforms.0.nam: unknown key"),
            ("Compose", {"transforms": [{"name": "GaussianBlu"}]}, r"t.0.args.transforms.0.name: unknown transform"),
            (
                "RandomApply",
                {"transforms": [{"name": "Resize", "args": {"siz": 3}}]},
                r"transforms.0.args.siz: 'Resize'",
            ),
        ],
    )
    def test_mistakes_are_named_where_they_are(self, name: str, args: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            build_transforms([Component(name=name, args=args)], "t")


NESTED = [
    {"name": "GaussianBlur", "args": {"kernel_size": 3}},
    {
        "name": "RandomApply",
        "args": {"transforms": [{"name": "RandomRotation", "args": {"degrees": 20, "interpolation": "bilinear"}}]},
    },
]


class Named:
    """A user's own transform, with arguments called as torchvision's."""

    def __init__(self, interpolation: str, policy: str) -> None:
        self.interpolation, self.policy = interpolation, policy

    def __call__(self, image: Any) -> Any:
        return image


class TestRepeats:
    CROPS = {"train": [{"name": "RandomCrop", "args": {"size": 16, "padding": 4}}]}
    MIXED = {"mixup": 0.4, "cutmix": 1.0, "erase": 0.5, "erase_with": "noise"}

    @pytest.mark.parametrize("size", [1, 2])
    @pytest.mark.parametrize(("num_samples", "repeats"), [(26, 3), (25, 3), (24, 2), (3, 2), (5, 5), (2, 2), (101, 4)])
    def test_an_epoch_is_the_permutation_with_groups_repeated_and_cut(
        self, size: int, num_samples: int, repeats: int
    ) -> None:
        sampler = StepSampler(BatchPlan.split(num_samples, 8, None, 1, False, size, num_repeats=repeats), 0, seed=5)
        for epoch in (0, 2):
            drawn = torch.randperm(num_samples, generator=torch.Generator().manual_seed(5 + epoch)).tolist()
            groups = [drawn[i : i + size] for i in range(0, num_samples, size)]
            expected = [SampleKey(epoch, i, r) for group in groups for r in range(repeats) for i in group][:num_samples]
            per_epoch = sampler.plan.steps_per_epoch
            steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
            keys = [key for step in steps for key in named_keys(sampler.keys(step))]
            assert keys == expected
            assert len(set(keys)) == num_samples

    def test_one_repeat_is_none(self) -> None:
        plan = BatchPlan.split(25, 8, None, 1, False)
        keys = [key for step in range(4) for key in named_keys(StepSampler(plan, 0, 5).keys(step))]
        drawn = torch.randperm(25, generator=torch.Generator().manual_seed(5)).tolist()
        assert keys == [SampleKey(0, i, 0) for i in drawn]

    @pytest.mark.parametrize("size", [1, 2])
    @pytest.mark.parametrize("ranks", [2, 3])
    def test_ranks_share_the_repeats_of_a_picture(self, ranks: int, size: int) -> None:
        whole, split = (BatchPlan.split(48, 24, None, n, False, size, num_repeats=ranks) for n in (1, ranks))
        shares = [named_keys(StepSampler(split, rank, 5).keys(1)) for rank in range(ranks)]
        assert sorted(key for share in shares for key in share) == sorted(named_keys(StepSampler(whole, 0, 5).keys(1)))
        for share in shares:
            assert len({key.sample for key in share}) == len(share) == 24 // ranks

    def test_no_picture_is_mixed_with_itself(self) -> None:
        for ranks, micro in ((1, 2), (1, 8), (2, 4), (4, 2)):
            plan = BatchPlan.split(26, 8, micro, ranks, False, group_size=2, num_repeats=3)
            for rank in range(ranks):
                for keys in map(named_keys, MicroBatchSampler(StepSampler(plan, rank, 0), 0, 12)):
                    for a, b in zip(keys[::2], keys[1::2], strict=len(keys) % 2 == 0):
                        assert a.sample != b.sample
                        assert (a.epoch, a.repeat) == (b.epoch, b.repeat)

    @pytest.mark.parametrize("way", [{}, {"feed": "resident"}, {"workers": 2}])
    def test_each_repeat_looks_different(self, way: dict[str, Any], pictures: TorchFile) -> None:
        settings = {"augment_repeats": 3, "transforms": self.CROPS, **way}
        found = appearances(pictures, stop=8, **settings)
        for epoch in (found[:4], found[4:]):
            ids = [i for step in epoch for i, _ in step]
            assert len(ids) == NUM_SAMPLES
            assert len(set(ids)) == 9  # three times each, but for the last
            shown = [a for step in epoch for a in step]
            assert len(set(shown)) >= len(shown) - 2  # of 81 places for a crop two may be the same
        assert found == appearances(pictures, stop=8, **{**settings, "feed": "host", "workers": 0})

    @pytest.mark.parametrize("way", [{}, {"feed": "resident"}])
    def test_mixed_and_erased_on_any_rank_and_from_any_step(self, way: dict[str, Any], pictures: TorchFile) -> None:
        settings = {"augment_repeats": 3, "transforms": self.CROPS, "augment": self.MIXED, **way}
        found = appearances(pictures, stop=6, **settings)
        assert appearances(pictures, 2, stop=6, **settings) == found
        assert appearances(pictures, start=3, stop=6, **settings) == found[3:]

    def test_decoded_on_the_device(self, tmp_path: Path) -> None:
        pytest.importorskip("nvidia.nvimgcodec")
        for i in range(6):
            (tmp_path / f"{i % 3}").mkdir(exist_ok=True)
            pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(i)).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / f"{i % 3}" / f"{i}.jpg")
        crops = {"train": [{"name": "RandomResizedCrop", "args": {"size": 16}}]}
        settings: dict[str, Any] = {
            "augment_repeats": 3,
            "transforms": crops,
            "train": {"name": "image_folder"},
            "stop": 2,
        }
        found = appearances(ImageFolder(str(tmp_path)), **settings, feed="device_decode")
        assert [i for i, _ in found[0]][:3] == [found[0][0][0]] * 3
        assert len(set(found[0])) == 6
        assert appearances(ImageFolder(str(tmp_path)), 2, **settings, feed="device_decode") == found

    def test_counts_are_those_of_any_epoch(self) -> None:
        plan = BatchPlan.split(26, 8, None, 2, False, num_repeats=3)
        plain = BatchPlan.split(26, 8, None, 2, False)
        assert plan.steps_per_epoch == plain.steps_per_epoch
        assert [plan.samples_before(step) for step in range(9)] == [plain.samples_before(step) for step in range(9)]

    @pytest.mark.parametrize(
        ("augment", "message"),
        [
            ({"mixup": 0.2, "mix_probability": 0.0}, "mixup and cutmix have no effect with mix_probability: 0"),
            ({"erase": 0.1, "mix_probability": 0.5}, "mix_probability has no effect without mixup or cutmix"),
            ({"cutmix": 1.0, "cutmix_share": 0.3}, "cutmix_share has no effect without both"),
            ({"mixup": 0.2, "erase_with": "noise"}, "erase_with has no effect without erase"),
        ],
    )
    def test_settings_of_augmentation_without_effect_are_refused(self, augment: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            AugmentConfig.model_validate(augment)

    def test_a_run_repeats(self, write_config: WriteConfig) -> None:
        trainer = Trainer(load_config(str(write_config(data__augment_repeats=3))))
        assert trainer.sampler.keys(0)[:, 2].tolist() == [0, 1, 2] * 4
        trainer.close()

    def test_more_repeats_than_samples_are_refused(self, train: Train, write_config: WriteConfig) -> None:
        code, _, err = train("--config", write_config(data__augment_repeats=61))
        assert code == 2
        assert "data.augment_repeats: an epoch of 60 samples has no room for 61 repeats of one" in err

    def test_without_augmentation_they_are_refused(self, train: Train, write_config: WriteConfig) -> None:
        data = {"train": {"name": "digits", "args": {"split": "train"}}, "augment_repeats": 3}
        code, _, err = train("--config", write_config(data=data))
        assert code == 2
        assert "augment_repeats repeats what nothing augments" in err

    def test_transforms_that_are_the_same_each_time_augment_nothing(self) -> None:
        def config(*names: str) -> DataConfig:
            transforms = {"train": [{"name": name, "args": {}} for name in names]}
            values = {"train": {"name": "digits"}, "augment_repeats": 3, "transforms": transforms}
            return DataConfig.model_validate(values)

        assert config("Resize", "RandomHorizontalFlip").augment_repeats == 3
        assert config("own:transform").augment_repeats == 3
        with pytest.raises(ValueError, match="augment_repeats repeats what nothing augments"):
            config("Resize", "CenterCrop", "ToImage")
        assert not {name for name in _SAME_EACH_TIME if not hasattr(v2, name)}

    def test_they_cannot_change_in_a_run(self, train: Train, write_config: WriteConfig) -> None:
        assert train("--config", write_config(train__epochs=1)).code == 0
        code, _, err = train("--config", write_config(data__augment_repeats=2))
        assert code == 2
        assert "data.augment_repeats: 1 in the checkpoint, 2 now; this cannot change in a run" in err
