"""What a task is: the meaning of a batch, the loss, and the evaluation metrics.

The loop knows nothing of inputs, targets or classes; it calls these methods. A task of your own subclasses
`Task` and is named by import path in `task.name`; it is built with `task.args` (and `loss=`, where the config
has `task.loss`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from trainer.data.nested import part, with_part
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.tasks.distillation import Teacher


class Task(ABC):
    """The life of one batch:

    ```
    task.check(data, sample_ids)             # in host memory, before the device sees it
    outputs = task.forward(model, data)      # on the device from here on
    loss_sum = task.loss_sum(outputs, data)  # training: divided by the global batch size by the loop,
    count = task.loss_count(outputs, data)   # or by this, summed over the global batch, where it is not None
    sums = task.eval_sums(outputs, data)     # evaluation: summed over batches and ranks by the loop
    metrics = task.metrics(sums)             # once, from the totals
    ```

    Metrics that no sum can give come from `eval_records` and `metrics_of_records`, those that a config asks for in
    `task.metrics` from `metric_inputs`. An evaluation can also show something: `eval_tables` and `examples`.
    """

    input_key = "input"  # where the input is in samples that are dicts
    target_key = "target"  # and the target
    num_classes: int | None = None  # where targets are labels, and their number is known
    transforms_targets = False
    """Whether `data.transforms` get (input, target) together, as torchvision's v2 transforms do with tv_tensors.

    Then all of them run on the host, per sample. `data.normalize` stays on the device; mixing and erasing are refused.
    """
    target_keys: tuple[str, ...] | None = None
    """With `transforms_targets`: what to keep of the targets of torchvision's data sets that are dicts, such as COCO's.

    None: boxes and labels.
    """
    stacks = True
    """Whether the samples of a batch are stacked. Else a batch is [inputs, targets], two lists of one entry per sample.

    Inputs may differ in size. Images are floats on the device, as ever; nothing is mixed or erased.
    """
    loss_args: Mapping[str, Any] = {}
    """What a loss by name is built with where it takes arguments of these names, such as the label to ignore."""
    eval_batch_size: int | None = None
    """Samples of a batch of an evaluation, where neither that of training nor `eval.batch_size` is to decide."""
    class_names: Sequence[str] = ()
    """Names of labels, in their order: the task's own, or those that the data set knows."""
    teacher: Teacher | None = None  # from which the model learns as well; whoever builds the run sets it
    tokens_per_sample: int | None = None  # where throughput is also told in tokens
    metric_names: tuple[str, ...] = ()
    """All that its evaluations may have, but for those of `task.metrics`, so that a misspelt one is refused at once.

    Of a class without a line of its own nothing is known, whatever the class above says.
    """
    best_metric: str | None = None  # the evaluation metric that decides the best checkpoint
    best_mode: Literal["max", "min"] = "max"

    def to(self, device: torch.device) -> None:
        """Moves the modules of the task, such as a loss with class weights, to the device."""
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.to(device)

    def check_config(self, config: Config) -> None:  # noqa: B027  # optional, not abstract
        """Refuses settings of the run that do not go with this task.

        Raises:
            UserError: with the path of the setting.
        """

    def look_at(self, train_set: Any, eval_set: Any) -> None:  # noqa: B027  # optional, not abstract
        """Learns from the data sets what only they know; called once, before any batch. `eval_set` may be None.

        Raises:
            UserError: they cannot be trained on.
        """

    def check_model(self, model: nn.Module) -> None:  # noqa: B027
        """Raises UserError where the model, as built, cannot be called as this task does."""

    def check(self, data: Any, sample_ids: torch.Tensor) -> None:  # noqa: B027
        """Raises UserError where a batch in host memory cannot be trained on.

        In place of images `data` may hold undecoded pictures, or None where the images are on the device already.
        """

    def inputs(self, data: Any) -> Any:
        """Returns what the model is called with: the first of a pair, or `input_key` of a dict."""
        return self.part(data, self.input_key, 0)

    def targets(self, data: Any) -> Any:
        """Returns the targets of a batch: the second of a pair, or `target_key` of a dict."""
        return self.part(data, self.target_key, 1)

    def with_targets(self, data: Any, targets: Any) -> Any:
        """Returns the batch with other targets: where augmentation mixes samples."""
        return with_part(data, self.target_key, 1, targets)

    def forward(self, model: nn.Module, data: Any) -> Any:
        """Runs the model on a batch."""
        return model(self.inputs(data))

    @abstractmethod
    def loss_sum(self, outputs: Any, data: Any) -> torch.Tensor:
        """Returns the loss summed over the samples of the batch, a scalar with gradient."""

    def training_loss_sum(self, outputs: Any, data: Any) -> torch.Tensor:
        """Returns `loss_sum` with the part of the teacher, where there is one: what training minimises."""
        loss_sum = self.loss_sum(outputs, data)
        return loss_sum if self.teacher is None else self.teacher.taught(loss_sum, outputs, self, data)

    def loss_count(self, outputs: Any, data: Any) -> torch.Tensor | None:
        """Returns what `loss_sum` counts in the batch, where the mean is not over samples: a scalar on the device.

        Such as the pixels that are not ignored, or the tokens. The loss of a step is then the sum over the global
        batch, divided by this count over the global batch, however it is split; with a count of 0 nothing is learnt.
        None for every batch, or for none.
        """
        return None

    def eval_sums(self, outputs: Any, data: Any) -> dict[str, torch.Tensor]:
        """Returns what adds up over batches and ranks: tensors on the device, with the same keys for every batch.

        Scalars, or tensors of a shape that does not depend on the batch, such as a confusion matrix.
        """
        return {}

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Turns the totals of `eval_sums` over the whole evaluation set into named metrics.

        Args:
            sums: floats for what were scalars, float64 tensors in host memory for the rest.
        """
        return {}

    def eval_records(self, outputs: Any, data: Any) -> Sequence[Any] | None:
        """Returns a record per sample of the batch, for metrics that no sum can give, such as average precision.

        In host memory and picklable: all of them travel to rank 0. None for every batch where there are none.
        """
        return None

    def metrics_of_records(self, records: Sequence[Any]) -> dict[str, float]:
        """Turns the records of all samples, each once and in the order of the data set, into named metrics.

        Called on rank 0 only, while the others wait; what it returns goes to all.
        """
        raise NotImplementedError("a task that returns records has to make metrics of them")

    def metric_inputs(self, outputs: Any, data: Any) -> tuple[Any, ...]:
        """Returns what a metric of `task.metrics` is updated with: predictions and targets, as torchmetrics takes them.

        On the device. A task without this method of its own takes no such metrics.
        """
        raise NotImplementedError

    def eval_tables(self, tables: dict[str, torch.Tensor], outputs: Any, data: Any) -> None:  # noqa: B027
        """Adds the counts of a batch to square tables (classes, classes), a row per target, a column per prediction.

        They are int64, on the device, and made with the first batch; names and shapes are the same on all ranks.
        """

    def examples(self, outputs: Any, data: Any, num: int) -> dict[str, torch.Tensor]:
        """Returns what to show of up to `num` samples of a batch, the first dimension of each tensor being samples.

        On the device and without waiting for it. `image` are inputs, or pictures (B, 1 or 3, height, width) as uint8.
        `masks` are labels per pixel (B, masks, height, width), below 0 where there is none, of which each is drawn over
        a copy of the picture; `boxes` (B, kinds, boxes, 4), XYXY as shares of width and height, are drawn on it, a copy
        of it for each kind, with the names of their `labels` (B, kinds, boxes), of which those below 0 are of no box.
        The rest is for `describe_examples`. An empty dict where there is nothing to show.
        """
        return {}

    def describe_examples(
        self, examples: Mapping[str, torch.Tensor], classes: Sequence[str]
    ) -> list[tuple[str, str, float | None]]:
        """Says of each example, now in host memory, its target, the prediction, and how sure that is, from 0 to 1."""
        raise NotImplementedError("a task that returns examples has to describe them")

    @staticmethod
    def part(data: Any, key: str, position: int) -> Any:
        """Returns `data[key]` of a dict, or `data[position]` of a pair.

        Raises:
            UserError: the batch has no such part.
        """
        if isinstance(data, Mapping):
            if key not in data:
                keys = ", ".join(map(str, data))
                raise UserError(f"samples have no key '{key}' (they have: {keys}); name it in task.args", path="task")
            return data[key]
        try:
            return part(data, key, position)
        except LookupError:
            raise UserError("samples must be (input, target) pairs, dicts or dataclasses") from None
