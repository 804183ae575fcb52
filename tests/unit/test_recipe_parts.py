"""Parts of recipes change what they should, and are refused where they make no sense.

On several ranks, and stopped and resumed: `tests/dist/test_recipe_parts_dist.py`.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from conftest import NIGHTLY, Train, WriteConfig, tiny_config
from PIL import Image
from pydantic import ValidationError
from run_results import checkpoint, losses
from torch import nn
from torch.nn import functional
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

from trainer.assembly import Assembly
from trainer.config import load_config
from trainer.config_data import _SAME_EACH_TIME, AugmentConfig, DataConfig
from trainer.config_model import TaskConfig, TeacherConfig
from trainer.config_values import Component
from trainer.data.datasets import ImageFolder, TorchFile
from trainer.data.feed import DeviceFeed
from trainer.data.sampler import BatchPlan, MicroBatchSampler, SampleKey, StepSampler
from trainer.data.transforms import build_transforms
from trainer.errors import UserError
from trainer.memory.jobs import plan_job
from trainer.tasks import build_task
from trainer.tasks.classification import Classification
from trainer.tasks.distillation import Teacher, build_teacher
from trainer.telemetry.efficiency import FlopCounter
from trainer.weights import load_weights

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
                Component(name="test_recipe_parts:Named", args={"interpolation": "bicubic", "policy": "mine"}),
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
            keys = [key for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for key in sampler.keys(step)]
            assert keys == expected
            assert len(set(keys)) == num_samples

    def test_one_repeat_is_none(self) -> None:
        plan = BatchPlan.split(25, 8, None, 1, False)
        keys = [key for step in range(4) for key in StepSampler(plan, 0, 5).keys(step)]
        drawn = torch.randperm(25, generator=torch.Generator().manual_seed(5)).tolist()
        assert keys == [SampleKey(0, i, 0) for i in drawn]

    @pytest.mark.parametrize("size", [1, 2])
    @pytest.mark.parametrize("ranks", [2, 3])
    def test_ranks_share_the_repeats_of_a_picture(self, ranks: int, size: int) -> None:
        whole, split = (BatchPlan.split(48, 24, None, n, False, size, num_repeats=ranks) for n in (1, ranks))
        shares = [StepSampler(split, rank, 5).keys(1) for rank in range(ranks)]
        assert sorted(key for share in shares for key in share) == sorted(StepSampler(whole, 0, 5).keys(1))
        for share in shares:
            assert len({key.sample for key in share}) == len(share) == 24 // ranks

    def test_no_picture_is_mixed_with_itself(self) -> None:
        for ranks, micro in ((1, 2), (1, 8), (2, 4), (4, 2)):
            plan = BatchPlan.split(26, 8, micro, ranks, False, group_size=2, num_repeats=3)
            for rank in range(ranks):
                for keys in MicroBatchSampler(StepSampler(plan, rank, 0), 0, 12):
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


LOGITS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 5
SOFT_LOSSES = ("timm.loss:BinaryCrossEntropy", "timm.loss:SoftTargetCrossEntropy", "torch.nn:BCEWithLogitsLoss")


def classification(**config: Any) -> Classification:
    task = build_task(TaskConfig.model_validate(config), num_classes=5)
    assert isinstance(task, Classification)
    return task


class TestSoftTargets:
    @pytest.mark.parametrize("name", SOFT_LOSSES)
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_mixed_and_smoothed_as_timm_does_it(self, name: str, smoothing: float) -> None:
        mixup = pytest.importorskip("timm.data.mixup")
        task = classification(loss={"name": name}, args={"label_smoothing": smoothing})
        ours = task.loss_sum(LOGITS, (None, mixup.mixup_target(LABELS, 5, lam=0.3))) / 12
        theirs = task_loss(name)(LOGITS, mixup.mixup_target(LABELS, 5, lam=0.3, smoothing=smoothing))
        torch.testing.assert_close(ours, theirs)
        own = task.loss_sum(LOGITS, (None, LABELS)) / 12  # of what is not mixed, as in evaluations
        torch.testing.assert_close(own, task_loss(name)(LOGITS, mixup.mixup_target(LABELS, 5, smoothing=smoothing)))

    def test_a_threshold_of_timms(self) -> None:
        loss = pytest.importorskip("timm.loss").BinaryCrossEntropy(target_threshold=0.2)
        args = {"name": "timm.loss:BinaryCrossEntropy", "args": {"target_threshold": 0.2}}
        soft = functional.one_hot(LABELS, 5) * 0.3 + functional.one_hot(LABELS.flip(0), 5) * 0.7
        torch.testing.assert_close(classification(loss=args).loss_sum(LOGITS, (None, soft)) / 12, loss(LOGITS, soft))

    def test_labels_that_are_no_class_have_no_part(self) -> None:
        task = classification(loss={"name": "timm.loss:SoftTargetCrossEntropy"}, args={"label_smoothing": 0.1})
        pytest.importorskip("timm")
        ignored = torch.where(LABELS == 1, -100, LABELS)
        kept = classification(loss={"name": "cross_entropy", "args": {"label_smoothing": 0.1}})
        torch.testing.assert_close(task.loss_sum(LOGITS, (None, ignored)), kept.loss_sum(LOGITS, (None, ignored)))

    @pytest.mark.parametrize("name", SOFT_LOSSES[1:])
    @pytest.mark.parametrize("num_samples", [1, 5, 12])  # labels of 5 samples would pass for a value per class
    def test_a_loss_of_probabilities_is_refused_where_there_are_labels(self, name: str, num_samples: int) -> None:
        pytest.importorskip("timm")
        message = "task.loss: the loss takes class probabilities, not labels: task.args.label_smoothing: 0 makes them"
        with pytest.raises(UserError, match=message):
            classification(loss={"name": name}).loss_sum(LOGITS[:num_samples], (None, LABELS[:num_samples]))
        task = classification(loss={"name": name})  # also where training alone would do, as its labels are mixed
        task.targets((None, LABELS))
        with pytest.raises(UserError, match=message):
            task.loss_sum(LOGITS, (None, functional.one_hot(LABELS, 5).float()))

    def test_data_with_probabilities_need_nothing(self) -> None:
        soft = torch.softmax(LOGITS.flip(0), 1)
        found = classification(loss={"name": "torch.nn:BCEWithLogitsLoss"}).loss_sum(LOGITS, (None, soft)) / 12
        torch.testing.assert_close(found, functional.binary_cross_entropy_with_logits(LOGITS, soft))

    @pytest.mark.parametrize("name", ["timm.loss:LabelSmoothingCrossEntropy", "torch.nn:NLLLoss"])
    def test_a_loss_of_labels_is_refused_where_samples_are_mixed(self, name: str) -> None:
        pytest.importorskip("timm")
        task = classification(loss={"name": name})
        task.targets((None, LABELS))
        with pytest.raises(UserError, match=r"task.loss: with mixed samples the loss gets class probabilities"):
            task.loss_sum(LOGITS, (None, functional.one_hot(LABELS, 5).float()))

    def test_cross_entropy_smooths_by_itself(self) -> None:
        with pytest.raises(UserError, match=r"task.args.label_smoothing: cross_entropy smooths by itself"):
            classification(args={"label_smoothing": 0.1})
        with pytest.raises(UserError, match=r"task.args.label_smoothing: must be between 0 and 1"):
            classification(loss={"name": "torch.nn:BCEWithLogitsLoss"}, args={"label_smoothing": 2})

    def test_training_and_evaluation_by_binary_cross_entropy(self, train: Train, write_config: WriteConfig) -> None:
        task = {"loss": {"name": "torch.nn:BCEWithLogitsLoss"}, "args": {"label_smoothing": 0.1}}
        assert train("--config", write_config(task=task, train__epochs=1)).code == 0


def task_loss(name: str) -> Any:
    """Returns the loss as its own package has it, a mean over the batch."""
    module, _, attribute = name.partition(":")
    return getattr(pytest.importorskip(module), attribute)()


class TestTeacher:
    DATA = (torch.randn(12, 8, generator=torch.Generator().manual_seed(1)), LABELS)

    @staticmethod
    def teacher(dtype: torch.dtype = torch.float32, **config: Any) -> Teacher:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 5))
        return Teacher(model, TeacherConfig(name="own:model", **config), dtype)

    def test_soft_distillation_is_hintons(self) -> None:
        teacher = self.teacher(alpha=0.3, temperature=4.0)
        outputs = LOGITS.clone().requires_grad_()
        task = classification()
        task.teacher = teacher
        found = task.training_loss_sum(outputs, self.DATA)
        wanted = torch.softmax(teacher.model(self.DATA[0]) / 4, 1)
        divergence = (wanted * (wanted.log() - torch.log_softmax(outputs / 4, 1))).sum(1)
        labels = functional.cross_entropy(outputs, LABELS, reduction="none")
        expected = (0.7 * labels + 0.3 * 16 * divergence).sum()
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(loss, outputs)[0] for loss in (found, expected)]
        torch.testing.assert_close(*gradients)
        assert not any(p.requires_grad for p in teacher.parameters())
        assert not any(module.training for module in teacher.model.modules())

    def test_hard_distillation_is_deits(self) -> None:
        task = classification()
        task.teacher = teacher = self.teacher(alpha=0.4, hard=True)
        best = teacher.model(self.DATA[0]).argmax(1)
        expected = 0.6 * functional.cross_entropy(LOGITS, LABELS) + 0.4 * functional.cross_entropy(LOGITS, best)
        torch.testing.assert_close(task.training_loss_sum(LOGITS, self.DATA) / 12, expected)

    def test_evaluations_know_no_teacher(self) -> None:
        task = classification()
        task.teacher = self.teacher()
        sums = task.eval_sums(LOGITS, self.DATA)
        torch.testing.assert_close(sums["loss"] / 12, functional.cross_entropy(LOGITS, LABELS))

    def test_it_computes_in_the_precision_of_the_step(self) -> None:
        task = classification()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert self.teacher(dtype).logits(task, self.DATA).dtype == dtype

    def test_its_forward_counts_among_the_flops(self) -> None:
        model, task = nn.Linear(8, 5, dtype=torch.bfloat16), classification()
        counted = []
        for teacher in (None, self.teacher()):
            task.teacher = teacher
            counter = FlopCounter(model, task, 1.0)
            counter.count(self.DATA, 12)
            counted.append(counter.per_sample)
        assert counted[0] is not None
        assert counted[1] == counted[0] + 2 * (8 * 16 + 16 * 5)

    def test_other_outputs_are_refused(self) -> None:
        task = build_task(TaskConfig(), num_classes=3)
        task.teacher = self.teacher()
        with pytest.raises(
            UserError, match=r"task.teacher: .* returns float32 \[12, 3\] and its teacher float32 \[12, 5\]"
        ):
            task.training_loss_sum(LOGITS[:, :3], (self.DATA[0], LABELS % 3))
        with pytest.raises(UserError, match=r"returns \{loss: float32 \[\]\} and its teacher float32 \[12, 5\]"):
            task.teacher.taught(torch.zeros(()), {"loss": LOGITS.sum()}, task, self.DATA)

    def test_a_loss_that_is_no_sum_over_samples_is_refused(self) -> None:
        class Counting(Classification):
            def loss_count(self, outputs: Any, data: Any) -> torch.Tensor:
                return torch.tensor(3)

        task = Counting()
        task.teacher = self.teacher()
        with pytest.raises(UserError, match=r"task.teacher: distillation is per sample"):
            task.training_loss_sum(LOGITS, self.DATA)

    def test_a_last_layer_of_another_size_is_refused(self, tmp_path: Path) -> None:
        torch.save(nn.Sequential(nn.Flatten(), nn.Linear(8, 7)).state_dict(), tmp_path / "t.pt")
        args = {"in_features": 8, "hidden": []}
        model = build_teacher(self.config(tmp_path, args, num_classes=7), 7, torch.float32).model
        assert model(torch.zeros(2, 8)).shape == (2, 7)
        with pytest.raises(
            UserError, match=r"task.teacher.weights: .*layers.1.weight is \[7, 8\], the model has \[3, 8\]"
        ):
            build_teacher(self.config(tmp_path, args), 3, torch.float32)
        given, own = (nn.Sequential(nn.Linear(8, 4), nn.Linear(4, classes)) for classes in (7, 3))
        with pytest.raises(UserError, match=r"t\.pt.*1\.bias is \[7\], the model has \[3\]$"):  # and no way round it
            load_weights(own, given.state_dict(), "t.pt", new_head=False)

    def test_pretrained_weights_of_other_classes_are_refused(self) -> None:
        config = TeacherConfig(name="test_recipe_parts:Pretrained", args={"pretrained": True})
        with pytest.raises(UserError, match=r"task.teacher: its weights are of 1000 classes, and it has 3"):
            build_teacher(config, 3, torch.float32)

    @staticmethod
    def config(folder: Path, args: dict[str, Any], **more: Any) -> TeacherConfig:
        state = torch.load(folder / "t.pt", weights_only=True)
        torch.save({f"layers.{name}": value for name, value in state.items()}, folder / "teacher.pt")
        return TeacherConfig(name="mlp", args={**args, **more}, weights=str(folder / "teacher.pt"))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"task__teacher__weights": None}, r"task.teacher: a teacher has learned something: set weights"),
            ({"task__teacher__name": "timm:resnet18", "task__teacher__weights": None}, r"has learned something"),
            ({"task__teacher__hard": True}, r"task.teacher: temperature has no effect with hard: true"),
            ({"task__teacher__alpha": 0.0}, r"task.teacher.alpha: must be greater than 0"),
            ({"train__micro_batch_size": "auto"}, r"train.micro_batch_size: a teacher's memory is not planned"),
            ({"memory__checkpointing": "auto"}, r"memory.checkpointing: a teacher's memory is not planned"),
            *(
                ({"task__name": name}, rf"task.teacher: distillation compares class scores, which {name} has not")
                for name in ("segmentation", "detection", "language_model")
            ),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        teacher = {"name": "mlp", "args": {"in_features": 8}, "weights": "x.pt", "temperature": 2.0}
        config = tiny_config(tmp_path, task={"teacher": dict(teacher)}, **changes)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(UserError, match=message):
            load_config(str(tmp_path / "config.yaml"))

    @pytest.mark.parametrize(
        ("name", "args", "knows"),
        [
            ("timm:resnet18", {"pretrained": True}, True),
            ("timm:resnet18", {"checkpoint_path": "teacher.pth"}, True),
            ("timm:resnet18", {"pretrained": False}, False),
            ("resnet18", {"weights": "DEFAULT"}, True),
            ("resnet18", {"weights": None}, False),
            ("googlenet", {"init_weights": True}, False),
            ("fcn_resnet50", {"weights_backbone": "DEFAULT"}, False),
            ("transformers:ViTForImageClassification", {"pretrained": True}, False),
            ("transformers:AutoModelForImageClassification.from_pretrained", {}, True),
            ("own:trained", {}, True),
        ],
    )
    def test_a_teacher_has_learned_something(self, name: str, args: dict[str, Any], knows: bool) -> None:
        values = {"name": name, "args": args}
        with nullcontext() if knows else pytest.raises(ValueError, match="a teacher has learned something"):
            TeacherConfig.model_validate(values)

    def test_its_memory_is_not_planned(self, tmp_path: Path) -> None:
        teacher = {"name": "mlp", "args": {"in_features": 8}, "weights": "x.pt"}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path, task={"teacher": teacher})))
        config, nobody = load_config(str(tmp_path / "config.yaml")), cast("Any", None)
        with pytest.raises(UserError, match=r"task.teacher: a teacher's memory is not planned"):
            plan_job(config, nn.Linear(8, 5), Classification(), nobody, nobody, "cpu")
        run: Any = SimpleNamespace(task=SimpleNamespace(teacher=self.teacher()))
        assert Assembly.memory_table(run) is None  # so a report of running out of memory has no table


class Pretrained(nn.Linear):
    """Says of itself what timm's models do."""

    pretrained_cfg, num_classes = {"num_classes": 1000}, 3

    def __init__(self, pretrained: bool) -> None:
        assert pretrained
        super().__init__(8, 3)


class TestTeachersRuns:
    @pytest.fixture
    def taught(self, write_config: WriteConfig, tmp_path: Path) -> WriteConfig:
        """Writes `tiny_config` with a teacher."""
        self.save_teacher(tmp_path / "teacher.pt", seed=1)
        args = {"in_features": 8, "hidden": [32], "num_classes": 3}
        teacher = {"name": "mlp", "args": args, "weights": str(tmp_path / "teacher.pt")}

        def write(name: str = "taught.yaml", alpha: float = 0.5, **changes: Any) -> Path:
            return write_config(name, task__teacher={**teacher, "alpha": alpha}, **changes)

        return write

    @staticmethod
    def save_teacher(file: Path, seed: int) -> None:
        from trainer.small_models import MLP

        torch.manual_seed(seed)
        torch.save(MLP(3, 8, (32,)).state_dict(), file)

    def test_a_teacher_of_no_weight_changes_nothing(
        self, train: Train, taught: WriteConfig, write_config: WriteConfig, tmp_path: Path
    ) -> None:
        runs = {"none": write_config(), "tiny": taught(alpha=1e-30), "half": taught("half.yaml")}
        for name, file in runs.items():
            assert train("--config", file, f"run.dir={tmp_path / name}", "train.epochs=1").code == 0
        assert losses(tmp_path / "tiny") == losses(tmp_path / "none")  # initial weights, dropout, all of it
        assert losses(tmp_path / "half") != losses(tmp_path / "none")

    def test_a_run_goes_on_with_the_same_teacher_only(self, train: Train, taught: WriteConfig, tmp_path: Path) -> None:
        assert train("--config", taught(train__epochs=1)).code == 0
        found = checkpoint(tmp_path / "run", 5)
        assert not any("teacher" in name for name in found.names(""))
        self.save_teacher(tmp_path / "teacher.pt", seed=2)
        code, _, err = train("--config", taught())
        assert code == 2
        assert "task.teacher.weights: these are other weights than those that the run began with" in err
        code, _, err = train("--config", taught(alpha=0.7))
        assert code == 2
        assert "task.teacher.alpha: 0.5 in the checkpoint, 0.7 now; this changes the training" in err
        assert train("--config", taught(), "checkpoint.allow_changes=[task.teacher.weights]").code == 0
        assert checkpoint(tmp_path / "run", 10).manifest.values["teacher"] != found.manifest.values["teacher"]
