"""Reading a checkpoint: is it whole, and into any model, on any number of ranks, under any strategy.

Which parts a rank needs is looked up here, which rows of them is the decision of torch.distributed.checkpoint's
planner, and which bytes come with one request that of `requests`. Never runs code from a file.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

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
from trainer.checkpoint.requests import AT_ONCE, REQUEST_BYTES, Span, requests_for
from trainer.checkpoint.safetensors_file import HEADER_SIZE, entry_name, first_bytes
from trainer.checkpoint.storage import MANIFEST, Storage
from trainer.checkpoint.tensor_table import Part, TensorTable
from trainer.errors import UserError, one_line_text

_MOST_MANIFEST_BYTES = 2**35  # where it lists all parts of very many ranks
_FIRST_READ = 2**16  # bytes: a header of some hundred tensors


class _Wanted(NamedTuple):
    """A box of a part that is saved, and where it goes.

    Args:
        target: of the box's sizes, on any device.
        name: of the saved tensor.
        part: of it.
        offsets: of the box in the part.
    """

    target: torch.Tensor
    name: str
    part: Part
    offsets: tuple[int, ...]


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
            whole = Span(MANIFEST, 0, min(size, _MOST_MANIFEST_BYTES))
            data = b"".join(storage.read(name, [whole]))
        except OSError as error:
            raise Damaged(f"the manifest cannot be read: {one_line_text(error)}") from error
        self.manifest = Manifest.from_bytes(data)
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

    # ---- whole tensors, and any boxes of them -------------------------------------------------------------

    def names(self, prefix: str) -> list[str]:
        """Returns the names that begin so, such as `model.`, without that; in the model's order."""
        return [name.removeprefix(prefix) for name in self.manifest.tensors if name.startswith(prefix)]

    def shape_and_dtype(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Returns the shape and the type of a whole tensor."""
        record = self.manifest.tensors[name]
        return torch.Size(record.shape), getattr(torch, record.dtype)

    def read(self, name: str) -> torch.Tensor:
        """Reads a whole tensor into host memory. Made for one after the other: what is where is kept.

        Raises:
            UserError: a file cannot be read.
        """
        whole = self._empty(name)
        origin = (0,) * whole.ndim
        parts = self.manifest.tensors[name].parts_of(origin, whole.shape)
        wanted = [_Wanted(_box(whole, part.offsets, part.sizes), name, part, origin) for part in parts]
        self._fill(wanted, keep_headers=True)
        return whole

    def read_all(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Reads whole tensors into host memory.

        Raises:
            UserError: a file cannot be read.
        """
        tensors = {name: self._empty(name) for name in names}
        self.load_into(tensors)
        return tensors

    def _empty(self, name: str) -> torch.Tensor:
        shape, dtype = self.shape_and_dtype(name)
        return torch.empty(shape, dtype=dtype)

    def _fill(self, wanted: Sequence[_Wanted], keep_headers: bool) -> None:
        """Reads what is wanted, with few requests. In host memory there is what is on its way.

        Args:
            wanted: boxes of any parts. Rows lie one behind the other in a file, and are read whole. One that is longer
                than a request is one all the same.
            keep_headers: of the files, for the next call.
        """
        pieces: list[_Wanted] = []
        spans: list[Span] = []
        for box, begin in zip(wanted, self._first_bytes_of(wanted, keep_headers), strict=True):
            count = box.target.shape[0] if box.offsets else 1
            row_bytes = math.prod(box.part.sizes[1:]) * self.shape_and_dtype(box.name)[1].itemsize
            first, most = (box.offsets[0] if box.offsets else 0), max(1, REQUEST_BYTES // max(1, row_bytes))
            for done in range(0, count if row_bytes else 0, most):
                num = min(most, count - done)
                pieces.append(box._replace(target=box.target[done : done + num] if box.offsets else box.target))
                spans.append(Span(box.part.file, begin + (first + done) * row_bytes, num * row_bytes))
        requests = requests_for(spans)
        with closing(self._read_exactly([request.whole for request in requests])) as found:
            for request, data in zip(requests, map(_tensor_of, found), strict=True):
                for number in request.spans:
                    begin = spans[number].begin - request.begin
                    self._copy(data[begin : begin + spans[number].size], pieces[number])

    def _copy(self, data: torch.Tensor, box: _Wanted) -> None:
        """Copies the bytes of whole rows to where the box that is wanted of them goes."""
        dtype = self.shape_and_dtype(box.name)[1]
        if data.storage_offset() % dtype.itemsize:
            data = data.clone()  # types of other sizes lie before it
        found = data.view(dtype).view(-1, *box.part.sizes[1:]) if box.offsets else data.view(dtype).view(())
        for dim in range(1, len(box.offsets)):
            found = found.narrow(dim, box.offsets[dim], box.target.shape[dim])
        box.target.copy_(found)

    def _first_bytes_of(self, wanted: Sequence[_Wanted], keep_headers: bool) -> list[int]:
        """Returns where each part begins in its file; what the manifest does not tell, the files' headers do."""
        begins = [-1 if box.part.begin is None else box.part.begin for box in wanted]
        unknown: dict[str, list[int]] = {}
        for number, box in enumerate(wanted):
            if box.part.begin is None:
                unknown.setdefault(box.part.file, []).append(number)
        for file, entries in self._entries(list(unknown), keep_headers):
            for number in unknown[file]:
                entry = entry_name(wanted[number].name, wanted[number].part.offsets)
                if entry not in entries:
                    raise UserError(f"'{self.location}/{file}' does not say where '{wanted[number].name}' is")
                begins[number] = entries[entry]
        return begins

    def _entries(self, files: Sequence[str], keep_headers: bool) -> Iterator[tuple[str, Mapping[str, int]]]:
        """Yields files, and where each of their entries begins."""
        unknown = [file for file in files if file not in self._first_bytes]
        yield from ((file, self._first_bytes[file]) for file in files if file in self._first_bytes)
        for first in range(0, len(unknown), AT_ONCE):
            together = unknown[first : first + AT_ONCE]
            for file, header in zip(together, self._headers(together), strict=True):
                try:
                    entries = first_bytes(header)
                except ValueError as error:
                    raise UserError(f"'{self.location}/{file}' does not say where its tensors are: {error}") from error
                if keep_headers:
                    self._first_bytes[file] = entries
                yield file, entries

    def _headers(self, files: Sequence[str]) -> list[bytes]:
        """Returns the headers of ranks' files without the bytes that tell their lengths."""
        strange = [file for file in files if file not in self.manifest.files]
        if strange:
            raise UserError(f"'{self.location}' has no file {strange[0]}")
        sizes = [self.manifest.files[file].size for file in files]
        firsts = [Span(file, 0, min(_FIRST_READ, size)) for file, size in zip(files, sizes, strict=True)]
        begins = [bytes(data) for data in self._read_exactly(firsts)]
        ends = [
            min(HEADER_SIZE + int.from_bytes(begin[:HEADER_SIZE], "little"), size)
            for begin, size in zip(begins, sizes, strict=True)
        ]
        longer = [number for number, (begin, end) in enumerate(zip(begins, ends, strict=True)) if end > len(begin)]
        rests = [Span(files[n], len(begins[n]), ends[n] - len(begins[n])) for n in longer]
        for number, data in zip(longer, self._read_exactly(rests), strict=True):
            begins[number] += bytes(data)
        return [begin[HEADER_SIZE:end] for begin, end in zip(begins, ends, strict=True)]

    def _read_exactly(self, spans: Sequence[Span]) -> Generator[memoryview]:
        """Yields the bytes of spans, each of which is good until the next."""
        try:
            for span, data in zip(spans, self.storage.read(self.name, spans), strict=True):
                if len(data) != span.size:
                    raise UserError(f"'{self.location}/{span.file}' ends too early")
                yield data
        except OSError as error:
            raise UserError(f"cannot read '{self.location}': {one_line_text(error)}") from error

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
            # It is ours alone, and wraps whatever it was, a KeyboardInterrupt as well.
            raise next(iter(error.failures.values()))[0] from error


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
        targets = [planner.resolve_tensor(item).detach() for item in plan.items]
        wanted = []
        for item, target in zip(plan.items, targets, strict=True):
            name = item.storage_index.fqn
            part = self._parts[name, tuple(item.storage_index.offset or ())]
            wanted.append(_Wanted(target, name, part, tuple(item.storage_offsets)))
        self._checkpoint._fill(wanted, keep_headers=False)
        for item, target in zip(plan.items, targets, strict=True):
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _tensor_of(data: memoryview) -> torch.Tensor:
    """Returns bytes as a tensor, without a copy. It is only read from."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(data, dtype=torch.uint8)


def _box(tensor: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def parts_to_read(saved: TensorTable, targets: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Part]]:
    """Yields the parts of which tensors, or this rank's shards of them, have something, with the tensors' names."""
    for name, target in targets.items():
        box = box_of(target)
        if box is not None:
            yield from ((name, part) for part in saved[name].parts_of(*box))
