"""Distillation: what a teacher adds to the loss, which teachers are refused, and runs with one.

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
from conftest import Train, WriteConfig, tiny_config
from run_results import checkpoint, losses
from torch import nn
from torch.nn import functional

from trainer.assembly import Assembly
from trainer.config import load_config
from trainer.config_model import TaskConfig, TeacherConfig
from trainer.errors import UserError
from trainer.memory.jobs import plan_job
from trainer.tasks import build_task
from trainer.tasks.classification import Classification
from trainer.tasks.distillation import Teacher, build_teacher
from trainer.telemetry.efficiency import FlopCounter
from trainer.weights import load_weights

LOGITS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 5


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
        task = Classification(num_classes=5)
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
        task = Classification(num_classes=5)
        task.teacher = teacher = self.teacher(alpha=0.4, hard=True)
        best = teacher.model(self.DATA[0]).argmax(1)
        expected = 0.6 * functional.cross_entropy(LOGITS, LABELS) + 0.4 * functional.cross_entropy(LOGITS, best)
        torch.testing.assert_close(task.training_loss_sum(LOGITS, self.DATA) / 12, expected)

    def test_evaluations_know_no_teacher(self) -> None:
        task = Classification(num_classes=5)
        task.teacher = self.teacher()
        sums = task.eval_sums(LOGITS, self.DATA)
        torch.testing.assert_close(sums["loss"] / 12, functional.cross_entropy(LOGITS, LABELS))

    def test_it_computes_in_the_precision_of_the_step(self) -> None:
        task = Classification(num_classes=5)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert self.teacher(dtype).logits(task, self.DATA).dtype == dtype

    def test_its_forward_counts_among_the_flops(self) -> None:
        model, task = nn.Linear(8, 5, dtype=torch.bfloat16), Classification(num_classes=5)
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
        config = TeacherConfig(name="test_teacher:Pretrained", args={"pretrained": True})
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
