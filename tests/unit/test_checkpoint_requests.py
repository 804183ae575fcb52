"""How a checkpoint's tensors are asked for: few requests, several together, whatever lies beside what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_results import identical
from torch import nn

from benchmarks.checkpoint_methods import Alone
from trainer.checkpoint import reading, requests
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Manifest, Progress
from trainer.checkpoint.reading import Checkpoint
from trainer.checkpoint.requests import Request, Span, batches_of, requests_for
from trainer.checkpoint.state import State
from trainer.checkpoint.storage import MANIFEST, LocalStorage
from trainer.checkpoint.writing import Saver
from trainer.errors import UserError


class Counting(LocalStorage):
    """Keeps what it is asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: list[list[Span]] = []

    def read(self, folder: str, spans: Sequence[Span]) -> Iterator[memoryview]:
        if spans and spans[0].file != MANIFEST:
            self.calls.append(list(spans))
        return super().read(folder, spans)


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Counting:
    storage = Counting(folder)
    saver = Saver(CheckpointFolder(storage, keep=1), Alone(), None, False, torch.device("cpu"))
    saver.save(State(tensors, {}, frozenset()), Manifest(Progress(step=1), {}, 1, 1, {}))
    assert not saver.failures
    return storage


def opened(storage: Counting) -> Checkpoint:
    return Checkpoint(storage, CheckpointFolder.name(1))


def opened_without_begins(storage: Counting) -> Checkpoint:
    """As where shards follow a rule: the manifest says in which file a part is, and that file's header where."""
    checkpoint = opened(storage)
    shared = checkpoint.manifest.tensors.shared
    for name, record in shared.items():
        shared[name] = replace(record, parts=tuple(part._replace(begin=None) for part in record.parts))
    return checkpoint


def of_all_kinds() -> dict[str, torch.Tensor]:
    """Sizes in bytes that put all that follows them at odd places."""
    return {
        "flags": torch.tensor([True, False, True]),
        "matrix": torch.randn(50, 7),
        "step": torch.tensor(3.0),
        "nothing": torch.empty(0, 4),
        "counts": torch.arange(9).view(3, 3),
        "half": torch.randn(5, 2, 3).bfloat16(),
        "wide": torch.randn(1, 400, dtype=torch.float64),
    }


def test_what_lies_near_each_other_comes_with_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "REQUEST_BYTES", 100)
    monkeypatch.setattr(requests, "_GAP", 10)
    spans = [
        Span("b", 0, 5),  # of another file
        Span("a", 30, 40),
        Span("a", 0, 20),  # 10 bytes before the next one
        Span("a", 40, 10),  # within another one
        Span("a", 70, 31),  # would make it too long
        Span("a", 112, 5),  # too far away
        Span("a", 200, 300),  # longer than any request
        Span("a", 210, 20),  # within that
    ]
    assert requests_for(spans) == [
        Request("a", 0, 70, [2, 1, 3]),
        Request("a", 70, 31, [4]),
        Request("a", 112, 5, [5]),
        Request("a", 200, 300, [6, 7]),
        Request("b", 0, 5, [0]),
    ]
    assert requests_for([]) == []


def test_requests_together_fit_into_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_BATCH_BYTES", 100)
    made = [Span("a", 0, size) for size in (60, 40, 1, 300, 50, 50)]
    assert [[span.size for span in batch] for batch in batches_of(made)] == [[60, 40], [1], [300], [50, 50]]
    monkeypatch.setattr(requests, "AT_ONCE", 1)
    assert [len(batch) for batch in batches_of(made)] == [1] * 6


@pytest.mark.parametrize("most", [1, 64, 2**24])
def test_every_bit_comes_back_whatever_a_request_takes(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (requests, reading):
        monkeypatch.setattr(module, "REQUEST_BYTES", most)
    monkeypatch.setattr(requests, "_BATCH_BYTES", 8 * most)
    expected = of_all_kinds()
    checkpoint = opened(save(tmp_path, expected))
    assert identical(checkpoint.read_all(expected), expected)
    assert identical({name: checkpoint.read(name) for name in expected}, expected)


def test_an_optimizer_of_many_tensors_is_read_with_few_requests(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(150)])
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    tensors = dict(model.state_dict())
    for number, state in enumerate(optimizer.state.values()):
        tensors |= {f"{number}.{key}": value for key, value in state.items()}
    assert len(tensors) == 1200
    storage = save(tmp_path, tensors)
    assert identical(opened(storage).read_all(tensors), tensors)
    assert [len(reads) for reads in storage.calls] == [1]
    storage.calls.clear()
    assert identical(opened_without_begins(storage).read_all(tensors), tensors)
    begin, rest, data = (reads[0] for reads in storage.calls)
    assert (begin.begin, rest.begin) == (0, begin.size)  # of a header that is long
    assert data.begin == rest.begin + rest.size


def test_headers_are_kept_for_one_tensor_after_the_other(tmp_path: Path) -> None:
    expected = of_all_kinds()
    storage = save(tmp_path, expected)
    checkpoint = opened_without_begins(storage)
    assert identical({name: checkpoint.read(name) for name in expected}, expected)
    read = [read for reads in storage.calls for read in reads]
    assert [each.begin == 0 for each in read] == [True] + [False] * (len(expected) - 1)  # one of them is empty
    storage.calls.clear()
    assert identical(checkpoint.read_all(expected), expected)
    assert [len(reads) for reads in storage.calls] == [1]


def test_nothing_is_read_for_nothing(tmp_path: Path) -> None:
    assert opened(save(tmp_path, of_all_kinds())).read_all([]) == {}


def test_a_file_that_ends_too_early_or_is_gone(tmp_path: Path) -> None:
    expected = of_all_kinds()
    storage = save(tmp_path, expected)
    checkpoint = opened_without_begins(storage)
    file = tmp_path / CheckpointFolder.name(1) / "rank-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"rank-00000\.safetensors' ends too early"):
        checkpoint.read_all(expected)
    file.write_bytes(b"\x08" + bytes(len(content) - 1))
    with pytest.raises(UserError, match=r"rank-00000\.safetensors' does not say where its tensors are"):
        checkpoint.read_all(expected)
    file.unlink()
    with pytest.raises(UserError, match=r"cannot read '.*': .*No such file or directory: .*rank-00000\.safetensors"):
        checkpoint.read_all(expected)


def test_a_bad_disk_is_told_with_the_file(tmp_path: Path) -> None:
    storage = save(tmp_path, of_all_kinds())
    (tmp_path / CheckpointFolder.name(1) / "good").write_bytes(bytes(9))
    (tmp_path / CheckpointFolder.name(1) / "bad").symlink_to("/proc/self/mem")  # whose first byte cannot be read
    with pytest.raises(OSError, match=r"Input/output error: '.*/bad'"):
        list(storage.read(CheckpointFolder.name(1), [Span(file, 0, 9) for file in ("good", "bad")]))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_what_ends_a_program_is_passed_on_as_it_is(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = of_all_kinds()
    storage = save(tmp_path, expected)
    checkpoint = opened(storage)

    def read(*_: object) -> Iterator[memoryview]:
        raise error

    monkeypatch.setattr(storage, "read", read)
    with pytest.raises(type(error)):
        checkpoint.read_all(expected)
