"""Which bytes of a checkpoint's files are asked for at once: small tensors lie beside each other in a file.

A request to an object store or to a file server takes its time however little it brings, so what is near each other
comes with one request, and several requests are on their way together. What the bytes mean is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

REQUEST_BYTES = 16 * 2**20  # of a request; more only where one span has more
AT_ONCE = 64  # requests that are on their way together
_BATCH_BYTES = 8 * REQUEST_BYTES  # of these to an object store; more only where one request has more
_GAP = 64 * 2**10  # bytes that are read for nothing rather than asking again


class Span(NamedTuple):
    """Bytes of a file that somebody wants."""

    file: str
    begin: int
    size: int


@dataclass
class Request:
    """Bytes of a file that are read together.

    Args:
        file: which.
        begin: of the first byte in the file.
        size: in bytes.
        spans: which of those that are wanted lie in it, by their number.
    """

    file: str
    begin: int
    size: int
    spans: list[int]

    @property
    def whole(self) -> Span:
        """All of its bytes."""
        return Span(self.file, self.begin, self.size)


def requests_for(spans: Sequence[Span]) -> list[Request]:
    """Puts spans of a file that lie near each other together, in the order of files and of bytes in them."""
    requests: list[Request] = []
    for number in sorted(range(len(spans)), key=lambda number: spans[number]):
        span = spans[number]
        if requests:
            last = requests[-1]
            size = max(last.begin + last.size, span.begin + span.size) - last.begin
            is_near = span.file == last.file and span.begin <= last.begin + last.size + _GAP
            if is_near and size <= max(REQUEST_BYTES, last.size):
                last.size = size
                last.spans.append(number)
                continue
        requests.append(Request(*span, [number]))
    return requests


def batches_of(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Yields spans that an object store is asked for together."""
    batch: list[Span] = []
    size = 0
    for span in spans:
        if batch and (size + span.size > _BATCH_BYTES or len(batch) == AT_ONCE):
            yield batch
            batch, size = [], 0
        batch.append(span)
        size += span.size
    if batch:
        yield batch
