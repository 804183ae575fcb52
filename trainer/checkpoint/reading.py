"""Reading a checkpoint: is it whole, and into any model, on any number of ranks, under any strategy.

Which parts a rank needs is looked up here, and which bytes of them is the decision of torch.distributed.checkpoint's
planner. Never runs code from a file.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from trainer.checkpoint.layout import box_of
from trainer.checkpoint.manifest import Damaged, Manifest, new_checksum
from trainer.checkpoint.safetensors_file import HEADER_SIZE, entry_name, first_bytes
from trainer.checkpoint.storage import MANIFEST, Storage
from trainer.checkpoint.tensor_table import Part, TensorTable
from trainer.errors import UserError, one_line_text

_MOST_MANIFEST_BYTES = 2**35  # where it lists all parts of very many ranks
_FIRST_READ = 2**16  # bytes: a header of some hundred tensors, and one request to an object store


class Checkpoint:
    """A published checkpoint whose manifest is good; `verify` tells whether the rest is, too.

    Args:
        storage: where it is.
        name: its folder.

    Raises:
        Damaged: it has no readable manifest.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage = storage
        self.name = name
        self.location = f"{storage.location}/{name}"
        try:
            size = storage.size(name, MANIFEST)
            if size is None:
                raise Damaged("it has no manifest")
            data = bytearray(min(size, _MOST_MANIFEST_BYTES))
            storage.read(name, MANIFEST, 0, memoryview(data))
        except OSError as error:
            raise Damaged(f"the manifest cannot be read: {one_line_text(error)}") from error
        self.manifest = Manifest.from_bytes(bytes(data))
        self._first_bytes: dict[str, dict[str, int]] = {}  # of the tensors in a file, by the file's name

    @property
    def step(self) -> int:
        """The optimizer steps that it has behind it."""
        return self.manifest.progress.step

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Compares files with the manifest, to the last bit.

        Args:
            files: which of them; all by default. Ranks may share the work.

        Raises:
            Damaged: a file is missing, or is not what was written.
        """
        for file in self.manifest.files if files is None else files:
            record = self.manifest.files[file]
            try:
                size = self.storage.size(self.name, file)
                if size is None:
                    raise Damaged(f"{file} is missing")
                if size != record.size:
                    raise Damaged(f"{file} has {size} bytes instead of {record.size}")
                found = new_checksum()
                for piece in self.storage.pieces(self.name, file):
                    found.update(piece)
            except OSError as error:
                raise Damaged(f"{file} cannot be read: {one_line_text(error)}") from error
            if found.hexdigest() != record.checksum:
                raise Damaged(f"{file} does not match its checksum")

    # ---- one tensor after the other -----------------------------------------------------------------------

    def names(self, prefix: str) -> list[str]:
        """Returns the names that begin so, such as `model.`, without that; in the model's order."""
        return [name.removeprefix(prefix) for name in self.manifest.tensors if name.startswith(prefix)]

    def shape_and_dtype(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Returns the shape and the type of a whole tensor."""
        record = self.manifest.tensors[name]
        return torch.Size(record.shape), getattr(torch, record.dtype)

    def read(self, name: str) -> torch.Tensor:
        """Reads a whole tensor into host memory.

        Raises:
            UserError: a file cannot be read.
        """
        shape, dtype = self.shape_and_dtype(name)
        whole = torch.empty(shape, dtype=dtype)
        for part in self.manifest.tensors[name].parts_of((0,) * len(shape), shape):
            box = whole
            for dim, (offset, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
                box = box.narrow(dim, offset, size)
            box.copy_(self._read_rows(name, part, 0, part.sizes[0] if part.sizes else 1))
        return whole

    def _read_rows(self, name: str, part: Part, first: int, count: int) -> torch.Tensor:
        """Reads rows of a tensor's part, which lie one behind the other in its file."""
        dtype = self.shape_and_dtype(name)[1]
        sizes = (count, *part.sizes[1:]) if part.sizes else ()
        row_bytes = math.prod(part.sizes[1:]) * dtype.itemsize
        begin = part.begin if part.begin is not None else self._first_byte(name, part)
        data = torch.empty(math.prod(sizes) * dtype.itemsize, dtype=torch.uint8)
        self._read_exactly(part.file, begin + first * row_bytes, data.numpy().data)
        return data.view(dtype).view(sizes)

    def _first_byte(self, name: str, part: Part) -> int:
        """Returns where a tensor's part begins in its file, as the file's header tells."""
        try:
            if part.file not in self._first_bytes:
                self._first_bytes[part.file] = first_bytes(self._header(part.file))
            return self._first_bytes[part.file][entry_name(name, part.offsets)]
        except (ValueError, KeyError) as error:
            raise UserError(f"'{self.location}/{part.file}' does not say where '{name}' is") from error

    def _header(self, file: str) -> bytes:
        """Returns the header of a rank's file without the bytes that tell its length."""
        size = self.manifest.files[file].size
        begin = bytearray(min(_FIRST_READ, size))
        self._read_exactly(file, 0, memoryview(begin))
        length = min(int.from_bytes(begin[:HEADER_SIZE], "little"), size - HEADER_SIZE)
        header = begin[HEADER_SIZE : HEADER_SIZE + length]
        rest = bytearray(length - len(header))
        self._read_exactly(file, len(begin), memoryview(rest))
        return bytes(header + rest)

    def _read_exactly(self, file: str, begin: int, target: memoryview) -> None:
        if not target:
            return
        try:
            found = self.storage.read(self.name, file, begin, target)
        except OSError as error:
            raise UserError(f"cannot read '{self.location}/{file}': {one_line_text(error)}") from error
        if found != len(target):
            raise UserError(f"'{self.location}/{file}' ends too early")

    # ---- into a model -------------------------------------------------------------------------------------

    def load_into(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fills tensors, sharded or not, with their values. Each rank reads what it needs, and waits for no other.

        Args:
            tensors: name -> tensor of the same shape as the saved one, on any device.

        Raises:
            UserError: a file cannot be read.
        """
        targets = dict(tensors)
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            with warnings.catch_warnings():
                # Ranks have nothing to tell each other: none looks at another's plan. With `no_dist` rank 0 does not
                # gather all of them first.
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load(targets, storage_reader=_Reader(self, targets), planner=planner, no_dist=True)
        except dcp.api.CheckpointException as error:
            for failure in error.failures.values():
                if isinstance(failure[0], UserError):
                    raise failure[0] from error
            raise


class _Reader(dcp.StorageReader):
    """torch.distributed.checkpoint's way to our files.

    Args:
        checkpoint: where they are.
        targets: what is to be read; parts of which they have nothing are left out of what the planner is told.
    """

    def __init__(self, checkpoint: Checkpoint, targets: Mapping[str, torch.Tensor]) -> None:
        self._checkpoint = checkpoint
        self._parts: dict[tuple[str, tuple[int, ...]], Part] = {}
        chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in targets}
        for name, part in parts_to_read(checkpoint.manifest.tensors, targets):
            self._parts[name, part.offsets] = part
            chunks[name].append(ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)))
        tensors: dict[str, Any] = {}
        for name in targets:
            shape, dtype = checkpoint.shape_and_dtype(name)
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks[name])
        self._metadata = Metadata(state_dict_metadata=tensors)

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            name = item.storage_index.fqn
            part = self._parts[name, tuple(item.storage_index.offset or ())]
            first, count = (item.storage_offsets[0], item.lengths[0]) if item.lengths else (0, 1)
            rows = self._checkpoint._read_rows(name, part, first, count)
            for dim in range(1, len(item.lengths)):
                rows = rows.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
            target = planner.resolve_tensor(item).detach()
            target.copy_(rows)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def parts_to_read(saved: TensorTable, targets: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Part]]:
    """Yields the parts of which tensors, or this rank's shards of them, have something, with the tensors' names."""
    for name, target in targets.items():
        box = box_of(target)
        if box is not None:
            yield from ((name, part) for part in saved[name].parts_of(*box))
