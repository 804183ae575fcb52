"""The manifest: what a checkpoint is, but for the numbers in its tensors, as JSON that vouches for itself.

It is written last and read first, and names every file with its size and checksum. No pickle is in it or behind it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from trainer.checkpoint.tensor_table import TensorTable, canonical

FORMAT = 2


class Damaged(Exception):
    """A checkpoint, or what is left of one, that cannot be trusted; says why in one line."""


@dataclass
class Progress:
    """Where a run stands: everything but tensors that it needs to go on."""

    step: int = 0
    evaluated_step: int = -1  # the last step that was evaluated
    best_step: int | None = None
    best_value: float | None = None
    eval_metrics: dict[str, float] = field(default_factory=dict)  # of `evaluated_step`
    skipped_steps: int = 0  # steps that the fp16 loss scaler skipped
    best_of: str | None = None  # what `best_value` is a value of, such as `max accuracy`
    wandb_id: str | None = None
    bad_steps: int = 0  # steps that were left out because of their numbers (`faults.non_finite: skip`)
    num_rollbacks: int = 0
    avoided_steps: list[int] = field(default_factory=list)  # steps whose batch a rollback leaves out, counted from 0
    better_of: str | None = None  # what early stopping looks at, such as `max accuracy`
    better_value: float | None = None  # the last value that was better than all before
    num_not_better: int = 0  # evaluations since then


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes, and the XXH3 hash of its content in hexadecimal digits."""

    size: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """All that a reader needs to know.

    Args:
        progress: the position, and results so far.
        config: the resolved config of the run.
        num_samples: of the training data, which the order of samples depends on.
        num_ranks: processes that wrote it, each with generator states of its own.
        values: state that is not a tensor, such as the loss scale.
        tensors: all of all ranks, and where they are.
        files: by name.
    """

    progress: Progress
    config: dict[str, Any]
    num_samples: int
    num_ranks: int
    values: dict[str, Any]
    tensors: TensorTable = field(default_factory=lambda: TensorTable({}))
    files: dict[str, FileRecord] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Returns the manifest as a JSON file, with a checksum of its own."""
        content = {
            "format": FORMAT,
            "progress": asdict(self.progress),
            "config": self.config,
            "num_samples": self.num_samples,
            "num_ranks": self.num_ranks,
            "values": self.values,
            "files": {name: [record.size, record.checksum] for name, record in self.files.items()},
        }
        text = canonical(content).removesuffix("}") + f',"tensors":{self.tensors.text}}}'
        return _envelope(checksum(text.encode()), text).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Reads a manifest.

        Raises:
            Damaged: it was changed or cut short, or is of another format.
        """
        try:
            outer = json.loads(data)
            content = outer["content"]
            before, after = (part.encode() for part in _envelope(outer["checksum"], "\n").split("\n", 1))
            text = memoryview(data)[len(before) : len(data) - len(after)]
            if not data.startswith(before) or not data.endswith(after) or checksum(text) != outer["checksum"]:
                raise Damaged("the manifest does not match its checksum")
            if content["format"] != FORMAT:
                raise Damaged(f"the manifest has format {content['format']}, this version reads {FORMAT}")
            return cls(
                progress=Progress(**content["progress"]),
                config=content["config"],
                num_samples=content["num_samples"],
                num_ranks=content["num_ranks"],
                values=content["values"],
                files={name: FileRecord(*record) for name, record in content["files"].items()},
                tensors=TensorTable.from_json(content["tensors"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged("the manifest is not readable") from error


def _envelope(found: str, content: str) -> str:
    return f'{{"checksum": "{found}", "content": {content}}}\n'


def checksum(data: bytes | memoryview) -> str:
    """Returns the hash that files are checked with: it finds accidents, not forgeries."""
    return new_checksum(data).hexdigest()


def new_checksum(data: bytes | memoryview = b"") -> Any:
    """Returns a hash object to feed piece by piece."""
    return xxhash.xxh3_128(data)
