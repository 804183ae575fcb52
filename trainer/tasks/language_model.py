"""Language modelling: the next token of a sequence, cross-entropy over all tokens of the batch, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from trainer.components import is_import_path
from trainer.errors import BadSample, UserError
from trainer.tasks.base import Task
from trainer.tasks.labels import logits_of
from trainer.tasks.misfit import described

if TYPE_CHECKING:
    from trainer.config import Config

IGNORED = -100  # a target that does not count
_CONTEXT = 64  # tokens before the one that an example is about
_NO_TOKEN = -1


class LanguageModel(Task):
    """Samples are (input, target) pairs or dicts of int64 (L,): the target of a token is the one after it.

    The model maps input (B, L) to logits (B, L, V), a tensor or the attribute `logits` of what it returns, and looks at
    no token to the right. The loss is the mean over the tokens of the global batch whose target is not -100.

    What the data sets know is used: `vocab_size`; `sequence_length`, for tokens per second; of the evaluation set also
    `bytes_per_token`, for bits per byte, and `decode(ids)`, for text in examples.

    Args:
        num_classes: different tokens that the model knows, V, against which ids are checked.
        input_key: where the input is in samples that are dicts.
        target_key: where the target is in samples that are dicts.
    """

    metric_names = ("loss", "perplexity", "token_accuracy", "bits_per_byte")
    best_metric = "loss"
    best_mode = "min"

    def __init__(self, num_classes: int | None = None, input_key: str = "input", target_key: str = "target") -> None:
        if num_classes is None:
            message = "the number of different tokens is not known: set data.train.args.vocab_size, or the model's own"
            raise UserError(message, path="data.train")
        self.num_classes: int = num_classes
        self.input_key = input_key
        self.target_key = target_key
        self._bytes_per_token: float | None = None
        self._decode: Callable[[Iterable[int]], str] | None = None

    def check_config(self, config: Config) -> None:
        data = config.data
        for split in ("train", "eval"):
            for i, transform in enumerate(getattr(data.transforms, split)):
                if not is_import_path(transform.name) or transform.name.startswith("torchvision."):
                    message = f"{transform.name} is for pictures, and inputs here are tokens"
                    raise UserError(message, path=f"data.transforms.{split}.{i}")
        if data.augment.mixes or data.augment.erase or data.normalize is not None:
            key = "normalize" if data.normalize is not None else "augment"
            raise UserError("this is for pictures, and inputs here are tokens: leave it out", path=f"data.{key}")

    def look_at(self, train_set: Any, eval_set: Any) -> None:
        self.tokens_per_sample = getattr(train_set, "sequence_length", None)
        self._bytes_per_token = getattr(eval_set, "bytes_per_token", None)
        if getattr(eval_set, "decodes", True):
            self._decode = getattr(eval_set, "decode", None)

    def check(self, data: Any, sample_ids: torch.Tensor) -> None:
        inputs, targets = self.inputs(data), self.targets(data)
        for tokens in (inputs, targets):
            is_sequences = isinstance(tokens, torch.Tensor) and tokens.ndim == 2 and tokens.dtype == torch.int64
            if not is_sequences or tokens.shape != inputs.shape:
                what = [list(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__ for t in (inputs, targets)]
                message = "inputs and targets must be int64 (batch, tokens), the same for both"
                raise UserError(f"{message} (got {what[0]} and {what[1]})")
        for name, tokens in (("input", inputs), ("target", targets)):
            wrong = (tokens < 0) | (tokens >= self.num_classes)
            if tokens is targets:
                wrong &= tokens != IGNORED
            if wrong.any():
                i, position = map(int, wrong.nonzero()[0])
                found = f"has the {name} {int(tokens[i, position])} at position {position}"
                raise BadSample(f"{found}; the model's tokens are 0 to {self.num_classes - 1}", int(sample_ids[i]))

    def forward(self, model: torch.nn.Module, data: Any) -> torch.Tensor:
        logits = logits_of(super().forward(model, data))
        inputs = self.inputs(data)
        is_logits = isinstance(logits, torch.Tensor) and logits.ndim == 3 and logits.shape[:2] == inputs.shape
        if not is_logits or logits.shape[2] < self.num_classes:
            message = f"the model returned {described(logits)} for tokens {list(inputs.shape)}"
            wanted = f"[batch, tokens, at least {self.num_classes}]"
            raise UserError(f"{message}; expected logits {wanted}", path="model", agreed=True)
        return logits

    def loss_sum(self, outputs: torch.Tensor, data: Any) -> torch.Tensor:
        """Returns the summed cross-entropy in nats, in float32, of the tokens that count."""
        targets = self.targets(data)
        return functional.cross_entropy(
            outputs.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def loss_count(self, outputs: torch.Tensor, data: Any) -> torch.Tensor:
        """Returns the number of tokens that count, on the device."""
        return (self.targets(data) != IGNORED).sum()

    def eval_sums(self, outputs: torch.Tensor, data: Any) -> dict[str, torch.Tensor]:
        # An ignored target is no token, and so never what the model says.
        is_right = outputs.argmax(2) == self.targets(data)
        return {
            "loss": self.loss_sum(outputs, data),
            "correct": is_right.sum(),
            "tokens": self.loss_count(outputs, data),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Returns loss (nats per token), perplexity, the share of tokens that are right, and bits per byte of text."""
        num_tokens = sums["tokens"]
        loss = sums["loss"] / num_tokens if num_tokens else math.nan
        found = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # beyond which it is no float
            "token_accuracy": sums["correct"] / num_tokens if num_tokens else math.nan,
        }
        if self._bytes_per_token is not None:
            found["bits_per_byte"] = loss / math.log(2) / self._bytes_per_token
        return found

    def examples(self, outputs: torch.Tensor, data: Any, num: int) -> dict[str, torch.Tensor]:
        """Returns of each sample the token that surprises the model most, and those before it."""
        if self._decode is None:
            return {}
        inputs, targets, logits = self.inputs(data)[:num], self.targets(data)[:num], outputs[:num].float()
        losses = functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        position = losses.argmax(1, keepdim=True)
        confidence, prediction = logits.take_along_dim(position[:, :, None], 1)[:, 0].softmax(1).max(1)
        before = position + torch.arange(1 - _CONTEXT, 1, device=position.device)
        context = inputs.take_along_dim(before.clamp(min=0), 1).masked_fill(before < 0, _NO_TOKEN)
        target = targets.take_along_dim(position, 1)[:, 0]
        return {"context": context, "target": target, "prediction": prediction, "confidence": confidence}

    def describe_examples(
        self, examples: Mapping[str, torch.Tensor], classes: Sequence[str]
    ) -> list[tuple[str, str, float | None]]:
        decode = self._decode
        assert decode is not None
        told: list[tuple[str, str, float | None]] = []
        columns = (examples[key].tolist() for key in ("context", "target", "prediction", "confidence"))
        for context, target, prediction, confidence in zip(*columns, strict=True):
            known = [token for token in context if token != _NO_TOKEN]
            if target == IGNORED:  # all of the sample is
                continue
            before = decode(known)
            told.append((f"{before}[{decode([target])}]", f"[{decode([prediction])}]", confidence))
        return told
