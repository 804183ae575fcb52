"""Reading a checkpoint: is it whole, and into any model, on any number of ranks, under any strategy.

Which bytes a rank needs is the decision of torch.distributed.checkpoint's planner. Never runs code from a file.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from trainer.checkpoint.manifest import Damaged, Manifest, Part, new_checksum
from trainer.checkpoint.storage import MANIFEST, Storage
from trainer.errors import UserError, one_line_text

_MOST_MANIFEST_BYTES = 2**35  # some 100 MB per thousand ranks that each hold a part of all


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
        for part in self.manifest.tensors[name].parts:
            box = whole
            for dim, (offset, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
                box = box.narrow(dim, offset, size)
            box.copy_(self._read_rows(part, dtype, 0, part.sizes[0] if part.sizes else 1))
        return whole

    def _read_rows(self, part: Part, dtype: torch.dtype, first: int, count: int) -> torch.Tensor:
        """Reads rows of a part, which lie one behind the other in its file."""
        sizes = (count, *part.sizes[1:]) if part.sizes else ()
        row_bytes = math.prod(part.sizes[1:]) * dtype.itemsize
        data = torch.empty(math.prod(sizes) * dtype.itemsize, dtype=torch.uint8)
        try:
            found = self.storage.read(self.name, part.file, part.begin + first * row_bytes, data.numpy().data)
        except OSError as error:
            raise UserError(f"cannot read '{self.location}/{part.file}': {one_line_text(error)}") from error
        if found != len(data):
            raise UserError(f"'{self.location}/{part.file}' ends too early")
        return data.view(dtype).view(sizes)

    # ---- into a model -------------------------------------------------------------------------------------

    def load_into(self, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> None:
        """Fills tensors, sharded or not, with their values; all ranks call it together.

        Args:
            tensors: name -> tensor of the same shape as the saved one, on any device.
            group: of all ranks, or None for a single process.

        Raises:
            UserError: a file cannot be read.
        """
        targets = dict(tensors)
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is no accident
                reader, is_alone = _Reader(self), group is None
                dcp.load(targets, storage_reader=reader, planner=planner, process_group=group, no_dist=is_alone)
        except dcp.api.CheckpointException as error:
            for failure in error.failures.values():
                if isinstance(failure[0], UserError):
                    raise failure[0] from error
            raise

    def metadata(self) -> Metadata:
        """Returns what torch.distributed.checkpoint needs to know of the tensors."""
        tensors: dict[str, Any] = {}
        for name, record in self.manifest.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in record.parts]
            properties = TensorProperties(dtype=getattr(torch, record.dtype))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(record.shape), chunks)
        return Metadata(state_dict_metadata=tensors)


class _Reader(dcp.StorageReader):
    """torch.distributed.checkpoint's way to our files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        tensors = checkpoint.manifest.tensors
        self._parts = {(name, part.offsets): part for name, record in tensors.items() for part in record.parts}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._checkpoint.metadata()

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            part = self._part(item.storage_index)
            dtype = self._checkpoint.shape_and_dtype(item.storage_index.fqn)[1]
            first, count = (item.storage_offsets[0], item.lengths[0]) if item.lengths else (0, 1)
            rows = self._checkpoint._read_rows(part, dtype, first, count)
            for dim in range(1, len(item.lengths)):
                rows = rows.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
            target = planner.resolve_tensor(item).detach()
            target.copy_(rows)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _part(self, index: MetadataIndex) -> Part:
        return self._parts[index.fqn, tuple(index.offset or ())]
