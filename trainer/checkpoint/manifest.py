"""The manifest: everything about a checkpoint but the numbers in its tensors, as JSON that vouches for itself.

It is written last and read first, and names every file with its size and checksum. No pickle is in it or behind it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import xxhash

FORMAT = 1


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


class Part(NamedTuple):
    """A box of a tensor, in row-major order, in a file.

    Args:
        offsets: of the box in the whole tensor, per dimension.
        sizes: of the box, per dimension.
        file: name of the file.
        begin: first byte in the file.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int


@dataclass(frozen=True)
class TensorRecord:
    """A whole tensor and where its parts are; `dtype` is torch's name, such as `float32`."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


class TensorTable(dict[str, TensorRecord]):
    """Tensors by name; not changed once it is there.

    With shards on a thousand ranks its JSON is some 100 MB and takes seconds, in which Python does nothing else. It is
    the same in every save, and made once.
    """

    @functools.cached_property
    def text(self) -> str:
        """The JSON of all records."""
        return _canonical({name: [record.dtype, record.shape, record.parts] for name, record in self.items()})


@dataclass(frozen=True)
class Manifest:
    """All that a reader needs to know.

    Args:
        progress: the position, and results so far.
        config: the resolved config of the run.
        num_samples: of the training data, which the order of samples depends on.
        num_ranks: processes that wrote it, each with generator states of its own.
        values: state that is not a tensor, such as the loss scale.
        tensors: by name, such as `model.conv1.weight`, in the order in which the model has them.
        files: by name.
    """

    progress: Progress
    config: dict[str, Any]
    num_samples: int
    num_ranks: int
    values: dict[str, Any]
    tensors: Mapping[str, TensorRecord]
    files: dict[str, FileRecord]

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
        table = self.tensors if isinstance(self.tensors, TensorTable) else TensorTable(self.tensors)
        text = _canonical(content).removesuffix("}") + f',"tensors":{table.text}}}'
        return _envelope(checksum(text.encode()), text).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Reads a manifest.

        Raises:
            Damaged: it was changed or cut short, or is of a format of the future.
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
                tensors=_tensor_table(content["tensors"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged("the manifest is not readable") from error


def _tensor_table(records: Mapping[str, list[Any]]) -> TensorTable:
    files: dict[str, str] = {}  # one string for each, however many parts are in it
    return TensorTable(
        (
            name,
            TensorRecord(
                dtype,
                tuple(shape),
                tuple(
                    Part(tuple(offsets), tuple(sizes), files.setdefault(file, file), begin)
                    for offsets, sizes, file, begin in parts
                ),
            ),
        )
        for name, (dtype, shape, parts) in records.items()
    )


def _envelope(found: str, content: str) -> str:
    return f'{{"checksum": "{found}", "content": {content}}}\n'


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"))


def checksum(data: bytes | memoryview) -> str:
    """Returns the hash that files are checked with: it finds accidents, not forgeries."""
    return new_checksum(data).hexdigest()


def new_checksum(data: bytes | memoryview = b"") -> Any:
    """Returns a hash object to feed piece by piece."""
    return xxhash.xxh3_128(data)
