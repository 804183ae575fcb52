"""The beginning of a safetensors file: which tensors are in it, and where. Written here, read by any tool."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 64  # of the data in a file
HEADER_SIZE = 8  # bytes that tell the length of a header in a safetensors file


def entry_name(name: str, offsets: Sequence[int]) -> str:
    """Returns the name in the file: the tensor's, and where its part begins if it is not the first of them."""
    return f"{name}[{','.join(map(str, offsets))}]" if any(offsets) else name


def header_of(entries: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Returns the beginning of a safetensors file; the data follows in the order given, without gaps.

    Args:
        entries: name, type and shape of each tensor.
        metadata: of the file.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, dtype, sizes in entries:
        end = begin + math.prod(sizes) * dtype.itemsize
        table[name] = {"dtype": TYPE_NAMES[dtype], "shape": list(sizes), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(HEADER_SIZE + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(HEADER_SIZE, "little") + text


def first_bytes(header_text: bytes) -> dict[str, int]:
    """Returns where each tensor of a safetensors file begins in it.

    Args:
        header_text: what follows the first `HEADER_SIZE` bytes, which tell its length.

    Raises:
        ValueError: it is no such header.
    """
    try:
        table = json.loads(header_text)
        data = HEADER_SIZE + len(header_text)
        return {name: data + int(entry["data_offsets"][0]) for name, entry in table.items() if name != "__metadata__"}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError("no header of a safetensors file") from error
