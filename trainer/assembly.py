"""What a run consists of, built from its config: data, order, task, model, optimizer, in the one right order.

Owns building, and that a problem on any rank is raised on all. Training with it is `trainer.loop`.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from trainer.config import Config
from trainer.config_data import DataConfig
from trainer.config_model import ModelConfig, TeacherConfig
from trainer.data.build import build_data, packed
from trainer.data.datasets import SizedDataset, class_names
from trainer.data.feed import DeviceFeed
from trainer.data.loader import preserved_generators
from trainer.data.resident import Share
from trainer.data.sampler import BatchPlan, StepSampler
from trainer.data.transforms import build_transforms
from trainer.early_stopping import EarlyStopping
from trainer.errors import UserError
from trainer.memory.blocks import repeated_blocks
from trainer.memory.shrink import Shrink, read_shrink
from trainer.model import (
    CLASS_COUNTS,
    build_model,
    class_argument,
    compile_model,
    may_download,
    recompute_blocks,
    uses_channels_last,
)
from trainer.optim import build_optimizer
from trainer.param_groups import choose_treatments, describe_groups, has_layers_of_timm
from trainer.precision import allows_tf32
from trainer.random_state import seed_everything
from trainer.run_folder import RunFolder
from trainer.runtime import Runtime
from trainer.schedule import build_learning_rate
from trainer.sync_batchnorm import synchronise_batchnorm
from trainer.tasks import build_task
from trainer.tasks.distillation import build_teacher, settled_teacher
from trainer.tasks.metrics import UserMetrics, check_name
from trainer.telemetry.efficiency import FlopCounter, peak_flops
from trainer.telemetry.memory import device_memory
from trainer.tracking import check_trackers
from trainer.weights import settled_weights

if TYPE_CHECKING:
    from trainer.memory.planner import Planner, Prediction

logger = logging.getLogger("lockstep")


class Assembly:
    """The components of one run.

    Args:
        config: the whole run.
        runtime: this process among its peers.
        folder: where the run leaves its files.
        to_train: whether it will train; else the training data is neither packed nor moved to the device.
    """

    def __init__(self, config: Config, runtime: Runtime, folder: RunFolder, to_train: bool) -> None:
        self.config = config
        self.runtime = runtime
        self.folder = folder
        self.to_train = to_train

    def build(self) -> None:
        """Builds every component. A problem on any rank is raised on all; nothing is wrapped yet."""
        config, runtime = self.config, self.runtime
        runtime.agree(self._check_surroundings)
        train_set, eval_set = build_data(config.data, runtime)
        self.class_names = class_names(train_set) or (class_names(eval_set) if eval_set is not None else None)
        runtime.agree(self._check_transforms)
        num_classes = runtime.agree(lambda: class_count(config, train_set))
        shrink = runtime.from_main(lambda: read_shrink(config.run_dir)) if config.memory.on_oom == "shrink" else None
        runtime.agree(lambda: self._build_order_and_task(train_set, num_classes, shrink))
        runtime.agree(lambda: self.task.look_at(train_set, eval_set))
        num_classes = self.task.num_classes or num_classes  # which the task may have learnt just now
        settled = runtime.from_main(lambda: settled_weights(config.model))
        runtime.agree(lambda: self._build_model(settled, num_classes))
        teacher = runtime.from_main(lambda: settled_teacher(config.task.teacher)) if self.to_train else None
        if teacher is not None:
            runtime.agree(lambda: self._build_teacher(teacher, num_classes))
        # What takes long comes last, when all else is known to be good.
        data = config.data
        if self.to_train:
            train_set = packed(train_set, data, runtime)
        else:
            data = data.model_copy(update={"feed": "host"})  # which moves nothing
        memory = min(runtime.gather(device_memory(runtime.device)))
        self.feed = runtime.agree(lambda: self._feed(train_set, data, "train", memory))
        self.eval_feed: DeviceFeed | None = None
        if eval_set is not None:
            eval_set = packed(eval_set, config.data, runtime)
            left = min(runtime.gather(memory - self.feed.resident_bytes))
            self.eval_feed = runtime.agree(lambda: self._feed(eval_set, config.data, "eval", left))
        self.planned: Prediction | None = None
        if self.to_train and config.leaves_memory_open:
            from trainer.memory.fitting import Fitting  # takes a while to import, and most runs plan nothing

            self.fitting = Fitting(config, runtime, self._planner)
            self.planned = self.fitting.choose(self.plan.micro_batch_size)
            self.split_batch(self.plan.num_samples, self.planned.micro_batch_size)
        self.flops = self._flop_counter() if self.to_train else None
        runtime.agree(self._shape_model)

    def _check_surroundings(self) -> None:
        check_trackers(self.config)
        self.folder.create()

    def _build_order_and_task(
        self, train_set: SizedDataset, num_classes: int | None, shrink: Shrink | None = None
    ) -> None:
        config = self.config
        train = config.train
        micro_batch_size = None if train.micro_batch_size == "auto" else train.micro_batch_size
        self.split_batch(len(train_set), micro_batch_size)
        if shrink is not None:
            limit = shrink.limit(
                train.micro_batch_size, train.batch_size // self.runtime.num_ranks, self.plan.group_size
            )
            if limit is not None:
                message = "train.micro_batch_size: %d instead of %d, which ran out of memory at step %d"
                logger.info(message, limit, shrink.was, shrink.step)
                self.split_batch(len(train_set), limit)
        self.total_steps = train.steps or (train.epochs or 0) * self.plan.steps_per_epoch
        self.learning_rate = build_learning_rate(
            config.optim, config.schedule, self.total_steps, self.plan.steps_per_epoch
        )
        self.task = build_task(config.task, num_classes)
        self.task.check_config(config)
        self.task.class_names = self.task.class_names or self.class_names or ()
        self.task.to(self.runtime.device)
        self.user_metrics = UserMetrics(config.task.metrics, self.task, self.runtime.device)
        self._check_metric_names()
        self.best_metric, best_mode = self.task.best_metric, self.task.best_mode
        if config.checkpoint.best is not None:
            self.best_metric, best_mode = config.checkpoint.best.metric, config.checkpoint.best.mode
        self.best_mode = best_mode
        self.best_of = f"{best_mode} {self.best_metric}"
        self.early_stopping = EarlyStopping(train.early_stopping, self.best_metric, best_mode)

    def _check_metric_names(self) -> None:
        best, early_stopping = self.config.checkpoint.best, self.config.train.early_stopping
        for section, path in ((best, "checkpoint.best"), (early_stopping, "train.early_stopping")):
            if section is not None:
                check_name(section.metric, self.task, self.config.task.metrics, f"{path}.metric")

    def split_batch(self, num_samples: int, micro_batch_size: int | None) -> None:
        """Splits the global batch over ranks and micro-batches, and with it the order of samples."""
        config = self.config
        self.plan = BatchPlan.split(
            num_samples,
            config.train.batch_size,
            micro_batch_size,
            self.runtime.num_ranks,
            config.data.drop_last,
            group_size=2 if config.data.augment.mixes else 1,
            in_lockstep=self.runtime.in_lockstep,
            num_repeats=config.data.augment_repeats,
        )
        self.sampler = StepSampler(self.plan, self.runtime.rank, config.run.seed)
        if config.parallel.static_graph and self.plan.num_micro_batches > 1:
            message = "DDP with a static graph cannot accumulate gradients over micro-batches"
            raise UserError(message, path="parallel.static_graph")

    def _build_model(self, model: ModelConfig, num_classes: int | None) -> None:
        config = self.config
        self._num_classes = num_classes
        seed_everything(config.run.seed)  # the same initial weights on every rank
        with self.runtime.main_first() if self.to_train and may_download(model) else nullcontext():
            # Whoever does not train has a checkpoint to read.
            self.bare_model = build_model(model, num_classes, is_fresh=not self.to_train)
        self.task.check_model(self.bare_model)
        if config.memory.blocks and not config.shapes_blocks and has_layers_of_timm(self.bare_model):
            message = "has no effect on optim.layer_decay: timm tells the layers of this model apart"
            raise UserError(message, path="memory.blocks")
        treatments = choose_treatments(config.optim, self.bare_model, config.memory.blocks)
        self.bare_optimizer = build_optimizer(config.optim, self.bare_model, self.runtime.device.type, treatments)
        if self.to_train:
            logger.info("optim      %s", describe_groups(self.bare_optimizer))
        self._seed_this_rank()

    def _seed_this_rank(self) -> None:
        seed_everything(self.config.run.seed + 1 + self.runtime.rank)  # dropout differs per rank

    def _build_teacher(self, config: TeacherConfig, num_classes: int | None) -> None:
        seed_everything(self.config.run.seed)
        with self.runtime.main_first() if may_download(config.model, "task.teacher") else nullcontext():
            teacher = build_teacher(config, num_classes, self.runtime.step_dtype)
        self.task.teacher = teacher.to(self.runtime.device)
        self._seed_this_rank()

    def _flop_counter(self) -> FlopCounter:
        if not self.runtime.is_main:
            return FlopCounter(self.bare_model, self.task, None)
        peak = peak_flops(
            self.runtime.device,
            self.runtime.step_dtype,
            is_fp8=self.config.precision == "fp8",
            allow_tf32=allows_tf32(self.config.backends, self.bare_model),
        )
        if self.runtime.device.type == "cpu":  # where several ranks have the same cores, each has a part of their peak
            peak *= min(self.runtime.num_cores / torch.get_num_threads(), 1.0)
        return FlopCounter(self.bare_model, self.task, peak)

    def _planner(self) -> Planner:
        """Returns the planner of this run's step on this device."""
        from trainer.memory.devices import this_device
        from trainer.memory.jobs import plan_job
        from trainer.memory.planner import Planner

        device = self.runtime.device
        model = self._model_without_memory() if self.runtime.in_lockstep else self.bare_model
        job = plan_job(self.config, model, self.task, self.feed, self.plan, device.type, self.runtime.shard_size)
        return Planner(job, this_device(device))

    def _model_without_memory(self) -> nn.Module:
        """Returns the model as built: of one that is sharded, or has a BatchNorm of all ranks, no plan can be made."""
        from trainer.memory.fakes import fake_tensors

        with preserved_generators(), fake_tensors():
            return build_model(self.config.model, self._num_classes, is_fresh=True)

    def _shape_model(self) -> None:
        """Memory format, gradient checkpointing, compile: in this order, and all of it before DDP."""
        config = self.config
        if config.parallel.sync_batchnorm:
            self.bare_model = synchronise_batchnorm(self.bare_model, self.runtime.num_ranks, self.runtime.device.type)
            self._check_even_batches()
        model = self.bare_model
        # FSDP shards rows of row-major weights; images arrive in channels_last all the same.
        if uses_channels_last(config.model, model) and not self.runtime.is_sharded:
            model.to(memory_format=torch.channels_last)
        self.compiled_blocks: dict[str, nn.Module] = {}
        self.shared_blocks = repeated_blocks(model, config.memory.blocks) if self.runtime.is_sharded else {}
        if not self.to_train:  # one evaluation is not worth compiling for, and has no backward
            return
        blocks = recompute_blocks(config, model, self.planned.policies if self.planned is not None else {})
        compile_model(config.model, model, blocks)
        self.compiled_blocks = blocks if config.model.compile != "none" else {}

    def _check_even_batches(self) -> None:
        """Refuses stand-ins, which keep a rank in step, where they would count in BatchNorm's statistics."""
        last = self.plan.steps_per_epoch - 1
        if self.runtime.in_lockstep and self.total_steps > last and self.plan.needs_stand_ins(last):
            message = (
                f"the last batch of an epoch has {self.plan.step_samples(last)} samples, which are not as many "
                f"micro-batches on each of {self.runtime.num_ranks} processes, as sync_batchnorm needs: leave it out"
            )
            raise UserError(message, path="data.drop_last")

    def confirmed_micro_batch(self) -> int:
        from trainer.memory.jobs import summed_loss

        assert self.planned is not None
        return self.fitting.confirm(self.bare_model, summed_loss(self.task), self.planned)

    def _check_transforms(self) -> None:
        for split in ("train", "eval"):
            build_transforms(getattr(self.config.data.transforms, split), f"data.transforms.{split}")

    def _feed(
        self, dataset: SizedDataset, data: DataConfig, split: Literal["train", "eval"], memory: int
    ) -> DeviceFeed:
        return DeviceFeed(
            dataset,
            data,
            split,
            self.runtime.device,
            self.config.run.seed,
            self.task,
            self.runtime.step_dtype,
            max_workers=max(self.runtime.num_cores - 1, 1),  # a core for the step
            ranks=Share(self.runtime.rank, self.runtime.num_ranks),
            memory=memory,
        )

    def memory_table(self) -> str | None:
        """Returns what the planner says of the present setting; None with a teacher, of which it knows nothing."""
        if self.task.teacher is not None:
            return None
        from trainer.memory.table import parts_table

        if self.planned is not None:
            planned = self.planned
            size = self.plan.micro_batch_size
            return parts_table(self.fitting.planner.predict(size, planned.checkpointing, planned.policies))
        return parts_table(self._planner().uniform(self.plan.micro_batch_size, self.config.memory.checkpointing))


def class_count(config: Config, train_set: SizedDataset) -> int | None:
    """Returns how many classes, or different tokens, there are: what the model is told, else what the data set knows.

    Raises:
        UserError: the data set has more than the model.
    """
    counted = CLASS_COUNTS if _counts_tokens(config) else {k: v for k, v in CLASS_COUNTS.items() if k != "vocab_size"}
    names = class_names(train_set)
    in_data = len(names) if names is not None else None
    if in_data is None and "vocab_size" in counted:
        in_data = getattr(train_set, "vocab_size", None)
    for key, what in counted.items():
        in_model = config.model.args.get(key)
        if isinstance(in_model, int):
            if in_data is not None and in_data > in_model:
                message = f"the model has {in_model} {what}, data.train has {in_data}"
                raise UserError(message, path=f"model.args.{key}")
            return in_model
    return in_data


def _counts_tokens(config: Config) -> bool:
    """Tells whether classes are tokens: to a language model, and to a task of one's own unless its model says other."""
    if config.task.name == "language_model":
        return True
    return ":" in config.task.name and class_argument(config.model) in (None, "vocab_size")
